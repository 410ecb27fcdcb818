"""Figures by name (label, unit, meaning, which way is better), and tables of many runs: Markdown, CSV and LaTeX."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Rows = Mapping[str, Mapping[str, Any]]  # run -> figure -> value


class Figure(NamedTuple):
    """What reports call a figure, its unit ("%" takes a share), what it means, and which value is best."""

    label: str
    unit: str
    meaning: str
    best: Literal["max", "min", ""] = ""


FIGURES = {
    "val_psnr": Figure(
        "Reconstruction PSNR", "dB", "held-out images through the VQGAN and back; higher is better", "max"
    ),
    "val_psnr_p10": Figure("PSNR, 10th percentile", "dB", "nine of ten held-out images are at least this good", "max"),
    "val_ssim": Figure("Reconstruction SSIM", "", "structural similarity of held-out images, at most 1", "max"),
    "val_l1": Figure("Reconstruction L1", "", "mean absolute difference of pixels in [-1, 1]; lower is better", "min"),
    "val_lpips": Figure("Reconstruction LPIPS", "", "perceptual distance of held-out images; lower is better", "min"),
    "rfid": Figure("rFID", "", "FID of reconstructions against the same held-out images; lower is better", "min"),
    "rfid_reference": Figure("rFID to the reference", "", "FID of reconstructions to the reference set", "min"),
    "codebook_usage": Figure("Codebook usage", "%", "share of the codes that held-out images use", "max"),
    "codebook_perplexity": Figure(
        "Codebook perplexity", "codes", "codes used as evenly as this many equally likely ones", "max"
    ),
    "val_nll": Figure("Transformer NLL", "nats a token", "held-out images; lower is better", "min"),
    "val_bits": Figure("Transformer NLL", "bits a token", "held-out images; lower is better", "min"),
    "val_bits_per_dim": Figure("Bits a dimension", "", "bits of an image's codes over its height x width x 3", "min"),
    "val_accuracy": Figure("Next-token accuracy", "%", "the likeliest token is the true one", "max"),
    "table_nll": Figure(
        "NLL of a table", "nats a token", "code frequencies by class and position: the transformer must win"
    ),
    "histogram_entropy": Figure(
        "Entropy of the codes", "nats a token", "of their histogram: the NLL of knowing nothing else"
    ),
    "fid": Figure("FID", "", "Frechet distance of features to the reference set; lower is better", "min"),
    "sfid": Figure("sFID", "", "FID of spatial features", "min"),
    "is_mean": Figure("Inception Score", "", "mean over the splits; higher is better", "max"),
    "is_std": Figure("Inception Score, scatter", "", "over the splits"),
    "precision": Figure("Precision", "%", "samples that lie among the reference's", "max"),
    "recall": Figure("Recall", "%", "reference images that lie among the samples", "max"),
    "kid_mean": Figure("KID", "", "squared maximum mean discrepancy, mean over subsets; lower is better", "min"),
    "kid_std": Figure("KID, scatter", "", "over the subsets"),
    "samples": Figure("Samples", "", "scored"),
    "reference_samples": Figure("Reference images", "", "behind the reference's statistics"),
    "class_agreement": Figure(
        "Class agreement", "%", "samples that a classifier of real images takes for the class asked", "max"
    ),
    "classifier_accuracy": Figure("Classifier accuracy", "%", "of that classifier, on held-out real images"),
    "segmentation_agreement": Figure("Segmentation agreement", "%", "pixels whose colour shows the label asked", "max"),
    "depth_order": Figure("Depth order", "%", "pairs of pixels of a row, by colour, in the order asked", "max"),
    "edges_f1": Figure("Edge F1", "%", "edges of the sample against those asked for", "max"),
    "edges_f1_near": Figure("Edge F1, within a pixel", "%", "the same where the next pixel is as good", "max"),
    "low_res_psnr": Figure("Low-resolution PSNR", "dB", "the sample, reduced, against the picture asked for", "max"),
    "keypoints_found": Figure("Key points found", "%", "points near which is what they stand for", "max"),
    "boxes_found": Figure("Boxes found", "%", "boxes that hold enough of their class", "max"),
    "memorisation_closer": Figure(
        "Closer than held-out", "%", "samples nearer the training set than held-out images: 50 % is none, 100 % copies"
    ),
    "memorisation_copies": Figure("Near copies", "%", "samples nearer than 99 % of held-out images; 1 % is expected"),
    "val_images": Figure("Held-out images", "", "scored"),
    "val_tokens": Figure("Held-out tokens", "", "scored"),
    "class_samples": Figure("Classified samples", "", "for the class agreement"),
    "step": Figure("Steps", "", "done at the last score"),
    "seconds": Figure("Wall time", "s", "of all commands, all starts together"),
}
FIGURES |= {f"val_{name}": FIGURES[name] for name in ("codebook_usage", "codebook_perplexity")}
FIGURES |= {f"val_{name}": FIGURES[name] for name in ("fid", "rfid")}
_ASKED_FOR = ("class_agreement", "segmentation_agreement", "depth_order", "edges_f1", "edges_f1_near", "low_res_psnr")
_ASKED_FOR += ("keypoints_found", "boxes_found")


def _beside(figures: Mapping[str, Figure]) -> Iterator[tuple[str, Figure]]:
    """The figures, and beside what is said of a condition what real images and other samples' conditions have."""
    for name, figure in figures.items():
        yield name, figure
        if name in _ASKED_FOR:
            yield f"{name}_shuffled", Figure(f"{figure.label}, shuffled", figure.unit, "with another's condition")
            yield f"{name}_real", Figure(f"{figure.label}, real", figure.unit, "of real images: the most to expect")


FIGURES = dict(_beside(FIGURES))

# What a network's features tell: a figure without its preset, network, reference set and counts says nothing.
BY_FEATURES = {"fid", "sfid", "is", "is_mean", "precision", "recall", "kid_mean", "rfid", "rsfid", "rfid_reference"}


def figure(name: str) -> Figure:
    """What is known of a figure; one that is not in FIGURES is called by its name."""
    return FIGURES.get(name.replace("val/", "val_"), Figure(name.replace("_", " "), "", ""))


def number(value: float, unit: str = "") -> str:
    """A number to read: shares in percent, long times in minutes, four digits of the rest."""
    if unit == "s" and value >= 60:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
    if unit == "%":
        return f"{100 * value:.1f} %"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1e4 else f"{value:.4g}"


def columns(rows: Rows) -> list[str]:
    """The figures that any row has, in the order of FIGURES, then of appearance; standard errors stay with theirs."""
    present = dict.fromkeys(name for figures in rows.values() for name, value in figures.items() if _is_number(value))
    order = {name: place for place, name in enumerate(FIGURES)}
    shown = [name for name in present if not name.endswith("_stderr")]
    return sorted(shown, key=lambda name: order.get(name.replace("val/", "val_"), len(order)))


def best_rows(rows: Rows, name: str) -> set[str]:
    """The rows with the best value of a figure, none where it has no direction, one row alone has it, or the rows'
    values were not made alike."""
    values = {
        run: figures[name]
        for run, figures in rows.items()
        if _is_number(figures.get(name)) and math.isfinite(figures[name])
    }
    direction = figure(name).best
    if not direction or len(values) < 2 or not comparable([rows[run] for run in values], name):
        return set()
    top = (max if direction == "max" else min)(values.values())
    return {run for run, value in values.items() if value == top}


def comparable(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a figure of these rows may be compared: one by features where all say the same of how it was made."""
    if _base(name) not in BY_FEATURES:
        return True
    terms = {_terms(figures, name) for figures in rows}
    return len(terms) == 1 and None not in terms


def named(run: str, figures: Mapping[str, Any]) -> str:
    """What a row is called: where it has figures by features, with the preset and how many images stand behind them."""
    preset = _definition(figures).get("preset")
    told = next((name for name in figures if _base(name) in BY_FEATURES), None)
    if not preset or told is None:
        return run
    count = _count(figures, told)
    return f"{run} [{preset}, {count}]" if count else f"{run} [{preset}]"


def _terms(figures: Mapping[str, Any], name: str) -> str | None:
    """All that must be equal for a figure by features to be compared; None where the row does not say it."""
    definition = _definition(figures)
    if not definition.get("preset"):
        return None
    terms = [definition["preset"], definition.get("network"), _count(figures, name)]
    if _base(name) in ("rfid", "rsfid"):  # against the held-out images themselves
        data = definition.get("data") or definition.get("config", {}).get("data", {})
        terms.append({key: value for key, value in data.items() if key not in ("threads", "processes")})
    else:
        terms.append(definition.get("reference"))
    return json.dumps(terms, sort_keys=True)


def _count(figures: Mapping[str, Any], name: str) -> Any:
    counted = "rfid_images" if _base(name).startswith("r") and _base(name) != "recall" else "samples"
    return figures.get(counted, _definition(figures).get("samples"))


def _definition(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    definition = figures.get("definition")
    return definition if isinstance(definition, Mapping) else {}


def _base(name: str) -> str:
    return name.removeprefix("val/").removeprefix("val_")


def markdown(rows: Rows) -> str:
    """A table of runs by figures, the best of each column in bold, standard errors behind a plus-minus."""
    names = columns(rows)
    lines = ["| run | " + " | ".join(map(_heading, names)) + " |", "|---|" + "---:|" * len(names)]
    for run, cells in _cells(rows, names, "**{}**", " ± "):
        lines.append(f"| {run.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def latex(rows: Rows) -> str:
    """The same as a LaTeX `tabular`, which needs the package booktabs."""
    names = columns(rows)
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
        r"\toprule",
        "run & " + " & ".join(_escape(_heading(name)) for name in names) + r" \\",
        r"\midrule",
    ]
    for run, cells in _cells(rows, names, r"\textbf{{{}}}", r" $\pm$ "):
        lines.append(" & ".join([_escape(run), *(cell.replace("%", r"\%") for cell in cells)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def comma_separated(rows: Rows) -> str:
    """The same as CSV: full precision, one column a figure by its name, standard errors in columns of their own."""
    names = columns(rows)
    errors = {name for figures in rows.values() for name in figures if name.endswith("_stderr")}
    names = [column for name in names for column in (name, f"{name}_stderr") if column == name or column in errors]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", *names])
    for run, figures in rows.items():
        writer.writerow([run, *(figures[name] if _is_number(figures.get(name)) else "" for name in names)])
    return buffer.getvalue()


def _cells(rows: Rows, names: list[str], bold: str, plus_minus: str) -> list[tuple[str, list[str]]]:
    best = {name: best_rows(rows, name) for name in names}
    out = []
    for run, figures in rows.items():
        cells = []
        for name in names:
            value, error = figures.get(name), figures.get(f"{name}_stderr")
            text = number(value, figure(name).unit) if _is_number(value) else ""
            text = bold.format(text) if run in best[name] else text
            if text and _is_number(error):
                text += plus_minus + (number(error, "%") if figure(name).unit == "%" else f"{error:.2g}")
            cells.append(text)
        out.append((run, cells))
    return out


def _heading(name: str) -> str:
    label, unit, *_ = figure(name)
    return f"{label} [{unit}]" if unit not in ("", "%", "s") else label


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _escape(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(character, {"\\": r"\textbackslash "}.get(character, f"\\{character}"))
    return text
