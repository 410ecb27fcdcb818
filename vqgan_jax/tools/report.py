"""The run page: one HTML file with a run's figures, commands, pictures, curves and record, which fetches nothing."""

import argparse
import base64
import html
import io
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FormatStrFormatter, NullFormatter
from PIL import Image

from vqgan_jax.config import UserError
from vqgan_jax.train.metric_writer import JSON_LINES

Picture = tuple[str, str, Path]  # title, caption, file
Series = tuple[np.ndarray, np.ndarray]  # steps [n], values [n]

SUMMARY, EVALUATION, COMMANDS = "summary.json", "evaluation.json", "commands.json"
MAX_POINTS = 300  # of a curve; a longer one is drawn as means of equal stretches

# Figures by name: what the page calls them, their unit ("%" takes a share), what they mean.
FIGURES = {
    "val_psnr": ("Reconstruction PSNR", "dB", "held-out images through the VQGAN and back; higher is better"),
    "val_psnr_p10": ("PSNR, 10th percentile", "dB", "nine of ten held-out images are at least this good"),
    "val_ssim": ("Reconstruction SSIM", "", "structural similarity of held-out images, at most 1"),
    "val_l1": ("Reconstruction L1", "", "mean absolute difference of pixels in [-1, 1]; lower is better"),
    "codebook_usage": ("Codebook usage", "%", "share of the codes that held-out images use"),
    "codebook_perplexity": ("Codebook perplexity", "codes", "codes used as evenly as this many equally likely ones"),
    "val_nll": ("Transformer NLL", "nats a token", "held-out images; lower is better"),
    "val_bits": ("Transformer NLL", "bits a token", "held-out images; lower is better"),
    "val_accuracy": ("Next-token accuracy", "%", "the likeliest token is the true one"),
    "table_nll": ("NLL of a table", "nats a token", "code frequencies by class and position: the transformer must win"),
    "histogram_entropy": (
        "Entropy of the codes",
        "nats a token",
        "of their histogram: the NLL of knowing nothing else",
    ),
    "class_agreement": ("Class agreement", "%", "samples that a classifier of real images takes for the class asked"),
    "classifier_accuracy": ("Classifier accuracy", "%", "of that classifier, on held-out real images"),
    "val_images": ("Held-out images", "", "scored"),
    "val_tokens": ("Held-out tokens", "", "scored"),
    "class_samples": ("Classified samples", "", "for the class agreement"),
    "step": ("Steps", "", "done at the last score"),
    "seconds": ("Wall time", "s", "of all commands, all starts together"),
}
FIGURES |= {f"val_{name}": FIGURES[name] for name in ("codebook_usage", "codebook_perplexity")}

PICTURES = {
    "reconstructions.png": ("Reconstructions", "held-out images and what the VQGAN makes of their codes"),
    "samples.png": ("Samples", "drawn by the transformer, one row a class"),
    "panorama.png": ("Panoramas", "wider than anything seen in training: the transformer's window slides along"),
}


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
    Panel("Codebook usage", "share of the codes", ("codebook_usage", "val/codebook_usage")),
    Panel("Codebook perplexity", "codes", ("codebook_perplexity", "val/codebook_perplexity")),
    Panel("Discriminator logits", "", ("logits_real", "logits_fake")),
    Panel("Adversarial losses", "", ("generator_loss", "discriminator_loss")),
    Panel("Adaptive weight", "", ("adaptive_weight",), scale="log"),
)
_TRANSFORMER_PANELS = (
    Panel("Negative log-likelihood", "nats a token", ("nll", "val/nll")),
    Panel("Next-token accuracy", "share of the tokens", ("accuracy", "val/accuracy")),
)
_SHARED_PANELS = (
    Panel("Learning rate", "", ("learning_rate", "learning_rate/generator", "learning_rate/discriminator")),
    Panel("Gradient norm", "", ("grad_norm", "grad_norm/generator", "grad_norm/discriminator"), scale="log"),
    Panel("Speed", "images a second", ("images/s",), scale="zero"),
    Panel("Seconds a step", "s", ("step_seconds", "data_wait_seconds"), scale="zero"),
)
_BASELINE = ("Negative log-likelihood", "table_nll")  # the panel that shows it, and the figure's name

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

_CSS = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f7f9; --line: #d9dde3; --ink: #1b2330; --soft: #5d6878;
  --c0: #2266cc; --c1: #d2601a; --c2: #14866d; --c3: #a8409a; --c4: #8a6a10; }
@media (prefers-color-scheme: dark) { :root { --page: #14181f; --card: #1c222b; --line: #38414e; --ink: #e6eaf0;
  --soft: #9aa6b6; --c0: #6aa5ff; --c1: #ff9a57; --c2: #4cc9a7; --c3: #e28ad6; --c4: #d9b44a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 3rem 0 1rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 1.8rem 0 .8rem; font-size: 1.05rem; }
p, .soft, figcaption, summary { color: var(--soft); }
p { margin: .3rem 0 1rem; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: baseline; overflow-wrap: anywhere; }
th { font-weight: 500; }
td.value { font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.value span { font-weight: 400; color: var(--soft); }
pre, code { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0; padding: .7rem .9rem; overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.command { display: flex; gap: .6rem; align-items: start; margin: .5rem 0; }
.command pre { flex: 1; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
button { padding: .6rem .9rem; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; font: inherit; font-size: .85rem; cursor: pointer; }
button:hover { border-color: var(--soft); }
figure { margin: 0; }
figcaption { font-size: .88rem; }
figcaption b { color: var(--ink); }
.pictures { display: flex; flex-wrap: wrap; gap: 1.6rem; align-items: start; }
.pictures img { display: block; max-width: 100%; height: auto; margin-bottom: .5rem; border-radius: 6px; }
.pictures .wide { width: 100%; }
.pictures .wide img { width: 100%; }
.pictures img.enlarged { image-rendering: pixelated; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.curves figure { padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.curves svg { display: block; width: 100%; height: auto; margin: .3rem 0; }
.curves svg text { font-family: inherit !important; }
.key { display: inline-block; margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: 1.1em; margin-right: .4em; border-top: 3px solid; vertical-align: middle; }
.key i.dashed { border-top-style: dashed; border-top-width: 2px; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
details > pre, details > table { margin-top: .6rem; }
@media (max-width: 40rem) { tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  th, td { display: block; padding: 0; border: 0; } }
@media print { button { display: none; } }
"""

_SCRIPT = """
for (const box of document.querySelectorAll(".command")) {
  const button = document.createElement("button"), code = box.querySelector("code");
  button.textContent = "Copy";
  button.onclick = async () => {
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(code); button.textContent = "Selected"; }
    setTimeout(() => button.textContent = "Copy", 1500);
  };
  box.append(button);
}
"""

# The policy makes a browser refuse any request, so that the page cannot start to depend on one.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script>{script}</script>
</body>
</html>
"""


def write_page(
    out: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    commands: Sequence[str],
    runs: Mapping[str, Path],
    pictures: Sequence[Picture],
) -> None:
    """Writes the page; what a run lacks (metrics, config, record, pictures) is left out.

    Args:
      out: the HTML file; its folder is made where it is missing.
      title: the page's heading.
      summary: figures by name, those of FIGURES with their unit and meaning; a name may stand behind "RUN/". The
        figure `table_nll` is drawn as a dashed line beside the transformer's NLL.
      commands: shell lines that made the runs.
      runs: workdirs by name, in the order to show them.
      pictures: (title, caption, image file) shown before those of the workdirs.
    """
    series = {name: read_metrics(Path(workdir) / JSON_LINES) for name, workdir in runs.items()}
    shown = [figure for figure in map(_picture, pictures) if figure]
    curves = [_curves(name, metrics, _baseline(name, summary)) for name, metrics in series.items() if metrics]
    training = []
    for name, workdir in runs.items():
        figures = [figure for figure in map(_picture, _newest_pictures(Path(workdir))) if figure]
        training += [f"<h3>{_text(name)}</h3>", _box("pictures", figures)] if figures else []
    record = [_record(name, Path(workdir)) for name, workdir in runs.items()]
    sections = (
        ("Summary", [_summary_table(summary)] if summary else []),
        ("Commands", _commands(commands)),
        ("Pictures", [_box("pictures", shown)] if shown else []),
        ("Curves", curves),
        ("Pictures from training", training),
        ("Run record", [part for part in record if part]),
    )
    body = "\n".join(f"<h2>{heading}</h2>\n" + "\n".join(parts) for heading, parts in sections if parts)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".tmp")
    partial.write_text(_PAGE.format(title=_text(title), css=_CSS, script=_SCRIPT, body=body), encoding="utf-8")
    partial.replace(out)


def gather(folders: Sequence[str | Path]) -> dict[str, Any]:
    """What `write_page` shows of demo folders and workdirs: its arguments `summary`, `commands`, `runs`, `pictures`.

    A demo folder holds workdirs, summary.json, commands.json and pictures. Where there is no summary.json the last
    scores on held-out data of each run stand in for it. With several folders, names get the folder's in front.

    Raises:
      UserError: a folder that holds no metrics.jsonl, nor do its subfolders.
    """
    summary, commands, runs, pictures = {}, [], {}, []
    for folder in map(Path, folders):
        front = f"{_name(folder)}/" if len(folders) > 1 else ""
        workdirs = _workdirs(folder)
        if workdirs == [folder]:
            found = {_name(folder): folder}
        else:
            found = {f"{front}{workdir.name}": workdir for workdir in workdirs}
        runs |= found
        figures = _read_json(folder / SUMMARY) or _read_json(folder / EVALUATION)
        if isinstance(figures, dict):
            summary |= {f"{front}{name}": value for name, value in figures.items()}
        else:
            for name, workdir in found.items():
                run = f"{name}/" if len(folders) > 1 or len(found) > 1 else ""
                last = _last_scores(read_metrics(workdir / JSON_LINES))
                summary |= {f"{run}{key}": value for key, value in last.items()}
        log = _read_json(folder / COMMANDS)
        if isinstance(log, list):
            commands += [entry["command"] for entry in log if entry["exit"] == 0]
        else:
            starts = [start for workdir in found.values() for start in _starts(workdir)]
            commands += [shlex.join(["python", *start["argv"]]) for start in starts if "argv" in start]
        pictures += [
            (front + title, caption, folder / file)
            for file, (title, caption) in PICTURES.items()
            if (folder / file).exists()
        ]
    return {"summary": summary, "commands": list(dict.fromkeys(commands)), "runs": runs, "pictures": pictures}


def read_metrics(path: str | Path) -> dict[str, Series]:
    """Reads metrics.jsonl as (steps, values) by name, `time` (seconds since 1970) among them; {} where it is missing.

    Texts and lines torn by a killed process are left out; NaN and infinities stay.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
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


def _workdirs(folder: Path) -> list[Path]:
    """The workdirs of a demo folder in the order they were trained, or the folder itself where it is one."""
    inner = [path.parent for path in folder.glob(f"*/{JSON_LINES}")]
    if inner and not (folder / "config.json").exists():
        started = {path: read_metrics(path / JSON_LINES).get("time", ([], [np.inf]))[1][0] for path in inner}
        return sorted(inner, key=lambda path: (started[path], path.name))
    if (folder / JSON_LINES).exists():
        return [folder]
    missing = "no such folder" if not folder.is_dir() else f"no {JSON_LINES} in it, nor in its subfolders"
    raise UserError(f"{folder}: {missing}; give the --workdir of a training run or the --out of the demo")


def _name(folder: Path) -> str:
    return folder.resolve().name


def _last_scores(metrics: Mapping[str, Series]) -> dict[str, float]:
    scores = {name: float(values[-1]) for name, (_, values) in metrics.items() if name.startswith("val/")}
    return scores and {"step": max(int(steps[-1]) for steps, _ in metrics.values())} | scores


def _newest_pictures(workdir: Path) -> list[Picture]:
    """images/NAME_STEP.png of the last step of each name."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted((workdir / "images").glob("*.png")):
        if match := re.fullmatch(r"(.+)_(\d{8,})", path.stem):
            newest[match[1]] = max(newest.get(match[1], (-1, path)), (int(match[2]), path))
    return [(name, f"after step {step:,}", path) for name, (step, path) in newest.items()]


def _starts(workdir: Path) -> list[dict[str, Any]]:
    """The records of every start of a run, first to last."""
    paths = [path for path in (workdir / "run").glob("*.json") if path.stem.isdecimal()]
    records = [_read_json(path) for path in sorted(paths, key=lambda path: int(path.stem))]
    return [record for record in records if isinstance(record, dict)]


def _read_json(path: Path) -> Any:
    """The file's content, or None where it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _text(value: Any) -> str:
    return html.escape(str(value))


def _box(kind: str, parts: Sequence[str]) -> str:
    return f'<div class="{kind}">\n' + "\n".join(parts) + "\n</div>"


def _number(value: float, unit: str = "") -> str:
    """A number to read: shares in percent, long times in minutes, four digits of the rest."""
    if unit == "s" and value >= 60:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
    if unit == "%":
        return f"{100 * value:.1f} %"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _summary_table(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, value in summary.items():
        if name.endswith("_stderr"):
            continue  # shown with its figure
        front, _, base = name.replace("val/", "val_").rpartition("/")
        label, unit, meaning = FIGURES.get(base, (base.replace("_", " "), "", ""))
        if isinstance(value, int | float) and not isinstance(value, bool):
            error = summary.get(f"{name}_stderr")
            value = _number(value, unit)
            unit = "" if unit == "%" or value.endswith(("s", "min")) else unit
            if isinstance(error, int | float):
                unit = f"{unit} ± {_number(error, '%') if value.endswith('%') else f'{error:.2g}'}"
        else:
            value = value if isinstance(value, str) else json.dumps(value)
        where = f' <span class="soft">{_text(front)}</span>' if front else ""
        rows.append(
            f'<tr><th scope="row">{_text(label)}{where}</th><td class="value">{_text(value)} <span>{_text(unit)}'
            f'</span></td><td class="soft">{_text(meaning)}</td></tr>'
        )
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _commands(commands: Sequence[str]) -> list[str]:
    if not commands:
        return []
    note = "<p>Run from the root of the repository, in this order.</p>"
    return [note, *(f'<div class="command"><pre><code>{_text(line)}</code></pre></div>' for line in commands)]


def _picture(picture: Picture) -> str | None:
    """A figure with the picture as a data URI; None where the file is missing or no image."""
    title, caption, path = picture
    try:
        with Image.open(path) as image:
            width, height, kind = *image.size, image.get_format_mimetype()
        data = base64.b64encode(Path(path).read_bytes()).decode()
    except OSError:
        return None
    scale = max(1, min(4, 520 // max(width, height)))  # small pictures by whole factors, which keep pixels square
    wide = ' class="wide"' if width > 1.4 * height else ""
    enlarged = ' class="enlarged"' if scale > 1 else ""
    return (
        f'<figure{wide}><img{enlarged} alt="{_text(title)}" width="{width * scale}" height="{height * scale}" '
        f'src="data:{kind};base64,{data}"><figcaption><b>{_text(title)}</b> {_text(caption)}</figcaption></figure>'
    )


def _baseline(run: str, summary: Mapping[str, Any]) -> float | None:
    """The figure that stands beside the run's curves: of its own folder, where there are several."""
    folder = run.rpartition("/")[0]
    value = summary.get(f"{folder}/{_BASELINE[1]}" if folder else _BASELINE[1])
    return value if isinstance(value, int | float) else None


def _curves(name: str, metrics: Mapping[str, Series], baseline: float | None) -> str:
    # `nll` is the reconstruction loss of a VQGAN and nats a token of a transformer, hence two lists.
    first_stage = any("codebook" in metric or "quantizer" in metric for metric in metrics)
    panels = (_VQGAN_PANELS if first_stage else _TRANSFORMER_PANELS) + _SHARED_PANELS
    figures, drawn = [], {"time"}
    for panel in panels:
        present = {metric: metrics[metric] for metric in panel.names if metric in metrics}
        if present:
            figures.append(_panel(panel, present, baseline if panel.title == _BASELINE[0] else None))
            drawn |= set(present)
    rest = "".join(
        f'<tr><th scope="row">{_text(metric)}</th><td class="value">{_number(values[-1])}</td>'
        f'<td class="soft">{_number(values.min())} to {_number(values.max())}</td></tr>'
        for metric, (_, values) in sorted(metrics.items())
        if metric not in drawn
    )
    parts = [f"<h3>{_text(name)}</h3>", _box("curves", figures)]
    if rest:
        parts.append(
            "<details><summary>Everything else that was logged: last value and range</summary>\n"
            f"<table>{rest}</table></details>"
        )
    return "\n".join(parts)


def _panel(panel: Panel, present: Mapping[str, Series], baseline: float | None) -> str:
    """One plot with its caption, which is also its legend: every curve's last value."""
    values = np.concatenate([series[1] for series in present.values()])
    values = values[np.isfinite(values)]
    keys = []
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.7, 2.1), layout="constrained")
        axes = figure.add_subplot()
        if panel.scale == "log" and values.size and values.min() > 0 and values.max() > 30 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        for k, (name, (steps, series)) in enumerate(present.items()):
            points = _thin(steps, series)
            marker = "." if len(points[0]) < 25 else None
            axes.plot(*points, color=_COLOURS[k], linewidth=1.4, marker=marker, markersize=4)
            keys.append(_key(f"var(--c{k})", name, series[-1]))
        if baseline is not None:
            axes.axhline(baseline, color=_INK, linewidth=1, linestyle="--")
            keys.append(_key("var(--soft)", _BASELINE[1], baseline, "dashed"))
        if panel.scale == "zero":
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("step")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    heading = f"<b>{_text(panel.title)}</b> {_text(panel.unit)}"
    return (
        f"<figure><figcaption>{heading}</figcaption>{_inline(buffer.getvalue(), panel.title)}"
        f"<figcaption>{''.join(keys)}</figcaption></figure>"
    )


def _key(colour: str, name: str, last: float, kind: str = "") -> str:
    line = f'<i class="{kind}" style="border-color: {colour}"></i>'
    return f'<span class="key">{line}{_text(name)} <b>{_number(last)}</b></span>'


def _thin(steps: np.ndarray, values: np.ndarray) -> Series:
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
    svg = re.sub(
        r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{_text(label)}">', svg, count=1
    )
    for stand_in, variable in ((_INK, "--soft"), (_GRID, "--line"), *((c, f"--c{k}") for k, c in enumerate(_COLOURS))):
        svg = svg.replace(stand_in, f"var({variable})")
    return svg


def _record(name: str, workdir: Path) -> str:
    """The last start of a run: source, versions and devices; the config folded."""
    starts, config = _starts(workdir), _read_json(workdir / "config.json")
    rows = {}
    if starts:
        last = starts[-1]
        git, devices = last.get("git"), last.get("devices")
        if isinstance(git, dict):
            git = f"{git.get('revision', '?')}{', with changes' if git.get('dirty') else ''}"
        if isinstance(devices, dict):
            devices = "{count} x {kind} ({platform}), processes: {processes}".format_map(
                {"count": "?", "kind": "?", "platform": "?", "processes": "?"} | devices
            )
        versions = ", ".join(f"{package} {version}" for package, version in (last.get("versions") or {}).items())
        rows = {"Revision": git, "Devices": devices, "Versions": versions, "Starts": len(starts)}
    seconds = read_metrics(workdir / JSON_LINES).get("time", (None, np.zeros(0)))[1]
    if seconds.size:
        rows["Logged"] = f"{_date(seconds[0])} to {_date(seconds[-1])}"
    table = "".join(
        f'<tr><th scope="row">{key}</th><td>{_text(value)}</td></tr>' for key, value in rows.items() if value
    )
    parts = [f"<table>{table}</table>"] if table else []
    if config is not None:
        text = _text(json.dumps(config, indent=1))
        parts.append(f"<details><summary>config.json</summary><pre>{text}</pre></details>")
    return "\n".join([f"<h3>{_text(name)}</h3>", *parts]) if parts else ""


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vqgan_jax.tools.report",
        description="Writes one self-contained HTML page about training runs: figures, commands, pictures, curves and "
        "the record of what ran. It opens without a network and can be sent to anyone. Works while a run goes on, too.",
        epilog="example: python -m vqgan_jax.tools.report runs/flowers_vqgan runs/flowers_gpt --out=flowers.html",
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="a --workdir of training, or the demo's --out")
    parser.add_argument("--out", metavar="FILE", help="the page (default: index.html in the first RUN_DIR)")
    parser.add_argument("--title", help="the page's heading (default: the names of the folders)")
    args = parser.parse_args(argv)
    out = Path(args.out or Path(args.folders[0]) / "index.html")
    title = args.title or ", ".join(_name(Path(folder)) for folder in args.folders)
    try:
        write_page(out, title=title, **gather(args.folders))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out={out}: cannot be written ({error.strerror or error})", file=sys.stderr)
        return 2
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
