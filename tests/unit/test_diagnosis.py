"""A refusal names its cause: models with one thing wrong, and what is said of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastpref import attention_dense
from fastpref.model import PairModel
from fastpref.selfcheck import check_model
from tests.architectures import PAIRS, packed, tiny_model


def refused(model: PairModel, cause: str) -> None:
    with pytest.raises(ValueError, match=f"differ in.*Cause: .*{cause}"):
        check_model(model, PAIRS)


def test_the_head() -> None:
    module = tiny_model("llama")
    head = module.lm_head.forward
    module.lm_head.forward = lambda x: head(x) * 1.2
    refused(packed(module), "the head transforms its logits")


def test_a_sum_along_the_sequence() -> None:
    module = tiny_model("llama")
    mlp = module.model.layers[0].mlp.forward
    module.model.layers[0].mlp.forward = lambda x: mlp(x) + 0.1 * x.cumsum(dim=1)
    refused(packed(module), "a layer looks along the sequence")


def test_positions_of_its_own() -> None:
    module = tiny_model("llama")
    rotary = module.model.rotary_emb.forward
    module.model.rotary_emb.forward = lambda x, position_ids: rotary(
        x, torch.arange(x.shape[1])[None]
    )
    refused(packed(module), "does not read position_ids")


def test_a_window_that_only_a_mask_tells() -> None:
    refused(
        packed(tiny_model("phimoe", sliding_window=5)),
        "window of 5 tokens is shorter.*max_length up to 5",
    )


def test_no_attention_function() -> None:
    module = tiny_model("llama")

    def recurrent(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return 0.5 * hidden_states.cumsum(dim=1), None

    for layer in module.model.layers:
        layer.self_attn.forward = recurrent
    refused(packed(module), "never calls the attention function")


def test_a_term_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of the scores that packing would not honour."""
    attend = attention_dense._attend

    def unscaled(*given: Any) -> torch.Tensor:
        *qkv_and_mask, terms = given
        return attend(*qkv_and_mask, dataclasses.replace(terms, scale=1.0))

    monkeypatch.setattr(attention_dense, "_attend", unscaled)
    refused(packed(tiny_model("llama")), "attention has a term that packing does not know")


def test_a_gradient_of_its_own() -> None:
    module = tiny_model("llama")
    norm = module.model.norm.forward
    module.model.norm.forward = lambda x: _Doubled.apply(norm(x)) if x.shape[1] > 30 else norm(x)
    refused(packed(module), "not found. Values of a single sequence agree")


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad
