"""Useful arithmetic, against a count by hand, by torch, and by brute force over the mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastpref.flops import Attention, Shape, visible
from fastpref.peaks import peak_tflops

LENGTHS = ((5, 3, 2), (1, 0, 4), (0, 2, 2), (7, 0, 0))


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            **changes,
        }
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("lengths", [LENGTHS, ((4, 2), (3, 1, 2, 2), (0, 5))])
def test_visible_pairs_are_those_of_the_mask(lengths: Any, window: int | None) -> None:
    count = 0
    for prefix, *branches in lengths:
        # In positions of a sequence: a branch goes on from the end of its prefix.
        for start, n in [(0, prefix), *((prefix, n) for n in branches)]:
            for query in range(start, start + n):
                count += sum(window is None or query - k < window for k in range(query + 1))
    assert visible(lengths, window) == count


def test_the_step_of_a_llama_by_hand() -> None:
    from transformers import LlamaConfig

    # 8B, 512 tokens of prompt, two completions of 256, cached reference: 45.2 TFLOP.
    shape = Shape.of_config(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
    )
    weights = 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336)
    assert (shape.weights, shape.trained) == (weights, weights)
    assert shape.attention == (Attention(32, 2 * 4096),)
    seen = 512 * 513 / 2 + 2 * (256 * 512 + 256 * 257 / 2)
    by_hand = 6 * 1024 * weights + 3 * 32 * 2 * 8192 * seen + 6 * 512 * 4096 * 128256
    assert shape.step([(512, 256, 256)], 512) == by_hand == pytest.approx(45.2e12, rel=1e-3)


def products(module: Any, tokens: int) -> int:
    """What torch counts of the body's products with weights, forward and backward: attention is
    replaced by its values."""
    from torch.utils.flop_counter import FlopCounterMode

    module.set_attn_implementation("eager")
    aten = torch.ops.aten
    with FlopCounterMode(display=False) as counter:
        ids = torch.arange(tokens)[None] % 50
        module.model(ids).last_hidden_state.sum().backward()
    found = counter.get_flop_counts()["Global"]
    return sum(n for op, n in found.items() if op in (aten.mm, aten.addmm))


def test_products_of_the_body_are_what_torch_counts() -> None:
    module = llama()
    shape = Shape.of(module)
    body, _ = shape._body([(12, 0, 0)])
    assert products(module, 12) == 3 * body


def test_frozen_weights_have_no_gradient_of_their_own() -> None:
    """With adapters alone in training: one backward product a frozen weight, two an adapter's."""
    module = llama()
    module.requires_grad_(False)
    for layer in module.model.layers:
        adapted = layer.mlp.down_proj
        layer.mlp.down_proj = nn.Sequential(nn.Linear(40, 4, bias=False), nn.Linear(4, 24))
        layer.mlp.down_proj.append(adapted)
        layer.mlp.down_proj[2] = nn.Identity()
    shape = Shape.of(module)
    frozen = 3 * (24 * (2 * 32 + 2 * 16) + 2 * 24 * 40)
    adapters = 3 * (40 * 4 + 4 * 24)
    assert (shape.weights, shape.trained) == (frozen + adapters, adapters)
    assert not shape.head_trained and shape.body_trained
    body = 2 * 12 * (frozen + adapters)
    attention = 3 * 2 * 64 * 78
    assert shape.step([(12, 0, 0)], 5) == (
        2 * body + 2 * 12 * adapters + 3 * attention + 2 * 2 * 5 * 24 * 50
    )


def test_the_head_alone_is_two_products_of_its_rows() -> None:
    module = llama()
    module.requires_grad_(False)
    module.lm_head.weight.requires_grad_(True)
    assert Shape.of(module).step(LENGTHS, 5, states=True) == 2 * 2 * 5 * 24 * 50


def test_what_the_head_does_not_read_is_not_useful() -> None:
    """Of tokens that predict no scored one: the last block's output projection and MLP."""
    module = llama()
    shape = Shape.of(module)
    last = 24 * 32 + 3 * 24 * 40
    assert (shape.last, shape.last_trained) == (last, last)
    assert shape.step(LENGTHS, 5) - shape.step(LENGTHS, 5, 3) == 3 * 2 * 3 * last
    assert shape.forward(LENGTHS, 5) - shape.forward(LENGTHS, 5, 3) == 2 * 3 * last
    more = shape.step(LENGTHS, 5, 3, reference=True) - shape.step(LENGTHS, 5, 3)
    assert more == shape.forward(LENGTHS, 5, 3)
    module.model.layers[-1].mlp.requires_grad_(False)
    assert Shape.of(module).last_trained == 24 * 32
    assert Shape.of_config(module.config).last == last


def test_a_reference_that_moves_is_a_forward_more() -> None:
    shape = Shape.of(llama())
    more = shape.step(LENGTHS, 5, reference=True) - shape.step(LENGTHS, 5)
    assert more == shape.forward(LENGTHS, 5) > 0
    assert shape.step([], 0) == 0


def test_other_architectures() -> None:
    from transformers import Gemma3TextConfig, GPT2Config, MixtralConfig

    gemma = Shape.of_config(Gemma3TextConfig(num_hidden_layers=7, sliding_window=16))
    assert [(kind.layers, kind.window) for kind in gemma.attention] == [(1, None), (6, 16)]
    gpt2 = Shape.of_config(GPT2Config(n_layer=2))
    assert gpt2.weights == 2 * 12 * 768**2 and gpt2.attention == (Attention(2, 2 * 768),)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 16}
    mixture = Shape.of_config(
        MixtralConfig(num_hidden_layers=1, num_key_value_heads=4, num_local_experts=8, **sizes)
    )
    assert mixture.weights == 4 * 64 * 64 + 2 * 3 * 64 * 48 + 8 * 64  # two of eight experts


def test_quantised_weights_count_as_what_they_stand_for() -> None:
    module = llama(num_hidden_layers=1)
    plain = Shape.of(module).weights
    layer = module.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(
        torch.zeros(24 * 40 // 2, 1, dtype=torch.uint8), requires_grad=False
    )
    assert Shape.of(module).weights == plain


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce GTX 1080", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_of_devices(name: str, peak: float | None) -> None:
    assert peak_tflops(name, "bfloat16") == peak
    assert peak_tflops(name, "float32") is None


def test_visible_is_quick() -> None:
    """It runs in every step."""
    import time

    lengths = [tuple(x) for x in np.random.default_rng(0).integers(1, 500, (64, 3)).tolist()]
    shape = Shape.of(llama())
    began = time.perf_counter()
    for _ in range(100):
        shape.step(lengths, 1000)
    assert (time.perf_counter() - began) / 100 < 2e-3
