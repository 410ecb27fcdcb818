"""Where compiled programs are kept: what the environment says, nothing on a CPU, else beside the weights."""

import jax
import pytest

from vqgan_jax import cli


@pytest.mark.parametrize(
    "platform, named, kept",
    [
        ("cpu", None, None),
        ("gpu", None, "cache/compiled"),
        ("tpu", None, "cache/compiled"),
        ("cpu", "named", "named"),
        ("tpu", "named", "named"),
    ],
)
def test_where_compiled_programs_are_kept(platform, named, kept, tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    try:  # JAX reads $JAX_COMPILATION_CACHE_DIR into this setting when it is imported
        jax.config.update("jax_compilation_cache_dir", named and str(tmp_path / named))
        cli.keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == (kept and str(tmp_path / kept))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
