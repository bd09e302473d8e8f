"""Text tables of measurements: one line for each row, printed as it arrives."""

from collections.abc import Mapping, Sequence
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
