"""What pair parts are computed by: the fused operations of a GPU, or C and dense blocks on a CPU.

Both give the same numbers but for rounding. On a CPU a step of a small model is a few hundred calls
long, so the parts of its pairs must not take many calls either: signs of projections are made once
and kept, and sums over a pair's tokens are one call of C, or of dense blocks. Shapes: T tokens, P
pairs, k sketch size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from fastpref_kernels import _native, linear_norms
from fastpref_kernels._launch import resolve_backend, surroundings
from fastpref_kernels.column_sums import column_sums
from fastpref_kernels.count_sketch import vocabulary_signs
from fastpref_kernels.projection import Projection, buckets_of, project
from fastpref_kernels.segment import add_rows_
from fastpref_kernels.segment_products import segment_products, wide_dtype
from fastpref_kernels.spans import starts
from fastpref_kernels.token_blocks import TokenBlocks
from torch import Tensor

from fastpref.transfer import numbers

CHUNK = 1 << 20  # numbers of a norm's input that are multiplied at a time
HALF = (torch.bfloat16, torch.float16)
KEPT = 1 << 30  # bytes of signs that stay in memory


class Signs:
    """Signs of projections, +-1 as int8, made when first needed and kept, up to KEPT bytes."""

    def __init__(self, seed: int) -> None:
        self.seed, self.kept, self.bytes = seed, {}, 0  # type: ignore[var-annotated]
        # By key, side, first row, rows, k.
        self.turned: dict[tuple[str, str, int, int, int], _native.Signs] = {}

    def get(
        self, key: str, side: str, first: int, rows: int, k: int, device: torch.device
    ) -> Tensor:
        """(N, k) of rows first .. first + N - 1."""
        name = (key, side, first, rows, k)
        found = self.kept.get(name)
        if found is None:
            ids = torch.arange(first, first + rows, device=device)
            found = Projection.of(self.seed, key, side).signs(ids, k, torch.float32)
            self._keep(name, found.to(torch.int8))
        return found

    def make_turned(
        self, key: str, side: str, first: int, rows: int, k: int
    ) -> _native.Signs | None:
        """What `_native.project` wants of rows first .. first + N - 1, kept in `turned`; None where
        it cannot do it."""
        size = buckets_of(k)
        if not _native.projects(k) or first % size:
            return None
        projection = Projection.of(self.seed, key, side)
        blocks = torch.arange(first // size, -(-(first + rows) // size), device="cpu")
        ids = torch.arange(first, first + rows, device="cpu")
        signs = projection.row_signs(ids, torch.float32)
        found = _native.Signs(signs, projection.turns(blocks, size).to(torch.int32), size, k)
        self.turned[key, side, first, rows, k] = found
        return found

    def of_vocabulary(
        self, ids: Tensor, key: str, vocab: int, k: int, buckets: int | None
    ) -> Tensor:
        """(N, k) of the outputs ``ids`` of an embedding or a head."""
        name = (key, "vocabulary", vocab, k, buckets)
        found = self.kept.get(name)
        if found is None:
            every = torch.arange(vocab, device=ids.device)
            found = self._vocabulary(every, key, k, buckets).to(torch.int8)
            if not self._keep(name, found):
                return self._vocabulary(ids, key, k, buckets)
        return found.index_select(0, ids)

    def _vocabulary(self, ids: Tensor, key: str, k: int, buckets: int | None) -> Tensor:
        if buckets is None:
            return Projection.of(self.seed, key, "out").signs(ids, k, torch.float32)
        return vocabulary_signs(ids, k, torch.float32, seed=self.seed, key=key, buckets=buckets)

    def _keep(self, name: tuple[object, ...], signs: Tensor) -> bool:
        if self.bytes + signs.numel() > KEPT:
            return False
        self.kept[name] = signs
        self.bytes += signs.numel()
        return True


class PairOps(Protocol):
    """Sums over the tokens of every pair."""

    def project(
        self, x: Tensor, key: str, side: str, k: int, first: int = 0, before: Tensor | None = None
    ) -> Tensor:
        """(T, k) x times the signs of a projection; added to ``before``, in place, where given."""

    def vocabulary(self, ids: Tensor, key: str, vocab: int, k: int, buckets: int | None) -> Tensor:
        """(T, k) signs of the rows of an embedding."""

    def add_products(
        self, out: Tensor, groups: Sequence[int], y: Sequence[Tensor], x: Sequence[Tensor]
    ) -> None:
        """out[groups[e]] (P, k, k) += sums of y_t x_t^T / k, for E narrow matrices y, x (T, k)."""

    def sums(
        self, dy: Tensor, x: Tensor | None = None, eps: float | None = 0.0, centred: bool = False
    ) -> Tensor:
        """(P, D) as `column_sums`; with eps None of dy times x as it is."""

    def norms(self, x: Tensor, dy: Sequence[Tensor]) -> Tensor:
        """(P,) as `linear_norms`."""


class FusedOps:
    """Of fastpref_kernels' operations."""

    def __init__(self, pair_of_token: Tensor, counts: list[int], signs: Signs) -> None:
        self.pair, self.counts, self.signs = pair_of_token, counts, signs

    def project(
        self, x: Tensor, key: str, side: str, k: int, first: int = 0, before: Tensor | None = None
    ) -> Tensor:
        found = project(x, Projection.of(self.signs.seed, key, side), k, first_row=first)
        return found if before is None else before.add_(found)

    def vocabulary(self, ids: Tensor, key: str, vocab: int, k: int, buckets: int | None) -> Tensor:
        return self.signs.of_vocabulary(ids, key, vocab, k, buckets)

    def add_products(
        self, out: Tensor, groups: Sequence[int], y: Sequence[Tensor], x: Sequence[Tensor]
    ) -> None:
        pairs = len(self.counts)
        backend = resolve_backend("auto", self.pair.device, wide_dtype(*y, *x), op="taps")
        known: dict[str, Any] = {"counts": self.counts, "backend": backend, "name": "taps"}
        found = [
            segment_products(a, b, self.pair, pairs, **known) for a, b in zip(y, x, strict=True)
        ]
        add_sketches(out, groups, torch.stack(found))

    def sums(
        self, dy: Tensor, x: Tensor | None = None, eps: float | None = 0.0, centred: bool = False
    ) -> Tensor:
        if eps is None:
            dy, x, eps = dy if x is None else dy * x, None, 0.0
        return column_sums(dy, self.pair, len(self.counts), x=x, eps=eps, centred=centred)

    def norms(self, x: Tensor, dy: Sequence[Tensor]) -> Tensor:
        return linear_norms(x, dy, self.pair, num_segments=len(self.counts), counts=self.counts)


class BlockOps:
    """In C where it is there, else of dense blocks: for a CPU."""

    def __init__(self, pair_of_token: Tensor, counts: list[int], signs: Signs) -> None:
        self.pair, self.counts, self.signs = pair_of_token, counts, signs

    @functools.cached_property
    def blocks(self) -> TokenBlocks:
        return TokenBlocks.make(self.counts, self.pair.device)

    @functools.cached_property
    def first(self) -> Tensor:
        """(P + 1,) the first token of every pair, and T."""
        return torch.tensor(starts(self.counts), device="cpu")

    def project(
        self, x: Tensor, key: str, side: str, k: int, first: int = 0, before: Tensor | None = None
    ) -> Tensor:
        if x.dtype in HALF:
            x = x.to(torch.float32)
        # One lookup is what a projection costs beside the call of C.
        signs = self.signs.turned.get((key, side, first, x.shape[1], k))
        if type(x) is not Tensor or x.dtype is not torch.float32 or x.stride(1) != 1:
            signs = None
        elif signs is None:
            signs = self.signs.make_turned(key, side, first, x.shape[1], k)
        if signs is not None and (before is None or before.dtype is torch.float32):
            return _native.project(x, signs, before)
        with torch.no_grad(), surroundings(x.device):
            wide = wide_dtype(x) if before is None else before.dtype
            own = self.signs.get(key, side, first, x.shape[1], k, x.device).to(wide)
            rows = x.to(wide)
            return torch.mm(rows, own) if before is None else before.addmm_(rows, own)

    def vocabulary(self, ids: Tensor, key: str, vocab: int, k: int, buckets: int | None) -> Tensor:
        return self.signs.of_vocabulary(ids, key, vocab, k, buckets)

    def add_products(
        self, out: Tensor, groups: Sequence[int], y: Sequence[Tensor], x: Sequence[Tensor]
    ) -> None:
        if all(map(_native.fits, (out, *y, *x))):
            _native.segment_products_(out, groups, y, x, self.first, 1.0 / out.shape[-1])
        else:
            found = self.blocks.products(torch.stack(list(y)), torch.stack(list(x)))
            add_sketches(out, groups, found)

    def sums(
        self, dy: Tensor, x: Tensor | None = None, eps: float | None = 0.0, centred: bool = False
    ) -> Tensor:
        if _native.fits(dy) and (x is None or _native.fits(x)):
            return _native.segment_sums(dy, x, self.first, eps, centred)
        dtype = wide_dtype(dy) if x is None else wide_dtype(dy, x)
        out = dy.new_zeros(len(self.counts), dy.shape[-1], dtype=dtype)
        step = max(CHUNK // max(dy[:1].numel(), 1), 1)
        for i in range(0, len(dy), step):
            rows = dy[i : i + step].to(dtype)
            if x is not None:
                own = x[i : i + step].to(dtype)
                rows = rows * own if eps is None else _times_normalised(rows, own, eps, centred)
            if rows.dim() == 3:
                rows = rows.sum(1)
            out.index_add_(0, self.pair[i : i + step], rows)
        return out

    def norms(self, x: Tensor, dy: Sequence[Tensor]) -> Tensor:
        return self.blocks.norms(x, dy)


def add_sketches(out: Tensor, groups: Sequence[int], sketches: Tensor) -> None:
    """out[groups[e]] (P, k, k) += sketches (E, P, k, k) / k."""
    own = sketches.flatten(1).to(out.dtype) / out.shape[-1]
    add_rows_(out.flatten(1), numbers(groups, out.device), own)


def _times_normalised(dy: Tensor, x: Tensor, eps: float, centred: bool) -> Tensor:
    """dy times x over its root mean square, or its deviation over the standard deviation."""
    if centred:
        x = x - x.mean(-1, keepdim=True)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return (dy * x).mul_(square.div_(x.shape[-1]).add_(eps).rsqrt_())
