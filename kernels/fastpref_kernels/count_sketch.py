"""CountSketch of head gradients along the vocabulary, inside the forward's loop over tiles.

    sketch[j] = sum over v in bucket j of sign(v) x[v],    E[sketch . sketch'] = x . x'

K buckets. A block of K ids meets every bucket once, so that a GPU adds a row's tile as a few ranges
with a sign per id, and a CPU as a sparse product: one multiply-add a logit, no scatter. Id v of
block b = v // K goes to bucket

    ((v xor turn(b) mod 8) + (turn(b) rounded down to a multiple of 8)) mod K

where turn(b), 0 .. K - 1, and the signs are hashes of seed and key (`projection`): two ids of
different blocks share a bucket with probability 1 / K.
Shapes: R rows, V vocab, K buckets, C tile width.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _native
from .projection import Projection, buckets_of, times_signs
from .row_sums import Tiles
from .segment import add_rows_
from .spans import kept_tables

BUCKETS = 1024
EIGHT = 8  # ids whose places differ in the last three bits
MOST_IN_C = 1 << 14  # sums, k for every row, of which C keeps several sets
SQUARES = 256  # rows that sums of squares are first taken to: one vector addition a tile's row


@dataclass(frozen=True)
class Buckets:
    """Where the CountSketch of a vocabulary puts every id, and its sign."""

    count: int  # K, a power of two, at least EIGHT
    sign: Projection
    turn: Projection

    @staticmethod
    def of(seed: int, key: str, count: int) -> Buckets:
        """That of the vocabulary side of the weight that `key` names."""
        sides = (Projection.of(seed, key, side) for side in ("bucket sign", "bucket turn"))
        return Buckets(count, *sides)

    def turns(self, blocks: Tensor) -> Tensor:
        """turn(b), int64, for block numbers of any shape."""
        return self.turn.words(blocks.flatten(), 1).view(blocks.shape) % self.count

    def place(self, ids: Tensor) -> Tensor:
        """Bucket of vocabulary ids, int64."""
        turns = self.turns(ids // self.count)
        return ((ids ^ (turns % EIGHT)) + turns // EIGHT * EIGHT) % self.count

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
    same: dict[str, Any] = {"seed": seed, "key": key, "buckets": buckets}
    return times_signs(x, k, first_id, lambda ids, kind: vocabulary_signs(ids, k, kind, **same))


@lru_cache(maxsize=8)
def sign_table(
    buckets: Buckets, vocab: int, dtype: torch.dtype, device: torch.device
) -> Tensor:  # (V,)
    """Signs of a vocabulary, the same for every batch of a run."""
    return buckets.signs(torch.arange(vocab, device=device), torch.float32).to(dtype)


@lru_cache(maxsize=8)
def turn_table(buckets: Buckets, vocab: int, device: torch.device) -> Tensor:
    """turn(b) of a vocabulary's blocks, int32."""
    blocks = torch.arange(-(-vocab // buckets.count), device=device)
    return buckets.turns(blocks).to(torch.int32)


@kept_tables
def vocabulary_table(
    vocab: int, k: int, dtype: torch.dtype, device: torch.device, seed: int, key: str, buckets: int
) -> Tensor:  # (V, k)
    """`vocabulary_signs` of a whole vocabulary."""
    ids = torch.arange(vocab, device=device)
    return vocabulary_signs(ids, k, dtype, seed=seed, key=key, buckets=buckets)


@kept_tables
def vocabulary_buckets(
    vocab: int, k: int, seed: int, key: str, buckets: int
) -> tuple[Tensor, Tensor]:
    """b_i (V,) int32 and s_i (V,) float32 of `vocabulary_signs`, on the CPU."""
    hashed, side = Buckets.of(seed, key, buckets), Projection.of(seed, key, "out")
    ids = torch.arange(vocab, device="cpu")
    place = hashed.place(ids)
    sign = hashed.signs(ids, torch.float32) * side.row_signs(place, torch.float32)
    return side.buckets(place, k).to(torch.int32), sign


@lru_cache(maxsize=8)
def tile_matrices(buckets: Buckets, vocab: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """For every tile of a vocabulary the (K, C) matrix with sign(v) at the bucket of v, sparse, on
    the CPU."""
    found = []
    for low in range(0, vocab, width):
        ids = torch.arange(low, min(low + width, vocab))
        place, order = buckets.place(ids).sort(stable=True)
        starts = torch.searchsorted(place, torch.arange(buckets.count + 1))
        # int32: what MKL takes as it is.
        parts = (starts.int(), order.int(), buckets.signs(ids, torch.float32)[order].to(dtype))
        with warnings.catch_warnings():  # said once by torch: that such tensors are new
            warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
            matrix = torch.sparse_csr_tensor(
                *parts, (buckets.count, len(ids)), check_invariants=True
            )
        found.append(matrix)
    return found


class CountSketch:
    """Sums over the tiles: the sketch of F (K, R), and sum F^2 (R,), relative to the maximum."""

    def __init__(self, buckets: Buckets, vocab: int, rows: int, like: Tensor) -> None:
        self.buckets = buckets
        self.vocab = vocab
        self.sums = like.new_zeros(buckets.count, rows)
        self.squares = SquareSums(rows, like)

    def add_tile(self, exps: Tensor, shrink: Tensor | None, tiles: Tiles, i: int) -> None:
        """exps (C, R) relative to the running maximum; shrink as from `RowSums`."""
        self.squares.add_tile(exps, shrink, tiles, i)
        if shrink is not None:
            self.sums.mul_(shrink)
        low, high = tiles.bounds[i]
        if exps.device.type != "cpu":  # CUDA's sparse products promise no order of their sums
            signs = sign_table(self.buckets, self.vocab, exps.dtype, exps.device)[low:high]
            ids = torch.arange(low, high, device=exps.device)
            add_rows_(self.sums, self.buckets.place(ids), exps * signs.unsqueeze(1))
        elif exps.shape[1]:
            key = (self.buckets, self.vocab, tiles.bounds[0][1], exps.dtype)
            # A row of the product is summed up before it is written: the buckets pass once a tile.
            torch.addmm(self.sums, tile_matrices(*key)[i], exps, out=self.sums)

    def rows(self, total: Tensor) -> Tensor:  # (R, K)
        """Of q = F / S', with total (R,) S' relative to the same maximum; row by row in memory, as
        everything that follows reads it."""
        return (self.sums / total).t().contiguous()


class ProjectedTiles:
    """Sums over the tiles: R_out^T F (k, R), without the buckets between, for a CPU where nothing
    is estimated from them: a product, or a pass in C, takes less time than those over K buckets a
    row."""

    def __init__(
        self, vocab: int, k: int, rows: int, like: Tensor, seed: int, key: str, buckets: int
    ) -> None:
        self.asked = (seed, key, buckets)
        self.table = vocabulary_table(vocab, k, like.dtype, like.device, *self.asked)  # (V, k)
        self.sums = like.new_zeros(k, rows)

    def add_tile(self, exps: Tensor, shrink: Tensor | None, tiles: Tiles, i: int) -> None:
        """As `CountSketch.add_tile`."""
        if shrink is not None:
            self.sums.mul_(shrink)
        low, high = tiles.bounds[i]
        vocab, k = self.table.shape
        if self.sums.numel() <= MOST_IN_C and _native.fits(exps):
            bucket, sign = vocabulary_buckets(vocab, k, *self.asked)
            cut = (bucket[low:high], sign[low:high])
            _native.project_columns_(self.sums, exps, *cut, buckets_of(k))
        else:
            self.sums.addmm_(self.table[low:high].t(), exps)

    def rows(self, total: Tensor) -> Tensor:  # (R, k)
        """Of q, as `CountSketch.rows`."""
        return (self.sums / total).t().contiguous()


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
