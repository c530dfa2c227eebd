"""Two varlen calls against dense blocks: values, gradients, models; with a stand-in on the CPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastpref import attention_reference
from fastpref.attention import build_layout, pair_attention
from fastpref.attention_backends import Backend
from fastpref.attention_dense import build_dense
from fastpref.attention_varlen import VarlenLayout
from fastpref.data.branches import pack_probes
from fastpref.data.pack import pack_pairs
from fastpref.model import PairModel
from fastpref.selfcheck import _packed, _plain, check_model
from tests.architectures import PAIRS, WINDOW, InFloat64, packed, tiny_model
from tests.golden.test_probe_layout import GROUPS

STAND_IN = Backend("stand-in", attention_reference.varlen)
PAIR_LENGTHS = [(5, 2, 1), (9, 0, 3), (14, 2, 5), (6, 1, 1), (1, 0, 0), (0, 2, 1), (40, 3, 9)]
CASES = {
    "pairs": PAIR_LENGTHS,
    "branches": [(5, 2, 1, 3), (4, 1), (6, 0, 3, 0, 2), (0, 2, 1), (3,), (7, 1, 1, 1, 1, 4)],
    "no second branch": [(5, 2, 0), (3, 0, 0), (9, 4, 0)],
    "nothing for the first call": [(0, 0, 3)],
    "one token": [(1, 0, 0)],
    "no prefixes": [(0, 3, 2), (0, 1, 1)],
}


def tensors(tokens: int, kv_heads: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(
        torch.randn(1, heads, tokens, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap,kv_heads", [(None, 2), (1.5, 4), (None, 1)])
def test_two_calls_equal_dense_blocks(
    case: str, window: int | None, softcap: float | None, kv_heads: int
) -> None:
    lengths = CASES[case]
    q, k, v = tensors(sum(map(sum, lengths)), kv_heads)
    results = []
    for layout in (build_layout(lengths, "cpu", STAND_IN), build_dense(lengths, "cpu")):
        out, _ = pair_attention(
            nn.Identity(), q, k, v, None, scaling=0.4, sliding_window=window, softcap=softcap,
            pair_layout=layout,
        )  # fmt: skip
        probe = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
        results.append([out, *torch.autograd.grad((out * probe).sum(), (q, k, v))])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)


def test_random_lengths() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = [
            tuple(rng.integers(0, 6, rng.integers(1, 6)).tolist())
            for _ in range(rng.integers(1, 9))
        ]
        lengths.append((2, 1, 1))
        q, k, v = tensors(sum(map(sum, lengths)), 2)
        layouts = (build_layout(lengths, "cpu", STAND_IN), build_dense(lengths, "cpu"))
        ours, dense = (
            pair_attention(nn.Identity(), q, k, v, None, pair_layout=layout)[0]
            for layout in layouts
        )
        torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)


def test_sequences_and_lengths_of_the_calls() -> None:
    """Written out by hand, for a pair, one without a rejected rest, and three branches."""
    layout = build_layout([(3, 1, 2), (2, 1, 0), (1, 1, 1, 2)], "cpu", STAND_IN)
    assert isinstance(layout, VarlenLayout) and layout.first and layout.second and layout.gather
    assert layout.first.cu_q.tolist() == layout.first.cu_k.tolist() == [0, 4, 7, 9]
    assert (layout.first.max_q, layout.first.max_k) == (4, 4)
    assert layout.second.cu_q.tolist() == [0, 2, 3, 5]
    assert layout.second.cu_k.tolist() == [0, 5, 7, 10]
    assert (layout.second.max_q, layout.second.max_k) == (2, 5)
    assert layout.gather.first.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10]
    assert layout.gather.second.tolist() == [4, 5, 11, 12, 13]
    assert layout.gather.keys.tolist() == [0, 1, 2, 4, 5, 9, 11, 9, 12, 13]
    shared = [(tokens.tolist(), places.tolist()) for tokens, places in layout.gather.shared]
    assert shared == [([0, 1, 2, 9], [0, 1, 2, 5]), ([9], [7])]


def test_completions_of_one_token_need_no_gathering() -> None:
    layout = build_layout([(7, 0, 0), (5, 0, 0)], "cpu", STAND_IN)
    assert isinstance(layout, VarlenLayout)
    assert layout.gather is None and layout.second is None


def test_nothing_is_read_back_from_the_device() -> None:
    """On the meta device there is nothing to read: whoever waited for a value would fail."""
    lengths = PAIR_LENGTHS

    def fake(q: Tensor, *rest: object, **terms: object) -> Tensor:
        return q * 1

    q, k, v = (x.detach().to("meta").requires_grad_() for x in tensors(sum(map(sum, lengths)), 2))
    for layout in (
        build_layout(lengths, "meta", Backend("fake", fake)),
        build_dense(lengths, "meta"),
    ):
        out, _ = pair_attention(nn.Identity(), q, k, v, None, pair_layout=layout, sliding_window=3)
        torch.autograd.grad(out.sum(), (q,))
        assert out.device.type == "meta" and out.shape == (1, q.shape[2], 4, 8)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "qwen3"])
def test_models_with_two_calls_equal_blocks_and_separate_sequences(name: str) -> None:
    with InFloat64():
        dense = packed(tiny_model(name))
        assert name != "mistral" or max(len(p.prompt) for p in PAIRS) > 2 * WINDOW
        varlen = dataclasses.replace(dense, attention=STAND_IN)
        ours, blocks, plain = (
            compute(model, PAIRS)
            for model, compute in ((varlen, _packed), (dense, _packed), (dense, _plain))
        )
        for other in (blocks, plain):
            scale = max(float(g.abs().max()) for g in other[1].values())
            torch.testing.assert_close(ours[0], other[0], rtol=1e-12, atol=1e-12)
            for parameter, gradient in other[1].items():
                error = float((ours[1][parameter] - gradient).abs().max())
                assert error < 1e-12 * scale, (parameter, error / scale)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_probes_with_many_responses(name: str) -> None:
    with InFloat64():
        dense = packed(tiny_model(name))
        batch = pack_probes(GROUPS)
        slope = torch.linspace(1, -2, batch.num_segments, dtype=torch.float64)
        parameters = list(dense.module.parameters())
        results = []
        for model in (dense, dataclasses.replace(dense, attention=STAND_IN)):
            logp = model.logp(batch).logp
            grads = torch.autograd.grad(slope @ logp, parameters, allow_unused=True)
            results.append([logp, *(g for g in grads if g is not None)])
        for ours, blocks in zip(*reversed(results), strict=True):
            torch.testing.assert_close(ours, blocks, rtol=1e-11, atol=1e-12)


def test_self_check_compares_the_backend_with_dense_blocks() -> None:
    model = dataclasses.replace(packed(tiny_model("llama")), attention=STAND_IN)
    assert check_model(model, PAIRS) < 1e-6

    def top_left(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: int,
                 **terms: object) -> Tensor:  # fmt: skip
        """Causal from the top left, as old versions of flash-attn were."""
        found = []
        for i in range(len(cu_q) - 1):
            own, to = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            qkv = (x.transpose(0, 1) for x in (q[own], k[to], v[to]))
            attended = torch.nn.functional.scaled_dot_product_attention(
                *qkv, is_causal=True, enable_gqa=True
            )
            found.append(attended.transpose(0, 1))
        return torch.cat(found)

    wrong = dataclasses.replace(model, attention=Backend("other", top_left))
    with pytest.raises(ValueError, match="other and sdpa differ in .* attn_implementation: sdpa"):
        check_model(wrong, PAIRS)
    lacking = dataclasses.replace(
        model, attention=Backend("other", attention_reference.varlen, head_dims=lambda d: d > 8)
    )
    with pytest.raises(ValueError, match="other has no heads of width 8.* sdpa"):
        check_model(lacking, PAIRS)


def test_what_a_model_asks_is_seen_before_the_run() -> None:
    capless = Backend("capless", attention_reference.varlen, softcap=False)
    everything = Backend("everything", attention_reference.varlen)
    half = Backend("half", attention_reference.varlen, dtypes=(torch.bfloat16,))
    found: dict[str, dict[str, str]] = {}
    for name in ("llama", "gemma2", "gpt_oss"):
        model: PairModel = packed(tiny_model(name))
        found[name] = model.lacks([capless, everything, half])
    assert found["llama"] == {"half": "float64 (it computes in bfloat16)"}
    assert found["gemma2"]["capless"] == "capped scores (softcap 50)"
    assert "everything" not in found["gemma2"]
    assert found["gpt_oss"]["everything"] == "attention sinks"


def test_packed_batch_of_pairs_goes_through_both_calls() -> None:
    calls = []

    def noting(q: Tensor, *rest: object, **terms: object) -> Tensor:
        calls.append(len(q))
        return attention_reference.varlen(q, *rest, **terms)  # type: ignore[arg-type]

    model = dataclasses.replace(packed(tiny_model("llama")), attention=Backend("noting", noting))
    batch = pack_pairs(PAIRS)
    model.logp(batch)
    rejected = sum(length[2] for length in batch.lengths)
    assert calls == [batch.num_tokens - rejected, rejected] * 2  # of each layer
