"""SIGKILL at random moments, one inside a checkpoint's writing: the run ends as if never killed."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fastpref.config import Config
from fastpref.dynamics.recorder import read_records
from fastpref.train import train

KILLS = 5


def test_killed_and_resumed_equals_straight(
    tiny_model_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=(str(tiny_data),),
        ref_cache_dir=str(tmp_path / "reference"),
        output_dir=str(tmp_path / "killed"),
        max_length=96,
        train_batch_size=8,
        max_steps=60,
        learning_rate=1e-3,
        logging_steps=7,
        eval_steps=9,
        eval_sample_size=4,
        save_steps=4,
    )
    # A server that has imported everything forks each run: a kill costs no new start of Python.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["fastpref.train", "transformers.models.llama.modeling_llama"])
    run, straight = tmp_path / "killed", tmp_path / "straight"

    def start(folder: Path) -> BaseProcess:
        own = dataclasses.replace(config, output_dir=str(folder))
        process = server.Process(target=train, args=(own, False))
        process.start()
        return process

    process = start(straight)
    process.join(timeout=300)
    assert process.exitcode == 0
    # From the first file that the loop needs to the last that it writes.
    began, ended = ((straight / n).stat().st_mtime for n in ("config.yaml", "model.safetensors"))

    moments = random.Random(time.time_ns())
    in_writing = False
    for n in range(KILLS):
        process = start(run)
        wait_for_training(run, process)
        if n == 0:
            in_writing = kill_inside_a_checkpoint(run, process)
        else:
            # By what is done, not by the clock alone: other work may make one run slower than
            # another. Of the 15 checkpoints at most 2 + 4 x 3 are reached before the last kill.
            wait_for_checkpoint(run, newest_checkpoint(run) + 4 * moments.randrange(3), process)
            time.sleep(moments.uniform(0, (ended - began) / 30))
            process.kill()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL, "the run ended by itself"
    assert in_writing, "no kill fell inside a checkpoint's writing"
    process = start(run)
    process.join(timeout=300)
    assert process.exitcode == 0

    for name in ("model.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name
    for table in ("pairs", "steps", "behaviors", "index"):
        assert read_records(run, table).equals(read_records(straight, table)), table
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith("perf")) == sorted(
        p.name for p in straight.iterdir() if not p.name.startswith("perf")
    )


def wait_for_training(run: Path, process: BaseProcess) -> None:
    """Until this process has begun with the run: its config.yaml is newer than the process."""
    started = time.time()
    written = run / "config.yaml"
    while process.is_alive():
        if written.exists() and written.stat().st_mtime >= started - 0.5:
            return
        time.sleep(0.001)


def newest_checkpoint(run: Path) -> int:
    """Step of the newest checkpoint that stands in ``run``, 0 if there is none."""
    return max((int(p.name.split("-")[1]) for p in run.glob("checkpoint-*")), default=0)


def wait_for_checkpoint(run: Path, step: int, process: BaseProcess) -> None:
    """Until the checkpoint of ``step`` stands."""
    while process.is_alive() and newest_checkpoint(run) < step:
        time.sleep(0.001)


def kill_inside_a_checkpoint(run: Path, process: BaseProcess) -> bool:
    """Kill at the sight of a folder that is being written; whether it was caught unfinished."""
    while process.is_alive():
        if any(run.glob(".tmp-checkpoint-*")):
            process.kill()
            process.join()
            return any(run.glob(".tmp-checkpoint-*"))
    return False


@pytest.mark.parametrize("stop", [signal.SIGTERM])
def test_sigterm_ends_at_a_whole_step(
    tiny_model_dir: Path, tiny_data: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    import subprocess
    import sys

    run = tmp_path / "run"
    options = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": tiny_data,
        "ref_cache_dir": tmp_path / "reference",
        "output_dir": run,
        "max_length": 96,
        "max_steps": 5000,
        "save_steps": 1000,
        "logging_steps": 1,
        "eval_steps": 0,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastpref", "train", *words],
        env={**os.environ, "PYTHONPATH": ".:kernels"},
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size:
            break
        time.sleep(0.05)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert read_records(run, "steps")["step"].to_pylist() == list(range(1, step + 1))
    assert f"stopped after step {step}" in errors
