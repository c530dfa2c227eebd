"""Before a run: is the packed, prefix-shared computation this model's own? Measured, not assumed.

Of the architectures in transformers many never call its attention interface, or do something along
the sequence that packing breaks. So one packed batch of mixed lengths is compared with plain
forwards and backwards of the separate sequences, log-probs and every gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.data.pack import pack_pairs, parts
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel

# Largest accepted difference, relative to the root mean square of the plain values. What packing
# gets wrong changes tenths; rounding in the precision of the products changes this much at most.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.bfloat16: 1e-1}
PAIRS = 4


def check_model(model: PairModel, pairs: Sequence[TokenPair]) -> float:
    """Compare packed with plain on a few of ``pairs``; returns the largest relative difference.

    Raises ValueError naming the architecture and what differs.
    """
    chosen = [pairs[i] for i in _mixed_lengths(pairs)]
    try:
        plain_logp, plain_grads = _plain(model, chosen)
        packed_logp, packed_grads = _packed(model, chosen)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{type(model.module).__name__} is not supported: it cannot compute a packed batch in "
            f"{model.dtype}: {error}"
        ) from error
    if not all(bool(torch.isfinite(x).all()) for x in (plain_logp, *plain_grads.values())):
        raise ValueError(
            f"{type(model.module).__name__}: the model's own log-probabilities or gradients are "
            f"not finite in {model.dtype}. Its weights are damaged, or the precision is too low."
        )
    worst = _difference(packed_logp, plain_logp)
    what = "log-probabilities"
    # Some gradients are zero but for rounding (a key's bias without rotary embedding): they are
    # held against a thousandth of what the others are.
    floor = 1e-3 * max(_size(grad) for grad in plain_grads.values())
    for name, plain in plain_grads.items():
        difference = _difference(packed_grads[name], plain, floor)
        if not difference <= worst:
            worst, what = difference, f"the gradient of {name}"
    if not worst <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"{type(model.module).__name__} (model_type {model.module.config.model_type}) is not "  # type: ignore[union-attr]
            f"supported: packed and separate computation differ in {what} by {worst:.2g} of its "
            f"size, where rounding in {model.dtype} explains {TOLERANCE[model.dtype]:g}. Either "
            "a layer looks along the sequence without the attention interface, or attention has a "
            "term that packing does not know, or the head transforms its logits in its own way."
        )
    return worst


def _mixed_lengths(pairs: Sequence[TokenPair]) -> list[int]:
    """The shortest, the longest and two between, the longest first."""
    by_length = np.argsort([parts(p).fed for p in pairs], kind="stable")
    picked = np.linspace(0, len(pairs) - 1, min(PAIRS, len(pairs))).round().astype(int)
    return by_length[picked[::-1]].tolist()


def _packed(model: PairModel, pairs: Sequence[TokenPair]) -> tuple[Tensor, dict[str, Tensor]]:
    batch = pack_pairs(pairs).to(model.device)
    shared, chosen, rejected = model.logp(batch).logp.view(-1, 3).unbind(1)
    logp = torch.stack([shared + chosen, shared + rejected], dim=1)
    return logp.detach(), _gradients(model, _probe(logp))


def _plain(model: PairModel, pairs: Sequence[TokenPair]) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' own forward of each sequence by itself, log-softmax over all its logits."""
    with model.plain_attention():
        rows = [
            torch.stack([_sequence_logp(model, p.prompt, y) for y in (p.chosen, p.rejected)])
            for p in pairs
        ]
        logp = torch.stack(rows)
        return logp.detach(), _gradients(model, _probe(logp))


def _sequence_logp(model: PairModel, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(model.device)
    with model.autocast():
        logits = model.module(input_ids=ids[None], use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    first = max(len(prompt), 1)  # nothing predicts position 0
    return -F.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum")


def _probe(logp: Tensor) -> Tensor:
    """A scalar whose gradient tells the sequences apart: weights of changing sign and size."""
    weight = torch.linspace(1.0, -2.0, logp.numel(), dtype=logp.dtype, device=logp.device)
    return (logp * weight.view_as(logp)).sum()


def _gradients(model: PairModel, scalar: Tensor) -> dict[str, Tensor]:
    named = [(n, p) for n, p in model.module.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(scalar, [p for _, p in named], allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named, grads, strict=True)
    }


def _difference(ours: Tensor, plain: Tensor, floor: float = 0.0) -> float:
    """Root-mean-square difference over root-mean-square value; nan where either is not finite."""
    return _size(ours.double() - plain.double()) / max(_size(plain), floor, 1e-30)


def _size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
