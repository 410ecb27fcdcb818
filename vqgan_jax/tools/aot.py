"""What a run takes of a slice of TPUs, known before it is paid for: its real programs, compiled without a TPU.

    python -m vqgan_jax.tools.aot --config=configs/paper_transformer.py:class_imagenet --topology=v5e:16x16 \
        --first=configs/paper_vqgan.py:imagenet_f16_1024 --config.cache_codes --config.batch_size=2048

Prints the memory of each chip, work, collectives, and the roofline: time, images/s, MFU and chip-hours at best.
--topology=2xv5e:16x16 is two slices, what they send each other (DCN) apart. Needs requirements-tpu.txt;
--topology=cpu:8 needs nothing. No data set and no weights are read.
"""

import dataclasses
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from jax.experimental import serialize_executable
from ml_collections import ConfigDict, config_flags

from vqgan_jax import cli, parallel, pretrained, storage
from vqgan_jax.conditioning import encoded_keys
from vqgan_jax.config import UserError
from vqgan_jax.tools import programs, topologies
from vqgan_jax.tools.compiling import Compiled, compile_cached
from vqgan_jax.tools.programs import Program
from vqgan_jax.train.roofline import Bound, Chip, bound_of, chip_of
from vqgan_jax.transformer import TransformerConfig

FLAGS = flags.FLAGS
WHAT = ("train", "sample", "encode")
IMAGENET = 1_281_167  # training pictures
CHIP_IMAGES = 8  # pictures at once a chip, where neither the config nor a flag says it
_COLUMN = 12  # of names of lines


def report(
    config: ConfigDict,
    topology: str,
    *,
    what: str = "train",
    stages: Sequence[Any] = (),
    batch: int = 0,
    examples: int = IMAGENET,
    smaller: str = "",
    save: str = "",
) -> dict[str, Any]:
    """Compiles one program, prints what it takes, and returns that as plain data.

    Args:
      config: of either stage.
      topology: see `topologies`.
      what: of WHAT.
      stages: of stage 2, see `programs.train_program`.
      batch: of sampler and encoder: pictures at once on each host; 0: CHIP_IMAGES a chip.
      examples: of the training split, for durations in epochs.
      smaller: of a train step: a topology with fewer chips to compile for too, at the same batch a chip; "" for none.
      save: file that keeps the compiled program; "" for none.

    Raises:
      UserError: no such topology, a batch or mesh that does not fit it, or what the script would raise.
    """
    devices = topologies.devices_of(topology)
    fewer = on_fewer(config, smaller, len(devices), what) if smaller else None
    program = build(config, devices, what=what, stages=stages, batch=batch, examples=examples)
    compiled = compile_cached(program, keep=bool(save))
    found = figures(program, compiled, len(devices), chip_of(devices[0].device_kind))
    found |= {"topology": topology, "what": what, "mesh": dict(program.mesh.shape)}
    for name, text in lines(found, config):
        _line(name, text)
    if fewer:
        program = build(fewer[0], fewer[1], what=what, stages=stages, batch=batch, examples=examples)
        found["growth"] = compare(compile_cached(program), compiled, smaller)
    if save and compiled.executable is not None:
        _line("saved", keep(compiled.executable, devices[0], save))
    return found


def build(config: ConfigDict, devices: Sequence[Any], *, what: str, stages: Any, batch: int, examples: int) -> Program:
    """The program on these devices: the train step on all of them, the others on those of one host."""
    if what == "train":
        mesh = parallel.make_mesh(config.mesh, list(devices))
        return programs.train_program(config, mesh, examples=examples, stages=stages)
    if not programs.is_transformer(config):
        raise UserError(f"--what={what}: takes the config of a transformer")
    host = [device for device in devices if device.process_index == devices[0].process_index]
    mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, host)
    batch = batch or CHIP_IMAGES * len(host)
    parallel.check_batch(batch, mesh, "--batch")
    make = programs.sample_program if what == "sample" else programs.encode_program
    return make(config, mesh, batch, stages)


def figures(program: Program, compiled: Compiled, chips: int, chip: Chip | None) -> dict[str, Any]:
    """What there is to know of a compiled program on a slice, as plain data; times are of the roofline."""
    found: dict[str, Any] = {
        "chips": chips,
        "chip": chip.name if chip else "",
        "images": program.images * (chips // program.mesh.size),
        "steps": program.steps,
        "needed_flops": compiled.needed_flops / program.mesh.size,
        "state_bytes": programs.bytes_a_device(program.args),
        "beside_bytes": programs.bytes_a_device(program.beside),
        "memory_bytes": chip.memory_bytes if chip else 0,
        "compile_seconds": compiled.seconds,
        "refused": compiled.refused,
    }
    if compiled.cost is None:
        return found | {"fits": False}
    cost = compiled.cost
    taken = cost.peak + found["beside_bytes"]
    found |= {
        "fits": chip is None or taken <= chip.memory_bytes,
        "taken_bytes": taken,
        "arguments": cost.arguments,
        "outputs": cost.outputs,
        "temporaries": cost.temporaries,
        "code": cost.code,
        "flops": cost.flops,
        "memory_moved": cost.memory_moved,
        "collectives": {kind: dataclasses.asdict(traffic) for kind, traffic in cost.collectives.items()},
        "between_slices": {kind: dataclasses.asdict(traffic) for kind, traffic in cost.between_slices.items()},
        "unknown_loops": cost.unknown_loops,
    }
    if chip is not None:
        bound = bound_of(cost, chip)
        found["roofline"] = dataclasses.asdict(bound)
        found["seconds"] = bound.seconds
        found["images_per_second"] = found["images"] / bound.seconds
        found["mfu"] = found["needed_flops"] / bound.seconds / chip.peak_flops
        found["chip_hours"] = program.steps * bound.seconds * chips / 3600
    return found


def lines(found: dict[str, Any], config: ConfigDict) -> Iterator[tuple[str, str]]:
    """The figures as a person reads them: name and text of each line."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1) or "one device"
    chips, has = found["chips"], found["memory_bytes"]
    each = f"{found['images']} images at once, {found['images'] / chips:.4g} a chip"
    yield (
        "program",
        f"{found['what']} on {found['topology']}: {chips} x {found['chip'] or 'device'}, mesh {mesh}; {each}",
    )
    if found["refused"]:
        yield "DOES NOT FIT", found["refused"]
        yield from (("mend", way) for way in mends(found, config))
        return
    parts = ("arguments", "outputs", "temporaries", "code")
    text = " + ".join(f"{name} {gib(found[name])}" for name in parts)
    text += f" + frozen networks {gib(found['beside_bytes'])}" if found["beside_bytes"] else ""
    yield "memory", f"a chip: {text} = {gib(found['taken_bytes'])} GiB" + (f" of {gib(has)}" if has else "")
    if has and found["fits"]:
        yield "FITS", f"{gib(has - found['taken_bytes'])} GiB to spare"
    elif has:
        yield "DOES NOT FIT", f"{gib(found['taken_bytes'] - has)} GiB too much"
        yield from (("mend", way) for way in mends(found, config))
    extra = found["flops"] / found["needed_flops"] if found["needed_flops"] else 1
    text = f"a chip: {found['flops'] / 1e12:.4g} TFLOP ({extra:.2f} x what the model needs), "
    text += f"{found['memory_moved'] / 1e9:.4g} GB of memory traffic"
    loops = found["unknown_loops"]
    yield "work", text + (f"; loops of unknown length, counted once: {loops}" if loops else "")
    yield "collectives", f"a chip sends: {_sent(found['collectives'])}; {sent_share(found):.1%} of all bytes moved"
    if found["between_slices"]:
        yield "DCN", f"a chip sends to other slices: {_sent(found['between_slices'])}"
    if "roofline" in found:
        yield from _speed(found)


def sent_share(found: dict[str, Any]) -> float:
    """Share of the bytes moved that goes over links, and between slices, to other chips."""
    sent = sum(kind["sent"] for name in ("collectives", "between_slices") for kind in found[name].values())
    return sent / (sent + found["memory_moved"]) if sent else 0.0


def _sent(kinds: Mapping[str, Mapping[str, float]]) -> str:
    named = (f"{name} {kind['count']:.0f} x, {kind['sent'] / 1e9:.3g} GB" for name, kind in kinds.items())
    return "; ".join(named) or "nothing"


def _speed(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    bound = Bound(**found["roofline"])
    parts = ", ".join(f"{name} {1e3 * value:.4g}" for name, value in found["roofline"].items() if value)
    yield "roofline", f"{parts} ms: at least {1e3 * bound.seconds:.4g} ms, bound by {bound.by}"
    yield "speed", f"at most {found['images_per_second']:.4g} images/s, MFU at most {found['mfu']:.0%}"
    if found["steps"]:
        hours = found["chip_hours"] / found["chips"]
        yield "run", f"{found['steps']} steps: at least {hours:.4g} hours, {found['chip_hours']:.4g} chip-hours"


def mends(found: dict[str, Any], config: ConfigDict) -> list[str]:
    """What makes a program fit, the cheapest first."""
    if found["what"] != "train":
        return [f"--batch={max(1, found['images'] // found['chips'] // 2)} a chip, or chips with more memory"]
    chips, fsdp, ways = found["chips"], found["mesh"]["fsdp"], []
    copy = chips // found["mesh"]["tensor"]  # at most so many share each copy of the state over `fsdp`
    if fsdp < copy and found["state_bytes"] > found["memory_bytes"] / 8:
        more = min(n for n in range(min(copy, max(8, 4 * fsdp)), copy + 1) if copy % n == 0)
        state = f"the state takes {gib(found['state_bytes'])} GiB a chip"
        ways.append(f"--config.mesh.fsdp={more} --config.mesh.data=-1 ({state})")
    if not config.remat:
        ways.append("--config.remat=block (activations are computed again in the backward pass)")
    rows = found["images"] // (chips * config.accumulation)
    if rows > 1:
        ways.append(f"--config.accumulation={2 * config.accumulation} (micro-batches of {rows // 2} a chip)")
    return ways + ["a smaller --config.batch_size, or chips with more memory"]


def on_fewer(config: ConfigDict, smaller: str, chips: int, what: str) -> tuple[ConfigDict, list[Any]]:
    """A train step's config at the same batch a chip on a smaller slice, and the devices of that.

    Raises:
      UserError: no train step (each host samples and encodes apart: nothing there knows how many chips there are), not
        fewer chips, or no whole batch for them.
    """
    if what != "train":
        raise UserError(f"--scaling={smaller}: compares train steps, not --what={what}, where each host works alone")
    devices = topologies.devices_of(smaller)
    if not 0 < len(devices) < chips:
        raise UserError(f"--scaling={smaller}: has {len(devices)} chips; name a slice with fewer than {chips}")
    config = config.copy_and_resolve_references()
    images, rest = divmod(config.batch_size * len(devices), chips)
    if rest:
        several = chips // math.gcd(chips, len(devices))
        raise UserError(f"--scaling={smaller}: as many images a chip need config.batch_size a multiple of {several}")
    config.batch_size = images
    return config, devices


def compare(fewer: Compiled, more: Compiled, smaller: str) -> list[dict[str, Any]]:
    """Prints what grows with the number of chips, and returns it: `growing` by 1 % of all temporaries or more.

    Args:
      fewer: compiled for the smaller slice.
      more: compiled for the larger one, at the same batch a chip.
      smaller: name of the smaller slice.
    """
    if fewer.cost is None or more.cost is None:
        _line("scaling", "not compared: one of both does not fit")
        return []
    before, after = fewer.cost.temporaries, more.cost.temporaries
    _line("scaling", f"at the same batch a chip temporaries are {gib(before)} GiB on {smaller}, {gib(after)} here")
    grown = growing(fewer.buffers, more.buffers, floor=0.01 * before)
    for buffer in grown[:5]:
        _line("GROWS", f"{buffer['made_by']}: {buffer['shape']}, {gib(buffer['from'])} to {gib(buffer['to'])} GiB")
    if not grown:
        _line("", "no activation grows with the number of chips")
    return grown


def growing(
    before: Mapping[str, tuple[int, str]], after: Mapping[str, tuple[int, str]], floor: float
) -> list[dict[str, Any]]:
    """Buffers that are larger by more than a quarter and by `floor` bytes, the largest first.

    An operation missing in `before` had a buffer too small to be kept there, or none: it was fused with its reader, or
    its result stayed in fast memory. It counts as the smallest that was kept, so it grew by no less. So that another
    choice of the compiler's is no growth, such a buffer must be of a shape that nothing kept had on fewer chips: what
    grows with the chips has a longer axis.

    Args:
      before: by the operation that makes it, (bytes, shape) of its largest buffer; the largest, on fewer chips.
      after: the same on more chips.
      floor: growth below this is let pass.
    """
    smallest = min((size for size, _ in before.values()), default=0)
    known = {array for _, shape in before.values() for array in shape.split(", ")}
    found = [
        {"made_by": name, "shape": shape, "from": before.get(name, (smallest, ""))[0], "to": size}
        for name, (size, shape) in after.items()
        if name in before or not known.issuperset(shape.split(", "))
    ]
    found = [b for b in found if b["to"] > 1.25 * b["from"] and b["to"] - b["from"] > floor]
    return sorted(found, key=lambda buffer: -buffer["to"])


def keep(executable: Any, device: Any, path: str) -> str:
    """Writes a compiled program to a file and says where JAX can load it.

    The file is what `jax.experimental.serialize_executable.deserialize_and_load(*pickle.load(file))` takes, with the
    same versions of jax and libtpu.

    Args:
      executable: compiled.
      device: one that it is for.
      path: local or gs://.
    """
    data = pickle.dumps(serialize_executable.serialize(executable))
    storage.write_bytes(storage.path(path), data)
    there = "this machine" if device.platform == "cpu" else f"a slice of {device.device_kind} of this shape, not here"
    return f"{path}, {len(data) / 2**20:.1f} MiB; JAX loads it on {there}"


def stage_models(config: ConfigDict, first: ConfigDict | None, cond: ConfigDict | None) -> list[Any]:
    """`config.model` of a transformer's stages: of the workdirs that its config names, else of other configs.

    Raises:
      UserError: neither names a first stage, or that of an encoded condition.
    """
    if not programs.is_transformer(config):
        return []
    models = []
    encoded = encoded_keys(TransformerConfig.from_config(config.model).condition)
    for key, flag, other in (("vqgan", "--first", first), ("cond_vqgan", "--cond", cond)):
        if key == "cond_vqgan" and not encoded:
            continue
        if config[key]:
            models += [pretrained.read_model(path, key=f"config.{key}") for path in config[key].split(",")]
        elif other is not None:
            models.append(other.model)
        else:
            raise UserError(f"{flag}: name the stage's config ({flag}=configs/paper_vqgan.py:ROW), or config.{key}")
    return models


def gib(size: float) -> str:
    """Bytes in GiB, as text."""
    return f"{size / 2**30:.2f}"


def _line(name: str, text: str) -> None:
    print(f"{name:{_COLUMN}} {text}", flush=True)


def define_flags() -> None:
    """The flags of this tool."""
    config_flags.DEFINE_config_file("config", None, "Config of either stage.", lock_config=True)
    config_flags.DEFINE_config_file("first", None, "Stage 2: config of the first stage, where config.vqgan is empty.")
    config_flags.DEFINE_config_file("cond", None, "Stage 2: config of the condition's VQGAN.")
    flags.DEFINE_string("topology", None, f"The slice: {topologies.FORMS}.")
    flags.DEFINE_enum("what", "train", WHAT, "The program: the train step, the sampler or the encoder.")
    flags.DEFINE_integer("batch", 0, "Sampler, encoder: images at once on each host; 0: 8 a chip.", lower_bound=0)
    flags.DEFINE_integer("examples", IMAGENET, "Training examples, for durations in epochs.", lower_bound=1)
    flags.DEFINE_string("scaling", "", "Train: a smaller slice, compiled for too, to name what grows with chips.")
    flags.DEFINE_string("json", "", "File to write the figures to.")
    flags.DEFINE_string("save", "", "File to keep the compiled program in.")


def main() -> None:
    """Calls `report` with the flags."""
    found = report(
        FLAGS.config,
        FLAGS.topology,
        what=FLAGS.what,
        stages=stage_models(FLAGS.config, FLAGS.first, FLAGS.cond),
        batch=FLAGS.batch,
        examples=FLAGS.examples,
        smaller=FLAGS.scaling,
        save=FLAGS.save,
    )
    if FLAGS.json:
        storage.write_json(storage.path(FLAGS.json), found)


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("config", "topology"))
