"""Random projections by signs that a seed, a key and a row number determine, on any device.

    R[i, a] = +-1 / sqrt(k),    E[R R^T] = 1

A sign needs no generator state, so that a tile, a shard of a weight, another rank and another
device find the same matrix without having it. With K columns, k rounded up to a power of two, and H
the Walsh-Hadamard matrix of K, H[b, a] = (-1)^(ones in b & a),

    sign(i, a) = s_i H[b_i, a],    b_i = (i xor turn(i // K)) mod K

s_i and turn are hashes: a CountSketch of K buckets, a block of K rows one in each, turned by H. Two
rows of different blocks share a bucket, and then all their signs up to s, with probability 1 / K;
else H makes their signs orthogonal, over k = K columns. So inner products have the variance that
independent signs give them, each pair of rows all or nothing; single columns look like independent
signs; and a CPU adds to K buckets instead of multiplying by k signs (`_native.project`). Shapes: N
rows of the projection (features of a layer), k columns, T rows of data.

The hash: with f the finaliser of MurmurHash3 (32 bits, a bijection) and the key's halves K0, K1,

    word(i, w) = f(f(i + K0) xor f(w + K1)),    s_i: bit 0 of word(i, 0),    turn(j) = word(j, 1)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _launch, _native
from ._launch import surroundings
from ._native import buckets_of
from .segment_products import wide_dtype
from .spans import kept_tables

MASK = 0xFFFFFFFF
SIGNS_AT_ONCE = 1 << 20  # entries of R that stand in memory at a time


@torch.compiler.assume_constant_result
def _halves(seed: int, key: str, side: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}\0{key}\0{side}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@dataclass(frozen=True)
class Projection:
    """Signs of one side of one weight; raw, without the factor 1 / sqrt(k)."""

    low: int  # K0
    high: int  # K1

    @staticmethod
    def of(seed: int, key: str, side: str) -> Projection:
        """The projection of the `side` ("in", "out", "vector") of the weight that `key` names.

        Equal keys share it: give an embedding and the head that is tied to it one key.
        """
        return Projection(*_halves(seed, key, side))

    def words(self, rows: Tensor, count: int) -> Tensor:
        """(N, count) int64 of hashes, 0 .. 2^32 - 1, for the row numbers `rows` (N,) int64."""
        stirred = _stir((rows + self.low) & MASK).unsqueeze(1)
        of_word = _stir((torch.arange(count, device=rows.device) + self.high) & MASK)
        return _stir(stirred ^ of_word)

    def row_signs(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,) of +-1: s_i of the row numbers `rows` (N,) int64, 0 .. 2^32 - 1, on their device."""
        return (self.words(rows, 1).squeeze(1) & 1).to(dtype).mul_(2.0).sub_(1.0)

    def turns(self, blocks: Tensor, size: int) -> Tensor:
        """(N,) int64: turn mod `size`, a power of two, of the block numbers (N,) int64."""
        return self.words(blocks, 2)[:, 1] & (size - 1)

    def buckets(self, rows: Tensor, k: int) -> Tensor:
        """(N,) int64: b_i of the row numbers `rows` (N,), with k columns."""
        size = buckets_of(k)
        return (rows ^ self.turns(rows // size, size)) & (size - 1)

    def signs(self, rows: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, k) of +-1 for the row numbers `rows` (N,) int64, 0 .. 2^32 - 1, on their device."""
        size = buckets_of(k)
        ones = self.buckets(rows, k).unsqueeze(1) & torch.arange(k, device=rows.device)
        for shift in (16, 8, 4, 2, 1):
            if size > 1 << shift:
                ones = ones ^ (ones >> shift)
        turned = (ones & 1).to(dtype).mul_(-2.0).add_(1.0)
        return turned.mul_(self.row_signs(rows, dtype).unsqueeze(1))


@kept_tables
def sign_rows(
    projection: Projection, count: int, k: int, dtype: torch.dtype, device: torch.device
) -> Tensor:  # (N, k)
    """Signs of the first rows, where every batch asks for the same."""
    return projection.signs(torch.arange(count, device=device), k, dtype)


def native_signs(projection: Projection, first: int, count: int, k: int) -> _native.Signs | None:
    """What `_native` wants of the signs of rows first .. first + count - 1; None where it cannot do
    it."""
    if not _native.projects(k) or first % buckets_of(k):
        return None
    return _signs_for_c(projection, first, count, k)


@kept_tables
def _signs_for_c(projection: Projection, first: int, count: int, k: int) -> _native.Signs:
    size = buckets_of(k)
    blocks = torch.arange(first // size, -(-(first + count) // size), device="cpu")
    rows = torch.arange(first, first + count, device="cpu")
    turns = projection.turns(blocks, size).to(torch.int32)
    return _native.Signs(projection.row_signs(rows, torch.float32), turns, size, k)


def project(
    x: Tensor,  # (T, N)
    projection: Projection,
    k: int,
    *,
    first_row: int = 0,
    backend: str = "auto",
    name: str = "project",
) -> Tensor:  # (T, k) float32 | float64
    """x times the signs of rows first_row .. first_row + N - 1, accumulated in float32 (64)."""
    chosen = _launch.resolve_backend(backend, x.device, wide_dtype(x), op=name)
    key = [projection.low, projection.high, first_row]
    return _project_op(x.detach(), key, k, chosen)


def torch_project(x: Tensor, projection: Projection, k: int, first_row: int) -> Tensor:
    """In plain torch."""
    return times_signs(x, k, first_row, lambda rows, dtype: projection.signs(rows, k, dtype))


def times_signs(
    x: Tensor,  # (T, N), columns first, first + 1, ...
    k: int,
    first: int,
    signs: Callable[[Tensor, torch.dtype], Tensor],  # ids (n,), dtype -> (n, k)
) -> Tensor:  # (T, k) float32 | float64
    """x times the signs of its columns' ids, made for some of them at a time."""
    dtype = wide_dtype(x)
    out = x.new_zeros(x.shape[0], k, dtype=dtype)
    step = max(SIGNS_AT_ONCE // k, 1)
    for i in range(0, x.shape[1], step):
        columns = x[:, i : i + step].to(dtype)
        ids = torch.arange(i, i + columns.shape[1], device=x.device) + first
        out.addmm_(columns, signs(ids, dtype))
    return out


def _stir(h: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on int64 tensors that hold 32-bit numbers."""
    h = h ^ (h >> 16)
    h = _times(h, 0x85EBCA6B)
    h = h ^ (h >> 13)
    h = _times(h, 0xC2B2AE35)
    return h ^ (h >> 16)


def _times(h: Tensor, factor: int) -> Tensor:
    """h * factor mod 2^32. The product may pass 2^63; int64 wraps, and the low bits are right."""
    return (h * factor) & MASK


@torch.library.custom_op(
    "fastpref::project",
    mutates_args=(),
    schema="(Tensor x, int[] key, SymInt k, str backend) -> Tensor",
)
def _project_op(x: Tensor, key: list[int], k: int, backend: str) -> Tensor:
    low, high, first_row = key
    with surroundings(x.device):
        if backend == "triton":
            from .triton_sketch import triton_project

            return triton_project(x, Projection(low, high), k, first_row)
        return torch_project(x, Projection(low, high), k, first_row)


@_project_op.register_fake
def _project_fake(x: Tensor, key: list[int], k: int, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], k, dtype=wide_dtype(x))
