"""Optimizer, schedule and clipping against transformers' Trainer and torch's own functions."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from torch import nn

from fastpref.config import Config
from fastpref.optim import build_optimizer, build_scheduler, clip_gradients


def tiny(kind: str, seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, attention_bias=True, **sizes, **heads))


def trainer_optimizer(module: nn.Module, config: Config, optim: str) -> torch.optim.Optimizer:
    """What transformers' Trainer builds for the same settings."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        optim=optim,
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


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
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
    ("optim", "other", "tolerance"),
    [
        ("adamw_torch", "adamw_torch_fused", 0.0),
        ("adamw_torch", "adamw_torch", 1e-6),
        ("sgd", "sgd", 1e-6),
    ],
)
def test_steps_equal_the_trainers(optim: str, other: str, tolerance: float) -> None:
    config = Config(
        optim=optim, learning_rate=1e-2, weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-6
    )
    mine, theirs = tiny("llama"), tiny("llama")
    run(mine, build_optimizer(mine.named_parameters(), config))
    run(theirs, trainer_optimizer(theirs, config, other))
    start = dict(tiny("llama").named_parameters())
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert not torch.equal(a, start[name]), name
        worst = (a - b).abs().max().item()
        assert worst <= tolerance, f"{name}: {worst}"


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


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.33, 1.0])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedule_equals_transformers(kind: str, ratio: float) -> None:
    from transformers import TrainingArguments, get_scheduler

    total = 37
    config = Config(lr_scheduler_type=kind, warmup_ratio=ratio, learning_rate=3e-4)
    args = TrainingArguments(output_dir=tempfile.mkdtemp(), warmup_steps=ratio, use_cpu=True)
    warmup = total if ratio == 1.0 else args.get_warmup_steps(total)
    weight = nn.Parameter(torch.zeros(2))
    theirs_optimizer = torch.optim.SGD([weight], lr=config.learning_rate)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, theirs_optimizer, warmup, total)
    mine_optimizer = build_optimizer([("w", weight)], config)
    mine = build_scheduler(mine_optimizer, config, total)
    for step in range(total):
        rates = {group["lr"] for group in mine_optimizer.param_groups}
        assert rates == {mine.learning_rate}
        expected = theirs.get_last_lr()[0]
        assert mine.learning_rate == pytest.approx(expected, rel=1e-12, abs=1e-18), step
        theirs_optimizer.step()
        theirs.step()
        mine.step()


def test_schedule_goes_on_after_its_state() -> None:
    config = Config(learning_rate=1e-3)
    make = lambda: build_scheduler(  # noqa: E731
        build_optimizer([("w", nn.Parameter(torch.zeros(2)))], config), config, 20
    )
    straight, resumed = make(), make()
    for _ in range(7):
        straight.step()
    resumed.load_state_dict(straight.state_dict())
    assert resumed.optimizer.param_groups[0]["lr"] == straight.learning_rate > 0
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        build_scheduler(resumed.optimizer, config, 0)


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
