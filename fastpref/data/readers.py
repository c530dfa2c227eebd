"""A `Source` of any format -> its rows as a `Table`."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from fastpref.data.columnar import read_arrow, read_hub, read_parquet
from fastpref.data.files import Source
from fastpref.data.table import Table
from fastpref.data.text_files import read_csv, read_json, read_jsonl

# First bytes -> what such a file is, and the endings under which it is read.
MAGIC = (
    (b"\x1f\x8b", "compressed with gzip", r"\.gz$", "add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", r"\.zst$", "add .zst to its name"),
    (b"PAR1", "Parquet", r"\.parquet$", "give it the ending .parquet"),
    (b"PK\x03\x04", "a ZIP archive (or an Excel sheet)", r"$^", "unpack it, or save it as CSV"),
    (b"ARROW1", "an Arrow file", r"$^", "save it as Parquet"),
    (b"\xff\xfe", "text in UTF-16", r"$^", "save it as UTF-8"),
)


def read_source(source: Source, columns: Collection[str]) -> Table:
    """The rows of ``source``, with those of ``columns`` that it has (and others, in JSON).

    Raises ValueError for a source that is missing, empty, damaged or not what its name says.
    """
    if source.kind not in ("arrow", "hub"):
        _refuse_disguise(source)
    if source.kind == "jsonl":
        table = read_jsonl(source)
    elif source.kind == "json":
        table = read_json(source)
    elif source.kind == "csv":
        table = read_csv(source, columns)
    elif source.kind == "parquet":
        table = read_parquet(source, columns)
    elif source.kind == "arrow":
        table = read_arrow(source, columns)
    else:
        table = read_hub(source, columns)
    if not table.rows and not table.bad:
        what = "data set" if source.kind in ("arrow", "hub") else "file"
        raise ValueError(f"{what} {source.name} is empty: expected at least one row")
    return table


def _refuse_disguise(source: Source) -> None:
    try:
        with open(Path(source.path).expanduser(), "rb") as file:
            first = file.read(8)
    except OSError as error:
        raise ValueError(f"file {source.name} cannot be read: {error}") from error
    for magic, what, ending, remedy in MAGIC:
        if first.startswith(magic) and not re.search(ending, source.path):
            raise ValueError(f"file {source.name} is {what}, which its name does not say: {remedy}")
