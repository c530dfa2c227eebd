"""Names of files, folders and patterns -> the JSON objects in them, each with its file and line.

Files are JSON Lines, plain or compressed (.gz, .zst).
"""

from __future__ import annotations

import difflib
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

DATA_FILE = re.compile(r"\.jsonl(\.gz|\.zst)?$")
SHOWN_BAD_ROWS = 5


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: where it is, why, and what stood there."""

    source: str
    line: int
    reason: str
    value: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason} (got {self.value})"


class Unusable(Exception):
    """Why a row cannot be used, without its place, which the caller knows."""

    def __init__(self, reason: str, value: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.value = value if isinstance(value, Words) else shown(value)


class Words(str):
    """A description, printed as it is; any other value is printed as a short repr."""


def find_files(dataset_name: Sequence[str]) -> list[str]:
    """The data files that files, folders and glob patterns stand for; each may come up only once.

    Raises ValueError for a name that stands for no file, and for a file that comes up twice.
    """
    if isinstance(dataset_name, str):
        raise ValueError(f"dataset_name is a list of names, got the string {dataset_name!r}")
    if not dataset_name:
        raise ValueError("dataset_name is empty: name at least one file, folder or glob pattern")
    found: dict[Path, tuple[str, str]] = {}
    for name in dataset_name:
        for source in _expand(name):
            path = Path(source).expanduser().resolve()
            if path in found:
                other, by = found[path]
                raise ValueError(
                    f"file {source} comes up twice, from {by!r} (as {other}) and from {name!r}: "
                    "its rows would count double. Name it once."
                )
            found[path] = (source, name)
    return [source for source, _ in found.values()]


def read_rows(source: str) -> tuple[list[tuple[int, dict[str, Any]]], list[BadRow]]:
    """(line, object) of every line that is a JSON object, and the lines that are not."""
    rows: list[tuple[int, dict[str, Any]]] = []
    bad: list[BadRow] = []
    line = 0
    try:
        with open(Path(source).expanduser(), "rb") as file:
            for line, raw in enumerate(_lines(file, source), 1):
                if not raw.strip():
                    continue
                try:
                    rows.append((line, _object(raw, "utf-8-sig" if line == 1 else "utf-8")))
                except Unusable as why:
                    bad.append(BadRow(source, line, why.reason, why.value))
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"file {source} cannot be read beyond line {line}: {error}. If it is damaged or cut "
            "short, get it again: on_bad_rows does not skip the rest of a file."
        ) from error
    if not rows and not bad:
        raise ValueError(f"file {source} is empty: expected one JSON object per line")
    return rows, bad


def check_bad_rows(bad: Sequence[BadRow], total: int, on_bad_rows: str) -> None:
    """Raise ValueError, showing the first few, if bad rows are an error or no good row is left."""
    if not bad or (on_bad_rows == "drop" and len(bad) < total):
        return
    first = min(len(bad), SHOWN_BAD_ROWS)
    what = "no row can be used:" if len(bad) == total else ""
    lines = [f"{what} {len(bad)} of {total} rows are bad, the first {first}:".strip()]
    lines += [f"  {row}" for row in bad[:first]]
    if len(bad) < total:
        lines.append("Correct them, or leave such rows out with --on_bad_rows drop.")
    else:
        lines.append("Correct the rows, or name other files in dataset_name.")
    raise ValueError("\n".join(lines))


def shown(value: object, limit: int = 60) -> str:
    """A short repr of ``value`` for a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, known: Sequence[str]) -> str:
    """A sentence that names the known name closest to ``name``, or "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _expand(name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if DATA_FILE.search(p.name) and p.is_file())
        if not inside:
            raise ValueError(f"folder {name} holds no *.jsonl, *.jsonl.gz or *.jsonl.zst file")
        return [str(Path(name) / file) for file in inside]
    if path.is_file():
        if not DATA_FILE.search(name):
            raise ValueError(
                f"file {name}: expected a name that ends in .jsonl, .jsonl.gz or .jsonl.zst "
                "(JSON Lines: one object per line)"
            )
        return [name]
    if glob.has_magic(name):
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [match for match in matches if DATA_FILE.search(match) and Path(match).is_file()]
        if not files:
            raise ValueError(
                f"pattern {name!r} matches no *.jsonl, *.jsonl.gz or *.jsonl.zst file "
                f"({len(matches)} other matches)"
            )
        return files
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ValueError(f"{name}: no such file, folder or pattern.{nearest(path.name, beside)}")


def _lines(file: BinaryIO, source: str) -> Iterator[bytes]:
    if source.endswith(".gz"):
        with gzip.open(file) as unzipped:
            yield from unzipped
    elif source.endswith(".zst"):
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
    pending = b""
    try:
        while chunk := file.read(1 << 20):
            while chunk:
                if decoder.eof:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                pending += decoder.decompress(chunk)
                chunk = decoder.unused_data if decoder.eof else b""
            *whole, pending = pending.split(b"\n")
            yield from whole
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if not decoder.eof:
        raise EOFError("compressed file ended before the end of its last frame")
    if pending:
        yield pending


def _object(raw: bytes, encoding: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode(encoding))
    except UnicodeDecodeError as error:
        where = f"byte {raw[error.start : error.start + 1]!r} at position {error.start}"
        raise Unusable("the line is not UTF-8", Words(where)) from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}: {shown(error.doc.strip(), 40)}"
        raise Unusable("the line is not JSON", Words(where)) from None
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        raise Unusable("the line is not JSON", Words(f"{error}")) from None
    if not isinstance(row, dict):
        raise Unusable("the line is not a JSON object", row)
    return row
