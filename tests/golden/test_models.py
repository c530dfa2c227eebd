"""Every family of models: packed, prefix-shared = one padded batch of separate sequences.

The padded batch is TRL's: chosen and rejected rows of 2 P, padded on the right, an attention mask,
log-softmax over all logits. The models keep their families' default flags unless a case says more
(`tests.architectures`).
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref.data.pack import pack_pairs
from fastpref.model import PairModel
from tests.architectures import PAIRS, WINDOW, InFloat64, packed, tiny_model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 32,
    "factor": 2.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, dynamic rotary scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, windows in upper layers": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "gemma2": (
        "gemma2",
        {
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 4,
        },
    ),
    "gemma3_text": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3_text, softcaps": (
        "gemma3_text",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "phi3": ("phi3", {}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE}),
    "olmo": ("olmo", {"clip_qkv": 0.3}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"layer_types": ["sliding_attention", "full_attention"]}),
    "granite": (
        "granite",
        {
            "logits_scaling": 3.0,
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.7,
        },
    ),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {"layer_types": ["sliding_attention", "full_attention"]}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 3.0}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),  # its layers drop the keyword pair_layout
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "gpt_oss": ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"]}),  # sinks
}


def padded_logp(module: Any) -> Tensor:  # (2, P) chosen, rejected
    rows = [(p.prompt, y) for p in PAIRS for y in (p.chosen, p.rejected)]
    longest = max(len(prompt) + len(y) for prompt, y in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention, scored = torch.zeros_like(ids), torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (prompt, y) in enumerate(rows):
        end = len(prompt) + len(y)
        ids[row, :end] = torch.from_numpy(np.concatenate([prompt, y]).astype(np.int64))
        attention[row, :end] = 1
        scored[row, len(prompt) : end] = True
    logits = module(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logp * scored[:, 1:]).sum(dim=1).view(-1, 2).T


def packed_logp(model: PairModel) -> Tensor:  # (2, P)
    shared, chosen, rejected = model.logp(pack_pairs(PAIRS)).logp.view(-1, 3).unbind(1)
    return torch.stack([shared + chosen, shared + rejected])


def with_gradient(module: Any, logp: Tensor) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of a sum whose weights tell the sequences apart, in one vector."""
    weight = torch.linspace(1.0, -2.0, logp.numel(), dtype=logp.dtype).view_as(logp)
    grads = torch.autograd.grad((weight * logp).sum(), list(module.parameters()))
    return logp.detach(), torch.cat([grad.reshape(-1) for grad in grads])


def relative(ours: Tensor, plain: Tensor) -> float:
    return float((ours - plain).norm() / plain.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", CASES)
def test_packed_equals_padded(case: str, dtype: torch.dtype, tolerance: float) -> None:
    model_type, flags = CASES[case]
    assert max(len(p.prompt) + len(p.chosen) for p in PAIRS) > WINDOW + 1
    module = tiny_model(model_type, dtype, **flags)
    if dtype is torch.float64 and module._can_set_experts_implementation():
        module.set_experts_implementation("eager")  # torch's grouped products know no float64
    with InFloat64() if dtype is torch.float64 else contextlib.nullcontext():
        plain, plain_grad = with_gradient(module, padded_logp(module))
        model = packed(module)
        ours, our_grad = with_gradient(module, packed_logp(model))
    assert relative(ours, plain) <= tolerance
    assert relative(our_grad, plain_grad) <= tolerance
    assert plain_grad.norm() > 1.0


@pytest.mark.slow
def test_the_page_of_models_is_what_the_self_check_says() -> None:
    """Every causal LM of transformers, tiny: right or refused, as docs/models.md lists."""
    script = Path(__file__).resolve().parents[2] / "docs" / "models_table.py"
    spec = importlib.util.spec_from_file_location("models_table", script)
    assert spec and spec.loader
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    page = table.PAGE.read_text(encoding="utf-8")
    assert page.endswith(table.MARK + table.tables()), (
        "docs/models.md is out of date; run: python docs/models_table.py"
    )
