"""Whole runs in bfloat16 and with recomputed activations, beside the plain float32 run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config
from fastpref.dynamics.recorder import read_records
from fastpref.train import train

BF16 = {"dtype": "bfloat16"}
NARROW = {**BF16, "weights_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def base(tiny_config: Config) -> Config:
    return dataclasses.replace(
        tiny_config,
        max_length=44,
        max_steps=200,
        # Small steps, as in DPO of large models: an update is far below a weight's last bit.
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        warmup_steps=0,  # so that a run of fewer steps is the start of a longer one
        eval_steps=0,
        save_steps=200,
        record=True,
        track="none",
    )


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def losses(folder: Path) -> np.ndarray:
    return np.array(read_records(folder, "steps")["loss"].to_pylist())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def plain(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("float32") / "run", dtype="float32")


@pytest.fixture(scope="module")
def narrow(base: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compute in bfloat16; weights in it too, with masters and without."""
    folder = tmp_path_factory.mktemp("bfloat16")
    kinds = {"compute": BF16, "masters": NARROW, "pure": {**NARROW, "master_weights": False}}
    return {name: run(base, folder / name, **changes) for name, changes in kinds.items()}


def test_a_run_in_bfloat16_stays_in_a_band_of_the_float32_one(
    plain: Path, narrow: dict[str, Path]
) -> None:
    exact = losses(plain)
    assert exact[-20:].mean() < exact[:20].mean() - 0.1  # there is a curve to follow
    # With bfloat16 weights the model itself is another one from the start: each weight is rounded.
    for kind, largest, mean in (("compute", 0.01, 0.001), ("masters", 0.06, 0.008)):
        residual = losses(narrow[kind]) - exact
        assert np.abs(residual).max() < largest, kind
        assert abs(residual.mean()) < mean, kind


def test_small_updates_are_lost_in_bfloat16_weights_and_masters_keep_them(
    plain: Path, narrow: dict[str, Path]
) -> None:
    exact = losses(plain)
    learnt = exact[:20].mean() - exact[-20:].mean()
    missed = {kind: losses(narrow[kind])[-20:].mean() - exact[-20:].mean() for kind in narrow}
    assert missed["pure"] > 0.2 * learnt
    assert abs(missed["masters"]) < 0.02 * learnt
    assert {w.dtype for w in weights(narrow["masters"]).values()} == {torch.bfloat16}


def test_a_resumed_run_with_masters_is_the_straight_one(
    base: Config, tmp_path: Path, narrow: dict[str, Path]
) -> None:
    short = dataclasses.replace(base, max_steps=12, save_steps=6, **NARROW)
    straight = run(short, tmp_path / "straight")
    run(short, tmp_path / "resumed", max_steps=6)
    resumed = run(short, tmp_path / "resumed")
    assert np.array_equal(losses(straight), losses(resumed))
    one, other = weights(straight), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    masters = [
        load_file(folder / "checkpoint-12" / "masters.safetensors")
        for folder in (straight, resumed)
    ]
    assert all(torch.equal(masters[0][name], masters[1][name]) for name in masters[0])
    for name, master in masters[0].items():
        if name in one:
            assert torch.equal(master.bfloat16(), one[name])
    with pytest.raises(ValueError, match="saved without masters.safetensors; set master_weights"):
        lost = run(short, tmp_path / "lost", max_steps=6, master_weights=False)
        run(short, tmp_path / "other", resume_from_checkpoint=str(lost / "checkpoint-6"))


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_recomputed_activations_change_no_bit(base: Config, tmp_path: Path, trainable: str) -> None:
    few = {"max_steps": 4, "save_steps": 4, "learning_rate": 1e-3, "trainable": trainable}
    kept = run(base, tmp_path / "none", **few)
    for mode in ("selective", "full"):
        again = run(base, tmp_path / mode, gradient_checkpointing=mode, **few)
        assert np.array_equal(losses(kept), losses(again)), mode
        name = "adapter_model.safetensors" if trainable == "lora" else "model.safetensors"
        assert (kept / name).read_bytes() == (again / name).read_bytes(), mode


def test_recomputation_and_dropout_of_adapters_agree(base: Config, tmp_path: Path) -> None:
    few = {"max_steps": 3, "save_steps": 3, "trainable": "lora", "lora_dropout": 0.3}
    kept = run(base, tmp_path / "none", **few)
    again = run(base, tmp_path / "full", gradient_checkpointing="full", **few)
    assert np.array_equal(losses(kept), losses(again))


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_moments_of_8_bits_follow_those_of_32_and_resume(
    base: Config, tmp_path: Path, weights_dtype: str
) -> None:
    few = {"dtype": "bfloat16", "weights_dtype": weights_dtype, "max_steps": 20, "save_steps": 10}
    few["learning_rate"] = 2e-4
    wide = losses(run(base, tmp_path / "32", **few))
    straight = run(base, tmp_path / "8", optim="adamw_8bit", **few)
    residual = losses(straight) - wide
    assert np.abs(residual).max() < 0.05 * (wide[0] - wide.min())
    run(base, tmp_path / "resumed", optim="adamw_8bit", **{**few, "max_steps": 10})
    resumed = run(base, tmp_path / "resumed", optim="adamw_8bit", **few)
    assert np.array_equal(losses(straight), losses(resumed))
