"""LoRA gives TRL's trajectory: fresh adapters, and continued ones against their initial copy.

TRL computes the reference in every step, from peft's model with the adapter off, or with a second
adapter "ref" that holds the first one's initial weights; fastpref computes it once and keeps it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastpref import lora
from fastpref.config import Config
from fastpref.dynamics.recorder import read_jsonl, read_records
from fastpref.loading import load_model
from fastpref.train import train
from tests.golden.test_trl_parity import BATCH, BETA, distance, pairs

STEPS = 20
LOGGED = (
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class Case:
    """Settings of both trainers, and how far apart they may end up: see test_trl_parity."""

    adapter: dict[str, Any]  # fields of `Config`
    continued: bool
    optim: str
    learning_rate: float
    weight_decay: float
    loss_within: float
    weights_within: float


CASES = {
    "fresh": Case({"lora_r": 8}, False, "adamw_torch", 2e-3, 0.01, 1e-6, 1e-4),
    "continued": Case({"lora_r": 8}, True, "adamw_torch", 2e-3, 0.01, 1e-6, 1e-4),
    "continued, rsLoRA and DoRA": Case(
        {
            "lora_r": 4, "use_rslora": True, "use_dora": True,
            "lora_target_modules": ("q_proj", "up_proj"),
        },
        True, "sgd", 0.05, 0.0, 1e-6, 1e-4,
    ),
}  # fmt: skip


def first_adapter(case: Case, config: Config, folder: Path) -> None:
    """What both begin with: a fresh adapter, or one that has been somewhere."""
    module = load_model(config).module
    if case.continued:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, weight in lora.weights(module).items():
                if "lora_B" in name:
                    weight += 0.05 * torch.randn(weight.shape, generator=generator)
    lora.save(module, folder)


def run_trl(
    case: Case, rows: list[dict[str, str]], model_dir: Path, first: Path, output: Path
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """TRL's log line of every step, and the adapter's final weights."""
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(output),
        beta=BETA,
        max_length=256,
        optim=case.optim,
        learning_rate=case.learning_rate,
        weight_decay=case.weight_decay,
        lr_scheduler_type="linear",
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
    dataset = Dataset.from_list(rows)
    if case.continued:
        base = AutoModelForCausalLM.from_pretrained(model_dir)
        model = PeftModel.from_pretrained(base, first, is_trainable=True)
        tokenizer = load_tokenizer(model_dir)
        trainer = DPOTrainer(
            model, args=arguments, train_dataset=dataset, processing_class=tokenizer
        )
        assert set(trainer.model.peft_config) == {"default", "ref"}
    else:
        settings = PeftConfig.from_pretrained(str(first))
        settings.inference_mode = False
        trainer = DPOTrainer(
            str(model_dir), args=arguments, train_dataset=dataset, peft_config=settings
        )
        lora.load(trainer.model.get_base_model(), first)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    module = trainer.model.get_base_model()
    return lines, {n: t.clone() for n, t in lora.weights(module).items()}


def load_tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def saved(folder: Path) -> dict[str, Tensor]:
    found = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}


@pytest.mark.parametrize(
    "name",
    [
        "fresh",
        pytest.param("continued", marks=pytest.mark.slow),
        "continued, rsLoRA and DoRA",
    ],
)
def test_same_trajectory_as_trl(
    name: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    case, rows = CASES[name], pairs()[: STEPS * BATCH]
    data, first = tmp_path / "pairs.jsonl", tmp_path / "first"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = {"adapter_name_or_path": str(first)} if case.continued else case.adapter
    common: dict[str, Any] = {
        "model_name_or_path": str(tiny_model_dir), "device": "cpu", "dtype": "float32",
        "max_length": 256, "trainable": "lora",
    }  # fmt: skip
    first_adapter(case, Config(**common, **case.adapter), first)
    config = Config(
        **common,
        **own,
        dataset_name=(str(data),),
        eval_fraction=0.0,
        eval_steps=0,
        output_dir=str(tmp_path / "run"),
        ref_cache_dir=str(tmp_path / "reference"),
        beta=BETA,
        optim=case.optim,
        learning_rate=case.learning_rate,
        weight_decay=case.weight_decay,
        max_steps=STEPS,
        train_batch_size=BATCH,
        max_tokens_per_microbatch=192,  # several micro-batches a step; TRL takes one
        shuffle=False,
        logging_steps=1,
    )
    run = train(config, progress=False)
    ours = read_jsonl(run / "metrics.jsonl")
    losses = np.array(read_records(run, "steps", ["loss"])["loss"])
    theirs, their_weights = run_trl(case, rows, tiny_model_dir, first, tmp_path / "trl")

    loss = np.array([line["loss"] for line in theirs])
    assert np.ptp(loss) > 0.05  # otherwise the comparison would show little
    residual = losses - loss
    assert np.abs(residual).max() <= case.loss_within, residual
    assert abs(residual.mean()) <= case.loss_within / 5, residual
    for key in LOGGED:
        a, b = (np.array([line[key] for line in lines]) for lines in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=key)
    update = distance(their_weights, saved(first))
    apart = distance(saved(run), their_weights)
    assert apart <= case.weights_within * update, (apart, update)
