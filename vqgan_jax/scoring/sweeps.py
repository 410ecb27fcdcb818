"""Sweeps over sampler settings: the grid of a text such as "temperature=0.9,1.0;top_k=0,100", one scored row each.

Rows that are done stay done: a row's key is the digest of all that defines it, and is looked up in the JSON first.
"""

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from etils import epath
from matplotlib.figure import Figure

from vqgan_jax import parallel, storage
from vqgan_jax.config import UserError, suggest
from vqgan_jax.sampling.strategies import RAMPS, Strategy

Setting = dict[str, Any]  # values by name, as in SETTINGS
ACCEPTANCE = "acceptance"
# Fields of Strategy, and the share that rejection sampling keeps: how a value is read, whether it may be, what it is.
SETTINGS: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str]] = {
    "temperature": (float, lambda x: x > 0, "a number above 0"),
    "top_k": (int, lambda x: x >= 0, "a whole number, 0 for all"),
    "top_p": (float, lambda x: 0 <= x <= 1, "a share from 0 to 1"),
    "min_p": (float, lambda x: 0 <= x <= 1, "a share from 0 to 1"),
    "guidance": (float, math.isfinite, "a number, 1 for none"),
    "power": (float, lambda x: x > 0, "a number above 0"),
    "schedule": (str, RAMPS.__contains__, f"one of {', '.join(RAMPS)}"),
    "greedy": ({"true": True, "false": False}.__getitem__, lambda x: True, "true or false"),
    ACCEPTANCE: (float, lambda x: 0 < x <= 1, "a share above 0 and at most 1"),
}
_SHOWN = ("fid", "sfid", "is_mean", "precision", "recall", "kid_mean", "class_agreement")


def parse(text: str, flag: str = "--sweep") -> list[Setting]:
    """The product of "name=value,value;name=value", names as in SETTINGS. Raises UserError: one of them is wrong."""
    axes: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, values = (piece.strip() for piece in part.partition("="))
        if name not in SETTINGS or name in axes:
            problem = "is given twice" if name in axes else f"is no setting of the sampler{suggest(name, SETTINGS)}"
            raise UserError(f"{flag}: '{name}' {problem}")
        read, allowed, meaning = SETTINGS[name]
        try:
            axes[name] = [read(value.strip()) for value in values.split(",") if equals and value.strip()]
        except (ValueError, KeyError):
            raise UserError(f"{flag}: '{part}': {name} is {meaning}") from None
        if not axes[name]:
            raise UserError(f"{flag}: '{part}' has no values; write {name}=VALUE,VALUE")
        for value in axes[name]:
            if not allowed(value):
                raise UserError(f"{flag}: {name}={value}: {name} is {meaning}")
    if not axes:
        raise UserError(f"{flag}={text}: no settings; write temperature=0.9,1.0;top_k=0,100")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def setting_of(strategy: Strategy, acceptance: float) -> Setting:
    """What of a strategy differs from the default, and the acceptance rate where it rejects."""
    fields = {name: getattr(strategy, name) for name in (*SETTINGS, "interval") if name != ACCEPTANCE}
    found = {name: value for name, value in fields.items() if value != getattr(Strategy(), name)}
    return found | ({ACCEPTANCE: acceptance} if acceptance != 1 else {})


def split(setting: Setting) -> tuple[Strategy, float]:
    """A setting as the sampler takes it, and the acceptance rate."""
    fields = {name: value for name, value in setting.items() if name != ACCEPTANCE}
    return Strategy(**fields), setting.get(ACCEPTANCE, 1.0)


def name_of(setting: Setting) -> str:
    """A setting as its row is called: "temperature=0.9 top_k=100"."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in setting.items()
    )


def run(
    settings: Iterable[Setting],
    score: Callable[[Setting], Mapping[str, Any]],
    out: epath.Path,
    define: Callable[[Setting], Mapping[str, Any]],
) -> dict[str, Any]:
    """Scores every setting and writes the result after each; rows that `out` holds of this very definition are kept.

    Args:
      settings: as `parse` gives them.
      score: a setting -> its figures.
      out: the JSON file; beside it, with its stem, NAME.csv and NAME.png.
      define: a setting -> all that defines its row: checkpoint, data, networks, seed.

    Returns:
      {"rows": [{"name", "setting", "key", "scores", "definition"}], "best": the name of the row with the lowest FID,
      "earlier": rows that `out` held and these settings did not ask for (yet)}.
    """
    settings = list(settings)
    done = parallel.of_first_host(lambda: _finished(out))  # hosts must not part over what each finds in a file
    rows: list[dict[str, Any]] = []
    for number, setting in enumerate(settings, 1):
        definition = dict(define(setting))
        key = digest({"setting": setting, "definition": definition})
        if key in done:
            parallel.say(f"[{number}/{len(settings)}] {name_of(setting)}: done before")
        else:
            parallel.say(f"[{number}/{len(settings)}] {name_of(setting)}")
            row = {"name": name_of(setting), "key": key, "scores": dict(score(setting)), "definition": definition}
            done[key] = row
        rows.append(done[key] | {"setting": setting})  # not as JSON keeps it, which makes lists of tuples
        reached = {row["key"] for row in rows}
        earlier = [row for key, row in done.items() if key not in reached]
        result = {"rows": rows, "best": best(rows), "earlier": earlier}
        if jax.process_index() == 0:
            storage.write_json(out, result)
    if jax.process_index() == 0:
        storage.write_text(out.with_suffix(".csv"), comma_separated(rows))
        _plot(out.with_suffix(".png"), rows)
    parallel.say(table(rows))
    return result


def digest(value: Any) -> str:
    """SHA-256 of plain data; versions and devices do not count, for they do not make another row."""
    if isinstance(value, Mapping) and isinstance(value.get("definition"), Mapping):
        kept = {k: v for k, v in value["definition"].items() if k not in ("versions", "devices")}
        value = {**value, "definition": kept}
    return storage.digest(value)


def _finished(out: epath.Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(out.read_text())
        return {row["key"]: row for name in ("earlier", "rows") for row in found.get(name, [])}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def best(rows: list[dict[str, Any]]) -> str | None:
    """The name of the row with the lowest FID."""
    scored = [row for row in rows if math.isfinite(row["scores"].get("fid", math.nan))]
    return min(scored, key=lambda row: row["scores"]["fid"])["name"] if scored else None


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text in columns, the best one marked with a star."""
    names = [name for name in _SHOWN if any(name in row["scores"] for row in rows)]
    top = best(rows)
    lines = [["", "setting", *names]]
    for row in rows:
        values = (row["scores"].get(name, math.nan) for name in names)
        lines.append(["*" if row["name"] == top else "", row["name"], *(f"{value:.4g}" for value in values)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def comma_separated(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV: settings, then figures in full precision, then whether the row is the best."""
    settings = list(dict.fromkeys(name for row in rows for name in row["setting"]))
    figures = list(
        dict.fromkeys(name for row in rows for name, v in row["scores"].items() if isinstance(v, int | float))
    )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*settings, *figures, "best"])
    top = best(rows)
    for row in rows:
        cells = [row["setting"].get(name, "") for name in settings] + [row["scores"].get(name, "") for name in figures]
        writer.writerow([*cells, int(row["name"] == top)])
    return buffer.getvalue()


def _plot(path: epath.Path, rows: list[dict[str, Any]]) -> None:
    """FID and Inception Score over the axis with most values, one line for each setting of the others; the best row
    ringed; and FID against Inception Score."""
    rows = [row for row in rows if "fid" in row["scores"]]
    if not rows:
        return
    values = {name: sorted({row["setting"][name] for row in rows}, key=str) for name in rows[0]["setting"]}
    axis = max(values.keys() & SETTINGS, key=lambda name: (len(values[name]), -list(values).index(name)))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(name_of({k: v for k, v in row["setting"].items() if k != axis}), []).append(row)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    fid, score, both = figure.subplots(1, 3)
    top = best(rows)
    for name, members in groups.items():
        x = [row["setting"][axis] for row in members]
        fid.plot(x, [row["scores"]["fid"] for row in members], marker=".", label=name or None)
        scores = [row["scores"].get("is_mean", math.nan) for row in members]
        score.plot(x, scores, marker=".", label=name or None)
        both.plot(scores, [row["scores"]["fid"] for row in members], marker=".", label=name or None)
    for row in rows:
        if row["name"] == top:
            ring = dict(marker="o", markersize=11, fillstyle="none", color="black")
            fid.plot(row["setting"][axis], row["scores"]["fid"], **ring)
            score.plot(row["setting"][axis], row["scores"].get("is_mean", math.nan), **ring)
            both.plot(row["scores"].get("is_mean", math.nan), row["scores"]["fid"], **ring)
    for axes, x_label, y_label in (
        (fid, axis, "FID"),
        (score, axis, "Inception Score"),
        (both, "Inception Score", "FID"),
    ):
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
    if len(groups) > 1:
        fid.legend(fontsize="x-small")
    figure.suptitle(f"best FID: {top}", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    storage.write_bytes(path, buffer.getvalue())
