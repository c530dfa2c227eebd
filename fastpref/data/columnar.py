"""Parquet files, Arrow data sets on disk and data sets of the Hub -> rows, numbered from 1.

Only the columns that are asked for become Python objects. Of columns of media (images, sound) a
row tells only whether it has any.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fastpref.data.badrows import listed, nearest
from fastpref.data.files import HUB_PREFIX, Source, hub_doubt
from fastpref.data.table import MEDIA, Table

log = logging.getLogger(__name__)

BATCH = 1024  # rows decoded at a time


def read_parquet(source: Source, columns: Collection[str]) -> Table:
    """Raises ValueError for a file that is no Parquet, or that is damaged or cut short."""
    import pyarrow.parquet as pq

    with _explained(
        f"file {source.name} cannot be read as Parquet",
        "If it is damaged or cut short, get it again",
    ):
        with pq.ParquetFile(Path(source.path).expanduser()) as file:
            names = list(file.schema_arrow.names)
            _refuse_double(names)
            wanted = [name for name in names if name in columns]
            table = Table(dict.fromkeys(names))
            if not wanted:
                return _unread(table, file.metadata.num_rows)
            for batch in file.iter_batches(BATCH, columns=wanted):
                _add(table, {name: _values(name, batch.column(name)) for name in wanted})
    return table


def read_arrow(source: Source, columns: Collection[str]) -> Table:
    """A folder that `datasets` wrote with save_to_disk (for a DatasetDict that of one split)."""
    folder = Path(source.path).expanduser()
    datasets = _datasets(f"{source.name} is an Arrow data set, which is read")
    if source.split and not folder.is_dir():
        raise ValueError(_no_split(source, folder.parent))
    with _explained(
        f"Arrow data set {source.name} cannot be read", "If it is damaged, write it again"
    ):
        data = datasets.load_from_disk(str(folder))
        return _from_datasets(data, columns)


def read_hub(source: Source, columns: Collection[str]) -> Table:
    """One split of a data set of the Hub, from its cache where it has been loaded before."""
    here = ""
    if not source.name.startswith(HUB_PREFIX):
        here = f"{source.path}: no file or folder of this name.{hub_doubt(source.path)} "
    datasets = _datasets(f"{here}Data sets of the Hub are read")
    config = "" if source.config_name is None else f", dataset_config_name {source.config_name!r}"
    with _explained(
        f"{here}The Hub's data set {source.path} (split {source.split!r}{config}) cannot be loaded",
        "Check the name, the connection, dataset_split or eval_dataset_split, and "
        "dataset_config_name",
    ):
        data = datasets.load_dataset(source.path, name=source.config_name, split=source.split)
        log.info("%sRead from the Hub: %s, %d rows", here, source.name, len(data))
        return _from_datasets(data, columns)


def _datasets(purpose: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{purpose} with the package datasets, which is not installed: "
            'pip install "fastpref[datasets]"'
        ) from error
    return datasets


def _no_split(source: Source, folder: Path) -> str:
    try:
        splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
        known = [str(name) for name in splits]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"Arrow data set {source.name}: dataset_dict.json cannot be read ({error})"
    return (
        f"Arrow data set {folder} has no split {source.split!r}.{nearest(source.split, known)} It "
        f"has {listed(known)}: set dataset_split (eval_dataset_split for eval_dataset_name)."
    )


def _from_datasets(data: Any, columns: Collection[str]) -> Table:
    names = list(data.column_names)
    table = Table(dict.fromkeys(names))
    texts = [name for name in names if name in columns and name not in MEDIA]
    if not texts:
        return _unread(table, len(data))
    # Media would be decoded, at great cost; the Arrow table tells whether a row has any.
    media: dict[str, list[Any]] = {name: [] for name in names if name in columns and name in MEDIA}
    if media:
        for part in data.select_columns(list(media)).with_format("arrow").iter(BATCH):
            for name, values in media.items():
                values += _values(name, part.column(name))
    data = data.select_columns(texts).with_format(None)
    # The file is mapped into memory as it is: wrong offsets would read whatever lies there.
    data.data.validate(full=True)
    for batch in data.iter(BATCH):
        first, last = len(table.rows), len(table.rows) + len(batch[texts[0]])
        _add(table, {**batch, **{name: values[first:last] for name, values in media.items()}})
    return table


def _unread(table: Table, rows: int) -> Table:
    """None of the columns is known: one empty row stands for all, so that the caller can say so."""
    table.rows = [(1, {})] if rows else []
    return table


def _add(table: Table, columns: dict[str, list[Any]]) -> None:
    first = len(table.rows) + 1
    names = list(columns)
    rows = (dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True))
    table.rows += enumerate(rows, first)


def _values(name: str, column: Any) -> list[Any]:
    """A column's Python values; of media, True where a row has any, else None."""
    if name not in MEDIA:
        return list(column.to_pylist())
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    some = pc.greater(pc.list_value_length(column), 0) if lists else column.is_valid()
    return [value or None for value in some.to_pylist()]


def _refuse_double(names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"column {twice!r} stands in it more than once")


@contextlib.contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Whatever a library raises inside becomes a ValueError that says what was tried."""
    try:
        yield
    except Exception as error:  # damaged files raise nearly anything
        first = f"{error}".strip().split("\n")[0][:400].rstrip(".") or "no message"
        raise ValueError(f"{what}: {type(error).__name__}: {first}. {remedy}.") from error
