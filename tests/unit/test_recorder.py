"""The recorder: what is written comes back; killed and resumed leaves the straight records."""

from __future__ import annotations

import json
import os
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpref.dynamics import parts, schema, writer
from fastpref.dynamics import recorder as recorder_module
from fastpref.dynamics.groups import behavior_rows
from fastpref.dynamics.recorder import MetricsLog, Recorder, read_jsonl, read_records

NAMES = ["calm", "bold"]
TABLES = ("pairs", "steps", "behaviors")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def pair_columns(step: int, count: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {
        "pair_id": rng.integers(0, 2**62, count),
        "behavior": rng.integers(0, 2, count),
        "margin": rng.normal(size=count).astype(np.float32),
        "logp_chosen": rng.normal(size=count).astype(np.float32),
        "logp_rejected": rng.normal(size=count).astype(np.float32),
        "loss": rng.normal(size=count),
    }


def evaluate(recorder: Recorder, step: int) -> None:
    for split in ("train_sample", "eval"):
        columns = pair_columns(1000 + step, 8)
        del columns["pair_id"]
        recorder.behaviors(step, split, behavior_rows(NAMES, **columns))


def run_steps(
    folder: Path, last: int, part_steps: int, resume: int | None, *, close: bool = True
) -> None:
    """A training loop without the training: evaluates every 3 steps and at step 0."""
    recorder = Recorder(folder, 0, NAMES, part_steps, resume)
    recorder.index({"pair_id": i, "behavior": "calm", "split": "train"} for i in range(4))
    if resume is None:
        evaluate(recorder, 0)
    for step in range((resume or 0) + 1, last + 1):
        recorder.pairs(step, "train", step / 10, micro=0, **pair_columns(step))
        recorder.step(step, loss=1.0 / step, lr=1e-3, pairs=3)
        if step % 3 == 0:
            evaluate(recorder, step)
        recorder.flush(step)
    if close:
        recorder.close(last)
    else:
        recorder._writer.join()  # killed, but not in the middle of a part


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / "records").rglob("*"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.is_file()}


def test_parts_are_cut_at_steps(tmp_path: Path) -> None:
    run_steps(tmp_path, 10, 4, None)
    for table in TABLES:
        names = [path.name for path in parts.list_parts(tmp_path, table)]
        assert names == [f"part-{first:08d}-0000.parquet" for first in (0, 5, 9)]
    held = [pq.read_table(p)["step"].to_pylist() for p in parts.list_parts(tmp_path, "steps")]
    assert held == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    evaluated = [
        set(pq.read_table(p)["step"].to_pylist()) for p in parts.list_parts(tmp_path, "behaviors")
    ]
    assert evaluated == [{0, 3}, {6}, {9}]


def test_what_is_recorded_comes_back(tmp_path: Path) -> None:
    run_steps(tmp_path, 10, 4, None)
    table = read_records(tmp_path, "pairs")
    assert table.schema.names == schema.arrow_schema("pairs").names
    expected = [pair_columns(step) for step in range(1, 11)]
    for name in ("pair_id", "margin", "logp_chosen"):
        want = np.concatenate([columns[name] for columns in expected])
        np.testing.assert_array_equal(table[name].to_numpy(), want)
    behavior = np.concatenate([columns["behavior"] for columns in expected])
    assert table["behavior"].to_pylist() == [NAMES[k] for k in behavior]
    margin = table["margin"].to_numpy()
    assert table["reward_accuracy"].to_pylist() == [bool(m > 0) for m in margin]
    higher = table["logp_chosen"].to_numpy() > table["logp_rejected"].to_numpy()
    assert table["output_accuracy"].to_pylist() == higher.tolist()
    assert table["gnorm_m"].null_count == table.num_rows
    assert set(table["split"].to_pylist()) == {"train"}
    steps = read_records(tmp_path, "steps", columns=["step", "loss"])
    assert steps.to_pydict() == {"step": list(range(1, 11)), "loss": [1 / s for s in range(1, 11)]}


def test_rate_obs_is_the_difference_quotient(tmp_path: Path) -> None:
    run_steps(tmp_path, 10, 4, None)
    rows = read_records(tmp_path, "behaviors").to_pylist()
    for split in ("train_sample", "eval"):
        for name in NAMES:
            mine = [r for r in rows if r["split"] == split and r["behavior"] == name]
            assert [r["step"] for r in mine] == [0, 3, 6, 9]
            assert mine[0]["rate_obs"] is None
            for before, after in zip(mine, mine[1:], strict=False):
                assert after["rate_obs"] == (after["margin"] - before["margin"]) / 3


@pytest.mark.parametrize("killed", [4, 5, 7, 8, 11])
def test_killed_at_any_step_and_resumed_is_the_straight_run(tmp_path: Path, killed: int) -> None:
    run_steps(tmp_path / "straight", 13, 4, None)
    run_steps(tmp_path / "killed", killed, 4, None, close=False)
    boundary = killed // 4 * 4
    stale = tmp_path / "killed" / "records" / "steps" / "part-00000009-0000.parquet.partial"
    stale.write_bytes(b"half a file")
    run_steps(tmp_path / "killed", 13, 4, boundary)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.parametrize(("reached", "resume"), [(7, 7), (13, 7), (3, 2), (13, 13), (13, 4)])
def test_resumed_inside_a_part_is_the_straight_run(
    tmp_path: Path, reached: int, resume: int
) -> None:
    run_steps(tmp_path / "straight", 13, 4, None)
    run_steps(tmp_path / "cut", reached, 4, None)
    run_steps(tmp_path / "cut", 13, 4, resume)
    assert contents(tmp_path / "cut") == contents(tmp_path / "straight")


def test_resuming_removes_what_lies_ahead(tmp_path: Path) -> None:
    run_steps(tmp_path, 13, 4, None)
    Recorder(tmp_path, 0, NAMES, 4, 6)
    assert read_records(tmp_path, "steps")["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert max(read_records(tmp_path, "behaviors")["step"].to_pylist()) == 6


def test_resume_needs_the_records_up_to_there(tmp_path: Path) -> None:
    run_steps(tmp_path, 7, 4, None, close=False)
    told = r"at step 7: .*part-00000000-0000.parquet ends at step 4 \(4 steps"
    with pytest.raises(ValueError, match=told):
        Recorder(tmp_path, 0, NAMES, 4, 7)
    with pytest.raises(ValueError, match="at step 7: .*records has none of it"):
        Recorder(tmp_path / "elsewhere", 0, NAMES, 4, 7)
    run_steps(tmp_path, 6, 4, 4)
    with pytest.raises(ValueError, match="ends at step 6"):
        Recorder(tmp_path, 0, NAMES, 4, 8)


def test_a_new_run_removes_the_old_one(tmp_path: Path) -> None:
    run_steps(tmp_path, 13, 4, None)
    run_steps(tmp_path, 3, 4, None)
    run_steps(tmp_path / "fresh", 3, 4, None)
    fresh = contents(tmp_path / "fresh")
    assert {k: v for k, v in contents(tmp_path).items() if "fresh" not in k} == fresh


def test_an_interrupted_write_leaves_the_previous_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_steps(tmp_path, 4, 4, None)
    before = contents(tmp_path)
    real = pq.write_table

    def dies(table: pa.Table, where: Path, **options: Any) -> None:
        real(table, where, **options)
        where.write_bytes(where.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(parts.pq, "write_table", dies)
    with pytest.raises(KeyboardInterrupt):
        run_steps(tmp_path, 8, 4, 4)
    monkeypatch.undo()
    readable = [read_records(tmp_path, table).num_rows for table in TABLES]
    Recorder(tmp_path, 0, NAMES, 4, 4)
    assert contents(tmp_path) == before
    assert readable == [read_records(tmp_path, table).num_rows for table in TABLES]


def test_a_part_ends_early_where_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part_steps is; and a resumed run, from any step, has the same parts."""
    per_step = 3 * len(schema.TABLES["pairs"].columns) + len(schema.TABLES["steps"].columns)
    monkeypatch.setattr(recorder_module, "PART_VALUES", 3 * per_step)
    run_steps(tmp_path / "straight", 13, 10**6, None)
    firsts = [parts.first_step_of(p) for p in parts.list_parts(tmp_path / "straight", "pairs")]
    for first, following in zip(firsts, firsts[1:], strict=False):
        name = parts.part_name(first, 0)
        found = [tmp_path / "straight" / "records" / table / name for table in TABLES]
        tables = [pq.read_table(path) for path in found if path.exists()]
        before = [parts.rows_until(table, following - 2) for table in tables]
        held, without_the_last = (sum(map(parts.values_in, own)) for own in (tables, before))
        assert without_the_last < 3 * per_step <= held
    steps = read_records(tmp_path / "straight", "steps")["step"].to_pylist()
    assert steps == list(range(1, 14))
    assert len(firsts) > 3
    for reached, resume in ((13, 4), (11, 2), (7, 7), (12, 10)):
        folder = tmp_path / f"resumed-{resume}"
        run_steps(folder, reached, 10**6, None)
        run_steps(folder, 13, 10**6, resume)
        assert contents(folder) == contents(tmp_path / "straight"), (reached, resume)


def test_memory_does_not_grow_with_the_steps_of_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "PART_VALUES", 10_000)
    recorder = Recorder(tmp_path, 0, NAMES, 10**6)
    tracemalloc.start()
    peaks = []
    for step in range(1, 401):
        recorder.pairs(step, "train", **pair_columns(step, 30))
        recorder.flush(step)
        if step % 100 == 0:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    tracemalloc.stop()
    recorder.close(400)
    assert max(peaks[1:]) < 1.2 * peaks[0], peaks
    assert pa.total_allocated_bytes() < 10_000_000


def test_the_loop_goes_on_while_a_part_is_written_and_waits_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, may_write, written = parts.write_part, threading.Semaphore(0), []

    def held(table: pa.Table, path: Path, last_step: int) -> None:
        may_write.acquire()
        write(table, path, last_step)
        written.append(last_step)

    monkeypatch.setattr(writer, "write_part", held)
    recorder = Recorder(tmp_path, 0, NAMES, 1)

    def step(number: int) -> None:
        recorder.pairs(number, "train", **pair_columns(number))
        recorder.flush(number)

    step(1)  # returns, though nothing can be written
    waiting = threading.Thread(target=step, args=(2,))
    waiting.start()
    waiting.join(timeout=0.2)
    assert waiting.is_alive() and written == []
    may_write.release()
    waiting.join(timeout=10)
    assert not waiting.is_alive() and written == [1]
    may_write.release()
    recorder.close(2)
    assert written == [1, 2]


def test_what_goes_wrong_in_the_thread_is_told_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_part", full)
    with pytest.raises(OSError, match="records could not be written.*No space left") as told:
        with Recorder(tmp_path, 0, NAMES, 1) as recorder:
            recorder.pairs(1, "train", **pair_columns(1))
            recorder.flush(1)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                recorder.flush(1)
    assert isinstance(told.value.__cause__, OSError)
    with pytest.raises(OSError, match="No space left"):
        recorder = Recorder(tmp_path, 0, NAMES, 1)
        recorder.pairs(1, "train", **pair_columns(1))
        recorder.close(1)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ArithmeticError])
def test_however_the_loop_ends_what_was_recorded_is_written(
    tmp_path: Path, error: type[BaseException] | None
) -> None:
    def loop() -> None:
        with Recorder(tmp_path, 0, NAMES, 10) as recorder:
            for step in range(1, 8):
                recorder.pairs(step, "train", **pair_columns(step))
                recorder.step(step, loss=0.5)
                if step == 7 and error:
                    raise error  # before its flush
                recorder.flush(step)

    if error:
        with pytest.raises(error):
            loop()
    else:
        loop()
    assert read_records(tmp_path, "steps")["step"].to_pylist() == list(range(1, 8))
    Recorder(tmp_path, 0, NAMES, 10, 6)  # goes on from an earlier checkpoint
    assert read_records(tmp_path, "steps")["step"].to_pylist() == list(range(1, 7))


def test_ranks_write_their_own_pairs_and_rank_0_the_rest(tmp_path: Path) -> None:
    for rank in (0, 1):
        recorder = Recorder(tmp_path, rank, NAMES, 2)
        recorder.index([{"pair_id": 1, "behavior": "calm", "split": "eval"}])
        for step in (1, 2):
            recorder.pairs(step, "train", **pair_columns(10 * step + rank, 2 + rank))
            recorder.step(step, loss=0.5)
            recorder.flush(step)
        recorder.close(2)
    ranks = read_records(tmp_path, "pairs")["rank"].to_pylist()
    assert ranks == [0] * 4 + [1] * 6
    assert len(parts.list_parts(tmp_path, "steps")) == len(parts.list_parts(tmp_path, "index")) == 1


def test_list_columns_and_numbers_for_all(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, NAMES, 1)
    groups = np.arange(6, dtype=np.float32).reshape(3, 2)
    recorder.pairs(1, "train", gnorm_groups=groups, truncated=False, **pair_columns(1))
    recorder.step(1, module_update_norm=np.array([0.5, 0.25]))
    recorder.close(1)
    table = read_records(tmp_path, "pairs", columns=["gnorm_groups", "truncated"])
    assert table.to_pydict() == {"gnorm_groups": groups.tolist(), "truncated": [False] * 3}
    assert read_records(tmp_path, "steps")["module_update_norm"].to_pylist() == [[0.5, 0.25]]


def bad(recorder: Recorder, **changes: Any) -> None:
    recorder.pairs(1, changes.pop("split", "train"), **{**pair_columns(1), **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: bad(r, gnorm=np.zeros(3)), "'pairs' has no column 'gnorm'"),
        (lambda r: bad(r, margin=np.zeros(4)), r"'margin' needs shape \(3,\), got \(4,\)"),
        (lambda r: bad(r, loss=[1.0, 2.0, 3.0]), "'loss' needs a numpy array .*, got list"),
        (lambda r: bad(r, behavior=np.array([0, 2, 1])), "index 2 at row 1, expected 0 to 1"),
        (lambda r: bad(r, split="test"), "split 'test' at step 1 is none of"),
        (lambda r: bad(r, prompt_len=np.array([1, 2, 2**40])), "1099511627776 not in range"),
        (lambda r: r.pairs(1, "train", behavior=np.zeros(3)), "need the column 'pair_id'"),
        (lambda r: r.step(1, seconds=1.0), "'steps' has no column 'seconds'"),
        (lambda r: r.step(5, loss=1.0), r"step 5 recorded after flush\(-1\).* 4 steps"),
        (lambda r: (r.flush(1), r.step(1, loss=1.0)), r"step 1 recorded after flush\(1\)"),
        (lambda r: r.behaviors(0, "eval", [{"behavior": "calm"}]), "row 0 of behaviors needs 'n'"),
        (lambda r: [evaluate(r, 0), evaluate(r, 0)], "evaluated at step 0 already"),
    ],
)
def test_bad_records_are_refused(
    tmp_path: Path, call: Callable[[Recorder], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(Recorder(tmp_path, 0, NAMES, 4))


def test_reading_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no records of 'pairs': expected .*part-\*"):
        read_records(tmp_path, "pairs")


@pytest.mark.parametrize("version", [schema.SCHEMA_VERSION - 1, 99])
def test_records_of_another_version_are_refused(tmp_path: Path, version: int) -> None:
    """Read, or continued by a resumed run: neither mixes two meanings in one folder."""
    run_steps(tmp_path, 4, 4, None)
    for path in parts.list_parts(tmp_path, "steps") + parts.list_parts(tmp_path, "index"):
        table = pq.read_table(path)
        other = {**table.schema.metadata, schema.VERSION_KEY: str(version).encode()}
        pq.write_table(table.replace_schema_metadata(other), path)
    told = rf"part-00000000-0000.*version {version}, this .*version {schema.SCHEMA_VERSION}"
    with pytest.raises(ValueError, match=told):
        read_records(tmp_path, "steps")
    with pytest.raises(ValueError, match=told):
        run_steps(tmp_path, 6, 4, 4)


def test_index_must_stay_the_same(tmp_path: Path) -> None:
    run_steps(tmp_path, 4, 4, None)
    recorder = Recorder(tmp_path, 0, NAMES, 4, 4)
    rows = [{"pair_id": i, "behavior": "calm", "split": "train"} for i in (0, 1, 5, 3)]
    with pytest.raises(ValueError, match="4 rows then, 4 now, first difference at row 2"):
        recorder.index(rows)


def test_metrics_log_appends_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1, "loss": np.float32(0.5), "name": "é"})
    assert path.read_text() == ""
    log.flush()
    log.append({"step": 2, "loss": float("nan")})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5, "name": "é"},
        {"step": 2, "loss": None},
    ]


@pytest.mark.parametrize("truncate", [True, False])
def test_metrics_log_resumes_and_drops_a_half_line(tmp_path: Path, truncate: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 4, "a": 1}\n{"step": 5}\n{"step": 6, "lo')
    assert [row["step"] for row in read_jsonl(path)] == [1, 4, 5]
    log = MetricsLog(path, 4, truncate=truncate)
    log.append({"step": 5, "again": True})
    log.flush()
    kept = [1, 4] if truncate else [1, 4, 5]
    assert [row["step"] for row in read_jsonl(path)] == [*kept, 5]
    MetricsLog(path)
    assert path.read_text() == ""


def test_metrics_log_refuses_other_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        MetricsLog(path, 3)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: expected an object with a step"):
        read_jsonl(path)
    with pytest.raises(ValueError, match="integer 'step'"):
        MetricsLog(tmp_path / "new.jsonl").append({"loss": 1.0})


def test_norms_beyond_float16_are_inf(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    column = schema.TABLES["pairs"].column("gnorm_groups")
    values = np.array([[1e5, 65504.0, np.nan, 1.5]], np.float32)
    assert parts.arrow_array(column, [values], [1]).to_pylist() == [[np.inf, 65504.0, None, 1.5]]
    assert not recwarn.list
