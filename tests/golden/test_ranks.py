"""Two ranks and one are the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from pyarrow.parquet import read_table
from safetensors.torch import load_file

from fastpref.config import Config
from fastpref.dynamics.recorder import read_records
from fastpref.train import train

STEPS = 8


def run_on_two(options: dict[str, str], folder: Path, *config: Path) -> None:
    """`fastpref train [CONFIG]` with ``options`` as two gloo processes."""
    words = [
        w for name, v in {**options, "output_dir": str(folder)}.items() for w in (f"--{name}", v)
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    done = subprocess.run(
        [sys.executable, *launch, "fastpref", "train", *map(str, config), *words],
        env={**os.environ, "PYTHONPATH": ".:kernels", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_ranks_equal_one(tiny_model_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    options = {
        "model_name_or_path": str(tiny_model_dir),
        "dataset_name": str(tiny_data),
        "ref_cache_dir": str(tmp_path / "reference"),
        "max_length": "96",
        "train_batch_size": "8",
        # Margins grow, and smaller ones are asked for: the first evaluation is the best one, and
        # the second ends the run, early, on both ranks.
        "max_steps": str(2 * STEPS),
        "metric_for_best_model": "rewards/margins",
        "greater_is_better": "false",
        "early_stopping_patience": "1",
        "load_best_model_at_end": "true",
        "report_to": "tensorboard",
        "learning_rate": "3e-3",
        "logging_steps": "3",
        "eval_steps": "4",
        "eval_sample_size": "4",
        "save_steps": "4",
        "balance": "margins",
        "balance_every": "3",
    }
    one, two = tmp_path / "one", tmp_path / "two"
    train(Config(**{**options, "output_dir": str(one)}), progress=False)  # type: ignore[arg-type]
    run_on_two({**options, "ref_cache_dir": str(tmp_path / "reference of two")}, two)
    (kept,) = (tmp_path / "reference").iterdir()
    (of_two,) = (tmp_path / "reference of two").iterdir()
    assert of_two.name == kept.name and read_table(of_two).equals(read_table(kept))

    bests = [
        json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["counters"]
        for run in (one, two)
    ]
    for counters in bests:
        assert (counters["best"]["step"], counters["best"]["stale"]) == (4, 1)
    balance = [np.array(c["balance"]["controller"]["weights"]) for c in bests]
    np.testing.assert_allclose(balance[1], balance[0], rtol=1e-3)
    assert np.ptp(balance[0]) > 0.05
    for run in (one, two):
        assert len(list((run / "tensorboard").iterdir())) == 1  # rank 0's
        weights = [(f / "model.safetensors").read_bytes() for f in (run, run / "checkpoint-4")]
        assert weights[0] == weights[1]

    steps = [read_records(run, "steps").to_pydict() for run in (one, two)]
    assert steps[0]["step"] == steps[1]["step"] == list(range(1, STEPS + 1))
    for name in ("pairs", "tokens", "rows", "lr"):
        assert steps[0][name] == steps[1][name], name
    for name in ("loss", "grad_norm"):
        ours, theirs = np.array(steps[1][name]), np.array(steps[0][name])
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
        assert abs(np.mean(ours - theirs)) < 1e-5
    pairs = [read_records(run, "pairs").to_pylist() for run in (one, two)]
    for split in ("train", "train_sample", "eval"):
        seen = [
            sorted((r["step"], r["pair_id"], r["margin"]) for r in rows if r["split"] == split)
            for rows in pairs
        ]
        assert [r[:2] for r in seen[0]] == [r[:2] for r in seen[1]]
        margins = [np.array([r[2] for r in side]) for side in seen]
        np.testing.assert_allclose(*margins, atol=1e-3)
    assert {r["rank"] for r in pairs[1] if r["split"] == "train"} == {0, 1}

    start = load_file(tiny_model_dir / "model.safetensors")
    ours, theirs = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    for name in theirs:
        update = (theirs[name] - start[name]).norm()
        assert (ours[name] - theirs[name]).norm() < 1e-2 * update, name


def test_losses_that_tie_a_step_together(
    tiny_model_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Sorted over both ranks and divided by the tokens of both; in the second step one rank has no
    pair. Weighted tokens and a reference that moves come along."""
    loss_config = tmp_path / "loss.yaml"
    options = {
        "model_name_or_path": str(tiny_model_dir),
        "dataset_name": str(tiny_data),
        "ref_cache_dir": str(tmp_path / "reference"),
        "max_length": "96",
        "train_batch_size": "71",  # of 72 pairs
        "max_steps": "3",
        "learning_rate": "3e-3",
        "max_tokens_per_microbatch": "700",
        "ld_alpha": "0.5",
        "sync_ref_model": "true",
        "ref_model_sync_steps": "1",
        "eval_steps": "0",
    }
    one, two = tmp_path / "one", tmp_path / "two"
    names = {"loss_type": ("aot_unpaired", "sft"), "output_dir": str(one)}
    train(Config(**{**options, **names}), progress=False)  # type: ignore[arg-type]
    loss_config.write_text("loss_type: [aot_unpaired, sft]\n")
    run_on_two(options, two, loss_config)

    steps = [read_records(run, "steps").to_pydict() for run in (one, two)]
    assert steps[0]["pairs"] == steps[1]["pairs"] == [71, 1, 71]
    assert steps[0]["micro_batches"][0] > 2
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(steps[1][name], steps[0][name], rtol=1e-4)
    seen = [
        sorted((r["step"], r["pair_id"], r["loss"], r["weight"]) for r in rows)
        for rows in (read_records(run, "pairs").to_pylist() for run in (one, two))
    ]
    np.testing.assert_allclose(*([r[2:] for r in side] for side in seen), rtol=1e-3, atol=1e-5)
    start = load_file(tiny_model_dir / "model.safetensors")
    ours, theirs = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    for name in theirs:
        update = (theirs[name] - start[name]).norm()
        assert (ours[name] - theirs[name]).norm() < 1e-2 * update, name
