"""A reference that follows the policy: TRL's rule, when it begins, and that resumed runs go on."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpref.compile import compile_blocks
from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.data.pack import pack_pairs
from fastpref.dynamics.recorder import read_records
from fastpref.loading import load_model
from fastpref.reference import (
    copy_reference,
    is_live,
    sequence_logp,
    sync_reference,
    with_live_reference,
)
from fastpref.train import train
from tests.architectures import PAIRS


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=(str(tiny_data),),
        ref_cache_dir=str(tmp_path_factory.mktemp("reference")),
        max_length=64,
        train_batch_size=8,
        max_steps=7,
        warmup_ratio=0.0,
        learning_rate=3e-3,
        eval_steps=3,
        eval_sample_size=4,
        save_steps=5,
        sync_ref_model=True,
        ref_model_mixup_alpha=0.7,
        ref_model_sync_steps=3,
    )


@pytest.fixture(scope="module")
def straight(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("sync") / "run")


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


@pytest.mark.parametrize("wrapped", ["none", "selective", "full", "compiled"])
def test_the_copy_does_not_move_with_the_policy(base: Config, wrapped: str) -> None:
    """Whatever is wrapped around the policy's blocks."""
    checkpointing = "none" if wrapped == "compiled" else wrapped
    model = load_model(dataclasses.replace(base, gradient_checkpointing=checkpointing))
    if wrapped == "compiled":
        compile_blocks(model.module)  # at their first call, which is not made here
    reference, batch = copy_reference(model), pack_pairs(PAIRS)
    with torch.no_grad():
        before = reference.logp(batch).logp
        for parameter in model.module.parameters():
            parameter.mul_(1.1)
        assert torch.equal(reference.logp(batch).logp, before)
        if wrapped != "compiled":
            assert not torch.allclose(model.logp(batch).logp, before)


def test_trls_rule(tiny_model_dir: Path) -> None:
    """The weights after two syncs are those of TRL's callback, bit for bit."""
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    policy = load_model(Config(model_name_or_path=str(tiny_model_dir), max_length=64))
    reference = copy_reference(policy)
    theirs = copy_reference(policy)
    assert not any(p.requires_grad for p in reference.module.parameters())
    for _ in range(2):
        with torch.no_grad():
            for p in policy.module.parameters():
                p.add_(0.1 * torch.randn_like(p))
        sync_reference(reference, policy, 0.7)
        callbacks.SyncRefModelCallback._sync_target_model(policy.module, theirs.module, 0.7)
    both = zip(reference.module.parameters(), theirs.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    assert reference.head.weight is not policy.head.weight


def test_when_it_is_live(base: Config) -> None:
    assert [is_live(base, n) for n in (0, 2, 3, 4)] == [False, False, True, True]
    assert not is_live(Config(), 10**6)


def test_a_batch_is_scored_by_it(base: Config, tiny_tokenizer: Any) -> None:
    model = load_model(base)
    pairs = load_dataset(base, tiny_tokenizer).train[-3:]
    batch = with_live_reference(pack_pairs(pairs), model, None)
    chosen, rejected = sequence_logp(model, pack_pairs(pairs), None)
    assert torch.equal(batch.ref_chosen, chosen) and torch.equal(batch.ref_rejected, rejected)
    assert not chosen.requires_grad
    weighted = with_live_reference(pack_pairs(pairs), model, 0.5)
    assert not torch.equal(weighted.ref_chosen + weighted.ref_rejected, chosen + rejected)
    assert weighted.group == batch.group == 3


def test_the_reference_of_every_step(base: Config, tmp_path: Path) -> None:
    """Steps 1-3 have the initial reference, 4-6 the mixture made after step 3, computed here from
    the weights that the same run leaves behind when it ends there."""
    constant = {"lr_scheduler_type": "constant"}  # the schedule of both lengths
    early = run(base, tmp_path / "early", max_steps=3, **constant)
    rows = read_records(run(base, tmp_path / "run", **constant), "pairs").to_pylist()
    initial, mixed, policy = load_model(base), load_model(base), load_model(base)
    weights = load_file(early / "model.safetensors")
    with torch.no_grad():
        for name, p in policy.module.named_parameters():
            p.copy_(weights[name])
    sync_reference(mixed, policy, base.ref_model_mixup_alpha)

    dataset = load_dataset(base, initial.tokenizer)
    known = {p.pair_id: p for p in dataset.train + dataset.held_out}
    for r in rows:
        # An evaluation comes after its step, and after the sync of that step.
        first = 4 if r["split"] == "train" else 3
        if r["step"] > (6 if r["split"] == "train" else 5):
            continue
        model = initial if r["step"] < first else mixed
        chosen, rejected = sequence_logp(model, pack_pairs([known[r["pair_id"]]]), None)
        assert r["ref_logp_chosen"] == pytest.approx(chosen.item(), abs=1e-4)
        assert r["ref_logp_rejected"] == pytest.approx(rejected.item(), abs=1e-4)
    a, b = (sequence_logp(m, pack_pairs(dataset.train[:8]), None)[0] for m in (initial, mixed))
    assert len(rows) > 60 and (a - b).abs().min() > 1e-3


def test_resumed_equals_straight(base: Config, straight: Path, tmp_path: Path) -> None:
    """Stopped after step 5, between the syncs of steps 3 and 6."""
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    assert (folder / "checkpoint-5" / "reference" / "model.safetensors").is_file()
    shutil.rmtree(folder / "checkpoint-7")
    (folder / "model.safetensors").unlink()
    resumed = run(base, folder)
    ours, theirs = (load_file(f / "model.safetensors") for f in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for table in ("pairs", "steps", "behaviors"):
        assert read_records(resumed, table).equals(read_records(straight, table)), table


def test_given_references_are_refused(base: Config, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [json.loads(x) for x in (tiny_data / "polite.jsonl").read_text().splitlines()]
    with data.open("w") as file:
        for row in rows:
            row |= {"ref_chosen_logps": -5.0, "ref_rejected_logps": -6.0}
            file.write(json.dumps(row) + "\n")
    named = rf"{re.escape(str(data))}:1: the row brings reference log-probs"
    with pytest.raises(ValueError, match=f"{named}.*sync_ref_model"):
        run(base, tmp_path / "run", dataset_name=(str(data),))
    weighted = {"sync_ref_model": False, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}
    with pytest.raises(ValueError, match=f"{named}.*ld_alpha"):
        run(base, tmp_path / "run", dataset_name=(str(data),), ld_alpha=0.5, **weighted)
