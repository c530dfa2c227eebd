"""Steps that run out of memory: tried again with half the tokens, as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastpref.step
from fastpref.config import Config
from fastpref.dynamics.recorder import read_records
from fastpref.train import train
from tests.ranks import run_two_ranks

ROWS = ("loss", "margin", "pair_id", "gnorm_head")


@pytest.fixture(scope="module")
def base(tiny_config: Config) -> Config:
    return dataclasses.replace(
        tiny_config,
        max_length=44,
        max_steps=6,
        learning_rate=1e-3,
        lr_scheduler_type="constant",  # so that a run of fewer steps is the start of a longer one
        warmup_steps=0,
        eval_steps=0,
        save_steps=3,
        logging_steps=1,
        dtype="float64",
    )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`failing(when)`: `backward` raises torch.OutOfMemoryError, after its work, for every call
    whose number and tokens `when` says so of."""
    real, calls = fastpref.step.backward, [0]

    def install(when: Any) -> list[int]:
        def backward(model: Any, batch: Any, *args: Any, **named: Any) -> Any:
            calls[0] += 1
            result = real(model, batch, *args, **named)
            if when(calls[0], batch.num_tokens):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
            return result

        monkeypatch.setattr(fastpref.step, "backward", backward)
        return calls

    return install


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "adapter_model.safetensors"
    return load_file(file if file.exists() else folder / "model.safetensors")


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def assert_alike(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert all(torch.allclose(left[n], right[n], rtol=0, atol=1e-9) for n in left)
    for name in ("pairs", "steps"):
        a, b = read_records(one, name), read_records(other, name)
        assert a.num_rows == b.num_rows and a.column_names == b.column_names
        for column in set(ROWS) & set(a.column_names):
            x, y = (np.asarray(t[column].to_pylist(), np.float64) for t in (a, b))
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=column)


@pytest.mark.parametrize("track", ["head", "sketch"])
def test_the_step_is_the_plain_one_and_the_rest_of_the_run_too(
    base: Config, tmp_path: Path, failing: Any, caplog: pytest.LogCaptureFixture, track: str
) -> None:
    base = dataclasses.replace(base, track=track, rate_every=0)
    plain = run(base, tmp_path / "plain")
    failing(lambda call, _: call == 4)  # one micro-batch a step: the fourth step
    with caplog.at_level(logging.WARNING, "fastpref"):
        again = run(base, tmp_path / "again")
    assert "step 4: out of memory with a micro-batch of" in caplog.text
    assert "CUDA out of memory" in caplog.text
    assert_alike(plain, again)
    counted = [line.get("oom_retries") for line in lines(again)]
    assert counted == [None] * 3 + [1] * 3
    assert not any("oom_retries" in line for line in lines(plain))
    tokens = [line["num_tokens"] for line in lines(again)]
    assert tokens == [line["num_tokens"] for line in lines(plain)]


def test_what_fits_is_found_by_halving_and_stays(
    base: Config, tmp_path: Path, failing: Any
) -> None:
    plain = run(base, tmp_path / "plain")
    calls = failing(lambda _, tokens: tokens > 150)
    again = run(base, tmp_path / "again")
    assert_alike(plain, again)
    assert lines(again)[0]["oom_retries"] == 1
    assert calls[0] > 6
    # The halved budget is in the checkpoint: a resumed run cuts as the straight one did.
    half = run(base, tmp_path / "resumed", max_steps=3)
    before = calls[0]
    resumed = run(base, half)
    assert lines(resumed)[-1]["oom_retries"] == lines(again)[-1]["oom_retries"]
    one, other = weights(again), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert calls[0] - before >= 6  # no attempt was lost


def test_dropout_draws_the_same_masks_again(base: Config, tmp_path: Path, failing: Any) -> None:
    """Where the second attempt is cut as the first one was not, masks differ: here the first one's
    generators are compared with those of a run that was cut so from the start."""
    lora = {"trainable": "lora", "lora_dropout": 0.3, "max_steps": 2, "save_steps": 2}
    failing(lambda call, tokens: call == 1)
    again = run(base, tmp_path / "again", **lora)
    state = json.loads((again / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    tokens = state["counters"]["budget"]["tokens"]
    plain = run(base, tmp_path / "plain", max_tokens_per_microbatch=tokens, **lora)
    assert_alike(plain, again)


def test_a_second_failure_ends_the_run_with_numbers(
    base: Config, tmp_path: Path, failing: Any
) -> None:
    failing(lambda call, tokens: call >= 3)
    with pytest.raises(ValueError, match=r"step 3: out of memory again.*at most \d+ tokens.*Set"):
        run(base, tmp_path / "run")


def test_a_pair_that_does_not_fit_alone_is_refused(
    base: Config, tmp_path: Path, failing: Any
) -> None:
    failing(lambda call, tokens: True)
    with pytest.raises(ValueError, match="single pair of .* tokens, which cannot be cut"):
        run(base, tmp_path / "run", train_batch_size=1)


@pytest.mark.slow
def test_both_ranks_try_again_where_one_ran_out(base: Config, tmp_path: Path) -> None:
    plain = run(base, tmp_path / "plain", max_steps=3, save_steps=3)
    file = tmp_path / "config.yaml"
    two = dataclasses.replace(base, output_dir=str(tmp_path / "two"), max_steps=3, save_steps=3)
    file.write_text(two.to_yaml(), encoding="utf-8")
    run_two_ranks(__file__, str(file))
    one, other = weights(plain), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-9) for name in one)
    assert [line.get("oom_retries") for line in lines(tmp_path / "two")] == [None, 1, 1]


def _rank(file: str) -> None:
    """A run as one of two ranks, of which the second runs out of memory in its second step."""
    from fastpref import dist
    from fastpref.config import load_config

    real, calls = fastpref.step.backward, [0]

    def backward(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if dist.rank() == 1 and calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args, **named)

    fastpref.step.backward = backward
    train(load_config(file), progress=False)
    print("all held")


if __name__ == "__main__":
    _rank(sys.argv[1])
