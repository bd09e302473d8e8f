"""Text tables of measurements, one line for each row, printed as it arrives; and tables in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# heading, alignment and width, field of the row, format of its value
Column = tuple[str, str, str, str]


def heading(columns: Sequence[Column]) -> str:
    return " ".join(format(head, spec) for head, spec, _, _ in columns).rstrip()


def line(columns: Sequence[Column], row: Mapping[str, Any]) -> str:
    """A row of the table: blank where it has no value, its note after the last one."""
    cells = [
        format("" if row.get(field) is None else form.format(row[field]), spec)
        for _, spec, field, form in columns
    ]
    return f"{' '.join(cells).rstrip()}  {row.get('note') or ''}".rstrip()


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    for cells in (heads, ["---"] * len(heads), *rows):
        yield f"| {' | '.join(cells)} |"
