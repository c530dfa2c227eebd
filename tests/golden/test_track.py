"""Runs that record every pair's gradient: the same weights to the bit, and norms that are right."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastpref.loop
from fastpref import transfer
from fastpref.config import Config
from fastpref.dynamics.recorder import read_records
from fastpref.errors import NonFiniteError
from fastpref.train import train


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=(str(tiny_data),),
        ref_cache_dir=str(tmp_path_factory.mktemp("reference")),
        feature_cache_dir=str(tmp_path_factory.mktemp("features")),
        max_length=44,
        train_batch_size=8,
        max_tokens_per_microbatch=150,  # several micro-batches a step
        max_steps=6,
        learning_rate=3e-3,
        save_steps=3,
        track="none",
        rate_every=0,
    )


LORA = {"trainable": "lora", "lora_dropout": 0.2}


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "model" if (folder / "model.safetensors").exists() else "adapter_model"
    return load_file(folder / f"{name}.safetensors")


def same_bits(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def trained(folder: Path) -> dict[str, np.ndarray]:
    """Columns of `pairs`, of the steps."""
    table = read_records(folder, "pairs").to_pandas()
    return table[table.split == "train"].reset_index(drop=True)


HALF = {"dtype": "bfloat16", "weights_dtype": "bfloat16"}
AGAIN = {"gradient_checkpointing": "full"}
SOME = {"gradient_checkpointing": "selective"}


@pytest.mark.parametrize(
    "changes",
    [{}, LORA, {"dtype": "bfloat16"}, HALF, AGAIN, SOME],
    ids=["all", "lora", "autocast", "half", "checkpointed", "selective"],
)
def test_tracking_changes_no_bit(base: Config, tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = run(base, tmp_path / "none", **changes)
    for track in ("sketch", "exact"):
        watched = run(base, tmp_path / track, track=track, **changes)
        assert same_bits(plain, watched), track
        a, b = (read_records(x, "steps").to_pandas() for x in (plain, watched))
        assert (a.loss == b.loss).all() and (a.grad_norm == b.grad_norm).all()


def test_sketches_lie_around_the_exact_norms(base: Config, tmp_path: Path) -> None:
    """By as much as they say; head and norms are exact in both; the groups are named."""
    exact = run(base, tmp_path / "exact", track="exact")
    sketch = run(base, tmp_path / "sketch", track="sketch")
    groups = json.loads((exact / "records/layer_groups.json").read_text())
    assert groups == json.loads((sketch / "records/layer_groups.json").read_text())
    a, b = trained(exact), trained(sketch)
    assert (a.pair_id == b.pair_id).all() and len(a) == 48
    assert set(a.norm_method) == {"gram"} and set(b.norm_method) == {"sketch"}
    assert a.gnorm_error.isna().all() and (b.gnorm_error > 0).all()
    away = (b.gnorm_loss / a.gnorm_loss - 1) / b.gnorm_error
    assert 0.5 < np.sqrt((away**2).mean()) < 1.6 and away.abs().max() < 5
    own, theirs = np.stack(a.gnorm_groups), np.stack(b.gnorm_groups)
    assert own.shape == (48, len(groups))
    for name in ("norms", "head"):
        np.testing.assert_allclose(own[:, groups.index(name)], theirs[:, groups.index(name)], 2e-3)
    np.testing.assert_allclose((own.astype(float) ** 2).sum(1) ** 0.5, a.gnorm_m, rtol=2e-3)
    np.testing.assert_allclose(own[:, groups.index("head")], a.head_gnorm_m, rtol=2e-3)


def test_margin_norms_are_those_of_the_loss_over_its_weight(base: Config, tmp_path: Path) -> None:
    table = trained(run(base, tmp_path / "run", track="exact", beta=0.3))
    np.testing.assert_allclose(table.gnorm_m * table.weight, table.gnorm_loss, rtol=1e-5)


def test_a_pair_of_weight_zero_has_no_margin_norm(base: Config, tmp_path: Path) -> None:
    """The hinge loss of a pair beyond its margin does not tell grad m: null, and not 0."""
    table = trained(
        run(base, tmp_path / "run", track="exact", loss_type=("hinge",), beta=50.0, max_steps=20)
    )
    passed = table.weight == 0
    assert passed.any() and (~passed).any()
    assert table.gnorm_m[passed].isna().all() and table.gnorm_m[~passed].notna().all()
    assert (table.gnorm_loss[passed] == 0).all()


def test_losses_of_more_than_the_margin(base: Config, tmp_path: Path) -> None:
    table = trained(run(base, tmp_path / "run", track="exact", loss_type=("ipo",), max_steps=2))
    assert table.gnorm_m.isna().all() and (table.gnorm_loss > 0).all()
    assert np.isfinite(np.stack(table.gnorm_groups).astype(float)).all()


def test_resumed_equals_straight(base: Config, tmp_path: Path) -> None:
    straight = run(base, tmp_path / "straight", track="sketch", track_every=2)
    folder = run(base, tmp_path / "run", track="sketch", track_every=2)
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "model.safetensors").unlink()
    resumed = run(base, folder, track="sketch", track_every=2)
    assert same_bits(straight, resumed)
    assert read_records(resumed, "pairs").equals(read_records(straight, "pairs"))
    a = trained(resumed)
    assert set(a.step[a.gnorm_loss.notna()]) == {2, 4, 6}


def test_where_the_head_alone_learns(base: Config, tmp_path: Path) -> None:
    table = trained(run(base, tmp_path / "run", track="exact", trainable="head"))
    np.testing.assert_allclose(table.gnorm_m, table.head_gnorm_m, rtol=1e-6)
    np.testing.assert_allclose(table.gnorm_loss, table.head_gnorm_m * table.weight, rtol=1e-5)
    assert json.loads((tmp_path / "run/records/layer_groups.json").read_text()) == ["head"]


def test_micro_batches_are_invisible(base: Config, tmp_path: Path) -> None:
    one = trained(run(base, tmp_path / "one", track="exact", max_tokens_per_microbatch=4096))
    some = trained(run(base, tmp_path / "some", track="exact"))
    assert set(one.micro) == {0} and len(set(some.micro)) > 1
    both = one.merge(some, on=["step", "pair_id"])
    assert len(both) == 48
    np.testing.assert_allclose(both.gnorm_m_x, both.gnorm_m_y, rtol=2e-4)


@pytest.mark.parametrize("track", ["none", "exact"])
def test_a_recorded_step_is_one_copy_from_the_device(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: str
) -> None:
    """Pairs of all micro-batches, sums and scalars together; whatever is tracked."""
    copies: list[int] = []
    real = transfer._Copy

    def counted(packed: torch.Tensor) -> transfer._Copy:
        copies.append(packed.numel())
        return real(packed)

    monkeypatch.setattr(transfer, "_Copy", counted)
    folder = run(base, tmp_path / "run", track=track, eval_steps=0)
    steps = read_records(folder, "steps").to_pydict()
    assert len(copies) == len(steps["step"]) == 6 and min(steps["micro_batches"]) > 1


def test_a_run_that_fails_leaves_what_it_recorded(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last step too, whose copy was on the way; and goes on to the straight run's records."""
    straight = run(base, tmp_path / "straight", save_steps=2)
    real, calls = fastpref.loop.train_step, []

    def fails(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise NonFiniteError("made up")
        return real(*arguments, **named)

    monkeypatch.setattr(fastpref.loop, "train_step", fails)
    with pytest.raises(NonFiniteError, match="step 6: made up"):
        run(base, tmp_path / "run", save_steps=2)
    assert read_records(tmp_path / "run", "steps")["step"].to_pylist() == [1, 2, 3, 4, 5]
    monkeypatch.undo()
    resumed = run(base, tmp_path / "run", save_steps=2)
    for table in ("pairs", "steps"):
        assert read_records(resumed, table).equals(read_records(straight, table))
    assert same_bits(resumed, straight)
