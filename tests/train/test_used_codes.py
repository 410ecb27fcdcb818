"""A first stage without the codes that nobody uses: the same codes and pictures as before, under fewer ids."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_transformer
from configs import quantizers
from tests.models.test_quantizers import config_of, init, module_of
from tests.processes import free_address
from tests.train.test_code_cache import folder, make_config, open_model, process, read, training_config  # noqa: F401
from vqgan_jax import pretrained
from vqgan_jax.config import UserError
from vqgan_jax.models.quantizers import nearest
from vqgan_jax.models.quantizers.contract import unit
from vqgan_jax.tools.encode import encode
from vqgan_jax.train import used_codes

CODEBOOKS = {
    "vq": config_of("vq", 64, 4, restart_below=0.1),
    "low_dim": config_of("low_dim_vq", 64, 4),
    "ema": config_of("ema", 64, 4),
    "gumbel": config_of("gumbel", 64, 4),
    "simvq": config_of("simvq", 64, 4),
    "ibq": config_of("ibq", 64, 4),
}


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_pruned_quantizer_gives_what_it_gave(name):
    """The same vectors for what used these codes; for anything else the nearest code that is left."""
    config = CODEBOOKS[name]
    module = module_of(config)
    z, other = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, module.input_dim))
    params, state = init(module, z)
    run = jax.jit(lambda module, v, z: module.apply(v, z, train=False, step=0)[:2], static_argnums=0)
    z_q, ids = run(module, {"params": params, **state}, z)
    used = np.unique(ids)
    assert 2 <= len(used) < 20
    model = used_codes.prune_model({"quantizer": config}, len(used))
    trees = {"params": {"quantizer": params}, **{key: {"quantizer": tree} for key, tree in state.items()}}
    less = {key: tree["quantizer"] for key, tree in used_codes.prune(trees, used).items() if tree}
    pruned = module_of(model["quantizer"])
    shapes = jax.eval_shape(lambda: dict(zip(("params", "rest"), init(pruned, z), strict=True)))
    assert jax.tree.map(jnp.shape, less.get("params", {})) == jax.tree.map(jnp.shape, shapes["params"])
    found_z, found = run(pruned, less, z)
    np.testing.assert_array_equal(used[found], ids)
    np.testing.assert_allclose(found_z, z_q, atol=1e-6)
    if name in ("vq", "low_dim", "ema", "simvq"):
        codes = pruned.apply(less, jnp.arange(len(used)), method="codes")
        np.testing.assert_array_equal(
            run(pruned, less, other)[1], nearest(unit(other) if name == "low_dim" else other, codes)
        )


@pytest.mark.slow
def test_a_run_keeps_the_codes_in_use_alone(folder, tmp_path, monkeypatch):  # noqa: F811
    """From the first stage's copy in the workdir: the vocabulary, cached codes, encoding and decoding, and a resume."""
    config = training_config(folder, "class", remap=True, cache_codes=True, save_every="2")
    train_transformer.train(config, str(tmp_path))
    trained = pretrained.open_transformer(tmp_path, key="workdir", best=False)
    first, variables = trained.model.first_stage, trained.frozen["first_stage"]
    record = json.loads((tmp_path / "first_stage" / "stage.json").read_text())["record"]
    used = np.asarray(record["used_codes"])
    assert first.codebook_size == trained.model.layout.image_codes == len(used) < 64 and list(used) == sorted(set(used))
    full, stages, data = open_model(make_config(folder))
    rows = [data.val_transform(data.train[i], np.random.default_rng(0))["image"] for i in range(len(data.train))]
    ids = np.asarray(full.first_stage.encode(stages.frozen["first_stage"], jnp.stack(rows)))
    np.testing.assert_array_equal(np.unique(ids), used)
    cached = np.stack([example["codes/image"][0] for example in read(tmp_path / "codes", "train")])
    np.testing.assert_array_equal(used[cached], ids)
    pictures = first.decode(variables, jnp.asarray(cached[:2], jnp.int32))
    wanted = full.first_stage.decode(stages.frozen["first_stage"], ids[:2])
    np.testing.assert_allclose(pictures, wanted, atol=1e-5)

    monkeypatch.setattr(used_codes, "find", None)  # a resumed run counts nothing
    config.steps = "3"
    assert int(train_transformer.train(config, str(tmp_path)).step) == 3


def test_what_cannot_be_pruned_is_one_line(folder, tmp_path):  # noqa: F811
    config = training_config(folder, "class", remap=True, codes=str(tmp_path))
    with pytest.raises(UserError, match="are made already; make them with vqgan_jax.tools.encode --config.remap=True"):
        pretrained.adopt_stages(config, tmp_path, jnp.float32)
    for quantizer in (quantizers.fsq((4, 4)), quantizers.bsq(3)):

        class Stage:
            config = type("Config", (), {"quantizer": module_of(quantizer.to_dict()).config})

        with pytest.raises(UserError, match="numbers, not rows of a codebook"):
            used_codes.find(config, Stage, {})


@pytest.mark.slow
def test_encoded_codes_leave_their_first_stage_beside_them(folder, tmp_path):  # noqa: F811
    config = make_config(folder)
    config.remap = True
    encode(config, str(tmp_path / "codes"), batch=8)
    config = training_config(folder, "class", codes=str(tmp_path / "codes"), save_every="2")
    config.vqgan = str(tmp_path / "codes" / "first_stage")
    train_transformer.train(config, str(tmp_path / "run"))
    assert pretrained.open_transformer(tmp_path / "run", key="workdir", best=False).model.first_stage.codebook_size < 64


@pytest.mark.slow
def test_two_hosts_find_the_codes_that_one_finds(folder, tmp_path):  # noqa: F811
    alone = process(str(folder), str(tmp_path / "alone"), REMAP="1")
    assert alone.wait(timeout=200) == 0, alone.stderr.read()
    address = free_address()
    hosts = [process(str(folder), str(tmp_path / "hosts"), address, str(rank), REMAP="1") for rank in (0, 1)]
    outputs = [host.communicate(timeout=200) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    one, two = (json.loads((tmp_path / name / "first_stage" / "stage.json").read_text()) for name in ("alone", "hosts"))
    assert one == two and len(one["record"]["used_codes"]) < 64
