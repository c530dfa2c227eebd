"""Random projections by signs that a seed, a key and a row number determine, on any device.

    R[i, a] = +-1 / sqrt(k),    E[R R^T] = 1

A sign is a bit of a hash of (key, row, column // 32): no generator state, so that a tile, a shard
of a weight, another rank and another device find the same matrix without having it. Shapes: N rows
of the projection (features of a layer), k columns, T rows of data.

The hash: with f the finaliser of MurmurHash3 (32 bits, a bijection) and the key's halves K0, K1,

    word(i, w) = f(f(i + K0) xor f(w + K1)),    sign(i, a) = bit a % 32 of word(i, a // 32)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _launch
from ._launch import surroundings
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

    def signs(self, rows: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, k) of +-1 for the row numbers `rows` (N,) int64, 0 .. 2^32 - 1, on their device."""
        hashed = self.words(rows, -(-k // 32))
        # Back to 32 bits: int32 arithmetic is twice as fast, and only single bits are read.
        hashed = torch.where(hashed > 0x7FFFFFFF, hashed - (1 << 32), hashed).to(torch.int32)
        shift = torch.arange(32, device=rows.device, dtype=torch.int32)
        bits = (hashed.unsqueeze(2) >> shift) & 1
        return bits.flatten(1)[:, :k].to(dtype).mul_(2.0).sub_(1.0)


@kept_tables
def sign_rows(
    projection: Projection, count: int, k: int, dtype: torch.dtype, device: torch.device
) -> Tensor:  # (N, k)
    """Signs of the first rows, where every batch asks for the same."""
    return projection.signs(torch.arange(count, device=device), k, dtype)


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
