"""Every quantizer under the one contract, and what is particular to each: losses, entropies, who learns, usage."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from configs import quantizers as defaults
from vqgan_jax import parallel
from vqgan_jax.config import UserError, resolve_steps, to_dataclass
from vqgan_jax.models import quantizers
from vqgan_jax.models.quantizers.contract import unit


def config_of(kind, *sizes, **changes):
    """A plain config of `configs.quantizers`, changed."""
    return getattr(defaults, kind)(*sizes).to_dict() | changes


SMALL = {  # sixteen codes of four numbers, or nearly
    "vq": config_of("vq", 16, 4),
    "vq_restart": config_of("vq", 16, 4, restart_below=0.5, usage_decay=0.4),
    "low_dim": config_of("low_dim_vq", 16, 4),
    "ema": config_of("ema", 16, 4, decay=0.9, restart_below=0.5),
    "gumbel": config_of("gumbel", 16, 4, temperature_end=0.1, temperature_start=1.0, temperature_steps="10"),
    "fsq": config_of("fsq", (4, 5, 3)),
    "lfq": config_of("lfq", 4, temperature=1.0),
    "bsq": config_of("bsq", 4, temperature=1.0, group_bits=2),
    "simvq": config_of("simvq", 16, 4),
    "ibq": config_of("ibq", 16, 4),
}
EXACT = ("vq", "low_dim", "ema", "lfq", "bsq", "simvq")  # each code is its own nearest one


def module_of(config):
    fields = dict(config)
    kind = quantizers.CONFIGS[fields.pop("name")]
    made = quantizers.with_steps(to_dataclass(kind, fields, key="quantizer"), in_a_run_of_100k_steps)
    return quantizers.make_quantizer(made, None)


def in_a_run_of_100k_steps(duration, name):
    return resolve_steps(duration, key=name, batch_size=8, examples=80_000, total=100_000)


def init(module, z):
    keys = {"params": jax.random.key(1), "quantizer": jax.random.key(2)}
    variables = dict(jax.jit(lambda: module.init(keys, z, train=False, step=0))())
    return variables.pop("params", {}), variables


@functools.partial(jax.jit, static_argnums=0)
def step(module, params, state, z, number, weights):
    """A training pass: (loss, z_q, ids, aux, state), and its gradients by (params, z)."""

    def loss(params, z):
        (z_q, ids, aux), new = module.apply(
            {"params": params, **state},
            z,
            train=True,
            step=number,
            rngs={"quantizer": jax.random.key(3)},
            mutable=["codebook"],
        )
        return jnp.sum(z_q * weights) / weights.size + aux.loss, (z_q, ids, aux, new)

    (value, rest), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, z)
    return (value, *rest), gradients


class Passed:
    """One quantizer's variables, batch, and what one compiled program says of them."""

    def __init__(self, name):
        self.name, self.module = name, module_of(SMALL[name])
        self.z = jax.random.normal(jax.random.key(0), (8, 4, 4, self.module.input_dim))
        self.weights = jax.random.normal(jax.random.key(4), (8, 4, 4, self.module.dim))
        self.params, self.state = init(self.module, self.z)
        self.all = jax.jit(self.program)
        self.found = jax.device_get(self.all(*self.arguments))
        self.eval, self.codes, self.again, self.gradients, self.train, (self.by_params, self.by_z) = self.found

    @property
    def arguments(self):
        return self.params, self.state, self.z, self.weights

    def program(self, params, state, z, weights):
        variables = {"params": params, **state}
        z_q, ids, aux = self.module.apply(variables, z, train=False, step=1)
        every = jnp.arange(self.module.codebook_size)
        codes = self.module.apply(variables, every, method="codes")
        again = self.module.apply(variables, codes[None, None], train=False, step=1)[1]
        back = self.module.apply(variables, ids, method="codes")
        stands_for = {"low_dim": unit, "bsq": unit, "fsq": lambda z: self.module.bounded(z) / np.array([2, 2, 1])}
        gradients = [
            jax.grad(lambda z, f=f: jnp.vdot(f(z), weights))(z) if self.module.dim == z.shape[-1] else z
            for f in (
                lambda z: self.module.apply(variables, z, train=False, step=1)[0],
                stands_for.get(self.name, lambda z: z),
            )
        ]
        return (z_q, ids, aux, back), codes, again[0, 0], gradients, *step(self.module, params, state, z, 1, weights)


@functools.cache
def passed_of(name):
    return Passed(name)


@pytest.fixture(params=SMALL)
def passed(request):
    return passed_of(request.param)


def test_the_contract(passed):
    module, (z_q, ids, aux, back) = passed.module, passed.eval
    q = module.codebook_size
    assert z_q.shape == (8, 4, 4, module.dim) and z_q.dtype == jnp.float32
    assert ids.shape == (8, 4, 4) and ids.dtype == jnp.int32 and ids.min() >= 0 and ids.max() < q
    assert aux.loss.shape == () and aux.counts.shape == (q,)
    np.testing.assert_array_equal(aux.counts, np.bincount(np.ravel(ids), minlength=q))
    assert 2 < float(quantizers.perplexity(aux.counts)) <= int((aux.counts > 0).sum()) + 1e-3
    np.testing.assert_allclose(z_q, back, atol=1e-6)
    assert passed.codes.shape == (q, module.dim)
    if passed.name in EXACT:
        np.testing.assert_array_equal(passed.again, np.arange(q))


def test_the_gradient_reaches_the_encoder(passed):
    """Straight through: that of what the codes stand for, which is z, or z on the sphere, or z within bounds."""
    assert np.all(np.isfinite(passed.by_z)) and np.all(np.any(passed.by_z != 0, axis=-1))
    gradient, expected = passed.gradients
    if passed.name not in ("gumbel", "ibq"):  # they go through a softmax
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("name", [x if x in ("ema", "bsq") else pytest.param(x, marks=pytest.mark.slow) for x in SMALL])
def test_eight_devices_compute_what_one_does(name):
    passed = passed_of(name)
    mesh = parallel.make_mesh(dict(data=4, fsdp=2, tensor=1))
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec()))
    placed = [jax.device_put(x, whole) for x in passed.arguments[:2]]
    placed += [jax.device_put(x, rows) for x in passed.arguments[2:]]
    with jax.set_mesh(mesh):
        found = passed.all(*placed)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(same, jax.device_get(found), passed.found)


def test_who_learns(passed):
    """The gradient reaches unused codes through IBQ's index and Gumbel's softmax alone; random ones get none."""
    flat = {"/".join(p.key for p in path): g for path, g in jax.tree_util.tree_leaves_with_path(passed.by_params)}
    (aux, state), name = passed.train[3:], passed.name
    unused = np.asarray(aux.counts) == 0
    if name in ("ema", "fsq", "lfq", "bsq"):
        assert not flat
    elif name == "simvq":
        assert set(flat) == {"projection/kernel", "projection/bias"} and all(jnp.any(g != 0) for g in flat.values())
        np.testing.assert_array_equal(state["codebook"]["codes"], passed.state["codebook"]["codes"])
    else:
        reached = np.abs(flat["codebook"]).max(axis=1) > 0
        np.testing.assert_array_equal(reached, True if name in ("ibq", "gumbel") else ~unused)


def brute_force(codes, z, temperature, groups):
    """Entropies from the scores of every corner: the mean of single assignments', and the sum over groups' means'."""
    z = np.asarray(z, np.float64).reshape(-1, z.shape[-1])
    scores = -(((z[:, None] - np.asarray(codes, np.float64)) ** 2).sum(-1)) / temperature
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    h = lambda p: -(p * np.log(np.maximum(p, 1e-300))).sum(-1)  # noqa: E731
    patterns = np.asarray(codes) > 0
    total = 0.0
    for group in groups:
        number = patterns[:, group] @ (1 << np.arange(len(group)))
        total += h(np.bincount(number, weights=p.mean(axis=0)))
    return h(p).mean(), total


@pytest.mark.parametrize(
    ("name", "bits", "group_bits", "temperature"),
    [("lfq", 5, 5, 1.0), ("lfq", 5, 2, 0.3), ("bsq", 6, 6, 0.2), ("bsq", 4, 1, 1.0), ("lfq", 1, 1, 0.5)],
)
def test_bits_entropies_equal_those_of_all_scores(name, bits, group_bits, temperature):
    config = config_of(name, bits, temperature=temperature, group_bits=group_bits)
    module = module_of(config)
    z = jax.random.normal(jax.random.key(0), (3, 7, bits)) * 0.5
    bound = module.bind({})

    @jax.jit
    def program(z):
        placed = bound.placed(z)
        aux = bound(z[None], train=True, step=1000)[2]
        weights = bound.entropy_weight(jnp.array([0, 2000, 9999]))
        return placed, bound.entropies(placed), aux, bound.codes(jnp.arange(1 << bits)), weights

    placed, (single, mean), aux, codes, weights = program(z)
    groups = [list(range(k, min(k + group_bits, bits))) for k in range(0, bits, group_bits)]
    expected = brute_force(codes, placed, temperature, groups)
    np.testing.assert_allclose((single, mean), expected, rtol=1e-5)
    weight = 0.2  # halfway
    terms = 0.25 * aux.metrics["commitment"] + weight * (single - mean)
    np.testing.assert_allclose(aux.loss, terms, rtol=1e-5)
    assert [float(w) for w in weights] == pytest.approx([0.3, 0.1, 0.1])


@pytest.mark.parametrize("bits", [14, 18])
def test_no_array_holds_a_score_of_every_code_for_every_token(bits):
    """Neither forwards nor backwards, nothing compiled: the largest array is a number for each code."""
    module = module_of(config_of("lfq", bits))
    z = jnp.zeros((2, 8, 8, bits))
    program = jax.make_jaxpr(lambda z: step(module, {}, {}, z, 1, jnp.ones_like(z)))(z)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    found = list(sizes(program.jaxpr))
    assert len(found) > 100 and max(found) <= max(1 << bits, 128 << bits // 2)


def test_certain_bits_have_finite_gradients():
    module = module_of(config_of("lfq", 4))
    z = jnp.array([[[[30.0, -30.0, 0.0, 1e-9]]]])
    (value, *_), (_, gradient) = step(module, {}, {}, z, 1, jnp.ones_like(z))
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("levels", [(4, 5, 3), (8, 6, 5)])
def test_fsq_reaches_each_of_its_codes_and_no_other(levels):
    module = module_of(config_of("fsq", levels))
    z = np.stack(np.meshgrid(*[np.linspace(-9, 9, 61, dtype=np.float32)] * 3), axis=-1).reshape(1, 1, -1, 3)
    z[..., 0, :] = 0
    program = jax.jit(lambda z, ids: (module.apply({}, z, train=False, step=0), module.apply({}, ids, method="codes")))
    (z_q, ids, _), codes = program(z, np.arange(module.codebook_size))
    assert set(np.ravel(ids)) == set(range(int(np.prod(levels))))
    assert len(np.unique(codes, axis=0)) == module.codebook_size and np.abs(codes).max() == 1
    np.testing.assert_array_equal(z_q[0, 0, 0], np.zeros(3))  # also where the levels are even


def test_ibq_loss_is_the_double_quantization_loss():
    """By finite sums: thrice the squared distance at its three weights, and the entropies of the sharpened softmax."""
    passed = passed_of("ibq")
    codebook, z = np.asarray(passed.params["codebook"]), np.asarray(passed.z)
    scores = np.einsum("bhwe,qe->bhwq", z, codebook)
    distance = ((codebook[scores.argmax(-1)] - z) ** 2).mean()
    sharp = np.asarray(jax.nn.softmax(scores / 0.01)).reshape(-1, 16)
    h = lambda p: -(p * np.log(np.maximum(p, 1e-30))).sum(-1)  # noqa: E731
    expected = (1.0 + 0.25 + 1.0) * distance + 0.05 * (h(sharp).mean() - h(sharp.mean(axis=0)))
    np.testing.assert_allclose(passed.eval[2].loss, expected, rtol=1e-4)


CLUSTERS = 32


def after_training(config, steps=60):
    """Codes used, and perplexity, after a small optimisation of well separated clusters: linear maps around them."""
    module = module_of(config)
    tx = optax.adam(1e-2)

    def start():
        centres, encoder, decoder = (jax.random.normal(jax.random.key(k), (CLUSTERS, 16)) for k in range(3))
        keys = {"params": jax.random.key(4), "quantizer": jax.random.key(5)}
        state = dict(module.init(keys, jnp.zeros((1, 1, 1, module.input_dim)), train=False, step=0))
        weights = {
            "encoder": encoder[:16, : module.input_dim] / 4,
            "decoder": decoder[: module.dim] / module.dim**0.5,
            "quantizer": state.pop("params", {}),
        }
        return centres, (weights, state, tx.init(weights))

    def loss(weights, state, x, key, number):
        variables = {"params": weights["quantizer"], **state}
        z = x @ weights["encoder"]
        keys = {"quantizer": key}
        (z_q, _, aux), state = module.apply(variables, z, train=True, step=number, rngs=keys, mutable=["codebook"])
        return jnp.mean((z_q @ weights["decoder"] - x) ** 2) + aux.loss, (aux, state)

    def step(centres, carry, number):
        weights, state, opt = carry
        key = jax.random.fold_in(jax.random.key(6), number)
        x = (centres + 0.05 * jax.random.normal(key, (8, CLUSTERS, 16)))[:, :, None]
        gradients, (aux, state) = jax.grad(loss, has_aux=True)(weights, state, x, key, number)
        updates, opt = tx.update(gradients, opt)
        weights = optax.apply_updates(weights, updates)
        if aux.restart is not None:
            weights |= {"quantizer": quantizers.apply_restart(weights["quantizer"], aux.restart)}
        return (weights, state, opt), aux.counts

    @jax.jit
    def train():
        centres, carry = start()
        return jax.lax.scan(functools.partial(step, centres), carry, jnp.arange(steps))[1]

    counts = train()
    return int((counts[-1] > 0).sum()), float(quantizers.perplexity(counts[-1]))


@pytest.mark.slow
def test_codes_on_the_sphere_are_used_more_than_plain_ones():
    plain, low = after_training(config_of("vq", CLUSTERS, 16)), after_training(config_of("low_dim_vq", CLUSTERS, 8))
    assert low[0] >= 20 and low[0] > plain[0] and low[1] > plain[1]


@pytest.mark.slow
def test_restarted_codes_are_used():
    config = config_of("vq", 64, 16, usage_decay=0.9)
    plain, restarted = (after_training({**config, "restart_below": below}) for below in (0.0, 0.1))
    assert restarted[0] > plain[0] and restarted[1] > plain[1], (plain, restarted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        config_of("vq", 32, 16, restart_below=0.1, usage_decay=0.9),
        config_of("gumbel", 64, 16, kl_weight=1e-2, temperature_steps="60"),
        config_of("ema", 32, 16),
        config_of("fsq", (4, 3, 3)),
        config_of("lfq", 5),
        config_of("bsq", 5),
        config_of("simvq", 64, 16),
        config_of("ibq", 32, 16),
    ],
    ids=lambda config: config["name"],
)
def test_clusters_use_many_codes(config):
    used, perplexity = after_training(config)
    assert used >= 20 and perplexity >= (12 if config["name"] == "gumbel" else 15)  # one draws its codes


def test_ema_finds_clusters_and_starts_from_the_batch():
    """Sixteen tight clusters, sixteen codes: nearly all are used, and end on a cluster's mean."""
    module = module_of(config_of("ema", 16, 4, decay=0.5, restart_below=0.3))
    centres = jax.random.normal(jax.random.key(0), (16, 4)) * 3
    _, variables = init(module, jnp.zeros((1, 1, 1, 4)))

    @jax.jit
    def trained(variables, number):
        noise = jax.random.normal(jax.random.key(number), (8, 16, 4)) * 1e-2
        keys = {"quantizer": jax.random.key(100 + number)}
        z = (centres + noise)[:, :, None]
        (_, _, aux), variables = module.apply(variables, z, train=True, step=number, rngs=keys, mutable=["codebook"])
        return variables, aux

    for number in range(60):
        variables, aux = trained(variables, number)
    assert int((aux.counts > 0).sum()) >= 15
    codes = variables["codebook"]["codes"]
    distance = jnp.linalg.norm(codes[:, None] - centres[None], axis=-1).min(axis=1)
    assert int((distance < 0.05).sum()) >= 14
    assert float(quantizers.perplexity(aux.counts)) > 14


def test_dead_codes_restart_from_the_batch():
    passed = passed_of("vq_restart")
    _, _, _, aux, state = passed.train
    mask, vectors = aux.restart
    unused = aux.counts == 0
    np.testing.assert_array_equal(mask, unused)
    assert 0 < aux.metrics["restarts"] == mask.sum() and vectors.shape == (16, 4)
    assert {tuple(v) for v in vectors} <= {tuple(v) for v in np.asarray(passed.z).reshape(-1, 4)}
    usage = 0.4 + 0.6 * aux.counts / aux.counts.mean()
    np.testing.assert_allclose(state["codebook"]["usage"], np.where(unused, 1.0, usage), rtol=1e-6)
    codebook = np.asarray(passed.params["codebook"])
    restarted = quantizers.apply_restart(passed.params, aux.restart)["codebook"]
    np.testing.assert_array_equal(restarted, np.where(unused[:, None], vectors, codebook))


@pytest.mark.parametrize("duration, steps", [("300", "300"), ("25%", "25000"), ("1 epoch", "10000")])
def test_annealing_takes_a_duration_in_any_unit(duration, steps):
    assert module_of(config_of("bsq", 4, entropy_steps=duration)).config.entropy_steps == steps
    assert module_of(config_of("gumbel", 16, 4, temperature_steps=duration)).config.temperature_steps == steps
    with pytest.raises(UserError, match="temperature_steps: 'soon'"):
        module_of(config_of("gumbel", 16, 4, temperature_steps="soon"))


@pytest.mark.parametrize("name", SMALL)
def test_products_are_of_full_precision_on_every_platform(name):
    """TPUs round the factors of others to bfloat16."""
    module = module_of(SMALL[name])
    z = jnp.zeros((1, 2, 2, module.input_dim))
    keys = {"params": jax.random.key(0), "quantizer": jax.random.key(1)}
    variables = jax.eval_shape(lambda: module.init(keys, z, train=False, step=0))

    def loss(params, state, z):
        z_q, _, aux = module.apply({"params": params, **state}, z, train=True, step=1, rngs=keys, mutable=True)[0]
        return jnp.sum(z_q**2) + aux.loss

    state = dict(variables)
    params = state.pop("params", {})
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 2)))(params, state, z))
    products = re.findall(r"(?:dot_general|conv_general_dilated)\[.*?\n\s*\]", text, re.DOTALL)
    assert all("HIGHEST" in product for product in products), products
    assert products or name == "fsq"


def test_gumbel_temperature_falls_by_half_a_cosine():
    module = module_of(SMALL["gumbel"])
    params, _ = init(module, jnp.zeros((1, 1, 1, 4)))
    bound = module.bind({"params": params})
    np.testing.assert_allclose(bound.temperature(jnp.array([0, 5, 10, 99])), [1.0, 0.55, 0.1, 0.1], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("vq", 16, 1, normalize=True), "normalize needs a dim of 2"),
        (config_of("vq", 16, 4, start="spheer"), "did you mean 'sphere'"),
        (config_of("vq", 1, 4), "codebook_size 1: two codes"),
        (config_of("ema", 16, 0), "dim 0"),
        (config_of("fsq", (8, 2)), "each takes 3 values"),
        (config_of("fsq", ()), "each takes 3 values"),
        (config_of("fsq", (5,) * 20), "are the most"),
        (config_of("lfq", 25), "bits 25: 1 to 24"),
        (config_of("bsq", 4, group_bits=5), "group_bits 5"),
        (config_of("lfq", 4, temperature=0.0), "temperature 0.0"),
        (config_of("simvq", 0, 4), "codebook_size 0"),
        (config_of("ibq", 16, 4, entropy_temperature=-1.0), "entropy_temperature -1.0"),
    ],
)
def test_impossible_settings_are_refused_at_construction(config, message):
    with pytest.raises(UserError, match=message) as raised:
        module_of(config)
    assert str(raised.value).startswith("quantizer")
