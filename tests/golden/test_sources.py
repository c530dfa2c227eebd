"""Weighted sources and named evaluation sets in whole runs, resumed and recorded."""

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

from fastpref.config import Config, load_config
from fastpref.dynamics.recorder import read_records
from fastpref.train import train


@pytest.fixture(scope="module")
def config(
    tiny_model_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    folder = tmp_path_factory.mktemp("sets")
    held = []
    for name in ("agrees", "polite"):
        lines = (tiny_data / f"{name}.jsonl").read_text().splitlines()
        (folder / f"{name}-train.jsonl").write_text("\n".join(lines[:30]))
        (folder / f"{name}-eval.jsonl").write_text("\n".join(lines[30:]))
        held.append(f"{name}-set={folder / f'{name}-eval.jsonl'}")
    return Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=tuple(str(folder / f"{n}-train.jsonl") for n in ("agrees", "polite")),
        dataset_weights=(0.5, 1.5),
        max_length=64,
        eval_dataset_name=tuple(held),
        ref_cache_dir=str(folder / "reference"),
        train_batch_size=8,
        num_train_epochs=2,
        learning_rate=3e-3,
        eval_steps=8,
        save_steps=5,
    )


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def test_weighted_run(config: Config, tmp_path: Path) -> None:
    straight = run(config, tmp_path / "straight")
    resumed = run(config, tmp_path / "resumed")
    for step in (15, 16):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    run(config, resumed)  # goes on in the middle of the second epoch
    one, other = (load_file(f / "model.safetensors") for f in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (straight / "metrics.jsonl").read_text() == (resumed / "metrics.jsonl").read_text()

    # 15 + 45 pairs an epoch, 8 steps: every pair of the first source once in two epochs.
    rows = [r for r in read_records(straight, "pairs").to_pylist() if r["split"] == "train"]
    assert len(rows) == 120 and max(r["step"] for r in rows) == 16
    counts: dict[int, int] = {}
    for r in rows:
        counts[r["pair_id"]] = counts.get(r["pair_id"], 0) + 1
    by_file: dict[str, list[int]] = {}
    for r in read_records(straight, "index").to_pylist():
        if r["split"] == "train":
            by_file.setdefault(Path(r["file"]).name, []).append(counts[r["pair_id"]])
    assert by_file == {"agrees-train.jsonl": [1] * 30, "polite-train.jsonl": [3] * 30}

    # Each set has its own line, the union is their mean, and the records know no other split.
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines if line["step"] == 8][-4:] == [
        "train_sample",
        "eval",
        "eval_agrees-set",
        "eval_polite-set",
    ]
    last = {line["split"]: line for line in lines if line["step"] == 16}
    both = [last["eval_agrees-set"], last["eval_polite-set"]]
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert last["eval"][name] == pytest.approx(np.mean([line[name] for line in both]), rel=1e-6)
    margin = last["eval"]["behavior/polite-eval/rewards/margins"]
    assert margin == pytest.approx(last["eval_polite-set"]["rewards/margins"], rel=1e-6)
    splits = {r["split"] for r in read_records(straight, "pairs").to_pylist()}
    assert splits == {"train", "train_sample", "eval"}


def test_what_a_resumed_run_may_change(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, max_steps=2, save_steps=2, eval_steps=0)
    folder = run(config, tmp_path / "run", template_date="2024-02-29")
    again = {"dataset_num_proc": 1, "token_cache_dir": str(tmp_path / "tokens")}
    run(config, tmp_path / "run", max_steps=3, **again)
    # The day of the run's beginning stays, whenever it goes on.
    assert load_config(folder / "config.yaml").template_date == "2024-02-29"
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    for change in ({"dataset_weights": (1, 1)}, {"truncation_mode": "keep_completion"}):
        with pytest.raises(ValueError, match=f"other settings .{next(iter(change))}"):
            run(config, tmp_path / "run", max_steps=4, **change)


TEMPLATE = (
    "{% for m in messages %}{{ '\\n' + m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nassistant:' }}{% endif %}"
)


def test_a_run_on_conversations(config: Config, tiny_data: Path, tmp_path: Path) -> None:
    """The same steps as on the strings that the template makes of them; the template is saved."""
    from transformers import AutoTokenizer

    texts, chats = [], []
    for line in (tiny_data / "polite.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = row["prompt"].removeprefix("Human: ").removesuffix("\n\nAssistant:")
        answers = {name: row[name].strip() for name in ("chosen", "rejected")}
        asked = [{"role": "user", "content": question}]
        said = {n: [{"role": "assistant", "content": a}] for n, a in answers.items()}
        chats.append({"prompt": asked, **said})
        prompt = f"\nuser: {question}<|end|>\nassistant:"
        texts.append({"prompt": prompt, **{n: f" {a}" for n, a in answers.items()}})
    runs = []
    for name, rows in (("texts", texts), ("chats", chats)):
        for n, row in enumerate(rows):
            row["id"] = str(n)  # so that both are split and ordered alike
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        changes = {"dataset_name": (str(file),), "dataset_weights": (), "eval_dataset_name": ()}
        changes |= {"max_steps": 3, "chat_template": TEMPLATE if name == "chats" else None}
        runs.append(run(config, tmp_path / name, **changes))
    one, other = (load_file(folder / "model.safetensors") for folder in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert AutoTokenizer.from_pretrained(runs[1]).chat_template == TEMPLATE
