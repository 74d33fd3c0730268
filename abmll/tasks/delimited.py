"""CSV and TSV files as they are read: rows by the names of a header, with the place of each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence

_LONGEST_FIELD = 10_000_000  # characters


def delimited_rows(lines: Iterable[str], source: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row's place (file and last line) and fields by column. Tabs part the fields where the source ends in .tsv.

    ValueError, with file and line, for a header that names a column twice and at a row that cannot be read.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    tabs = source.lower().endswith(".tsv")
    reader = csv.reader(lines, dialect=csv.excel_tab if tabs else csv.excel, strict=True)
    header: list[str] | None = None
    first = 1
    try:
        for values in reader:
            where = f"{source}:{reader.line_num}"
            if tabs:
                _check_no_row_inside(values, f"{source}:{first}", reader.line_num)
            first = reader.line_num + 1
            if header is None:
                header = _checked_header(values, where) if values else None
            elif values:
                if len(values) != len(header):
                    raise ValueError(
                        f"{where}: {len(header)} columns in the header, another number in this row: "
                        "put texts with commas or line breaks in quotes"
                    )
                yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{source}:{first}: malformed CSV: {error}: a field that begins with a quote must end with one, and those "
            "in it are doubled; or save as JSONL"
        ) from error


def _checked_header(names: Sequence[str], where: str) -> list[str]:
    """Columns without a name may be several, as spreadsheets leave them at the end: nobody can ask for them."""
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"{where}: column {name!r} occurs {names.count(name)} times: rename or remove one")
    return list(names)


def _check_no_row_inside(values: Sequence[str], where: str, last: int) -> None:
    """Few who write tabs quote texts: a text's own quote at its start takes all up to the next quote for one field."""
    for value in values:
        if "\t" in value and ("\n" in value or "\r" in value):
            raise ValueError(
                f"{where}: a quote opens a field that spans rows, up to line {last}: {value[:40]!r}; put the text in "
                "quotes and double those in it, or save as CSV or JSONL"
            )
