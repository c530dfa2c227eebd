"""The thread that turns what was observed into Arrow columns and writes them as Parquet parts.

One part at a time: while it is written the loop goes on and fills the next, and where that is full
first, the loop waits. So no more than two parts are in memory, however long the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastpref.dynamics import schema
from fastpref.dynamics.parts import arrow_array, part_name, table_of_rows, write_part

# Written last and for every part, even without rows: it marks the part complete.
COMMIT_TABLE = "pairs"


class PartWriter:
    """Writes the parts of one rank, in the order in which they are given.

    Args:
        root: the `records` folder. rank: whose parts they are.
        behaviors: names that the integers of the `behavior` column of `pairs` index.
        begun: tables of a part that a run before has begun, by name.
    """

    def __init__(
        self,
        root: Path,
        rank: int,
        behaviors: Sequence[str],
        begun: Mapping[str, pa.Table] | None = None,
    ) -> None:
        self._root, self._rank = root, rank
        self._names = {
            "behavior": pa.array(list(behaviors), pa.string()),
            "split": pa.array(list(schema.SPLITS), pa.string()),
        }
        # The thread's own: what it has of a part that is not finished, which a later `write`
        # completes.
        self._tables = {name: [table] for name, table in (begun or {}).items()}
        # Python waits for its thread when it ends, so that what was handed over is written.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="records")
        self._job: Future[None] | None = None

    def write(
        self,
        first: int,
        last: int,
        pairs: Sequence[Mapping[str, Any]],
        rows: Mapping[str, Sequence[Mapping[str, object]]],
        tables: Mapping[str, Sequence[pa.Table]],
        whole: bool,
    ) -> None:
        """Hand over what the part of steps ``first`` to ``last`` has more than at the last call.

        pairs: sets of columns of `pairs`, checked; rows: mappings of columns, and tables, by name.
        whole: the part is finished; otherwise it is written as far as it goes, and goes on.
        Waits for the part before. Raises what went wrong with that one.
        """
        self.join()
        self._job = self._thread.submit(self._write, first, last, pairs, rows, tables, whole)

    def check(self) -> None:
        """Raise what went wrong, where that is known by now."""
        if self._job is not None and self._job.done():
            self.join()

    def join(self) -> None:
        """Wait until everything handed over is on the disk; raises what went wrong with it."""
        job, self._job = self._job, None
        try:
            if job is not None:
                job.result()
        except OSError as error:
            raise OSError(
                f"{self._root}: records could not be written, so the run ends here: {error}. It "
                "goes on from its last checkpoint once that is mended."
            ) from error

    def _write(
        self,
        first: int,
        last: int,
        pairs: Sequence[Mapping[str, Any]],
        rows: Mapping[str, Sequence[Mapping[str, object]]],
        tables: Mapping[str, Sequence[pa.Table]],
        whole: bool,
    ) -> None:
        for name, more in tables.items():
            self._tables.setdefault(name, []).extend(more)
        for name, mappings in rows.items():
            self._tables.setdefault(name, []).append(table_of_rows(name, mappings))
        self._tables.setdefault(COMMIT_TABLE, []).append(self._pairs_table(pairs))
        for name in sorted(self._tables, key=lambda name: name == COMMIT_TABLE):
            table = pa.concat_tables(self._tables[name])
            if table.num_rows or name == COMMIT_TABLE:
                write_part(table, self._root / name / part_name(first, self._rank), last)
        if whole:
            self._tables.clear()

    def _pairs_table(self, pairs: Sequence[Mapping[str, Any]]) -> pa.Table:
        counts = [len(columns["pair_id"]) for columns in pairs]
        arrays = []
        for column in schema.TABLES["pairs"].columns:
            values = [columns.get(column.name) for columns in pairs]
            if column.name in self._names:
                indices = arrow_array(schema.Column("", pa.int32(), "", ""), values, counts)
                arrays.append(pa.DictionaryArray.from_arrays(indices, self._names[column.name]))
            else:
                arrays.append(arrow_array(column, values, counts))
        return pa.Table.from_arrays(arrays, schema=schema.arrow_schema("pairs"))
