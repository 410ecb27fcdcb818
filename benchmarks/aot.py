"""What the paper's transformers and the presets of 2026 take of slices of TPUs, by `tools.aot`: a Markdown table.

    python -m benchmarks.aot --models=307M,1.4B --slices=v5e:2x4,v5e:8x8,v5e:16x16
    python -m benchmarks.aot --models=307M,1.4B --slices=v5e:2x2,v5p:2x2x1,v6e:2x2 --what=sample

Needs requirements-tpu.txt and no TPU. The train steps read cached codes; `data` is what `fsdp` leaves. A row is printed
when it is known, and what was compiled once is found again at once.
"""

import argparse
import itertools

from benchmarks.machine import TRANSFORMERS, transformer
from vqgan_jax.config import UserError
from vqgan_jax.tools import aot

NAMES = {
    "train": (
        "model",
        "slice",
        "chips",
        "fsdp",
        "remat",
        "images a chip",
        "GiB a chip",
        "of",
        "sent",
        "ms",
        "bound by",
    ),
    "sample": ("model", "slice", "images a chip", "GiB", "of", "s a batch", "bound by"),
}
MORE = ("images/s", "MFU at most")


def row(model: str, topology: str, what: str, images: int, remat: str, fsdp: int) -> list[str]:
    """The cells of one line of the table; `images` a chip."""
    config, first = transformer(model)
    config.dtype, config.cache_codes, config.remat, config.mesh.fsdp = "bfloat16", True, remat, fsdp
    devices = aot.topologies.devices_of(topology)
    config.batch_size = images * len(devices)
    host = images * sum(device.process_index == devices[0].process_index for device in devices)
    try:
        found = aot.report(config, topology, what=what, stages=[first], batch=host)
    except UserError as error:  # such as a mesh that the slice cannot hold
        return [model, topology, str(error)]
    memory = [f"{found.get('taken_bytes', 0) / 2**30:.1f}", f"{found['memory_bytes'] / 2**30:.1f}"]
    if not found["fits"]:
        memory[0] = f"does not fit ({found['refused'] or memory[0]})"
    cells = [model, topology] + ([str(found["chips"]), str(fsdp), remat or "no"] if what == "train" else [])
    cells += [str(images), *memory]
    if "seconds" not in found:
        return cells
    cells += [f"{aot.sent_share(found):.1%}", f"{1e3 * found['seconds']:.0f}"] if what == "train" else []
    cells += [f"{found['seconds']:.2f}"] if what == "sample" else []
    bound = max(found["roofline"], key=found["roofline"].get)
    return [*cells, bound, f"{found['images_per_second']:.0f}", f"{found['mfu']:.0%}"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.partition("\n")[0])
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=words, default=["307M"], help=f"of {', '.join(TRANSFORMERS)}")
    parser.add_argument("--slices", type=words, default=["v5e:2x4"])
    parser.add_argument("--what", default="train", choices=("train", "sample"))
    parser.add_argument("--images", type=int, default=16, help="a chip")
    parser.add_argument("--remat", default="", help="see config.remat")
    parser.add_argument("--fsdp", type=int, default=8, help="of the train step: config.mesh.fsdp")
    args = parser.parse_args()
    names = (*NAMES[args.what], *MORE)
    rows = (row(m, s, args.what, args.images, args.remat, args.fsdp) for m in args.models for s in args.slices)
    for cells in itertools.chain((names, ["---"] * len(names)), rows):
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
