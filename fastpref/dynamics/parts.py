"""Parquet parts of the records: their names, how they are written whole, how they are read.

A part appears whole or not at all: it is written to a temporary file beside its place, synced and
renamed.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.dynamics import schema

_TEMPORARY = ".partial"
_ROW_GROUP = 1 << 16


def list_parts(run: str | Path, table: str) -> list[Path]:
    """Paths of the parts of `table` in the run folder `run`, by first step and rank."""
    schema.arrow_schema(table)
    return sorted((Path(run) / "records" / table).glob("part-*-*.parquet"))


def read_records(run: str | Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all parts of one records table of a run, running, stopped or finished.

    Args:
        run: the run folder. table: a name of schema.TABLES. columns: those wanted, None = all.

    Raises ValueError if there are no parts, or if they were written by another schema version.
    """
    parts = list_parts(run, table)
    if not parts:
        raise ValueError(
            f"{run}: no records of {table!r}: expected {Path(run) / 'records' / table}/part-*"
            ".parquet; give the folder of a run that recorded (record: true) and has written its "
            "first part"
        )
    tables = [read_part(part, table, columns) for part in parts]
    return (
        pa.concat_tables(tables)
        .unify_dictionaries()
        .replace_schema_metadata(schema.arrow_schema(table).metadata)
    )


def read_part(path: Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part; ValueError if it is damaged or another schema version wrote it."""
    try:
        content = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a whole Parquet file: {error}") from None
    with content as file:
        version = (file.schema_arrow.metadata or {}).get(schema.VERSION_KEY, b"none").decode()
        if version != str(schema.SCHEMA_VERSION):
            raise ValueError(
                f"{path}: records schema version {version}, this fastpref reads version "
                f"{schema.SCHEMA_VERSION}; read it with the version that wrote it"
            )
        for name in columns or ():
            schema.TABLES[table].column(name)
        return file.read(columns=None if columns is None else list(columns))


def check_column(column: schema.Column, value: Any, rows: int) -> None:
    """Raise ValueError unless ``value`` can become `rows` values of the column: a numpy array, one
    number or text for all, or None."""
    if value is None or isinstance(value, (str, bool, int, float, np.generic)):
        return
    nested = pa.types.is_list(column.type)
    if not isinstance(value, np.ndarray):
        raise ValueError(
            f"column {column.name!r} needs a numpy array or a number, got {type(value).__name__}"
        )
    if value.ndim != (2 if nested else 1) or value.shape[0] != rows:
        raise ValueError(
            f"column {column.name!r} needs shape ({rows}{', G' if nested else ','}), "
            f"got {value.shape}"
        )
    if value.dtype.kind in "iu" and pa.types.is_integer(column.type):
        low, high = _limits(column.type)
        for number in (value.min(initial=0), value.max(initial=0)):
            if not low <= number <= high:
                raise ValueError(f"column {column.name!r}: {number} not in range: {low} to {high}")


@functools.cache
def _limits(kind: pa.DataType) -> tuple[int, int]:
    found = np.iinfo(kind.to_pandas_dtype())
    return int(found.min), int(found.max)


def arrow_array(column: schema.Column, values: Sequence[Any], rows: Sequence[int]) -> pa.Array:
    """One array from ``values`` that `check_column` passed, each for as many rows as ``rows`` says.

    Arrays of one width are joined before they become Arrow's: an array a value would cost as much
    time as all else that a small step records.
    """
    total = sum(rows)
    if all(value is None for value in values):
        return pa.nulls(total, column.type)
    if all(isinstance(value, (str, bool, int, float, np.generic)) for value in values):
        each = pa.array(list(map(plain, values)), column.type)
        return each.take(pa.array(np.repeat(np.arange(len(rows)), rows)))
    widths = {value.shape[1:] if isinstance(value, np.ndarray) else None for value in values}
    if None in widths or len(widths) > 1:
        singles = zip(values, rows, strict=True)
        parts = [arrow_array(column, [v], [n]) for v, n in singles]
        return pa.chunked_array(parts, column.type).combine_chunks()
    joined = np.concatenate(values)
    nested = pa.types.is_list(column.type)
    kind = column.type.value_type if nested else column.type
    if pa.types.is_floating(kind):
        with np.errstate(over="ignore"):  # inf in float16, as the schema says
            joined = joined.astype(kind.to_pandas_dtype())
    flat = pa.array(joined.reshape(-1), kind, from_pandas=True)  # what is not known, NaN, is null
    if not nested:
        return flat
    offsets = np.arange(total + 1, dtype=np.int32) * joined.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def table_of_rows(name: str, rows: Iterable[Mapping[str, object]]) -> pa.Table:
    """Arrow table from mappings; ValueError on an unknown column or a missing required one."""
    table = schema.TABLES[name]
    values = [{key: plain(value) for key, value in row.items()} for row in rows]
    for number, row in enumerate(values):
        for key in row:
            table.column(key)
        for column in table.columns:
            if column.required and row.get(column.name) is None:
                raise ValueError(f"row {number} of {name} needs {column.name!r}, got {row}")
        if "split" in row and row["split"] not in schema.SPLITS:
            raise ValueError(f"split {row['split']!r} in {name} is none of {list(schema.SPLITS)}")
    return pa.Table.from_pylist(values, schema=schema.arrow_schema(name))


def plain(value: object) -> object:
    """Python's own number or list for one of numpy's."""
    if isinstance(value, np.generic):
        return value.item()
    return value.tolist() if isinstance(value, np.ndarray) else value


def part_name(first: int, rank: int) -> str:
    """File name of the part of `rank` whose first step is `first`."""
    return f"part-{first:08d}-{rank:04d}.parquet"


def first_step_of(part: Path) -> int:
    """First step that the part may hold, from its name."""
    return int(part.name.split("-")[1])


def last_step_of(part: Path) -> int:
    """Last step that the part holds rows up to, from its metadata."""
    return int(pq.read_schema(part).metadata[schema.LAST_STEP_KEY])


def write_layer_groups(run: Path, groups: Sequence[str]) -> None:
    """records/layer_groups.json: what the numbers of a `gnorm_groups` are of."""
    _write_names(run, "layer_groups.json", groups)


def write_lora_layers(run: Path, layers: Sequence[str]) -> None:
    """records/lora_layers.json: what the numbers of a `lora_update_norm` are of."""
    _write_names(run, "lora_layers.json", layers)


def _write_names(run: Path, file: str, names: Sequence[str]) -> None:
    path = run / "records" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(list(names), indent=0) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_parts(root: Path, after_step: int) -> None:
    """Remove temporary files, and the parts of all ranks whose first step is > `after_step`."""
    for path in sorted(root.glob("*/part-*")):
        if path.name.endswith(_TEMPORARY) or first_step_of(path) > after_step:
            path.unlink()


def latest_part(root: Path, table: str, rank: int, step: int) -> Path | None:
    """The part of `rank` that holds `step` if any does: the last one that begins by then."""
    own = (root / table).glob(f"part-*-{rank:04d}.parquet")
    return max((path for path in own if first_step_of(path) <= step), default=None)


def cut_parts(root: Path, step: int) -> None:
    """Take the rows of steps > `step` out of the parts of all ranks."""
    for path in sorted(root.glob("*/part-*-*.parquet")):
        name, rank = path.parent.name, int(path.stem.split("-")[2])
        if name in schema.INDEX_TABLES or path != latest_part(root, name, rank, step):
            continue
        if last_step_of(path) > step:
            write_part(rows_until(read_part(path, name), step), path, step)


def values_in(table: pa.Table) -> int:
    """Values of all columns and rows, nulls and elements of lists included."""
    lists = [column for column in table.columns if pa.types.is_list(column.type)]
    return table.num_rows * table.num_columns + sum(
        len(chunk.flatten()) for column in lists for chunk in column.chunks
    )


def rows_until(table: pa.Table, step: int) -> pa.Table:
    """The rows whose step is at most `step`."""
    return table.filter(pa.array(table["step"].to_numpy() <= step))


def write_part(table: pa.Table, path: Path, last_step: int) -> None:
    """Write a part that holds everything up to `last_step`."""
    fields = schema.arrow_schema(path.parent.name)
    metadata = {**fields.metadata, schema.LAST_STEP_KEY: str(last_step).encode()}
    # One chunk and the schema's own fields (reading adds metadata to them), so that the bytes do
    # not depend on how the rows arrived.
    whole = table.unify_dictionaries().combine_chunks().cast(fields.with_metadata(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(
        path,
        lambda temporary: pq.write_table(
            whole, temporary, compression="zstd", row_group_size=_ROW_GROUP, **_encodings(fields)
        ),
    )


def _encodings(fields: pa.Schema) -> dict[str, Any]:
    """How the columns are laid out: numbers that hardly repeat cost a dictionary more than it
    saves, and of floats the bytes with the exponents, put together, are what can be compressed
    (not of float16, which duckdb then could not read)."""
    own = [(f.name, f.type.value_type, ".list.element") for f in fields if pa.types.is_list(f.type)]
    own += [(f.name, f.type, "") for f in fields if not pa.types.is_list(f.type)]
    split = [n + path for n, kind, path in own if kind in (pa.float32(), pa.float64())]
    varied = [n + path for n, kind, path in own if kind in (pa.float16(), pa.int64())]
    repeated = {n + path for n, _, path in own} - {*split, *varied} | {"epoch"}
    return {
        "use_dictionary": sorted(repeated),
        "use_byte_stream_split": [path for path in split if path != "epoch"],
    }


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Make `path` by `write` on a temporary file beside it, synced, then renamed."""
    temporary = path.with_name(path.name + _TEMPORARY)
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
