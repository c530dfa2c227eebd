"""Whole runs with LoRA: one trajectory straight, resumed and watched; what they leave loads."""

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

from fastpref.config import Config
from fastpref.dynamics.recorder import read_records
from fastpref.train import train

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tiny_config: Config) -> Config:
    return dataclasses.replace(
        tiny_config,
        max_length=96,
        trainable="lora",
        lora_r=4,
        lora_alpha=8,
        max_steps=10,
        learning_rate=1e-2,
        logging_steps=3,
        eval_steps=4,
        eval_sample_size=4,
        save_steps=4,
    )


@pytest.fixture(scope="module")
def straight(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("straight") / "run", save_merged=True)


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same_bits(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(input_ids=torch.arange(2, 60)[None]).logits


def test_it_begins_at_the_reference_and_learns(straight: Path) -> None:
    steps = read_records(straight, "steps").to_pydict()
    assert steps["loss"][0] == pytest.approx(np.log(2), abs=1e-7)
    assert np.mean(steps["loss"][-3:]) < 0.66
    trained = [r for r in read_records(straight, "pairs").to_pylist() if r["split"] == "train"]
    assert len(trained) == 80 and all(r["head_gnorm_m"] > 0 for r in trained)


def test_what_the_run_leaves(straight: Path, tiny_model_dir: Path) -> None:
    """The adapter for peft and for transformers, the merged model for everyone."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {p.name for p in straight.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "merged"} <= names
    assert not names & {"model.safetensors", "config.json", "README.md"}
    assert not [n for n in names if n.startswith(".tmp")]

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = logits(model)
    ours = logits(PeftModel.from_pretrained(model, straight))
    assert float((ours - before).abs().max()) > 0.1
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(straight)), ours)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(straight)), ours)
    merged = AutoModelForCausalLM.from_pretrained(straight / "merged")
    assert not [n for n, _ in merged.named_parameters() if "lora" in n]
    torch.testing.assert_close(logits(merged), ours, rtol=0, atol=1e-5 * float(ours.abs().max()))
    assert AutoTokenizer.from_pretrained(straight / "merged").eos_token == "<|end|>"

    (last,) = straight.glob("checkpoint-10")
    assert same_bits(straight, last) and not (last / "model.safetensors").exists()
    settings = json.loads((straight / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (4, 8, "CAUSAL_LM")
    assert settings["base_model_name_or_path"] == str(tiny_model_dir)


def test_watching_changes_no_bit(base: Config, straight: Path, tmp_path: Path) -> None:
    assert same_bits(straight, run(base, tmp_path / "run", record=False, eval_steps=0))
    assert same_bits(straight, run(base, tmp_path / "untracked", track="none"))


def test_micro_batches_are_invisible(base: Config, straight: Path, tmp_path: Path) -> None:
    cut = run(base, tmp_path / "run", max_tokens_per_microbatch=120)
    ours, theirs = (np.array(read_records(r, "steps")["loss"]) for r in (cut, straight))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True, "lora_dropout": 0.3, "lora_modules_to_save": ("model.norm",)},
    ],
    ids=["lora", "dora, dropout, a whole module"],
)
def test_resumed_equals_straight(base: Config, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Stopped after 8 of 10 steps; with dropout the masks go on where they were."""
    one = run(base, tmp_path / "one", **changes)
    two = tmp_path / "two"
    shutil.copytree(one, two)
    shutil.rmtree(two / "checkpoint-10")
    (two / "adapter_model.safetensors").unlink()
    (two / "config.yaml").write_text((two / "config.yaml").read_text().replace(str(one), str(two)))
    run(base, two, **changes)
    assert same_bits(one, two)
    for table in ("pairs", "steps", "behaviors", "index"):
        assert read_records(two, table).equals(read_records(one, table)), table
    for name in ("metrics.jsonl", "adapter_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_dropout_is_another_trajectory(base: Config, straight: Path, tmp_path: Path) -> None:
    dropped = run(base, tmp_path / "run", lora_dropout=0.3)
    assert not same_bits(straight, dropped)
    unwatched = {"record": False, "eval_steps": 0, "lora_dropout": 0.3}
    assert same_bits(dropped, run(base, tmp_path / "unwatched", **unwatched))
    first = [read_records(r, "steps")["loss"][0].as_py() for r in (straight, dropped)]
    assert first[0] == first[1]  # B is zero in the first step, whatever A sees


def test_full_training_and_lora_share_their_reference(base: Config, tmp_path: Path) -> None:
    cache = str(tmp_path / "reference")
    run(base, tmp_path / "all", trainable="all", lora_r=16, lora_alpha=32, max_steps=1,
        ref_cache_dir=cache)  # fmt: skip
    (file,) = (tmp_path / "reference").iterdir()
    before = file.stat().st_mtime_ns
    adapted = run(base, tmp_path / "lora", max_steps=2, ref_cache_dir=cache)
    run(base, tmp_path / "dora", max_steps=1, use_dora=True, ref_cache_dir=cache)
    assert list((tmp_path / "reference").iterdir()) == [file]
    assert file.stat().st_mtime_ns == before

    # A continued adapter's reference is its own; without it, the base's again.
    own = {"lora_r": 16, "lora_alpha": 32, "adapter_name_or_path": str(adapted), "max_steps": 2}
    continued = run(base, tmp_path / "initial", ref_cache_dir=cache, **own)
    loss = read_records(continued, "steps")["loss"].to_pylist()
    assert loss[0] == pytest.approx(np.log(2), abs=1e-7)
    assert len(list((tmp_path / "reference").iterdir())) == 2
    on_base = run(base, tmp_path / "base", ref_cache_dir=cache, adapter_reference="base", **own)
    loss = read_records(on_base, "steps")["loss"].to_pylist()
    assert abs(loss[0] - np.log(2)) > 1e-4
    assert len(list((tmp_path / "reference").iterdir())) == 2


def test_a_resumed_run_needs_its_own_base(
    base: Config, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    folder = run(base, tmp_path / "run", model_name_or_path=str(model), max_steps=4)
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="the model that training began from changed"):
        run(base, folder, model_name_or_path=str(model), max_steps=6)


def test_a_run_does_not_remove_what_it_starts_from(base: Config, tmp_path: Path) -> None:
    made = run(base, tmp_path / "made", save_merged=True, max_steps=4, eval_steps=0)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(made / name, alone)
    start = {"trainable": "lora", "lora_r": 16, "lora_alpha": 32, "overwrite_output_dir": True}
    for folder, field, source in (
        (alone, "adapter_name_or_path", alone),
        (made, "adapter_name_or_path", made),
        (made, "adapter_name_or_path", made / "checkpoint-4"),
        (made, "model_name_or_path", made / "merged"),
    ):
        with pytest.raises(ValueError, match=rf"{field}.*would remove or replace"):
            run(base, folder, **start, **{field: str(source)})
        assert (source / "config.json").exists() or (source / "adapter_config.json").exists()


def test_full_and_adapted_runs_do_not_mix_in_one_folder(base: Config, tmp_path: Path) -> None:
    """An adapter beside a whole model would be put on it by whoever loads the folder."""
    full = {"trainable": "all", "lora_r": 16, "lora_alpha": 32}
    folder = run(base, tmp_path / "run", max_steps=1, save_merged=True)
    with pytest.raises(ValueError, match="trainable: 'lora' -> 'all'"):
        run(base, folder, max_steps=1, **full)
    run(base, folder, max_steps=1, overwrite_output_dir=True, **full)
    assert (folder / "model.safetensors").exists() and (folder / "config.json").exists()
    assert not (folder / "merged").exists() and not list(folder.glob("adapter_*"))
    run(base, folder, max_steps=1, overwrite_output_dir=True)
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    # The merged model may be asked for later: the run then ends once more.
    run(base, folder, max_steps=1, save_merged=True)
    assert (folder / "merged" / "model.safetensors").exists()


def test_bfloat16(base: Config, tmp_path: Path) -> None:
    folder = run(base, tmp_path / "run", dtype="bfloat16", max_steps=3, use_dora=True)
    loss = read_records(folder, "steps")["loss"].to_pylist()
    assert loss[0] == pytest.approx(np.log(2), abs=1e-6) and loss[-1] < 0.693
    assert {t.dtype for t in weights(folder).values()} == {torch.float32}


@pytest.mark.slow
def test_two_ranks_equal_one(base: Config, straight: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    options = dataclasses.asdict(base) | {"output_dir": str(tmp_path / "two")}
    file = tmp_path / "run.yaml"
    file.write_text(Config(**options).to_yaml(), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    done = subprocess.run(
        [sys.executable, *launch, "fastpref", "train", str(file)],
        env={**os.environ, "PYTHONPATH": ".:kernels", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = weights(straight), weights(tmp_path / "two")
    for name in one:
        if "lora_B" in name:  # which began at zero
            assert (two[name] - one[name]).norm() < 1e-3 * one[name].norm(), name
