"""CountSketch of head gradients along the vocabulary, inside the forward's loop over tiles.

    sketch[j] = sum over v in bucket j of sign(v) x[v],    E[sketch . sketch'] = x . x'

Bucket j of K holds the vocabulary ids v with (v + rotation(v // K)) mod K = j, where
rotation(b) = 8 ((A b + B) mod K / 8). Every block of K ids meets every bucket once, so that a tile
is added as a few ranges with a sign per id: one multiply-add a logit, and no scatter. Signs, A and
B are hashes of seed and key (`projection`); A and B change which ids of different blocks share a
bucket, and multiples of 8 keep vector loads whole. Shapes: R rows, V vocab, K buckets, C tile
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .pair_gram import wide_dtype
from .projection import SIGNS_AT_ONCE, Projection
from .row_sums import Tiles

BUCKETS = 1024
ROTATION = 8  # rotations are multiples of it
SQUARES = 64  # rows that sums of squares are first taken to: one vector addition a tile's row


@dataclass(frozen=True)
class Buckets:
    """Where the CountSketch of a vocabulary puts every id, and its sign."""

    count: int  # K, a power of two, at least ROTATION
    sign: Projection
    slope: int  # A
    start: int  # B

    @staticmethod
    def of(seed: int, key: str, count: int) -> Buckets:
        """That of the vocabulary side of the weight that `key` names."""
        rotation = Projection.of(seed, key, "bucket rotation")
        steps = count // ROTATION
        sign = Projection.of(seed, key, "bucket sign")
        return Buckets(count, sign, rotation.low % steps, rotation.high % steps)

    def rotation(self, block: Any) -> Any:
        """By how much a block of K ids (an int, or a tensor of them) is moved; a multiple of 8."""
        return (block * self.slope + self.start) % (self.count // ROTATION) * ROTATION

    def place(self, ids: Tensor) -> Tensor:
        """Bucket of vocabulary ids, int64."""
        return (ids + self.rotation(ids // self.count)) % self.count

    def signs(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """+-1 for vocabulary ids (N,)."""
        return self.sign.signs(ids, 1, dtype).squeeze(1)


def vocabulary_signs(
    ids: Tensor,  # (N,) int64 vocabulary ids
    k: int,
    dtype: torch.dtype,
    *,
    seed: int,
    key: str,
    buckets: int,
) -> Tensor:  # (N, k)
    """Rows of the projection of a vocabulary: sign(v) times the signs of v's bucket.

    A CountSketch followed by a projection of its buckets. E[R R^T] = 1 still; two ids share all
    their signs with probability 1 / K, which adds 1 / K to the 1 / k of a variance.
    """
    hashed = Buckets.of(seed, key, buckets)
    rows = Projection.of(seed, key, "out").signs(hashed.place(ids), k, dtype)
    return rows.mul_(hashed.signs(ids, dtype).unsqueeze(1))


def project_vocabulary(
    x: Tensor,  # (T, V), or the ids from first_id on
    k: int,
    *,
    seed: int,
    key: str,
    buckets: int,
    first_id: int = 0,
) -> Tensor:  # (T, k) float32 | float64
    """x times the rows of `vocabulary_signs`."""
    dtype = wide_dtype(x)
    out = x.new_zeros(x.shape[0], k, dtype=dtype)
    step = max(SIGNS_AT_ONCE // k, 1)
    for i in range(0, x.shape[1], step):
        columns = x[:, i : i + step].to(dtype)
        ids = torch.arange(i, i + columns.shape[1], device=x.device) + first_id
        out.addmm_(columns, vocabulary_signs(ids, k, dtype, seed=seed, key=key, buckets=buckets))
    return out


@lru_cache(maxsize=8)
def sign_table(
    buckets: Buckets, vocab: int, dtype: torch.dtype, device: torch.device
) -> Tensor:  # (V,)
    """Signs of a vocabulary, the same for every batch of a run."""
    return buckets.signs(torch.arange(vocab, device=device), torch.float32).to(dtype)


class CountSketch:
    """Sums over the tiles: the sketch of F (K, R), and sum F^2 (R,), relative to the maximum."""

    def __init__(self, buckets: Buckets, vocab: int, rows: int, like: Tensor) -> None:
        self.buckets = buckets
        self.signs = sign_table(buckets, vocab, like.dtype, like.device).unsqueeze(1)
        self.sums = like.new_zeros(buckets.count, rows)
        self.squares = SquareSums(rows, like)

    def add_tile(self, exps: Tensor, shrink: Tensor | None, tiles: Tiles, i: int) -> None:
        """exps (C, R) relative to the running maximum; shrink as from `RowSums`."""
        self.squares.add_tile(exps, shrink, tiles, i)
        if shrink is not None:
            self.sums.mul_(shrink)
        count = self.buckets.count
        low, high = tiles.bounds[i]
        first = low
        while first < high:
            # Up to where the block of ids ends, or the buckets do.
            block = first // count
            start = (first + self.buckets.rotation(block)) % count
            last = min(high, (block + 1) * count, first + count - start)
            self.sums[start : start + last - first].addcmul_(
                exps[first - low : last - low], self.signs[first:last]
            )
            first = last


class SquareSums:
    """sum F^2 (R,) over the entries that are not the target, relative to the maximum."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.sums = like.new_zeros(SQUARES, rows)

    def add_tile(self, exps: Tensor, shrink: Tensor | None, tiles: Tiles, i: int) -> None:
        """As `CountSketch.add_tile`."""
        if shrink is not None:
            self.sums.mul_(shrink).mul_(shrink)
        for first in range(0, exps.shape[0], SQUARES):
            some = exps[first : first + SQUARES]
            self.sums[: some.shape[0]].addcmul_(some, some)

    def total(self) -> Tensor:
        return self.sums.sum(0)
