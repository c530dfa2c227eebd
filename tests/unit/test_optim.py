"""Optimizers and clipping against transformers' Trainer and torch's own functions."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastpref.config import Config
from fastpref.optim import build_optimizer, clip_gradients
from fastpref.train import train

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def tiny(kind: str, seed: int = 0) -> nn.Module:
    import transformers as hf

    torch.manual_seed(seed)
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    if kind == "neox":
        return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(num_attention_heads=2, **SIZES))
    if kind == "gemma2":
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(head_dim=8, **SIZES, **HEADS))
    if kind == "gemma3":
        return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(head_dim=8, **SIZES, **HEADS))
    return hf.LlamaForCausalLM(hf.LlamaConfig(attention_bias=True, **SIZES, **HEADS))


def trainer_optimizer(module: nn.Module, config: Config, optim: str) -> torch.optim.Optimizer:
    """What transformers' Trainer builds for the same settings."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        optim=optim,
        optim_args=",".join(f"{key}={value}" for key, value in config.optim_args) or None,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        use_cpu=True,
        report_to="none",
    )
    return Trainer(model=module, args=args).create_optimizer()


def run(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "gemma2", "gemma3"])
def test_decay_groups_are_the_trainers(kind: str) -> None:
    module = tiny(kind)
    config = Config(weight_decay=0.1)
    names = {id(p): name for name, p in module.named_parameters()}

    def decayed(optimizer: torch.optim.Optimizer) -> dict[str, float]:
        return {
            names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
        }

    mine = decayed(build_optimizer(module.named_parameters(), config))
    theirs = decayed(trainer_optimizer(module, config, "adamw_torch"))
    assert mine == theirs
    assert set(mine.values()) == {0.0, 0.1}


@pytest.mark.parametrize(
    ("optim", "args", "other", "tolerance"),
    [
        ("adamw_torch", "", "adamw_torch_fused", 0.0),
        ("adamw_torch", "", "adamw_torch", 1e-6),
        ("adamw_torch_fused", "", "adamw_torch_fused", 0.0),
        ("sgd", "", "sgd", 1e-6),
        ("sgd", "momentum=0.9,dampening=0.2", "sgd", 1e-6),
        ("sgd", "momentum=0.9,nesterov=true", "sgd", 1e-6),
        ("rmsprop", "", "rmsprop", 0.0),
        ("rmsprop", "alpha=0.95,eps=1e-6,momentum=0.5,centered=true", "rmsprop", 0.0),
        ("adafactor", "", "adafactor", 0.0),
    ],
)
def test_steps_equal_the_trainers(optim: str, args: str, other: str, tolerance: float) -> None:
    config = Config(
        optim=optim,
        optim_args=args,  # type: ignore[arg-type]
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
    )
    mine, theirs = tiny("llama"), tiny("llama")
    run(mine, build_optimizer(mine.named_parameters(), config))
    run(theirs, trainer_optimizer(theirs, config, other))
    start = dict(tiny("llama").named_parameters())
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert not torch.equal(a, start[name]), name
        worst = (a - b).abs().max().item()
        assert worst <= tolerance, f"{name}: {worst}"


@pytest.mark.parametrize(
    ("optim", "args"),
    [("sgd", "momentum=0.9"), ("rmsprop", "alpha=0.5"), ("adafactor", "beta1=0.9,decay_rate=-0.5")],
)
def test_options_reach_the_optimizer(optim: str, args: str) -> None:
    plain, dialled = tiny("llama"), tiny("llama")
    for module, given in ((plain, ""), (dialled, args)):
        config = Config(optim=optim, optim_args=given, learning_rate=1e-2)  # type: ignore[arg-type]
        run(module, build_optimizer(module.named_parameters(), config))
    pairs = zip(plain.parameters(), dialled.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_frozen_parameters_are_left_out() -> None:
    module = tiny("llama")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing would learn"):
        build_optimizer(module.named_parameters(), Config())
    head: Any = module.get_output_embeddings()
    head.weight.requires_grad_(True)
    optimizer = build_optimizer(module.named_parameters(), Config())
    assert [p is head.weight for g in optimizer.param_groups for p in g["params"]] == [True]


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clipping_equals_torch(max_norm: float) -> None:
    mine, theirs = tiny("gpt2"), tiny("gpt2")
    for module in (mine, theirs):
        torch.manual_seed(3)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
    norm, factor = clip_gradients(mine.parameters(), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf"))
    assert torch.equal(norm, expected)
    assert float(factor) == pytest.approx(min(1.0, max_norm / float(norm)) if max_norm else 1.0)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_clipping_shows_a_norm_that_is_not_finite() -> None:
    weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="after backward"):
        clip_gradients([weight], 1.0)
    weight.grad = torch.tensor([1.0, float("nan"), 1.0])
    norm, _ = clip_gradients([weight], 1.0)
    assert not bool(torch.isfinite(norm))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_what_an_optimizer_lacks_is_found_before_anything_is_read_or_written(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    config = Config(
        dataset_name=(str(tmp_path / "missing.jsonl"),),
        output_dir=str(tmp_path / "run"),
        device="cpu",
        optim=optim,
    )
    paged = optim.startswith("paged") and not torch.cuda.is_available()
    remedy = "needs CUDA. Set optim: adamw_8bit" if paged else r'pip install "fastpref\[8bit\]"'
    with pytest.raises(ValueError, match=remedy):
        train(config)
    assert not (tmp_path / "run").exists()
