"""A portable stage comes back as it was written, from a folder or a bucket, or is refused."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.train.portable import read_stage, write_stage


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path) -> epath.Path:
    """A folder of either kind that is not there yet."""
    return storage.path(tmp_path if request.param == "local" else request.getfixturevalue("bucket")) / "stage"


def test_stage_round_trip_and_damage(folder):
    arrays = {
        "encoder": {"kernel": np.arange(6.0).reshape(2, 3).T, "scale": np.ones((), ml_dtypes.bfloat16)},
        "n": jnp.ones(2),
    }
    write_stage(folder, arrays, {"config": {"a": 1}})
    for _ in range(2):
        read, record = read_stage(folder)
        assert record == {"config": {"a": 1}}
        assert jax.tree.structure(read) == jax.tree.structure(arrays)
        for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(arrays), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_array_equal(a, np.asarray(b))
        write_stage(folder, arrays, {"config": {"a": 1}})
    data = bytearray((folder / "params.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "params.safetensors").write_bytes(bytes(data))
    with pytest.raises(UserError, match="params.safetensors: damaged"):
        read_stage(folder)
    with pytest.raises(UserError, match="no whole stage"):
        read_stage(folder / "nowhere")
    with pytest.raises(ValueError, match="slash"):
        write_stage(folder, {"a/b": np.ones(1)}, {})


def test_a_stage_cut_short_is_refused(folder, monkeypatch):
    write_stage(folder, {"a": np.zeros(2)}, {})
    monkeypatch.setattr(storage, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_stage(folder, {"a": np.ones(2)}, {})
    with pytest.raises(UserError, match="no whole stage"):
        read_stage(folder)
