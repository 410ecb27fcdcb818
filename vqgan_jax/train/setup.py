"""What both training scripts do before the loop: data, durations, restoring, the record that goes with a checkpoint."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqgan_jax import parallel, watchdog
from vqgan_jax.config import (
    FORMAT_VERSION,
    UserError,
    choose,
    differences,
    plain,
    resolve_steps,
    to_dataclass,
    upgrade,
    upgrade_config,
)
from vqgan_jax.data.pipeline import Evaluation, evaluation, pipeline
from vqgan_jax.data.prefetch import DevicePrefetch, prefetch_to_device
from vqgan_jax.data.sources import Source, open_source
from vqgan_jax.data.transforms import Transform, sides
from vqgan_jax.models.remat import NAMES
from vqgan_jax.train.checkpoints import Checkpoints
from vqgan_jax.train.loop import Schedule
from vqgan_jax.train.metric_writer import MetricWriter, open_writer
from vqgan_jax.train.optimizers import OptimizerConfig
from vqgan_jax.train.partial import check_train_only, leaf_name, under, unknown_part
from vqgan_jax.train.state import TrainState, Tree
from vqgan_jax.watchdog import Watchdog

CHECKPOINTS = "checkpoints"  # in a workdir
FIRST_STAGE, COND_STAGE = "first_stage", "cond_stage"  # in a stage-2 workdir
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Data:
    """Both splits of a config's data set, and how an example of each becomes a row."""

    train: Source
    val: Source
    train_transform: Callable[..., Any]
    val_transform: Callable[..., Any]


def open_data(config: ConfigDict, keys: Sequence[str], *, factor: int, classes: int = 0) -> Data:
    """Opens both splits.

    Args:
      config: the whole config.
      keys: batch keys that the run needs.
      factor: what the picture size must divide by.
      classes: labels below this are allowed.

    Raises:
      UserError: nothing to read, a size that does not divide, more classes than the model has.
    """
    size = config.data.image_size
    if any(n < 1 or n % factor for n in sides(size)):
        raise UserError(f"config.data.image_size: {size} does not divide by the model's factor {factor}")
    train, val = open_source(config.data, "train"), open_source(config.data, "val")
    if "label" in keys and len(train.classes) > classes:
        raise UserError(
            f"config.model.condition.classes: the model has {classes}, the data set {len(train.classes)}; "
            "raise it, or choose a data set with fewer"
        )
    if "label" in keys and not train.classes:
        raise UserError(f"config.data.path: '{config.data.path}' has no classes: put the images in one folder a class")
    count = classes if "label" in keys else len(train.classes)
    transforms = (Transform.from_config(config.data, keys=keys, classes=count, train=t) for t in (True, False))
    return Data(train, val, *transforms)


def cond_folders(keys: Sequence[str]) -> dict[str, str]:
    """Where a stage-2 workdir keeps the VQGAN of each batch key that its condition encodes: one alone lies in
    `cond_stage`, several in folders of it."""
    return {key: COND_STAGE if len(keys) == 1 else f"{COND_STAGE}/{key}" for key in keys}


def dtype_of(config: ConfigDict) -> Any:
    """The compute dtype that `config.dtype` names."""
    return choose("config.dtype", config.dtype, DTYPES)


def remat_of(config: ConfigDict) -> str:
    """The rule that `config.remat` names; the first versions knew False and True, for every block."""
    return choose("config.remat", str(config.remat), {"False": "", "True": "block"} | {name: name for name in NAMES})


class Durations:
    """Turns a config's durations into steps, once the size of the data set is known."""

    def __init__(self, config: ConfigDict, examples: int):
        self._units = dict(batch_size=config.batch_size, examples=examples)
        self.total = resolve_steps(config.steps, key="config.steps", **self._units)
        if self.total < 1:
            raise UserError(f"config.steps: '{config.steps}' is less than one step of {config.batch_size} examples")

    def steps(self, duration: str, key: str, *, at_least: int = 0) -> int:
        """Steps of one duration; `at_least` 1 where a rounding to 0 would mean "never" (0 of any unit does)."""
        steps = resolve_steps(duration, key=key, total=self.total, **self._units)
        asked = resolve_steps(duration, key=key, total=10**9, batch_size=1, examples=10**9)
        return max(at_least, steps) if asked else 0

    def schedule(self, config: ConfigDict) -> Schedule:
        """The loop's schedule."""
        keys = (f"{name}_every" for name in ("log", "eval", "save", "images", "fid"))
        return Schedule(self.total, *(self.steps(config[key], f"config.{key}", at_least=1) for key in keys))

    def replace(self, fields: ConfigDict, key: str, names: Sequence[str]) -> dict[str, Any]:
        """A config's fields with the durations among them as steps."""
        return dict(fields) | {name: self.steps(fields[name], f"{key}.{name}") for name in names}

    def optimizer(self, config: ConfigDict, key: str = "config.optimizer") -> OptimizerConfig:
        """The optimizer's settings in steps."""
        return to_dataclass(OptimizerConfig, self.replace(config.optimizer, key, ("warmup", "hold")), key=key)


def training_batches(
    config: ConfigDict, mesh: Mesh, source: Source, transform: Callable[..., Any], start: int
) -> DevicePrefetch:
    """Batches on the device, after `start` examples; a global batch is the same for any number of hosts.

    Raises:
      UserError: hosts that hold the same rows of the first batch read others.
    """
    batch = config.batch_size
    loaded = pipeline(
        source,
        rows=parallel.host_rows(mesh, batch),
        global_batch=batch,
        seed=config.seed,
        start=start,
        transform=transform,
        threads=config.data.threads,
        processes=config.data.processes,
        max_corrupt_share=config.data.max_corrupt_share,
    )
    batches = prefetch_to_device(loaded, lambda rows: parallel.put_batch(rows, mesh, batch))
    if jax.process_count() > 1:
        try:
            parallel.check_hosts_agree(batches.peek(), mesh)
        except BaseException:
            batches.close()
            raise
    return batches


def evaluation_batches(batch: int, mesh: Mesh, source: Source, transform: Callable[..., Any], limit: int) -> Evaluation:
    """Every example of a source once (or `limit` of them, spread out; 0: all), in padded batches of host rows."""
    rows = parallel.host_rows(mesh, batch)
    return evaluation(source, rows=rows, global_batch=batch, transform=transform, limit=limit or None)


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError unless the batch divides over micro-batches and devices."""
    if config.batch_size < 1:
        raise UserError(f"config.batch_size: {config.batch_size}; write 1 or more")
    if config.accumulation < 1 or config.batch_size % config.accumulation:
        raise UserError(
            f"config.accumulation: a batch of {config.batch_size} does not divide into {config.accumulation} parts"
        )
    parallel.check_batch(config.batch_size // config.accumulation, mesh)


def make_record(config: ConfigDict, kind: str, **more: Any) -> dict[str, Any]:
    """What a checkpoint holds beside the state."""
    return {"format_version": FORMAT_VERSION, "kind": kind, "seed": config.seed, "config": plain(config), **more}


def open_checkpoints(config: ConfigDict, workdir: epath.Path) -> Checkpoints:
    """The run's checkpoints, by `config.checkpoint`; read-only for a replay: the run may be going on."""
    return Checkpoints(workdir / CHECKPOINTS, **config.checkpoint, read_only=bool(config.replay))


def open_logs(config: ConfigDict, workdir: epath.Path, start: "Start") -> MetricWriter:
    """The run's logs, cut back to where it starts."""
    options = dict(hand_to_clu=config.hand_to_clu, wandb=config.wandb)
    return open_writer(workdir, resume_step=start.step, owed=start.owed, **options)


def check_same_model(config: ConfigDict, workdir: epath.Path) -> None:
    """Raises UserError if the workdir holds checkpoints of another model. Only `config.model` decides."""
    recorded = workdir / "config.json"
    if not recorded.exists() or not any((workdir / CHECKPOINTS).glob("[0-9]*")):
        return
    theirs = upgrade_config(json.loads(recorded.read_text()))
    if found := differences(plain(config.model), theirs["model"]):
        raise UserError(
            f"--workdir={workdir}: holds another model: config.model.{'; '.join(found)}. Name another folder"
        )
    trained = theirs["train_only"]
    if trained != plain(config.train_only):
        raise UserError(
            f"config.train_only: the run in --workdir={workdir} trains {', '.join(trained) or 'everything'}, and its "
            f"optimizer no more; start from it in another folder, with --config.init_from={workdir}"
        )


def open_watchdog(config: ConfigDict, workdir: epath.Path) -> Watchdog | None:
    """What watches the loop on several hosts, by `config.watchdog_seconds`."""
    if jax.process_count() == 1 or not config.watchdog_seconds:
        return None
    place = jax.process_index(), jax.process_count()
    return Watchdog(workdir / watchdog.FOLDER, *place, config.watchdog_seconds)


class Start(NamedTuple):
    """Where a run starts: completed steps, and the examples that they have seen, of whatever batch size they were; and
    whether the evaluation of that step is owed."""

    step: int
    examples: int
    owed: bool = False


def restore_or_init(
    checkpoints: Checkpoints,
    init: Callable[[jax.Array], TrainState],
    mesh: Mesh,
    config: ConfigDict,
    load_initial: Callable[[str], Tree] | None = None,
) -> tuple[TrainState, Start]:
    """The newest whole checkpoint, else a fresh state; and how far it has come.

    Args:
      checkpoints: open.
      init: `init(key) -> TrainState`, boxed.
      mesh: where the state is born.
      config: the whole config.
      load_initial: `path -> parameters by network`, for `config.init_from`.
    """
    key = jax.random.key(config.seed)
    abstract = parallel.abstract_sharded(init, mesh, key)
    check_train_only(config.train_only, abstract)
    averaged = {name: tree for name, tree in abstract.params.items() if name != "discriminator"}

    def like(saved: Mapping[str, Any]) -> TrainState:
        collections = abstract.collections
        if "lecam" not in saved["collections"].get("discriminator", {}):  # of a version without
            collections = _without_lecam(collections)
        return abstract.replace(ema=averaged if jax.tree.leaves(saved.get("ema")) else {}, collections=collections)

    restored = checkpoints.restore(like)
    if restored is not None:
        state, record = restored
        record = upgrade(record)
        if bool(state.ema) != bool(abstract.ema):  # the config has switched averaging on or off since
            state = state.replace(ema={name: jax.tree.map(jnp.copy, state.params[name]) for name in abstract.ema})
        if jax.tree.structure(state.collections) != jax.tree.structure(abstract.collections):
            means = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract.collections["discriminator"]["lecam"])
            judge = state.collections["discriminator"] | {"lecam": parallel.put_tree(means, mesh)}
            state = state.replace(collections=state.collections | {"discriminator": judge})
        return state, Start(step := int(state.step), record["examples"], checkpoints.owes(step))
    if config.init_exclude and not config.init_from:
        raise UserError("config.init_exclude: there is nothing to exclude from; set config.init_from")
    state = parallel.init_sharded(init, mesh, key)
    if config.init_from and load_initial:
        state = start_from(state, load_initial(config.init_from), config.init_from, config.init_exclude)
    return state, Start(0, 0)


def _without_lecam(collections: Tree) -> Tree:
    ours = {key: value for key, value in collections.get("discriminator", {}).items() if key != "lecam"}
    return {name: ours if name == "discriminator" else tree for name, tree in collections.items()}


def start_from(
    state: TrainState, loaded: Mapping[str, Mapping[str, Any]], path: str, exclude: Sequence[str] = ()
) -> TrainState:
    """A fresh state with the networks of another run: {"params": {network: tree}, "collections": {network: tree}}.

    Optimizers are always fresh, and EMA starts at the parameters. A network that `loaded` lacks stays fresh, and so do
    what LeCAM and spectral norms remember of a discriminator that was trained without.

    Args:
      state: fresh.
      loaded: the arrays.
      path: where they were read, for errors.
      exclude: what else stays fresh, statistics and codebooks included: networks or prefixes of paths, such as
        "discriminator" or "generator/decoder/conv_out".

    Raises:
      UserError: an array of another shape, or an exclusion that matches nothing.
    """
    exclude = [str(prefix).strip("/") for prefix in exclude]
    pairs = {"params": (state.params, loaded["params"]), "collections": (state.collections, loaded["collections"])}
    names = {leaf_name(key, kind) for kind, trees in pairs.items() for tree in trees for key, _ in _leaves(tree)}
    for prefix in exclude:
        if unknown := unknown_part(prefix, names):
            raise UserError(f"config.init_exclude: '{unknown[0]}' is neither here nor in {path}{unknown[1]}")

    def take(kind: str) -> Tree:
        fresh, new = pairs[kind]
        new = {key: x for key, x in _leaves({name: new[name] for name in new if name in fresh})}
        ours = {key: x for key, x in _leaves({name: fresh[name] for name in fresh if name in pairs[kind][1]})}
        taken = {}
        for key in sorted(set(ours) | set(new), key=str):
            name = leaf_name(key, kind)
            if any(under(name, prefix) for prefix in exclude):
                continue
            shapes = [np.shape(tree[key]) if key in tree else None for tree in (new, ours)]
            if kind == "collections" and name.startswith("discriminator/") and None in shapes:
                continue
            if shapes[0] != shapes[1]:
                there, here = ("is absent" if shape is None else f"has shape {shape}" for shape in shapes)
                raise UserError(
                    f"config.init_from={path}: {name} {there} there and {here} here; mend config.model, or start it "
                    f"""fresh with --config.init_exclude='("{name}",)'"""
                )
            taken[key] = jax.device_put(jnp.asarray(new[key], ours[key].dtype), ours[key].sharding)
        return jax.tree_util.tree_map_with_path(lambda key, x: taken.get(key, x), fresh)

    params = take("params")
    ema = {name: jax.tree.map(jnp.copy, params[name]) for name in state.ema}
    return state.replace(params=params, collections=take("collections"), ema=ema)


def _leaves(tree: Tree) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def jit_step(
    step: Callable[..., Any], learning_rate: Callable[[jax.Array], jax.Array], state: TrainState
) -> Callable[[TrainState, Any, Tree], Any]:
    """The jitted `(state, batch, frozen) -> (state, metrics)` of a run, with `learning_rate` among the metrics.

    The state, which may be abstract, is donated and keeps its shardings.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state: TrainState, batch: Any, frozen: Tree) -> Any:
        rate = learning_rate(state.step)
        state, metrics = step(state, batch, frozen)
        return state, metrics | {"learning_rate": rate}

    return train_step


def profile_range(config: ConfigDict) -> tuple[int, int] | None:
    """`config.profile` ("100-110") as two counts of steps."""
    if not config.profile:
        return None
    first, _, last = config.profile.partition("-")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"config.profile: '{config.profile}' is no range of steps; write '100-110'")
    return int(first), int(last)
