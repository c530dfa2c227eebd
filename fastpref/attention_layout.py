"""What every way of computing attention over packed branches shares: terms of the scores, and
index tensors that reach the device without anyone waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """What a layer asks of attention beside queries, keys and values."""

    scale: float | None = None  # of the scores; None: one over the root of the head's width
    window: int | None = None  # keys that a query sees, itself included; None: all before it
    softcap: float | None = None  # c tanh(score / c) before the softmax
    sinks: Tensor | None = None  # (heads,) score of one more key a head, which gives nothing
    dropout: float = 0.0


def rectangle(lengths: Sequence[Sequence[int]]) -> np.ndarray:  # (P, parts)
    """The lengths as one array; what a pair lacks in branches are branches without tokens."""
    parts = max(map(len, lengths), default=1)
    if any(len(own) < parts for own in lengths):
        lengths = [[*own, *[0] * (parts - len(own))] for own in lengths]
    return np.asarray(lengths, np.int64).reshape(-1, parts)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``start, start + 1, ...``, ``count`` of them, for every start; one after another."""
    begin = np.cumsum(counts) - counts
    return np.repeat(starts - begin, counts) + np.arange(int(counts.sum()))


def on_device(arrays: Sequence[np.ndarray], device: torch.device | str) -> tuple[Tensor, ...]:
    """The arrays, of one dtype, as 1-D tensors on ``device``: one copy, for which nobody waits."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()  # torch keeps it until the copy is done
    return flat.to(device, non_blocking=True).split([array.size for array in arrays])


def in_autocast(x: Tensor) -> Tensor:
    """``x`` in the precision of autocast's products, where autocast is on."""
    kind = x.device.type
    if x.dtype is torch.float32 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
