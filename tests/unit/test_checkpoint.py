"""Checkpoints: bit-exact, whole or refused, usable after a kill at any moment.

Run as a script, this file is the process that the kill tests kill: see `_be_killed`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastpref import checkpoint
from fastpref.checkpoint import (
    TrainState,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    remove_checkpoints_after,
    save_checkpoint,
    verify_checkpoint,
)
from fastpref.config import Config
from fastpref.optim import build_optimizer
from fastpref.schedule import Schedule

ROOT = Path(__file__).resolve().parents[2]


class Small(nn.Module):
    """Two weights and what `save_checkpoint` asks of a Hugging Face model."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(4, 4)

    def save_pretrained(self, folder: Path) -> None:
        save_file(self.state_dict(), Path(folder) / "model.safetensors")

    def loss(self) -> Tensor:
        noise = torch.randn(3, 4) + random.gauss(0, 1) + float(np.random.standard_normal())
        return self.inner(noise.to(self.inner.weight.dtype)).square().sum()


class Text(nn.Module):
    """A transformers model; its loss is that of random tokens, from all three generators."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf

    def loss(self) -> Tensor:
        shift = random.randrange(40) + int(np.random.randint(40))
        ids = (torch.randint(0, 40, (2, 6)) + shift) % 40
        return self.hf(input_ids=ids, labels=ids).loss


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **sizes, **heads)
    return LlamaForCausalLM(config).to(dtype)


def new_state(module: Any, tokenizer: Any = None, **options: Any) -> TrainState:
    config = Config(learning_rate=1e-2, weight_decay=0.01, **options)
    optimizer = build_optimizer(module.named_parameters(), config)
    schedule = Schedule(optimizer, config, 20)
    return TrainState(module, tokenizer, optimizer, schedule, {"step": 0, "sum": 0.1})


def train(state: TrainState, loss: Any, steps: int) -> None:
    for _ in range(steps):
        state.optimizer.zero_grad()
        loss().backward()
        state.optimizer.step()
        state.schedule.step()
        state.counters["step"] += 1
        state.counters["sum"] += 1 / 3


def assert_same_bits(a: TrainState, b: TrainState) -> None:
    mine, theirs = a.module.state_dict(), b.module.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    one, two = a.optimizer.state_dict(), b.optimizer.state_dict()
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    for number, entries in one["state"].items():
        assert entries.keys() == two["state"][number].keys()
        for key, value in entries.items():
            other = two["state"][number][key]
            if isinstance(value, Tensor):
                assert value.dtype == other.dtype and torch.equal(value, other), (number, key)
            else:
                assert value == other, (number, key)
    assert a.counters == b.counters and a.schedule.state_dict() == b.schedule.state_dict()


@pytest.mark.parametrize(
    ("dtype", "tied", "optim", "args"),
    [
        (torch.float32, True, "adamw_torch", ""),
        (torch.float64, False, "adamw_torch", ""),
        (torch.bfloat16, False, "adamw_torch", ""),
        (torch.float32, True, "sgd", ""),
        (torch.float32, False, "sgd", "momentum=0.9,nesterov=true"),
        (torch.float32, True, "rmsprop", ""),
        (torch.float64, False, "rmsprop", "momentum=0.5,centered=true"),
        (torch.float32, True, "adafactor", ""),
        (torch.float64, False, "adafactor", "beta1=0.9"),
        (torch.bfloat16, False, "adafactor", ""),
    ],
)
def test_a_resumed_run_has_the_straight_runs_bits(
    tmp_path: Path, dtype: torch.dtype, tied: bool, optim: str, args: str
) -> None:
    straight = new_state(llama(1, dtype, tied), optim=optim, optim_args=args)
    random.seed(11)
    random.gauss(0, 1)  # leaves half of a pair of normals behind: state too
    np.random.seed(12)
    np.random.standard_normal()
    torch.manual_seed(13)
    train(straight, Text(straight.module).loss, 5)
    path = save_checkpoint(tmp_path, 5, straight)
    train(straight, Text(straight.module).loss, 4)

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(99)
    resumed = new_state(llama(2, dtype, tied), optim=optim, optim_args=args)
    counters = load_checkpoint(path, resumed)
    assert counters is resumed.counters and counters["step"] == 5
    if tied:
        head = resumed.module.get_output_embeddings().weight  # type: ignore[operator]
        assert head is resumed.module.get_input_embeddings().weight  # type: ignore[operator]
    train(resumed, Text(resumed.module).loss, 4)
    assert_same_bits(straight, resumed)
    assert random.gauss(0, 1) is not None


def test_generators_continue_in_the_middle_of_a_pair_of_normals(tmp_path: Path) -> None:
    state = new_state(Small())
    random.gauss(0, 1)
    np.random.standard_normal()
    save_checkpoint(tmp_path, 1, state)

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), float(np.random.standard_normal())] + [
            float(torch.randn(1))
        ]

    expected = draw()
    draw()
    load_checkpoint(tmp_path / "checkpoint-1", state)
    assert draw() == expected


def test_hugging_face_reads_a_checkpoint(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = new_state(llama(1, tied=True), tiny_tokenizer)
    train(state, Text(state.module).loss, 2)
    path = save_checkpoint(tmp_path, 2, state)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state.module.state_dict()[name]), name
    words = " Yes, honest talk."
    assert AutoTokenizer.from_pretrained(path)(words) == tiny_tokenizer(words)
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt"}, suffixes  # nothing pickled


def test_weights_that_files_name_otherwise_than_modules_do(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixtral(seed: int) -> Any:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
        return MixtralForCausalLM(MixtralConfig(vocab_size=40, **sizes, **heads))

    state = new_state(mixtral(1))
    train(state, Text(state.module).loss, 2)
    path = save_checkpoint(tmp_path, 2, state)
    other = new_state(mixtral(2))
    load_checkpoint(path, other)
    assert_same_bits(state, other)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Path, TrainState]]:
    """A run folder with checkpoint-1 and checkpoint-2, and the state of the second."""
    state = new_state(Small())
    for step in (1, 2):
        train(state, state.module.loss, 1)
        save_checkpoint(tmp_path, step, state)
    yield tmp_path, state


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGE = {
    "a flipped bit": (lambda f: flip(f / "optimizer.safetensors"), "content is not what was"),
    "a cut file": (lambda f: os.truncate(f / "model.safetensors", 40), "bytes, got 40"),
    "a missing file": (lambda f: (f / "rng.safetensors").unlink(), "missing, though"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "not written to its end"),
    "a broken manifest": (lambda f: (f / "manifest.json").write_text("{"), "expected a JSON file"),
    "another format": (lambda f: (f / "manifest.json").write_text("{}"), "expected format"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(
    run: tuple[Path, TrainState], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, state = run
    damage, part = DAMAGE[kind]
    damage(folder / "checkpoint-2")
    with pytest.raises(ValueError, match=part) as caught:
        load_checkpoint(folder / "checkpoint-2", state)
    assert "checkpoint-2" in str(caught.value)
    with pytest.raises(ValueError, match=part):
        find_checkpoint(str(folder / "checkpoint-2"), folder)
    assert latest_checkpoint(folder) == folder / "checkpoint-1"
    assert "checkpoint-2" in caplog.text and part in caplog.text
    damage(folder / "checkpoint-1")
    with pytest.raises(ValueError, match="no checkpoint is whole.*overwrite_output_dir"):
        find_checkpoint("auto", folder)


def test_what_resume_means(run: tuple[Path, TrainState], tmp_path: Path) -> None:
    folder, _ = run
    assert find_checkpoint("none", folder) is None
    assert find_checkpoint("auto", folder) == folder / "checkpoint-2"
    assert find_checkpoint(str(folder / "checkpoint-1"), folder) == folder / "checkpoint-1"
    assert verify_checkpoint(folder / "checkpoint-1") == 1
    assert latest_checkpoint(folder / "absent") is None
    with pytest.raises(ValueError, match="expected a checkpoint folder"):
        find_checkpoint(str(folder / "checkpoint-7"), folder)
    (folder / "checkpoint-best").mkdir()  # a user's own folder is none of our business
    assert latest_checkpoint(folder) == folder / "checkpoint-2"


def test_the_newest_is_by_number_and_the_limit_keeps_it(tmp_path: Path) -> None:
    state = new_state(Small())
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, state, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    # What was just written stays, even where later ones of an older history exist.
    save_checkpoint(tmp_path, 5, state, save_total_limit=1)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-100"}
    remove_checkpoints_after(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_step_saved_again_replaces_the_old(run: tuple[Path, TrainState]) -> None:
    folder, state = run
    train(state, state.module.loss, 1)
    save_checkpoint(folder, 2, state)
    other = new_state(Small(5))
    load_checkpoint(folder / "checkpoint-2", other)
    assert_same_bits(state, other)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_failed_write_leaves_nothing(
    run: tuple[Path, TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = run

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, 3, state)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_another_model_or_optimizer_is_refused(run: tuple[Path, TrainState]) -> None:
    folder, _ = run
    path = folder / "checkpoint-2"
    with pytest.raises(ValueError, match="saved with the optimizer AdamW, but the run uses SGD"):
        load_checkpoint(path, new_state(Small(), optim="sgd"))
    wider = Small()
    wider.inner = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"inner\.bias.*expected \(5,\).*got \(4,\)"):
        load_checkpoint(path, new_state(wider))
    more = Small()
    more.outer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"outer\.(weight|bias) \(2 in all\) is not saved"):
        load_checkpoint(path, new_state(more))
    fewer = new_state(Small())
    fewer.optimizer = build_optimizer([("inner.weight", fewer.module.inner.weight)], Config())  # type: ignore[union-attr, list-item]
    with pytest.raises(ValueError, match="parameters are not the run's"):
        load_checkpoint(path, fewer)


def test_counters_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    state = new_state(Small())
    state.counters["mean"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 1, state)
    assert list(tmp_path.iterdir()) == []


def test_the_best_checkpoint_outlives_the_limit(tmp_path: Path) -> None:
    state = new_state(Small())
    for step, best in [(2, 2), (4, 2), (6, 2), (8, 8), (10, 8)]:
        save_checkpoint(tmp_path, step, state, save_total_limit=1, best_step=best)
        assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in {step, best}}
    save_checkpoint(tmp_path, 12, state, save_total_limit=3, best_step=8)
    save_checkpoint(tmp_path, 14, state, save_total_limit=3, best_step=8)
    assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (8, 12, 14)}


STAGES = ["first file", "last file", "manifest", "between the renames"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_while_writing_leaves_a_usable_checkpoint(tmp_path: Path, stage: str) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    child = subprocess.Popen(
        [sys.executable, __file__, stage, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline().strip() == "writing"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    leftovers = [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp-")]
    assert leftovers, "the kill came too late to test anything"
    found = latest_checkpoint(tmp_path)
    assert found is not None and json.loads((found / "trainer_state.json").read_text())
    assert found.name == ("checkpoint-2" if stage == "between the renames" else "checkpoint-1")
    names = {"checkpoint-1", found.name}
    assert {p.name for p in tmp_path.iterdir()} == names, "leftovers must go"
    resumed = new_state(Small(7))
    assert load_checkpoint(found, resumed)["step"] == int(found.name[-1])
    save_checkpoint(tmp_path, 2, resumed)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def _be_killed(stage: str, folder: Path) -> None:
    """Save checkpoint 1, then write checkpoint 2 and stop for ever at `stage` of it."""
    state = new_state(Small())
    train(state, state.module.loss, 1)
    save_checkpoint(folder, 1, state)
    train(state, state.module.loss, 1)
    if stage == "between the renames":
        save_checkpoint(folder, 2, state)

    def hang() -> None:
        print("writing", flush=True)
        time.sleep(600)

    fsync, replace = checkpoint._fsync, os.replace
    count = {"first file": 1, "last file": 5, "manifest": 6}.get(stage, 0)

    def slow_fsync(path: Path) -> None:
        nonlocal count
        count -= 1
        if count == 0:
            hang()
        fsync(path)

    def slow_replace(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp-checkpoint-2-"):
            hang()
        replace(source, target)

    checkpoint._fsync = slow_fsync
    if stage == "between the renames":
        os.replace = slow_replace  # type: ignore[assignment]
    save_checkpoint(folder, 2, state)


if __name__ == "__main__":
    _be_killed(sys.argv[1], Path(sys.argv[2]))
