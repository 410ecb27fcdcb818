"""A sheet of what a config feeds its model, conditions drawn, and how fast: what to look at before a long run.

python -m vqgan_jax.tools.show --config=configs/x.py [--number=16] [--split=train|val] [--keys=a,b] --out=sheet.png
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from vqgan_jax import cli, drawing, storage
from vqgan_jax.conditioning import batch_keys, condition_config
from vqgan_jax.config import UserError, choose
from vqgan_jax.data.pipeline import evaluation, pipeline
from vqgan_jax.data.source import CorruptExample, Source
from vqgan_jax.data.sources import open_source
from vqgan_jax.data.transforms import KEYS, Transform
from vqgan_jax.images import grid, png_bytes, to_uint8
from vqgan_jax.object_tokens import FLAGS

Row = Mapping[str, np.ndarray]

_CELL = 224  # pixels a picture is enlarged to, at least
_LEGEND_LINES = 4
_MEASURED, _SECONDS = 256, 15.0  # rows that speed is measured over, and for how long at most


class Shown(NamedTuple):
    """What a person needs besides the arrays: names of labels, of segmentation ids and of box classes."""

    classes: Sequence[str]
    tables: Mapping[str, Sequence[str]]


def keys_of(config: ConfigDict) -> tuple[str, ...]:
    """The batch keys that the config's model reads, the picture first.

    Raises:
      UserError: an unknown condition.
    """
    if "condition" not in config.model:
        return tuple(dict.fromkeys(("image", config.model.input_key)))
    return ("image", *batch_keys(condition_config(config.model.condition, "config.model.condition")))


def draw(row: Row, shown: Shown) -> np.ndarray:
    """One row of a batch as a person sees it: its picture and its conditions side by side, named: uint8 [., ., 3]."""
    picture = to_uint8(row["image"]) if "image" in row else None
    cells = []
    if picture is not None:
        cells.append(_cell(picture, _caption(row, shown)))
    for key in row:
        if key in _DRAWN:
            cells += _DRAWN[key](row, picture, shown)
    if not cells:
        raise UserError(f"--keys: nothing of {', '.join(row)} can be drawn; add image")
    height = max(len(cell) for cell in cells)
    padded = [np.pad(cell, ((0, height - len(cell)), (0, 2), (0, 0)), constant_values=255) for cell in cells]
    return np.concatenate(padded, axis=1)


def sheet(rows: Sequence[Row], shown: Shown) -> np.ndarray:
    """All rows drawn, in a grid about twice as wide as high: uint8 [., ., 3]."""
    drawn = [draw(row, shown) for row in rows]
    height, width = (max(picture.shape[k] for picture in drawn) for k in (0, 1))
    padded = [
        np.pad(p, ((0, height - p.shape[0]), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in drawn
    ]
    columns = max(1, round((2 * len(rows) * height / width) ** 0.5))
    return grid(np.stack(padded), min(columns, len(rows)), pad=10)


def _cell(picture: np.ndarray, caption: str) -> np.ndarray:
    return drawing.captioned(drawing.enlarged(picture, _CELL), caption)


def _caption(row: Row, shown: Shown) -> str:
    if "label" not in row:
        return ""
    label = int(row["label"])
    return f"{label} {shown.classes[label]}" if label < len(shown.classes) else str(label)


def _draw_segmentation(row: Row, picture: np.ndarray | None, shown: Shown) -> list[np.ndarray]:
    ids = row["segmentation"]
    colours = drawing.enlarged(drawing.segmentation(ids), _CELL)
    names = shown.tables.get("segmentation", ())
    legend = drawing.segmentation_legend(ids, names, colours.shape[1], _LEGEND_LINES)
    cells = [np.concatenate([colours, legend])]
    if picture is not None:
        mixed = drawing.overlay(drawing.enlarged(picture, _CELL), colours)
        cells.append(drawing.captioned(mixed, "both"))
    return cells


def _draw_depth(row: Row, picture: np.ndarray | None, shown: Shown) -> list[np.ndarray]:
    return [_cell(drawing.depth(row["depth"]), "depth, bright is 1")]


def _draw_edges(row: Row, picture: np.ndarray | None, shown: Shown) -> list[np.ndarray]:
    return [_cell(drawing.picture("edges", row["edges"]), "edges")]


def _draw_low_res(row: Row, picture: np.ndarray | None, shown: Shown) -> list[np.ndarray]:
    return [_cell(drawing.picture("low_res", row["low_res"]), "low resolution")]


def _draw_keypoints(row: Row, picture: np.ndarray | None, shown: Shown) -> list[np.ndarray]:
    drawn = to_uint8(row["keypoints"])
    cells = [_cell(drawn, "key points")]
    if picture is not None:
        cells.append(_cell(np.where(drawn.any(axis=-1, keepdims=True), drawn, picture), "both"))
    return cells


def _draw_coords(row: Row, picture: np.ndarray | None, shown: Shown) -> list[np.ndarray]:
    (top, left), (bottom, right) = row["coords"][0, 0], row["coords"][-1, -1]
    return [_cell(drawing.coords(row["coords"]), f"y {top:.2f} to {bottom:.2f}, x {left:.2f} to {right:.2f}")]


def _draw_boxes(row: Row, picture: np.ndarray | None, shown: Shown) -> list[np.ndarray]:
    boxes, classes = row["boxes"], row.get("box_classes", np.zeros(len(row["boxes"]), np.int32))
    size = _CELL * 2  # names need room
    canvas = np.full((size, size, 3), 40, np.uint8) if picture is None else drawing.enlarged(picture, size)
    caption = f"{int((classes >= 0).sum())} boxes"
    if "crop_box" in row:  # relative to the whole picture: brought to what is seen of it
        x, y, w, h = row["crop_box"]
        boxes, classes = drawing.seen_boxes(boxes, classes, row["crop_box"])
        caption += f", crop x {x:.2f} y {y:.2f} w {w:.2f} h {h:.2f}"
    flags = ["+".join(name for bit, name in enumerate(FLAGS) if n >> bit & 1) for n in row.get("box_flags", ())]
    return [
        drawing.captioned(drawing.boxes(canvas, boxes, classes, shown.tables.get("box_classes", ()), flags), caption)
    ]


_DRAWN = {
    "segmentation": _draw_segmentation,
    "depth": _draw_depth,
    "edges": _draw_edges,
    "low_res": _draw_low_res,
    "coords": _draw_coords,
    "keypoints": _draw_keypoints,
    "boxes": _draw_boxes,
}


def examples(data: ConfigDict, source: Source, transform: Transform, split: str, number: int) -> Iterator[Row]:
    """The first rows of training in its shuffled order, or readable ones of validation, spread over it."""
    if split == "train":
        with _open(data, source, transform, number, data.threads) as batches:
            batch = next(batches)
        yield from ({key: value[k] for key, value in batch.items()} for k in range(number))
        return
    for batch in evaluation(source, rows=np.arange(1), global_batch=1, transform=transform, limit=number):
        if batch.pop("valid")[0]:
            yield {key: value[0] for key, value in batch.items()}


def _open(data: ConfigDict, source: Source, transform: Transform, batch: int, threads: int, processes: int = 0) -> Any:
    return pipeline(
        source,
        rows=np.arange(batch),
        global_batch=batch,
        seed=data.seed,
        start=0,
        transform=transform,
        threads=threads,
        processes=processes,
        max_corrupt_share=1.0,
    )


class Speed(NamedTuple):
    """How fast rows are made: a second of one core's time, and a second of the clock; and what could not be read."""

    per_core: float
    per_second: float
    replaced: Mapping[str, str]


def measure(data: ConfigDict, source: Source, transform: Transform, *, threads: int, processes: int = 0) -> Speed:
    """Reads a few hundred rows; `threads=0` reads them in this thread, so that its time is one core's."""
    batch = 16
    with _open(data, source, transform, batch, threads, processes) as batches:
        next(batches)  # opens files and starts threads
        rows, start, busy = 0, time.perf_counter(), time.process_time()
        while rows < _MEASURED and time.perf_counter() - start < _SECONDS:
            next(batches)
            rows += batch
        busy, elapsed = time.process_time() - busy, time.perf_counter() - start
        return Speed(rows / max(busy, 1e-9), rows / elapsed, dict(batches.replaced))


def describe(config: ConfigDict, source: Source, transform: Transform, split: str, rows: Sequence[Row]) -> list[str]:
    """What to know of a data set, in lines: its size, classes, picture sizes, and the ranges of what the model gets."""
    data = config.data
    lines = [f"source       {data.source} {data.path}".rstrip() + f", {split}: {len(source)} examples"]
    if source.classes:
        lines.append(f"classes      {len(source.classes)}: {_few(source.classes)}")
    for key, names in getattr(source, "tables", {}).items():
        lines.append(f"{key:12} {len(names)} names: {_few(names)}")
    sizes, unreadable = [], []
    for index in np.linspace(0, len(source) - 1, min(len(rows), len(source))).astype(int):
        try:
            sizes.append(source[int(index)]["image"].shape[:2])
        except CorruptExample as error:
            unreadable.append(str(error))
    if sizes:
        (low_h, low_w), (high_h, high_w) = np.min(sizes, axis=0), np.max(sizes, axis=0)
        lines.append(f"decoded      {low_w} to {high_w} wide, {low_h} to {high_h} high, in {len(sizes)} of them")
    lines += [f"unreadable   {text}" for text in unreadable]
    lines.append(f"made         {data.image_size} px, crop {transform.crop}, flip {transform.flip}, {data.resize}")
    for key in rows[0]:
        values = np.stack([row[key] for row in rows])
        line = f"{key:12} {values.dtype} {list(values.shape[1:])}, {values.min():.4g} to {values.max():.4g}"
        if key in ("segmentation", "label", "box_classes"):
            line += f", {len(np.unique(values[values >= 0]))} different"
        else:
            line += f", mean {values.mean():.3g}"
        lines.append(line)
    return lines


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def show(config: ConfigDict, *, out: str, number: int, split: str, keys: Sequence[str] | None) -> None:
    """Writes the sheet and prints what the config feeds its model.

    Args:
      config: of either stage; only its data and the keys of its model are used.
      out: the PNG file, local or gs://.
      number: rows to show.
      split: "train" or "val".
      keys: batch keys to show; None takes those of the config's model.

    Raises:
      UserError: what opening the source raises, a key that it has not, or nothing that can be read.
    """
    choose("--split", split, dict.fromkeys(("train", "val")))
    if number < 1:
        raise UserError(f"--number={number}: at least 1")
    keys = tuple(keys) if keys else keys_of(config)
    for key in keys:
        choose("--keys", key, KEYS)
    source = open_source(config.data, split)
    if "label" in keys and not source.classes:
        raise UserError(f"--keys: '{config.data.source}' has no classes here, so no label; name other keys")
    transform = Transform.from_config(config.data, keys=keys, classes=len(source.classes), train=split == "train")
    shown = Shown(source.classes, getattr(source, "tables", {}))
    rows = list(examples(config.data, source, transform, split, number))
    if not rows:
        raise UserError(f"config.data: none of the examples of '{split}' that were tried can be read")
    storage.write_bytes(storage.path(out), png_bytes(sheet(rows, shown)))
    for line in describe(config, source, transform, split, rows):
        print(line)
    core = measure(config.data, source, transform, threads=0)
    threads, processes = config.data.threads, config.data.processes
    ours = measure(config.data, source, transform, threads=threads, processes=processes)
    for name, reason in {**core.replaced, **ours.replaced}.items():
        print(f"unreadable   {name}: {reason}")
    print(
        f"speed        {core.per_core:.0f} images/s a core; {ours.per_second:.0f} images/s with threads={threads}, ",
        end="",
    )
    print(f"processes={processes}, as configured")
    print(f"wrote        {out}: {len(rows)} examples")


def main() -> None:
    given = flags.FLAGS
    show(given.config, out=given.out, number=given.number, split=given.split, keys=given.keys)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Config file, with an argument after a colon: configs/demo_vqgan.py:runlocal.", lock_config=True
    )
    flags.DEFINE_string("out", None, "The PNG file to write.")
    flags.DEFINE_integer("number", 16, "Rows of a batch to show.")
    flags.DEFINE_string("split", "train", "train or val.")
    flags.DEFINE_list("keys", None, "Batch keys to show, such as image,segmentation; those of the model unless given.")
    cli.run(main, required=("config", "out"))
