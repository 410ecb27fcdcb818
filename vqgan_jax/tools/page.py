"""The run page as HTML: style, figures, commands, pictures, curves and the record of what ran. It fetches nothing."""

import base64
import io
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from vqgan_jax import storage
from vqgan_jax.tools.curves import BASELINE, Series, box, overlaid, read_metrics, run_curves, text
from vqgan_jax.tools.tables import comparable, figure, number
from vqgan_jax.train.metric_writer import JSON_LINES

Picture = tuple[str, str, Any]  # title, caption, file

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
    out: str | os.PathLike,
    *,
    title: str,
    summary: Mapping[str, Any],
    commands: Sequence[str],
    runs: Mapping[str, Any],
    pictures: Sequence[Picture],
) -> None:
    """Writes the page; what a run lacks (metrics, config, record, pictures) is left out.

    Args:
      out: the HTML file; its folder is made where it is missing.
      title: the page's heading.
      summary: figures by name, those of tables.FIGURES with their unit and meaning; a name may stand behind "RUN/". The
        figure `table_nll` is drawn as a dashed line beside the transformer's NLL.
      commands: shell lines that made the runs.
      runs: workdirs by name, in the order to show them. Of several, the curves are laid over each other first.
      pictures: (title, caption, image file) shown before those of the workdirs.
    """
    series = {name: read_metrics(storage.path(workdir) / JSON_LINES) for name, workdir in runs.items()}
    shown = [element for element in map(_picture, pictures) if element]
    drawn = [run_curves(name, metrics, _baseline(name, summary)) for name, metrics in series.items() if metrics]
    training = []
    for name, workdir in runs.items():
        elements = [element for element in map(_picture, _newest_pictures(storage.path(workdir))) if element]
        training += [f"<h3>{text(name)}</h3>", box("pictures", elements)] if elements else []
    record = [_record(name, storage.path(workdir)) for name, workdir in runs.items()]
    sections = (
        ("Summary", [_summary_table(summary)] if summary else []),
        ("Commands", _commands(commands)),
        ("Pictures", [box("pictures", shown)] if shown else []),
        ("Runs compared", overlaid(alike(series, runs))),
        ("Curves", drawn),
        ("Pictures from training", training),
        ("Run record", [part for part in record if part]),
    )
    body = "\n".join(f"<h2>{heading}</h2>\n" + "\n".join(parts) for heading, parts in sections if parts)
    storage.write_text(out, _PAGE.format(title=text(title), css=_CSS, script=_SCRIPT, body=body))


def define_scores(workdir: epath.Path) -> dict[str, Any]:
    """What defines the scores by features that a run logs, as far as its config tells; {} where there is none."""
    config = read_json(workdir / "config.json")
    if not isinstance(config, dict) or "fid_preset" not in config:
        return {}
    said = {name: config.get(f"fid_{name}") for name in ("preset", "samples")}
    data = {key: value for key, value in config.get("data", {}).items() if key not in ("threads", "processes")}
    return {
        **said,
        "network": config.get("fid_weights"),
        "reference": [config.get("fid_reference"), data],
        "data": data,
    }


def alike(series: Mapping[str, Mapping[str, Series]], runs: Mapping[str, Any]) -> dict[str, dict[str, Series]]:
    """The series of runs that may be laid over each other: without those by features that were not made alike.

    Args:
      series: of each run, by name.
      runs: workdirs by name.
    """
    rows = {name: {"definition": define_scores(storage.path(runs[name]))} for name in series}
    metrics = {metric for found in series.values() for metric in found}
    kept = {metric for metric in metrics if comparable([rows[run] for run in series if metric in series[run]], metric)}
    return {run: {metric: found[metric] for metric in found if metric in kept} for run, found in series.items()}


def _newest_pictures(workdir: epath.Path) -> list[Picture]:
    """images/NAME_STEP.png of the last step of each name."""
    newest: dict[str, tuple[int, epath.Path]] = {}
    for path in sorted((workdir / "images").glob("*.png")):
        if match := re.fullmatch(r"(.+)_(\d{8,})", path.stem):
            newest[match[1]] = max(newest.get(match[1], (-1, path)), (int(match[2]), path))
    return [(name, f"after step {step:,}", path) for name, (step, path) in newest.items()]


def read_starts(workdir: epath.Path) -> list[dict[str, Any]]:
    """The records of every start of a run, first to last."""
    paths = [path for path in (workdir / "run").glob("*.json") if path.stem.isdecimal()]
    records = [read_json(path) for path in sorted(paths, key=lambda path: int(path.stem))]
    return [record for record in records if isinstance(record, dict)]


def read_json(path: epath.Path) -> Any:
    """The file's content, or None where it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _summary_table(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, value in summary.items():
        if name.endswith("_stderr"):
            continue  # shown with its figure
        front, _, base = name.replace("val/", "val_").rpartition("/")
        label, unit, meaning, _ = figure(base)
        if isinstance(value, int | float) and not isinstance(value, bool):
            error = summary.get(f"{name}_stderr")
            value = number(value, unit)
            unit = "" if unit == "%" or value.endswith(("s", "min")) else unit
            if isinstance(error, int | float):
                unit = f"{unit} ± {number(error, '%') if value.endswith('%') else f'{error:.2g}'}"
        elif isinstance(value, Mapping | list):
            continue  # what defines a score, and the rows of a sweep
        else:
            value = value if isinstance(value, str) else json.dumps(value)
        where = f' <span class="soft">{text(front)}</span>' if front else ""
        rows.append(
            f'<tr><th scope="row">{text(label)}{where}</th><td class="value">{text(value)} <span>{text(unit)}'
            f'</span></td><td class="soft">{text(meaning)}</td></tr>'
        )
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _commands(commands: Sequence[str]) -> list[str]:
    if not commands:
        return []
    note = "<p>Run from the root of the repository, in this order.</p>"
    return [note, *(f'<div class="command"><pre><code>{text(line)}</code></pre></div>' for line in commands)]


def _picture(picture: Picture) -> str | None:
    """A figure with the picture as a data URI; None where the file is missing or no image."""
    title, caption, path = picture
    try:
        data = storage.path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height, kind = *image.size, image.get_format_mimetype()
    except OSError:
        return None
    scale = max(1, min(4, 520 // max(width, height)))  # small pictures by whole factors, which keep pixels square
    wide = ' class="wide"' if width > 1.4 * height else ""
    enlarged = ' class="enlarged"' if scale > 1 else ""
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure{wide}><img{enlarged} alt="{text(title)}" width="{width * scale}" height="{height * scale}" '
        f'src="{source}"><figcaption><b>{text(title)}</b> {text(caption)}</figcaption></figure>'
    )


def _baseline(run: str, summary: Mapping[str, Any]) -> float | None:
    """The figure that stands beside the run's curves: of its own folder, where there are several."""
    folder = run.rpartition("/")[0]
    value = summary.get(f"{folder}/{BASELINE[1]}" if folder else BASELINE[1])
    return value if isinstance(value, int | float) else None


def _record(name: str, workdir: epath.Path) -> str:
    """The last start of a run: source, versions and devices; the config folded."""
    starts, config = read_starts(workdir), read_json(workdir / "config.json")
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
        f'<tr><th scope="row">{key}</th><td>{text(value)}</td></tr>' for key, value in rows.items() if value
    )
    parts = [f"<table>{table}</table>"] if table else []
    if config is not None:
        dump = text(json.dumps(config, indent=1))
        parts.append(f"<details><summary>config.json</summary><pre>{dump}</pre></details>")
    return "\n".join([f"<h3>{text(name)}</h3>", *parts]) if parts else ""


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
