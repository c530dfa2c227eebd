"""161,000 pairs: what they take on the disk, who can read them, what README asks of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpref.dynamics import schema
from fastpref.dynamics.parts import list_parts
from fastpref.dynamics.recorder import Recorder, read_records

PAIRS, BATCH, GROUPS = 161_000, 64, 67  # HH-RLHF's; layer groups of a model of 32 blocks
NAMES = ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
# Of the logarithms of lengths in tokens in HH-RLHF: mean and standard deviation.
LENGTHS = {"prompt_len": (4.27, 1.05), "chosen_len": (3.25, 0.99), "rejected_len": (3.46, 1.02)}
README = Path(__file__).parents[2] / "README.md"


def made_up(count: int, groups: int, seed: int) -> dict[str, Any]:
    """Every column of `pairs` but the sketch, with the spread of real ones: numbers of which no bit
    follows from another column, where real margins and losses do."""
    rng = np.random.default_rng(seed)

    def spread(mean: float, deviation: float, *shape: int) -> np.ndarray:
        return np.exp(rng.normal(mean, deviation, (count, *shape))).astype(np.float32)

    columns: dict[str, Any] = {
        name: np.maximum(spread(*m), 1).astype(np.int64) for name, m in LENGTHS.items()
    }
    columns |= {
        "pair_id": rng.integers(0, 2**63 - 1, count),
        "behavior": rng.integers(0, len(NAMES), count),
        "shared_len": np.minimum(rng.geometric(0.7, count) - 1, columns["chosen_len"]),
        "truncated": rng.random(count) < 0.02,
        "norm_method": "gram",
        "micro": 0,
        "gnorm_groups": spread(1.5, 0.35, groups) * spread(0, 0.5, 1),
    }
    for column in schema.TABLES["pairs"].columns:
        if column.name.startswith(("logp", "ref_logp", "argmax_logp")):
            columns[column.name] = -spread(3.3 + 0.5, 1.0)
        elif column.name == "margin":
            columns["margin"] = rng.normal(1, 5, count).astype(np.float32)
        elif str(column.type) == "float" and column.name not in {*columns, "epoch"}:
            columns[column.name] = spread(0, 0.6)
    return columns


def rows_of(columns: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {n: v[start:stop] if isinstance(v, np.ndarray) else v for n, v in columns.items()}


def write_run(folder: Path, pairs: int, groups: int, eval_every: int, save_steps: int) -> int:
    """An epoch with evaluations of 2 x 500 pairs; the rows of `pairs`."""
    columns, rng = made_up(pairs, groups, 0), np.random.default_rng(1)
    recorder = Recorder(folder, 0, NAMES, save_steps)
    recorder.index(
        {
            "pair_id": pair_id, "id": f"{rng.integers(2**40):x}", "file": f"{NAMES[k]}.jsonl.gz",
            "line": line, "behavior": NAMES[k], "label": "", "flipped": False, "split": "train",
        }
        for line, (pair_id, k) in enumerate(
            zip(columns["pair_id"].tolist(), columns["behavior"].tolist(), strict=True)
        )
    )  # fmt: skip
    steps, rows = -(-pairs // BATCH), pairs
    for step in range(1, steps + 1):
        own = rows_of(columns, (step - 1) * BATCH, step * BATCH)
        recorder.pairs(step, "train", step / steps, **own)
        numbers = dict.fromkeys(("loss", "lr", "beta", "grad_norm", "clip_coef"), rng.random())
        moved = rng.random(groups, np.float32)
        recorder.step(step, pairs=BATCH, tokens=9000 + step, module_update_norm=moved, **numbers)
        if step % eval_every == 0:
            for split in ("train_sample", "eval"):
                recorder.pairs(step, split, step / steps, **made_up(500, groups, step))
                recorder.behaviors(step, split, [{"behavior": n, "n": 125} for n in NAMES])
                rows += 500
        recorder.flush(step)
    recorder.close(steps)
    return rows


@pytest.mark.parametrize("save_steps", [100, 100_000])
def test_an_epoch_of_hh_rlhf_is_under_60_mb(tmp_path: Path, save_steps: int) -> None:
    rows = write_run(tmp_path, PAIRS, GROUPS, eval_every=250, save_steps=save_steps)
    size = sum(path.stat().st_size for path in (tmp_path / "records").rglob("*.parquet"))
    filled = read_records(tmp_path, "pairs")
    print(f"{rows} rows of pairs, {size / 1e6:.1f} MB, {len(list_parts(tmp_path, 'pairs'))} parts")
    assert filled.num_rows == rows
    empty = [name for name in filled.column_names if filled[name].null_count == rows]
    assert empty == ["sketch"]
    assert size < 60e6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which README's queries run: it holds runs/demo."""
    root = tmp_path_factory.mktemp("reading")
    write_run(root / "runs" / "demo", 1000, 5, eval_every=10, save_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root / "runs" / "demo"


def test_pandas_polars_and_duckdb_read_the_same_table(run: Path) -> None:
    import duckdb
    import pandas
    import polars

    want = read_records(run, "pairs").to_pandas()
    files = "runs/demo/records/pairs/*.parquet"
    found = {
        "pandas": pandas.read_parquet("runs/demo/records/pairs"),
        "polars": polars.read_parquet(files).to_pandas(),
        "duckdb": duckdb.sql(f"FROM '{files}' ORDER BY step, split").df(),
    }
    assert len(list_parts(run, "pairs")) > 3
    for name, table in found.items():
        assert list(table.columns) == list(want.columns), name
        order = {"step": "stable", "split": "stable"}
        for column in want.columns:
            if column == "sketch":  # all null
                continue
            one, other = (
                t.assign(split=t.split.astype(str)).sort_values([*order, "pair_id"])[column]
                for t in (want, table)
            )
            if column == "gnorm_groups":
                one, other = np.stack(one), np.stack(other)
            elif one.dtype.name == "category":
                one, other = one.astype(str), other.astype(str)
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other), f"{name} {column}")


def test_the_query_of_readme_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (query,) = re.findall(r"```python\n(import duckdb.*?)```", README.read_text(), re.DOTALL)
    exec(query, {})
    shown = capsys.readouterr().out
    for word in ("behavior", "gradient", *NAMES[:2]):
        assert word in shown
    for reader in re.findall(r"`((?:polars|pandas)\.read_parquet\([^`]*\))`", README.read_text()):
        name = reader.partition(".")[0]
        table = eval(reader, {name: __import__(name)})
        assert len(table) == read_records(run, "pairs").num_rows
