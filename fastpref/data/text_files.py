"""JSON Lines, JSON and CSV files, plain or compressed -> rows, each with its line or number."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastpref.data.badrows import Unusable, Words, listed, shown
from fastpref.data.files import Source
from fastpref.data.table import NUMBERS, Table

UNDECODED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes not UTF-8


def read_jsonl(source: Source) -> Table:
    """One JSON object per line; blank lines do not count. A line that is none is a bad row."""
    table = Table()
    for line, raw in numbered_lines(source):
        if raw.strip():
            try:
                table.add(line, _object(raw, "utf-8-sig" if line == 1 else "utf-8"))
            except Unusable as why:
                table.bad.append(why.at(source.name, line))
    return table


def read_json(source: Source) -> Table:
    """A list of objects, or an object that holds such a list as ``data``; rows count from 1.

    A file of JSON Lines under this ending is read as that. Raises ValueError for anything else.
    """
    raw = b"".join(raw for _, raw in numbered_lines(source))
    if not raw.strip():
        return Table()
    try:
        rows = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        first = raw.lstrip(b"\xef\xbb\xbf \t\r\n").split(b"\n", 1)[0]
        if error.msg == "Extra data" and first.startswith(b"{") and _is_object(first):
            return read_jsonl(source)
        raise ValueError(
            f"file {source.name} is not JSON: {error.msg} at line {error.lineno} column "
            f"{error.colno}. Expected a list of objects, or an object with such a list as 'data'."
        ) from None
    except Unusable as why:
        raise ValueError(f"file {source.name}: {why.reason} (got {why.value})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8; numbers too long, lists too deep
        raise ValueError(f"file {source.name} is not JSON: {error}") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    elif isinstance(rows, dict):
        _refuse_columns(rows, source)
        rows = [rows]  # JSON Lines of a single line
    if not isinstance(rows, list):
        raise ValueError(
            f"file {source.name} holds {shown(rows)}: expected a list of objects, or an object "
            "with such a list as 'data'."
        )
    table = Table()
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            table.add(number, row)
        else:
            no_object = Unusable("the item is not a JSON object", row)
            table.bad.append(no_object.at(source.name, number))
    return table


def _refuse_columns(table: dict[str, Any], source: Source) -> None:
    """What pandas' `to_json` writes by default: of each column an object of its cells by number."""
    cells = list(table.values())
    numbered = all(isinstance(c, dict) and c and all(k.isdecimal() for k in c) for c in cells)
    if cells and numbered:
        raise ValueError(
            f"file {source.name} holds columns, not rows, as pandas' to_json writes them: expected "
            "a list of objects (to_json with orient='records')."
        )


def read_csv(source: Source, columns: Collection[str]) -> Table:
    """Comma-separated text with a header; a row's line is the one that it begins on.

    Cells are text, except those of `NUMBERS`; empty ones are null, which CSV cannot tell from an
    empty text. Raises ValueError for a header that cannot be used
    and for broken quoting.
    """
    reader = csv.reader(_decoded(source), strict=True)
    # The limit is the module's, not the reader's; a dialogue may well be longer than its 131072.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return _csv_table(reader, source, columns)
    except csv.Error as error:
        raise ValueError(
            f"file {source.name} line {reader.line_num}: not CSV: {error}. Texts that hold commas, "
            'quotes or line ends stand in quotes ("), quotes inside them twice ("").'
        ) from None
    finally:
        csv.field_size_limit(limit)


def _csv_table(reader: Any, source: Source, columns: Collection[str]) -> Table:
    header = next((cells for cells in reader if cells), None)
    if header is None:
        return Table()
    _check_header(header, source)
    table = Table(dict.fromkeys(header))
    wanted = [(i, name) for i, name in enumerate(header) if name in columns]
    end = reader.line_num
    for cells in reader:
        line, end = end + 1, reader.line_num
        if not cells:
            continue
        try:
            if len(cells) != len(header):
                count = Words(f"{len(cells)}: {listed(cells[:3])}")
                raise Unusable(f"the row has not the {len(header)} cells of the header", count)
            if any(UNDECODED.search(cell) for cell in cells):
                cell = next(cell for cell in cells if UNDECODED.search(cell))
                raise Unusable("the row is not UTF-8", cell)
        except Unusable as why:
            table.bad.append(why.at(source.name, line))
        else:
            table.rows.append((line, {name: _value(name, cells[i]) for i, name in wanted}))
    return table


def _value(name: str, cell: str) -> float | str | None:
    if not cell:
        return None
    if name in NUMBERS:
        with contextlib.suppress(ValueError):  # what is no number is refused later, with its place
            return float(cell)
    return cell


def _check_header(header: list[str], source: Source) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if any(UNDECODED.search(name) or "\0" in name for name in header):
        raise ValueError(f"file {source.name}: the header is not UTF-8 text: {listed(header[:3])}")
    if twice:
        raise ValueError(f"file {source.name}: the header names column {twice[0]!r} more than once")
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise ValueError(
            f"file {source.name}: the header is one column, {shown(header[0])}: expected commas "
            "between the columns."
        )


def numbered_lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of every line of a plain, .gz or .zst file, line ends included.

    Raises ValueError where the file cannot be read to its end.
    """
    line = 0
    try:
        with open(Path(source.path).expanduser(), "rb") as file:
            for line, raw in enumerate(_decompressed(file, source.path), 1):
                yield line, raw
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"file {source.name} cannot be read beyond line {line}: {error}. If it is damaged or "
            "cut short, get it again: on_bad_rows does not skip the rest of a file."
        ) from error


def _decompressed(file: BinaryIO, path: str) -> Iterator[bytes]:
    if path.endswith(".gz"):
        with gzip.open(file) as unzipped:
            yield from unzipped
    elif path.endswith(".zst"):
        yield from _zst_lines(file)
    else:
        yield from file


def _zst_lines(file: BinaryIO) -> Iterator[bytes]:
    # zstandard's own stream reader takes a truncated file for a complete one, so frames are
    # followed here.
    try:
        import zstandard
    except ImportError as error:
        raise ValueError("reading .zst files needs the package zstandard") from error
    decoder = zstandard.ZstdDecompressor().decompressobj()
    pending: list[bytes] = []  # of a line that has not ended yet
    try:
        while chunk := file.read(1 << 20):
            while chunk:
                if decoder.eof:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                *whole, rest = decoder.decompress(chunk).split(b"\n")
                for piece in whole:
                    yield b"".join([*pending, piece, b"\n"])
                    pending.clear()
                pending.append(rest)
                chunk = decoder.unused_data if decoder.eof else b""
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if not decoder.eof:
        raise EOFError("compressed file ended before the end of its last frame")
    if last := b"".join(pending):
        yield last


def _decoded(source: Source) -> Iterator[str]:
    """Lines as text, for the CSV reader, which knows only later which row a line belongs to."""
    for line, raw in numbered_lines(source):
        yield raw.decode("utf-8-sig" if line == 1 else "utf-8", errors="surrogateescape")


def _object(raw: bytes, encoding: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode(encoding), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        where = f"byte {raw[error.start : error.start + 1]!r} at position {error.start}"
        raise Unusable("the line is not UTF-8", Words(where)) from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}: {shown(error.doc.strip(), 40)}"
        raise Unusable("the line is not JSON", Words(where)) from None
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        raise Unusable("the line is not JSON", Words(f"{error}")) from None
    if isinstance(row, list) and encoding == "utf-8-sig":
        raise Unusable("the line is not a JSON object (name a file of one JSON list .json)", row)
    if not isinstance(row, dict):
        raise Unusable("the line is not a JSON object", row)
    return row


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a name that stands twice, Python would keep the last value only."""
    row = dict(items)
    if len(row) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise Unusable("a JSON object has the same name twice", twice)
    return row


def _is_object(raw: bytes) -> bool:
    try:
        _object(raw, "utf-8")
    except Unusable:
        return False
    return True
