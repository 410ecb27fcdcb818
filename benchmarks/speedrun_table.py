"""The speedrun's tables: which figures stand where, and the lines that benchmarks/RESULTS.md keeps of whole recipes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vqgan_jax.config import UserError

RESULTS = Path(__file__).parent / "RESULTS.md"
PART = "### Whole recipes"


class Column(NamedTuple):
    """A column: its title, the figure's name, how it is written, and what it is multiplied by before."""

    title: str
    name: str
    form: str = ".4g"
    scale: float = 1.0


_QUALITY = (
    Column("PSNR", "psnr", ".2f"),
    Column("L1", "l1", ".4f"),
    Column("rFID-proxy", "rfid_proxy"),
    Column("usage", "codebook_usage", ".1%"),
    Column("perplexity", "codebook_perplexity", ".0f"),
)
_LIKELIHOOD = (Column("NLL", "nll", ".3f"), Column("bits", "bits", ".3f"))
_SAMPLES = (Column("gFID-proxy", "gfid_proxy"), Column("class agreement", "agreement", ".1%"))
_COST = (Column("steps", "steps", "d"), Column("ms a step", "ms", ".0f"), Column("GFLOP a step", "flops", ".4g", 1e-9))

STAGE_COLUMNS = {
    "tokenizer": (Column("recipe", "name", ""), *_QUALITY, *_COST),
    "transformer": (
        Column("recipe", "name", ""),
        Column("M parameters", "parameters", ".2f", 1e-6),
        *_LIKELIHOOD,
        Column("NLL of a table", "table_nll", ".3f"),
        *_SAMPLES,
        *_COST,
    ),
}
COLUMNS = (
    Column("date", "date", ""),
    Column("recipe", "name", ""),
    Column("data", "data", ""),
    *_QUALITY,
    *_LIKELIHOOD,
    *_SAMPLES,
    Column("of real pictures", "accuracy", ".1%"),
    Column("steps 1", "steps_1", "d"),
    Column("steps 2", "steps_2", "d"),
    Column("ms a step 1", "ms_1", ".0f"),
    Column("GFLOP a step 1", "flops_1", ".4g", 1e-9),
    Column("GFLOP a step 2", "flops_2", ".4g", 1e-9),
    Column("minutes", "minutes", ".1f"),
    Column("classifier", "classifier", ""),
    Column("revision", "revision", ""),
    Column("machine", "machine", ""),
    Column("command", "command", ""),
)


def cell(column: Column, row: Mapping[str, Any]) -> str:
    """A figure as it is written; "" where the row has none."""
    if column.name not in row:
        return ""
    value = row[column.name]
    if column.name == "command":
        return f"`{value}`"
    return format(value if column.scale == 1 else value * column.scale, column.form)


def line_of(row: Mapping[str, Any]) -> str:
    """A whole recipe as a line of its table."""
    return _line([cell(column, row) for column in COLUMNS])


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> str:
    """Markdown."""
    head = [_line([column.title for column in columns]), "|" + " --- |" * len(columns)]
    return "\n".join((head if header else []) + [_line([cell(column, row) for column in columns]) for row in rows])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def record(path: Path, lines: Sequence[str]) -> None:
    """Adds lines at the end of the table of whole recipes.

    Raises:
      UserError: the file has no such table.
    """
    rows = path.read_text().split("\n")
    start = rows.index(PART) if PART in rows else len(rows)
    end = next((k for k in range(start + 1, len(rows)) if rows[k].startswith("#")), len(rows))
    inside = [k for k in range(start, end) if rows[k].startswith("|")]
    if not inside:
        raise UserError(f"{path}: has no table under '{PART}', to which --record adds lines")
    rows[inside[-1] + 1 : inside[-1] + 1] = lines
    path.write_text("\n".join(rows))
