"""The attention function by itself: blocks against one mask over everything; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastpref.attention import ambient, build_layout, pair_attention

LENGTHS = [(5, 2, 1), (9, 0, 3), (14, 2, 5), (6, 1, 1), (1, 0, 0), (0, 2, 1), (40, 3, 9)]


def whole_mask(window: int | None) -> Tensor:
    """(T, T) who sees whom, by plain loops over the tokens of all pairs."""
    tokens = []
    for p, (prefix, chosen, rejected) in enumerate(LENGTHS):
        tokens += [(p, "prefix", t) for t in range(prefix)]
        tokens += [(p, "chosen", prefix + t) for t in range(chosen)]
        tokens += [(p, "rejected", prefix + t) for t in range(rejected)]
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (pair, part, position) in enumerate(tokens):
        for k, (other, other_part, other_position) in enumerate(tokens):
            seen[q, k] = (
                pair == other
                and other_part in ("prefix", part)
                and other_position <= position
                and (window is None or position - other_position < window)
            )
    return seen


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_blocks_equal_one_mask_over_all_tokens(
    window: int | None, softcap: float | None, sinks: bool
) -> None:
    torch.manual_seed(0)
    count = sum(map(sum, LENGTHS))
    layout = build_layout(LENGTHS, "cpu")
    assert len(layout.blocks) > 1 and layout.padding is not None
    q = torch.randn(1, 4, count, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, count, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    out, _ = pair_attention(
        nn.Identity(), q, k, v, None, scaling=0.4, sliding_window=window, softcap=softcap,
        s_aux=sink if sinks else None, pair_layout=layout,
    )  # fmt: skip

    scores = 0.4 * q @ k.repeat_interleave(2, 1).transpose(2, 3)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    total = scores.masked_fill(~whole_mask(window), -torch.inf).logsumexp(-1, keepdim=True)
    if sinks:
        total = torch.logaddexp(total, sink[:, None, None])
    weights = (scores - total).exp() * whole_mask(window)
    expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected)

    probe = torch.randn_like(out)
    leaves = (q, k, v, sink) if sinks else (q, k, v)
    ours = torch.autograd.grad((out * probe).sum(), leaves)
    theirs = torch.autograd.grad((expected * probe).sum(), leaves)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain)


def test_equal_lengths_need_no_gathering() -> None:
    layout = build_layout([(5, 1, 2)] * 3, "cpu")
    assert layout.gather is None and len(layout.blocks) == 1


def test_what_it_does_not_know_is_refused() -> None:
    x = torch.randn(1, 2, 8, 4)
    layout = build_layout([(8, 0, 0)], "cpu")
    with pytest.raises(ValueError, match="pair_layout"):
        pair_attention(nn.Identity(), x, x, x, None)
    with pytest.raises(ValueError, match="position_bias"):
        pair_attention(nn.Identity(), x, x, x, None, pair_layout=layout, position_bias=x)
    with pytest.raises(ValueError, match="mask of its own"):
        pair_attention(nn.Identity(), x, x, x, torch.zeros(1, 1, 8, 8), pair_layout=layout)
    with pytest.raises(ValueError, match="later tokens"):
        pair_attention(nn.Identity(), x, x, x, None, pair_layout=layout, is_causal=False)
    encoder = nn.Identity()
    encoder.is_causal = False  # type: ignore[assignment]
    with pytest.raises(ValueError, match="later tokens"):
        pair_attention(encoder, x, x, x, None, pair_layout=layout)


def test_a_layout_that_the_model_dropped_is_found_but_the_keyword_goes_first() -> None:
    x = torch.randn(1, 2, 8, 4)
    whole, halves = build_layout([(8, 0, 0)], "cpu"), build_layout([(4, 0, 0)] * 2, "cpu")
    by_keyword, _ = pair_attention(nn.Identity(), x, x, x, None, pair_layout=whole)
    with ambient(whole):
        dropped, _ = pair_attention(nn.Identity(), x, x, x, None)
        both, _ = pair_attention(nn.Identity(), x, x, x, None, pair_layout=halves)
    assert torch.equal(dropped, by_keyword) and not torch.allclose(both, by_keyword)
    with pytest.raises(ValueError, match="pair_layout"):
        pair_attention(nn.Identity(), x, x, x, None)
