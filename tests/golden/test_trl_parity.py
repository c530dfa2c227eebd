"""One trajectory with TRL: same pairs, order, optimizer, precision; same loss, metrics and weights.

TRL pads every sequence, computes each prompt twice, scores every position and runs the reference
model in every step; fastpref does none of it. What comes out must be the same but for rounding.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpref.config import Config
from fastpref.dynamics.recorder import read_jsonl, read_records
from fastpref.train import train

STEPS, BATCH = 30, 8
BETA = 0.1
LOGGED = (
    "loss",
    "learning_rate",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
)


@dataclass(frozen=True)
class Case:
    """Settings of both trainers, and how far apart they may end up."""

    loss_type: str
    optim: str
    learning_rate: float
    weight_decay: float
    schedule: str
    loss_within: (
        float  # largest difference of a step's loss, relative to its size where that is > 1
    )
    residual_within: (
        float  # of the mean difference, in the same unit: it must not drift to one side
    )
    weights_within: float  # difference of final weights over the length of TRL's update
    label_smoothing: float = 0.0


CASES = {
    "sigmoid-sgd": Case("sigmoid", "sgd", 0.2, 0.01, "linear", 1e-6, 2e-7, 1e-4),
    "sigmoid-adamw": Case("sigmoid", "adamw_torch", 5e-4, 0.01, "linear", 1e-5, 2e-6, 1e-3),
    "ipo-sgd": Case("ipo", "sgd", 0.2, 0.0, "cosine", 1e-6, 2e-7, 1e-4),
    "ipo-adamw": Case("ipo", "adamw_torch", 5e-4, 0.0, "cosine", 1e-5, 2e-6, 1e-3),
    "robust-sgd": Case("robust", "sgd", 0.2, 0.0, "linear", 1e-6, 2e-7, 1e-4, 0.1),
    "bco_pair-sgd": Case("bco_pair", "sgd", 0.2, 0.0, "linear", 1e-6, 2e-7, 1e-4),
    "aot-sgd": Case("aot", "sgd", 0.2, 0.0, "linear", 1e-6, 2e-7, 1e-4, 0.05),
    "sft-adamw": Case("sft", "adamw_torch", 5e-4, 0.0, "linear", 1e-5, 2e-6, 1e-3),
}


def pairs() -> list[dict[str, str]]:
    """Yes/No answers, answers of unlike lengths, answers that differ in a word or at the end."""
    rng = random.Random(0)
    words = (
        "I value honest talk and music while friends question new tools or like the rain".split()
    )

    def text(least: int, most: int) -> list[str]:
        return [rng.choice(words) for _ in range(rng.randint(least, most))]

    rows = []
    for i in range(STEPS * BATCH):
        prompt, answer = " ".join(text(2, 24)), text(2, 14)
        kind = i % 4
        if kind == 0:
            prompt = f'Is the following statement something you would say?\n"{prompt}"'
            chosen, rejected = rng.choice([(" Yes", " No"), (" No", " Yes")])
        else:
            other = list(answer)
            if kind == 1:
                other = text(1, 20)
            elif kind == 2:
                other[rng.randrange(len(other))] = "Children"
            else:
                other += text(1, 3)
            chosen, rejected = f" {' '.join(answer)}.", f" {' '.join(other)}."
            if chosen == rejected:
                rejected = " No."
        if rng.random() < 0.5:
            chosen, rejected = rejected, chosen
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def run_trl(
    case: Case, rows: list[dict[str, str]], model_dir: Path, output: Path
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """TRL's log line of every step, and its final weights."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(output),
        loss_type=[case.loss_type],
        label_smoothing=case.label_smoothing,
        beta=BETA,
        max_length=256,
        optim=case.optim,
        learning_rate=case.learning_rate,
        weight_decay=case.weight_decay,
        lr_scheduler_type=case.schedule,
        warmup_steps=0.1,
        max_grad_norm=1.0,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = DPOTrainer(str(model_dir), args=arguments, train_dataset=Dataset.from_list(rows))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    weights = {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}
    return lines, weights


def run_fastpref(
    case: Case, rows: list[dict[str, str]], model_dir: Path, output: Path
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The same of fastpref; the loss comes from the records, which keep it in float64."""
    output.mkdir()
    data = output / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = train(
        Config(
            model_name_or_path=str(model_dir),
            device="cpu",
            dtype="float32",
            dataset_name=(str(data),),
            eval_fraction=0.0,
            eval_steps=0,
            max_length=256,
            output_dir=str(output / "run"),
            ref_cache_dir=str(output / "reference"),
            loss_type=(case.loss_type,),
            label_smoothing=case.label_smoothing,
            beta=BETA,
            optim=case.optim,
            learning_rate=case.learning_rate,
            weight_decay=case.weight_decay,
            lr_scheduler_type=case.schedule,
            warmup_ratio=0.1,
            max_grad_norm=1.0,
            max_steps=STEPS,
            train_batch_size=BATCH,
            max_tokens_per_microbatch=192,  # several micro-batches a step; TRL takes one
            shuffle=False,
            logging_steps=1,
        ),
        progress=False,
    )
    lines = read_jsonl(run / "metrics.jsonl")
    losses = read_records(run, "steps", ["step", "loss"]).to_pydict()
    assert losses["step"] == [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line | {"loss": x} for line, x in zip(lines, losses["loss"], strict=True)], weights_of(
        run
    )


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    squares = [(a[name].double() - b[name].double()).square().sum() for name in a]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("name", CASES)
def test_same_trajectory_as_trl(
    name: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    case, rows = CASES[name], pairs()
    theirs, their_weights = run_trl(case, rows, tiny_model_dir, tmp_path / "trl")
    ours, our_weights = run_fastpref(case, rows, tiny_model_dir, tmp_path / "fastpref")

    columns = {key: np.array([[a[key], b[key]] for a, b in zip(ours, theirs, strict=True)])
               for key in LOGGED}  # fmt: skip
    loss = columns["loss"]
    # Otherwise the comparison would show little: losses move, and pairs are won and lost.
    assert np.ptp(loss[:, 1]) > 0.05
    assert 0.2 < columns["rewards/accuracies"][2:, 1].mean() < 0.9

    residual = (loss[:, 0] - loss[:, 1]) / np.maximum(1.0, np.abs(loss[:, 1]))
    assert np.abs(residual).max() <= case.loss_within, residual
    assert abs(residual.mean()) <= case.residual_within, residual
    # The first step's rate is 0, so in two steps every margin is 0 and rounding decides its sign.
    columns["rewards/accuracies"] = columns["rewards/accuracies"][2:]
    if case.loss_type == "sft":  # TRL keeps a reference for its rewards
        columns = {k: v for k, v in columns.items() if not k.startswith("rewards")}
    for key, (a, b) in ((k, v.T) for k, v in columns.items()):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=key)

    start = weights_of(tiny_model_dir)
    update = distance(their_weights, start)
    assert distance(our_weights, their_weights) <= case.weights_within * update


def test_pairs_have_the_mixture_that_the_comparison_needs(tiny_tokenizer: Any) -> None:
    from fastpref.data.pack import parts
    from fastpref.data.tokenize import TokenPair

    rows = pairs()
    eos = tiny_tokenizer.eos_token
    found = []
    for row in rows:
        prompt, chosen, rejected = (
            np.array(tiny_tokenizer(text)["input_ids"], np.int32)
            for text in (row["prompt"], row["chosen"] + eos, row["rejected"] + eos)
        )
        found.append(parts(TokenPair(0, 0, "", prompt, chosen, rejected, False)))
    common = np.array([at.common for at in found])
    assert (common == 0).mean() > 0.2 and (common > 4).mean() > 0.2
    lengths = np.array([(at.chosen, at.rejected) for at in found])
    assert lengths.min() == 1 and lengths.max() > 20
    assert len({at.fed for at in found}) > 40
