"""CSV and TSV that the csv module, pandas and finetrace itself read back cell by cell."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from typing import Any


class _Echo:
    """Hands back what a writer of the csv module writes, one record at a time."""

    def write(self, record: str) -> str:
        return record


def delimited(columns: Sequence[str], records: Iterable[Sequence[Any]], delimiter: str = ",") -> str:
    """A header and its records; None and NaN are empty cells, and numbers have all their digits.

    Cells with a line end of any kind are quoted: unquoted, a lone carriage return ends a record for most readers.
    """
    # The csv module quotes the characters of its own line end; records end as those of other files do.
    writer: Any = csv.writer(_Echo(), delimiter=delimiter, lineterminator="\r\n")
    blank = (["" if value is None or value != value else value for value in record] for record in records)
    return "".join(writer.writerow(record).removesuffix("\r\n") + "\n" for record in (columns, *blank))
