"""Writes a run's records and logs, and reads the records back.

Records are Parquet parts, `records/<table>/part-<first step>-<rank>.parquet`. A part ends with a
step that is a multiple of n = part_steps, or sooner with the step by which it holds PART_VALUES
values: what is in memory does not grow with n. So where parts end depends on what was recorded,
never on time, and a run that was stopped and resumed has the parts of one that was not.

The last part of a run may end early; a run that goes on from there completes it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastpref.dynamics import schema
from fastpref.dynamics.parts import (
    check_column,
    cut_parts,
    first_step_of,
    last_step_of,
    latest_part,
    list_parts,
    part_name,
    plain,
    read_part,
    read_records,
    remove_parts,
    replace_file,
    rows_until,
    table_of_rows,
    values_in,
    write_part,
)
from fastpref.dynamics.writer import COMMIT_TABLE, PartWriter

__all__ = ["MetricsLog", "Recorder", "read_jsonl", "read_records"]

log = logging.getLogger(__name__)

# Values in a part, nulls and elements of lists included: some 16 MB, 80,000 pairs.
PART_VALUES = 1 << 22
_PAIRS = schema.TABLES["pairs"].columns
_FLOATS = {c.name for c in _PAIRS if c.type == pa.float32()}


class Recorder:
    """Buffers what one rank observes and writes it by parts, in a thread of its own.

    What goes wrong with the writing is raised by the next call. As a context manager it writes what
    it has of the unfinished part however the block ends.

    Args:
        output_dir: the run folder; parts go to its `records` folder.
        rank: this process. `steps`, `behaviors` and `index` speak of all ranks: rank 0 writes them,
            the other ranks' calls are accepted and drop them.
        behaviors: names that the integers of the `behavior` column index.
        part_steps: optimizer steps per part.
        resume_step: last step of the checkpoint the run continues from. None or 0 is a new run: all
            parts in the folder are removed. Otherwise parts of later steps are removed (by rank 0)
            and a part that holds steps on both sides of it is cut there and completed later.

    Raises ValueError if the records up to `resume_step` are not all there.
    """

    def __init__(
        self,
        output_dir: str | Path,
        rank: int,
        behaviors: Sequence[str],
        part_steps: int,
        resume_step: int | None = None,
    ) -> None:
        if part_steps < 1:
            raise ValueError(f"part_steps must be at least 1, got {part_steps}")
        self._root = Path(output_dir) / "records"
        self._rank = rank
        self._part_steps = part_steps
        self._num_behaviors = len(behaviors)
        self._margins: dict[tuple[str, str], tuple[int, float]] = {}
        self._flushed = self._written = self._seen = resume_step or -1
        self._first = 0  # step of the part
        self._values = 0  # in the part so far
        begun: dict[str, pa.Table] = {}
        if resume_step:
            begun = self._resume(resume_step)
        elif rank == 0:
            remove_parts(self._root, after_step=-1)
        self._writer = PartWriter(self._root, rank, behaviors, begun)
        self._empty()

    def _empty(self) -> None:
        # What was recorded and is checked since the last writing.
        self._pairs: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self._tables: dict[str, list[pa.Table]] = {}

    def index(self, rows: Iterable[Mapping[str, object]], name: str = "index") -> None:
        """Write the index table ``name``, once per run: a mapping of its columns per row.

        On resume the rows must be those already written; ValueError names the first that differs.
        """
        if self._rank != 0:
            return
        assert name in schema.INDEX_TABLES
        table = table_of_rows(name, rows)
        path = self._root / name / part_name(0, 0)
        if path.exists():
            old, new = read_part(path, name).to_pylist(), table.to_pylist()
            if old != new:
                at = next(
                    (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
                    min(len(old), len(new)),
                )
                raise ValueError(
                    f"{path}: the data changed since these records began: {len(old)} rows then, "
                    f"{len(new)} now, first difference at row {at}; use the data the run began "
                    "with, or another output_dir"
                )
            return
        write_part(table, path, last_step=0)

    def pairs(self, step: int, split: str, epoch: float | None = None, **columns: Any) -> None:
        """Record P pairs of `split` seen at `step`.

        columns: columns of the `pairs` table, numpy arrays of shape (P,), (P, G) for list columns,
        or one number for all. `behavior` (P,) indexes the behaviors; `pair_id` and `behavior` are
        required. reward_accuracy and output_accuracy are computed when margin and the log-probs
        are there and they are not. Raises ValueError on unknown columns, shapes or values.
        """
        self._check_step("pairs", step)
        columns = dict(columns)
        for name in ("pair_id", "behavior"):
            if name not in columns:
                raise ValueError(f"records of pairs at step {step} need the column {name!r}")
        if split not in schema.SPLITS:
            raise ValueError(f"split {split!r} at step {step} is none of {list(schema.SPLITS)}")
        rows = len(columns["pair_id"])
        margin, chosen, rejected = map(columns.get, ("margin", "logp_chosen", "logp_rejected"))
        if isinstance(margin, np.ndarray):
            columns.setdefault("reward_accuracy", margin > 0)
        if isinstance(chosen, np.ndarray) and isinstance(rejected, np.ndarray):
            columns.setdefault("output_accuracy", chosen > rejected)
        columns |= {"step": step, "rank": self._rank, "epoch": epoch}
        columns["split"] = np.full(rows, list(schema.SPLITS).index(split), np.int32)
        for name, value in columns.items():
            if name in _FLOATS and type(value) is np.ndarray and value.shape == (rows,):
                continue  # as most are, many times a second
            check_column(schema.TABLES["pairs"].column(name), value, rows)
        _check_indices("behavior", columns["behavior"], self._num_behaviors)
        self._pairs.append(columns)
        self._values += rows * len(_PAIRS) + sum(
            value.size for value in columns.values() if np.ndim(value) == 2
        )
        self._seen = step

    def step(self, step: int, **scalars: Any) -> None:
        """Record one optimizer step: columns of the `steps` table."""
        self._check_step("steps", step)
        for name in scalars:
            schema.TABLES["steps"].column(name)
        if self._rank == 0:
            self._steps.append({**scalars, "step": step})
            self._values += len(schema.TABLES["steps"].columns) + sum(
                len(value) for value in scalars.values() if isinstance(value, (np.ndarray, list))
            )
        self._seen = step

    def behaviors(
        self, step: int, split: str, rows: Iterable[Mapping[str, object]]
    ) -> list[dict[str, object]]:
        """Record an evaluation: one mapping of columns of `behaviors` per behavior.

        rows need `behavior` (a name) and `n`; `groups.behavior_rows` makes them. Returns them with
        step, split and rate_obs, unless they bring one the change of mean margin per step since the
        previous evaluation of that split (None at the first). Raises ValueError if `step` is not
        after that one.
        """
        complete = []
        for row in rows:
            behavior, margin = str(row["behavior"]), row.get("margin")
            filled: dict[str, object] = {**row, "step": step, "split": split}
            previous = self._margins.get((split, behavior))
            if previous is not None and previous[0] >= step:
                raise ValueError(
                    f"behavior {behavior!r} of split {split!r} was evaluated at step "
                    f"{previous[0]} already, it cannot be recorded at step {step}"
                )
            if isinstance(margin, (int, float, np.floating)):
                if previous is not None and "rate_obs" not in row:
                    filled["rate_obs"] = (float(margin) - previous[1]) / (step - previous[0])
                self._margins[split, behavior] = step, float(margin)
            complete.append(filled)
        self._add_rows("behaviors", step, complete)
        return complete

    def rows(self, name: str, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        """Record rows of a table that has rows of its own: mappings of columns, without step."""
        self._add_rows(name, step, [{**row, "step": step} for row in rows])

    def flush(self, step: int) -> None:
        """Say that everything of `step` is recorded; a part that ends there is handed over."""
        self._writer.check()
        self._flushed = step
        if step > max(self._written, 0) and self._ends(step):
            self._write(step)

    def close(self, step: int) -> None:
        """Write what is left after the last step, as a part that may end early; returns once
        everything is on the disk."""
        self._flushed = step
        if step > self._written:
            self._write(step)
        self._writer.join()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close(max(self._seen, self._written))
        except Exception:
            if kind is None:
                raise
            # The block's own error is what is told; it may well be this one.
            log.exception("records could not be written to their end")

    def _ends(self, step: int) -> bool:
        return step % self._part_steps == 0 or self._values >= PART_VALUES

    def _write(self, step: int) -> None:
        whole, rows = self._ends(step), {"steps": self._steps} if self._steps else {}
        pairs, tables = self._pairs, self._tables
        self._empty()
        self._written, first = step, self._first
        if whole:
            self._first, self._values = step + 1, 0
        self._writer.write(first, step, pairs, rows, tables, whole)

    def _check_step(self, table: str, step: int) -> None:
        following = self._flushed + 1
        part = [max(s - 1, 0) // self._part_steps for s in (step, following)]
        if step < following or part[0] != part[1]:
            raise ValueError(
                f"{table} of step {step} recorded after flush({self._flushed}): steps come in "
                f"order, each is flushed, and a part has {self._part_steps} steps"
            )

    def _add_rows(self, name: str, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        self._check_step(name, step)
        if self._rank == 0:
            table = table_of_rows(name, rows)
            self._tables.setdefault(name, []).append(table)
            self._values += values_in(table)
        self._seen = step

    def _resume(self, step: int) -> dict[str, pa.Table]:
        """Remove what lies after `step`; gives what there is of its unfinished part, and restores
        the last margins."""
        path = latest_part(self._root, COMMIT_TABLE, self._rank, step)
        last = -1 if path is None else last_step_of(path)
        if path is None or last < step:
            raise ValueError(
                f"cannot resume the records at step {step}: "
                + (
                    f"{self._root} has none of it"
                    if path is None
                    else f"{path} ends at step {last}"
                )
                + f" ({self._part_steps} steps to a part); resume from a checkpoint that the "
                "records reach, with the settings they were written with, or without recording"
            )
        self._first = first_step_of(path)
        if self._rank == 0:
            remove_parts(self._root, after_step=step)
            cut_parts(self._root, step)
        begun = {}
        for name in schema.TABLES:
            part = self._root / name / part_name(self._first, self._rank)
            if name not in schema.INDEX_TABLES and part.exists():
                begun[name] = rows_until(read_part(part, name), step)
        self._values = sum(map(values_in, begun.values()))
        if last > step:
            self._written = self._first - 1
        if self._ends(step):
            begun, self._first, self._values = {}, step + 1, 0
            self._written = step
        for part in list_parts(self._root.parent, "behaviors"):
            if first_step_of(part) <= step:
                for row in rows_until(read_part(part, "behaviors"), step).to_pylist():
                    if row["margin"] is not None:
                        self._margins[row["split"], row["behavior"]] = row["step"], row["margin"]
        return begun


class MetricsLog:
    """Appends JSON lines, `{"step": ..., ...}`, each batch of them synced by `flush`.

    Args:
        path: the file, metrics.jsonl or perf.jsonl.
        resume_step: None or 0 starts the file anew. Otherwise what the file holds is kept: lines
            up to that step only with truncate (metrics.jsonl: the straight run's lines, whatever
            happened between), all lines without (perf.jsonl: time that was really spent, so the
            steps that were lost and repeated stand in it twice).

    A last line that was half written when the run was killed is dropped. Raises ValueError with
    file and line for any other line that is not JSON. `kept` is what the file held and keeps.
    """

    def __init__(
        self, path: str | Path, resume_step: int | None = None, *, truncate: bool = True
    ) -> None:
        self._path = Path(path)
        self._rows: list[dict[str, object]] = []
        self.kept: list[dict[str, Any]] = []
        if resume_step and self._path.exists():
            rows = read_jsonl(self._path)
            self.kept = [row for row in rows if not truncate or row["step"] <= resume_step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(_json_line(row) for row in self.kept)
        replace_file(self._path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def append(self, row: Mapping[str, object]) -> None:
        """Add a line; it needs an integer "step". A number that is not finite becomes null."""
        if not isinstance(row.get("step"), int):
            raise ValueError(f"a line of {self._path} needs an integer 'step', got {dict(row)}")
        self._rows.append(_writable(row))

    def flush(self) -> list[dict[str, object]]:
        """Write the lines added since the last flush, wait until they are on the disk, return
        them."""
        rows, self._rows = self._rows, []
        if rows:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_json_line, rows)))
                file.flush()
                os.fsync(file.fileno())
        return rows

    def close(self) -> None:
        """The same as flush: the file is open only while it is written."""
        self.flush()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON lines, leaving out a half-written last one. ValueError on any other bad line."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        # Every whole line ends in a newline, so what stands after the last one is unfinished.
        if number == len(lines) or not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}): {line[:80]!r}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}:{number}: expected an object with a step, got {line[:80]!r}")
        rows.append(row)
    return rows


def _check_indices(column: str, indices: np.ndarray, count: int) -> None:
    """Raise ValueError unless every one of (P,) `indices` is one of 0 to count - 1."""
    bad = np.flatnonzero((indices < 0) | (indices >= count))
    if bad.size:
        raise ValueError(
            f"column {column!r} holds index {indices[bad[0]]} at row {bad[0]}, expected 0 to "
            f"{count - 1}"
        )


def _writable(row: Mapping[str, object]) -> dict[str, object]:
    """Plain Python values; numbers that are not finite become None, as JSON has none."""
    values = {key: plain(value) for key, value in row.items()}
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _json_line(row: Mapping[str, object]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
