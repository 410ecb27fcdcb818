"""Reports on runs: the self-contained page of one (index.html), and tables and overlaid curves of many.

python -m vqgan_jax.tools.report runs/gpt                     # runs/gpt/index.html
python -m vqgan_jax.tools.report runs/* --out=runs/all.html   # and runs/all.md, .csv, .tex and .png
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.tools import tables
from vqgan_jax.tools.curves import Series, read_metrics, save_overlaid
from vqgan_jax.tools.page import alike, define_scores, read_json, read_starts, write_page
from vqgan_jax.train.metric_writer import JSON_LINES

SUMMARY, EVALUATION, COMMANDS = "summary.json", "evaluation.json", "commands.json"
PICTURES = {
    "reconstructions.png": ("Reconstructions", "held-out images and what the VQGAN makes of their codes"),
    "samples.png": ("Samples", "drawn by the transformer, one row a class"),
    "panorama.png": ("Panoramas", "wider than anything seen in training: the transformer's window slides along"),
    "nearest.png": ("Nearest training images", "each sample with the training image nearest to it on its right"),
}
TABLES = {".md": tables.markdown, ".csv": tables.comma_separated, ".tex": tables.latex}


def gather(folders: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """What `write_page` shows of demo folders and workdirs: its arguments `summary`, `commands`, `runs`, `pictures`.

    A demo folder holds workdirs, summary.json, commands.json and pictures. Where there is no summary.json the last
    scores on held-out data of each run stand in for it. With several folders, names get the folder's in front.

    Raises:
      UserError: a folder that holds no metrics.jsonl, nor do its subfolders.
    """
    summary, commands, runs, pictures = {}, [], {}, []
    for folder in map(storage.path, folders):
        front = f"{_name(folder)}/" if len(folders) > 1 else ""
        found = _runs(folder, front)
        runs |= found
        rows = _figures(folder, found, front)
        for run, figures in rows.items():
            run = f"{run}/" if len(folders) > 1 or len(rows) > 1 else ""
            summary |= {f"{run}{name}": value for name, value in figures.items()}
        log = read_json(folder / COMMANDS)
        if isinstance(log, list):
            commands += [entry["command"] for entry in log if entry["exit"] == 0]
        else:
            starts = [start for workdir in found.values() for start in read_starts(workdir)]
            commands += [shlex.join(["python", *start["argv"]]) for start in starts if "argv" in start]
        pictures += [
            (front + title, caption, folder / file)
            for file, (title, caption) in PICTURES.items()
            if (folder / file).exists()
        ]
    return {"summary": summary, "commands": list(dict.fromkeys(commands)), "runs": runs, "pictures": pictures}


def gather_rows(paths: Sequence[str | os.PathLike]) -> dict[str, dict[str, Any]]:
    """A row of figures for each workdir, demo folder and result of evaluate.py (for a sweep one for each setting, for
    a followed run one for each checkpoint), called by `tables.named`."""
    rows: dict[str, dict[str, Any]] = {}
    files = [storage.path(path) for path in paths]
    stems = [path.stem for path in files if path.suffix == ".json"]
    for path in files:
        if path.suffix != ".json":
            front = f"{_name(path)}/"
            rows |= _figures(path, _runs(path, front), front)
            continue
        result = read_json(path)
        if not isinstance(result, dict):
            raise UserError(f"{path}: is no result of evaluate.py")
        name = path.stem if stems.count(path.stem) == 1 else f"{_name(path.parent)}/{path.stem}"
        name = str(path) if name in rows else name
        swept = result.get("rows")
        if isinstance(swept, list):
            for k, row in enumerate(swept):
                own = row.get("name") or f"step {row.get('step', k)}"
                rows[f"{name}: {own}"] = {"definition": row.get("definition"), **row.get("scores", {})}
        else:
            rows[name] = result
    return {
        tables.named(run, figures): {name.replace("val/", "val_"): x for name, x in figures.items()}
        for run, figures in rows.items()
    }


def _runs(folder: epath.Path, front: str) -> dict[str, epath.Path]:
    """A folder's workdirs by name."""
    workdirs = _workdirs(folder)
    if workdirs == [folder]:
        return {_name(folder): folder}
    return {f"{front}{workdir.name}": workdir for workdir in workdirs}


def _figures(folder: epath.Path, found: Mapping[str, epath.Path], front: str) -> dict[str, dict[str, Any]]:
    """The figures of a folder as a whole, where it has some, else those of each of its workdirs."""
    figures = read_json(folder / SUMMARY) or read_json(folder / EVALUATION)
    if isinstance(figures, dict):
        return {front.rstrip("/") or _name(folder): figures}
    scores = {name: _last_scores(read_metrics(workdir / JSON_LINES)) for name, workdir in found.items()}
    return {name: x and x | {"definition": define_scores(found[name])} for name, x in scores.items()}


def _workdirs(folder: epath.Path) -> list[epath.Path]:
    """The workdirs of a demo folder in the order they were trained, or the folder itself where it is one."""
    inner = [path.parent for path in folder.glob(f"*/{JSON_LINES}")]
    if inner and not (folder / "config.json").exists():
        started = {path: read_metrics(path / JSON_LINES).get("time", ([], [np.inf]))[1][0] for path in inner}
        return sorted(inner, key=lambda path: (started[path], path.name))
    if (folder / JSON_LINES).exists():
        return [folder]
    missing = "no such folder" if not folder.is_dir() else f"no {JSON_LINES} in it, nor in its subfolders"
    raise UserError(f"{folder}: {missing}; give the --workdir of a training run or the --out of the demo")


def _name(folder: epath.Path) -> str:
    return folder.resolve().name


def _last_scores(metrics: Mapping[str, Series]) -> dict[str, float]:
    scores = {name: float(values[-1]) for name, (_, values) in metrics.items() if name.startswith("val/")}
    return scores and {"step": max(int(steps[-1]) for steps, _ in metrics.values())} | scores


def report(paths: Sequence[str], out: str = "", title: str = "", rows: tables.Rows | None = None) -> list[epath.Path]:
    """Writes what there is to write about `paths` and returns the files.

    Args:
      paths: workdirs and demo folders; of several, also results of evaluate.py, and anything else is passed over.
      out: the page; by default index.html in the one folder, or report.html where the several lie.
      title: the page's heading; by default the names.
      rows: figures of several, for the tables and the page, in place of those of each of `paths`.

    Raises:
      UserError: nothing there to report on.
    """
    if len(paths) == 1 and not paths[0].endswith(".json") and rows is None:
        page = storage.path(out) if out else storage.path(paths[0]) / "index.html"
        write_page(page, title=title or _name(storage.path(paths[0])), **gather(paths))
        return [page]
    results = [path for path in paths if path.endswith(".json")]
    folders, skipped = [], []
    for path in paths:
        if path not in results:
            try:
                _workdirs(storage.path(path))
                folders.append(path)
            except UserError as error:
                skipped.append(error)
    if not folders and not results:
        raise skipped[0]
    for error in skipped:
        print(f"passed over: {error}", file=sys.stderr)
    page = storage.path(out) if out else storage.path(paths[0]).parent / "report.html"
    found = gather(folders)
    if rows is not None:
        found["summary"] = {f"{run}/{name}": value for run, figures in rows.items() for name, value in figures.items()}
    write_page(page, title=title or ", ".join(_name(storage.path(path)) for path in folders + results), **found)
    files = [page]
    rows = gather_rows([*folders, *results]) if rows is None else rows
    for suffix, table in TABLES.items():
        files.append(page.with_suffix(suffix))
        storage.write_text(files[-1], table(rows))
    series = {name: read_metrics(workdir / JSON_LINES) for name, workdir in found["runs"].items()}
    if save_overlaid(page.with_suffix(".png"), alike(series, found["runs"])):
        files.append(page.with_suffix(".png"))
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vqgan_jax.tools.report",
        description="Writes one self-contained HTML page about training runs: figures, commands, pictures, curves and "
        "the record of what ran. It opens without a network and can be sent to anyone. Works while a run goes on, too. "
        "Of several runs also tables (Markdown, CSV, LaTeX) and their curves in one picture, beside the page.",
        epilog="example: python -m vqgan_jax.tools.report runs/flowers_vqgan runs/flowers_gpt --out=flowers.html",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="RUN_DIR", help="a --workdir, the demo's --out, or a result of evaluate.py (.json)"
    )
    parser.add_argument("--out", default="", metavar="FILE", help="the page (default: index.html in the one RUN_DIR)")
    parser.add_argument("--title", default="", help="the page's heading (default: the names of the folders)")
    args = parser.parse_args(argv)
    try:
        files = report(args.paths, args.out, args.title)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = args.out or "the runs' folder"
        print(f"error: --out={where}: cannot be written ({error.strerror or error})", file=sys.stderr)
        return 2
    for file in files:
        print(f"wrote {file} ({file.stat().length / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
