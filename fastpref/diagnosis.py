"""Why a model's packed computation differs from its own: the cause in words, by small experiments.

Each one runs a single sequence, plain and as packing would, and looks where the two part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref import attention
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel

SAME = 1e-3  # relative difference of hidden states or logits below which two ways are one
UNKNOWN = (
    "not found. Values of a single sequence agree, so the gradient takes a way of its own, or the "
    "model treats sequences differently when several are computed at once"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether a model's failure is the machine's, not its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


@torch.no_grad()
def find_cause(model: PairModel, pair: TokenPair) -> str:
    """What in ``model`` packing does not know, found on ``pair``'s chosen sequence."""
    ids = torch.from_numpy(np.concatenate([pair.prompt, pair.chosen]).astype(np.int64))
    ids = ids.to(model.device)
    try:
        with model.plain_attention(), model.autocast():
            plain = _body(model, ids)
            logits = model.module(input_ids=ids[None], use_cache=False).logits[0]
        head = model.head
        ours = head.logit_scale * torch.nn.functional.linear(plain, head.weight, head.bias)
        if head.softcap is not None:
            ours = head.softcap * torch.tanh(ours / head.softcap)
        if _differ(ours, logits):
            return (
                "the head transforms its logits, or its input, in a way of its own, so the last "
                "hidden state times the output embedding is not what the model returns"
            )
        return _cause_in_body(model, ids, plain)
    except Exception as error:
        return f"not found, because looking for it failed: {error}"


def _cause_in_body(model: PairModel, ids: Tensor, plain: Tensor) -> str:
    count = len(ids)
    packed, called = _as_packed(model, ids, (count, 0, 0))
    if not called:
        return (
            "it never calls the attention function that it was given, and looks along the sequence "
            "in a way of its own (a recurrence, a convolution, an attention of its own)"
        )
    if _differ(packed, plain):
        window = getattr(model.module.config.get_text_config(decoder=True), "sliding_window", None)  # type: ignore[union-attr,operator]
        if window and window < count:
            return (
                f"its window of {window} tokens is shorter than this sequence of {count} and "
                "reaches attention as a mask only, which packing replaces; with max_length up to "
                f"{window} it makes no difference"
            )
        return (
            "even a single sequence comes out otherwise: attention has a term that packing does "
            "not know (a bias by distance, a mask of its own), or a layer depends on the length "
            "of the call"
        )
    start = count // 2
    shared = torch.cat([ids, ids[start:]])  # both completions the same
    packed, _ = _as_packed(model, shared, (start, count - start, count - start))
    if _differ(packed[count:], plain[start:]):
        if not _reads_positions(model, ids, plain):
            return (
                "it does not read position_ids but counts positions from the start of the call, "
                "so a rejected completion stands at the wrong ones"
            )
        return (
            "a layer looks along the sequence without the attention interface (a convolution, a "
            "recurrence, a shift or sum over tokens), so a rejected completion sees the chosen one"
        )
    return UNKNOWN


def _body(model: PairModel, ids: Tensor, **arguments: Any) -> Tensor:  # (T, D)
    out = model.module.base_model(input_ids=ids[None], use_cache=False, **arguments)  # type: ignore[operator]
    return out.last_hidden_state[0]


def _as_packed(
    model: PairModel,
    ids: Tensor,
    lengths: tuple[int, int, int],  # of prefix, chosen and rejected rest
    positions: Tensor | None = None,
) -> tuple[Tensor, bool]:
    """(T, D) hidden states of one packed pair; whether attention was asked at all."""
    layout = attention.build_dense([lengths], model.device)
    if positions is None:
        prefix, chosen, rejected = lengths
        starts = ((0, prefix), (prefix, chosen), (prefix, rejected))
        positions = torch.cat([torch.arange(at, at + n, device=model.device) for at, n in starts])
    with attention.ambient(layout), model.autocast():
        hidden = _body(model, ids, position_ids=positions[None], pair_layout=layout)
    return hidden, bool(layout.masks)


def _reads_positions(model: PairModel, ids: Tensor, plain: Tensor) -> bool:
    # Backwards, not moved along: rotary embedding sees differences of positions only.
    count = len(ids)
    backwards = torch.arange(count, device=model.device).flip(0)
    return _differ(_as_packed(model, ids, (count, 0, 0), backwards)[0], plain, 1e-5)


def _differ(ours: Tensor, plain: Tensor, same: float = SAME) -> bool:
    ours, plain = ours.double(), plain.double()
    difference = (ours - plain).square().mean().sqrt() / plain.square().mean().sqrt()
    return not bool(difference <= same)
