"""Curves of metrics.jsonl: which panels a run has, one inline SVG a panel, and the curves of many runs laid over each
other. Colours are those of the page's style sheet, so that plots follow light and dark."""

import html
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FormatStrFormatter, NullFormatter

from vqgan_jax import storage
from vqgan_jax.tools.tables import number

Series = tuple[np.ndarray, np.ndarray]  # steps [n], values [n]

MAX_POINTS = 300  # of a curve; a longer one is drawn as means of equal stretches


class Panel(NamedTuple):
    """One plot: the metrics it shows where a run logged them, their unit, and its axis: "log" where all are positive
    and far apart, "zero" from 0 up."""

    title: str
    unit: str
    names: tuple[str, ...]
    scale: Literal["linear", "log", "zero"] = "linear"


_VQGAN_PANELS = (
    Panel("Losses", "", ("loss", "l1", "bce", "lpips", "quantizer_loss"), scale="log"),
    Panel("PSNR", "dB", ("val/psnr", "val/psnr_p10")),
    Panel("rFID", "", ("val/rfid",), scale="zero"),
    Panel("Codebook usage", "share of the codes", ("codebook_usage", "val/codebook_usage")),
    Panel("Codebook perplexity", "codes", ("codebook_perplexity", "val/codebook_perplexity")),
    Panel("Discriminator logits", "", ("logits_real", "logits_fake")),
    Panel("Discriminator accuracy", "share of both kinds", ("discriminator_accuracy",)),
    Panel("Adversarial losses", "", ("generator_loss", "discriminator_loss", "lecam")),
    Panel("Adaptive weight", "", ("adaptive_weight",), scale="log"),
)
_TRANSFORMER_PANELS = (
    Panel("Negative log-likelihood", "nats a token", ("nll", "val/nll")),
    Panel("Next-token accuracy", "share of the tokens", ("accuracy", "val/accuracy")),
    Panel("FID", "", ("val/fid",), scale="zero"),
)
_SHARED_PANELS = (
    Panel("Learning rate", "", ("learning_rate", "learning_rate/generator", "learning_rate/discriminator")),
    Panel("Gradient norm", "", ("grad_norm", "grad_norm/generator", "grad_norm/discriminator"), scale="log"),
    Panel("Speed", "images a second", ("images/s",), scale="zero"),
    Panel("Seconds a step", "s", ("step_seconds", "data_wait_seconds"), scale="zero"),
)
OVERLAID = (  # what is compared between runs, one plot a name
    Panel("Loss", "", ("loss",), scale="log"),
    Panel("PSNR", "dB", ("val/psnr",)),
    Panel("Codebook perplexity", "codes", ("val/codebook_perplexity",)),
    Panel("Held-out NLL", "nats a token", ("val/nll",)),
    Panel("FID", "", ("val/rfid", "val/fid")),
    Panel("Speed", "images a second", ("images/s",), scale="zero"),
)
BASELINE = ("Negative log-likelihood", "table_nll")  # the panel that shows it, and the figure's name

# Stand-ins that matplotlib draws with and the page's style sheet replaces, so that curves follow light and dark.
_INK, _GRID = "#000001", "#000002"
_COLOURS = tuple(f"#00001{k}" for k in range(5))
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vqgan_jax",
    "font.size": 8,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "ytick.minor.size": 0,
    "axes.formatter.limits": (-3, 5),
}


def read_metrics(path: str | os.PathLike) -> dict[str, Series]:
    """Reads metrics.jsonl as (steps, values) by name, `time` (seconds since 1970) among them; {} where it is missing.

    Texts and lines torn by a killed process are left out; NaN and infinities stay.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    try:
        lines = storage.path(path).read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            step = row.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, value in row.items():
            if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
                points.setdefault(name, []).append((step, float(value)))
    return {name: (np.array([p[0] for p in row]), np.array([p[1] for p in row])) for name, row in points.items()}


def text(value: object) -> str:
    """A value as text of an HTML page."""
    return html.escape(str(value))


def box(kind: str, parts: Sequence[str]) -> str:
    """Elements side by side in a <div> of a class of the style sheet."""
    return f'<div class="{kind}">\n' + "\n".join(parts) + "\n</div>"


def run_curves(name: str, metrics: Mapping[str, Series], baseline: float | None) -> str:
    """A run's panels under its name; beside its NLL the baseline as a dashed line; a table of what no panel shows."""
    # `nll` is the reconstruction loss of a VQGAN and nats a token of a transformer, hence two lists.
    first_stage = any("codebook" in metric or "quantizer" in metric for metric in metrics)
    panels = (_VQGAN_PANELS if first_stage else _TRANSFORMER_PANELS) + _SHARED_PANELS
    figures, drawn = [], {"time"}
    for panel in panels:
        present = {metric: metrics[metric] for metric in panel.names if metric in metrics}
        if present:
            figures.append(_panel(panel, present, baseline if panel.title == BASELINE[0] else None))
            drawn |= set(present)
    rest = "".join(
        f'<tr><th scope="row">{text(metric)}</th><td class="value">{number(values[-1])}</td>'
        f'<td class="soft">{number(values.min())} to {number(values.max())}</td></tr>'
        for metric, (_, values) in sorted(metrics.items())
        if metric not in drawn
    )
    parts = [f"<h3>{text(name)}</h3>", box("curves", figures)]
    if rest:
        parts.append(
            "<details><summary>Everything else that was logged: last value and range</summary>\n"
            f"<table>{rest}</table></details>"
        )
    return "\n".join(parts)


def _panel(panel: Panel, present: Mapping[str, Series], baseline: float | None) -> str:
    """One plot with its caption, which is also its legend: every curve's last value."""
    keys = []
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(3.7, 2.1), layout="constrained")
        axes = drawn.add_subplot()
        _lines(axes, panel, present, _COLOURS)
        for k, (name, (_, series)) in enumerate(present.items()):
            kind = "dashed" if k >= len(_COLOURS) else ""
            keys.append(_key(f"var(--c{k % len(_COLOURS)})", name, series[-1], kind))
        if baseline is not None:
            axes.axhline(baseline, color=_INK, linewidth=1, linestyle="--")
            keys.append(_key("var(--soft)", BASELINE[1], baseline, "dashed"))
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", transparent=True)
    heading = f"<b>{text(panel.title)}</b> {text(panel.unit)}"
    return (
        f"<figure><figcaption>{heading}</figcaption>{_inline(buffer.getvalue(), panel.title)}"
        f"<figcaption>{''.join(keys)}</figcaption></figure>"
    )


def _lines(axes: Axes, panel: Panel, present: Mapping[str, Series], colours: Sequence[str]) -> None:
    """The curves of a panel; beyond as many as there are colours they are dashed."""
    values = np.concatenate([series[1] for series in present.values()])
    values = values[np.isfinite(values)]
    if panel.scale == "log" and values.size and values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for k, (name, (steps, series)) in enumerate(present.items()):
        points = thin(steps, series)
        axes.plot(
            *points,
            color=colours[k % len(colours)],
            linestyle="-" if k < len(colours) else "--",
            linewidth=1.4,
            marker="." if len(points[0]) < 25 else None,
            markersize=4,
            label=name,
        )
    if panel.scale == "zero":
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("step")


def _shared(runs: Mapping[str, Mapping[str, Series]]) -> list[tuple[Panel, dict[str, Series]]]:
    """The panels of OVERLAID that at least two runs have, with the runs' series."""
    found = []
    for panel in OVERLAID:
        for name in panel.names:
            present = {run: metrics[name] for run, metrics in runs.items() if name in metrics}
            if len(present) > 1:
                title = panel.title if len(panel.names) == 1 else f"{panel.title}: {name}"
                found.append((panel._replace(title=title), present))
    return found


def overlaid(runs: Mapping[str, Mapping[str, Series]]) -> list[str]:
    """The curves of several runs in the same plots, one plot a metric that two of them have, as a page's elements."""
    figures = [_panel(panel, present, None) for panel, present in _shared(runs)]
    return [box("curves", figures)] if figures else []


def save_overlaid(path: str | os.PathLike, runs: Mapping[str, Mapping[str, Series]]) -> bool:
    """The same as one picture for a paper, of the format that the suffix names; False where runs share no metric."""
    panels = _shared(runs)
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawn = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    for k, (panel, present) in enumerate(panels, 1):
        axes = drawn.add_subplot(rows, columns, k)
        _lines(axes, panel, present, [f"C{n}" for n in range(10)])
        axes.set_title(panel.title)
        axes.set_ylabel(panel.unit)
        axes.legend(fontsize="x-small")
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=storage.path(path).suffix.lstrip("."))
    storage.write_bytes(path, buffer.getvalue())
    return True


def _key(colour: str, name: str, last: float, kind: str = "") -> str:
    line = f'<i class="{kind}" style="border-color: {colour}"></i>'
    return f'<span class="key">{line}{text(name)} <b>{number(last)}</b></span>'


def thin(steps: np.ndarray, values: np.ndarray) -> Series:
    """At most MAX_POINTS points: the means of equal stretches, of NaN where a value in a stretch is not finite."""
    stretch = -(-len(values) // MAX_POINTS)
    if stretch == 1:
        return steps, values
    starts = np.arange(0, len(values), stretch)
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _inline(svg: str, label: str) -> str:
    """A matplotlib SVG as an element of the page: its colours from the style sheet, no ids that meet on the page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"| xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{text(label)}">', svg, count=1)
    for stand_in, variable in ((_INK, "--soft"), (_GRID, "--line"), *((c, f"--c{k}") for k, c in enumerate(_COLOURS))):
        svg = svg.replace(stand_in, f"var({variable})")
    return svg
