"""What pair parts are computed by: the fused operations of a GPU, or dense blocks on a CPU.

Both give the same numbers but for rounding. On a CPU signs of projections are made once and kept,
and sketches of float32 are C's business (input_layers.py). Shapes: T tokens, P pairs, G layer
groups, d inputs, p outputs, D features, k sketch size.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from fastpref_kernels import _native, linear_norms
from fastpref_kernels._launch import resolve_backend, surroundings
from fastpref_kernels.column_sums import column_sums
from fastpref_kernels.count_sketch import vocabulary_signs
from fastpref_kernels.projection import Projection, native_signs, project
from fastpref_kernels.segment_products import segment_products, wide_dtype
from fastpref_kernels.spans import starts
from fastpref_kernels.token_blocks import TokenBlocks
from torch import Tensor

from fastpref.dynamics.places import Place

CHUNK = 1 << 20  # numbers of a norm's input that are multiplied at a time
HALF = (torch.bfloat16, torch.float16)
KEPT = 1 << 30  # bytes of signs that stay in memory

# What follows is by token, (T, ...), or, as most layers see it, in a row of tokens, (1, T, ...).
# The gradient of a linear layer's output (T, p), and the layer's weight.
LinearOutput = tuple[Tensor, Place]
# A bias or a norm's weight, and what `PairOps.sums` makes its gradient of.
VectorInput = tuple[Place, Tensor, Tensor | None, float, bool]


class Signs:
    """Signs of projections, +-1 as int8, made when first needed and kept, up to KEPT bytes."""

    def __init__(self, seed: int) -> None:
        self.seed, self.kept, self.bytes = seed, {}, 0  # type: ignore[var-annotated]
        # For C, None where it has none: by key, side, first row, rows, k.
        self.turned: dict[tuple[str, str, int, int, int], _native.Signs | None] = {}

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

    def for_c(self, key: str, side: str, first: int, rows: int, k: int) -> _native.Signs | None:
        """What `_native` wants of rows first .. first + N - 1; None where it cannot do it."""
        name = (key, side, first, rows, k)
        if name not in self.turned:
            projection = Projection.of(self.seed, key, side)
            self.turned[name] = native_signs(projection, first, rows, k)
        return self.turned[name]

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


class PairOps(ABC):
    """Sums over the tokens of every pair, ``counts`` of each; sketches come ``scale`` times."""

    def __init__(
        self, pair_of_token: Tensor, counts: list[int], signs: Signs, scale: float = 1.0
    ) -> None:
        self.pair, self.counts, self.signs, self.scale = pair_of_token, counts, signs, scale

    def for_c(self, norm_sq: Tensor, sketch: Tensor) -> _native.Sums | None:
        """What C adds to; None where it does not."""
        return None

    def add_linear(self, out: Tensor, x: Tensor, layers: Sequence[LinearOutput]) -> None:
        """out[group] (P, k, k) += sketches of gradients of linear layers of one input x (T, d)."""
        k = out.shape[-1]
        for own in of_one_projection(layers):
            place = own[0][1]
            outputs = functools.reduce(
                torch.Tensor.add_,
                [self.project(by_token(dy), p.key, "out", k, p.first_output) for dy, p in own],
            )
            inputs = self.project(by_token(x), place.key, "in", k)
            self.add_products(out[place.group], outputs, inputs)

    def add_vectors(self, norm_sq: Tensor, sketch: Tensor, given: Sequence[VectorInput]) -> None:
        """norm_sq[group] (P,), sketch[group] (P, k, k) += those of gradients that are vectors."""
        k = sketch.shape[-1]
        for place, dy, x, eps, centred in given:
            sums = self.sums(by_token(dy), None if x is None else by_token(x), eps, centred)
            norm_sq[place.group] += sums.square().sum(1)
            own = self.project(sums, place.key, "vector", k * k).mul_(self.scale / k)
            sketch[place.group] += own.unflatten(1, (k, k))

    @abstractmethod
    def add_products(self, out: Tensor, y: Tensor, x: Tensor) -> None:
        """out (P, k, k) += scale / k times sums of y_t x_t^T, y and x (T, k)."""

    @abstractmethod
    def project(self, x: Tensor, key: str, side: str, k: int, first: int = 0) -> Tensor:
        """(T, k) x times the signs of a projection."""

    @abstractmethod
    def sums(
        self, dy: Tensor, x: Tensor | None = None, eps: float = 0.0, centred: bool = False
    ) -> Tensor:
        """(P, D) as `column_sums`."""

    @abstractmethod
    def norms(self, x: Tensor, dy: Sequence[Tensor]) -> Tensor:
        """(P,) as `linear_norms`."""


class FusedOps(PairOps):
    """Of fastpref_kernels' operations."""

    def add_products(self, out: Tensor, y: Tensor, x: Tensor) -> None:
        pairs = len(self.counts)
        backend = resolve_backend("auto", self.pair.device, wide_dtype(y, x), op="taps")
        found = segment_products(
            y, x, self.pair, pairs, counts=self.counts, backend=backend, name="taps"
        )
        out += found.mul_(self.scale / out.shape[-1])

    def project(self, x: Tensor, key: str, side: str, k: int, first: int = 0) -> Tensor:
        return project(x, Projection.of(self.signs.seed, key, side), k, first_row=first)

    def sums(
        self, dy: Tensor, x: Tensor | None = None, eps: float = 0.0, centred: bool = False
    ) -> Tensor:
        return column_sums(dy, self.pair, len(self.counts), x=x, eps=eps, centred=centred)

    def norms(self, x: Tensor, dy: Sequence[Tensor]) -> Tensor:
        return linear_norms(x, dy, self.pair, num_segments=len(self.counts), counts=self.counts)


class BlockOps(PairOps):
    """Of dense blocks, or passes of C where they are there: for a CPU."""

    @functools.cached_property
    def blocks(self) -> TokenBlocks:
        return TokenBlocks.make(self.counts, self.pair.device)

    @functools.cached_property
    def first(self) -> Tensor:
        """(P + 1,) the first token of every pair, and T."""
        return torch.tensor(starts(self.counts), device="cpu")

    def for_c(self, norm_sq: Tensor, sketch: Tensor) -> _native.Sums | None:
        if not _native.fits(sketch):
            return None
        return _native.Sums(norm_sq, sketch, self.first, self.scale)

    def add_products(self, out: Tensor, y: Tensor, x: Tensor) -> None:
        scale = self.scale / out.shape[-1]
        if all(map(_native.fits, (out, y, x))):
            _native.segment_products_(out, y, x, self.first, scale)
        else:
            out += self.blocks.products(y.unsqueeze(0), x.unsqueeze(0))[0].mul_(scale)

    def project(self, x: Tensor, key: str, side: str, k: int, first: int = 0) -> Tensor:
        x = _single(x)
        if x.stride(1) == 1 and _native.fits(x, contiguous=False):
            turned = self.signs.for_c(key, side, first, x.shape[1], k)
            if turned is not None:
                return _native.project(x, turned)
        with torch.no_grad(), surroundings(x.device):
            wide = wide_dtype(x)
            signs = self.signs.get(key, side, first, x.shape[1], k, x.device)
            return torch.mm(x.to(wide), signs.to(wide))

    def sums(
        self, dy: Tensor, x: Tensor | None = None, eps: float = 0.0, centred: bool = False
    ) -> Tensor:
        if _native.fits(dy) and (x is None or _native.fits(x)):
            return _native.segment_sums(dy, x, self.first, eps, centred)
        dtype = wide_dtype(dy) if x is None else wide_dtype(dy, x)
        out = dy.new_zeros(len(self.counts), dy.shape[-1], dtype=dtype)
        step = max(CHUNK // max(dy[:1].numel(), 1), 1)
        for i in range(0, len(dy), step):
            rows = dy[i : i + step].to(dtype)
            if x is not None:
                rows = _times_normalised(rows, x[i : i + step].to(dtype), eps, centred)
            if rows.dim() == 3:
                rows = rows.sum(1)
            out.index_add_(0, self.pair[i : i + step], rows)
        return out

    def norms(self, x: Tensor, dy: Sequence[Tensor]) -> Tensor:
        return self.blocks.norms(x, dy)


def of_one_projection(
    layers: Sequence[LinearOutput],
) -> Iterator[Sequence[LinearOutput]]:
    """Layers of one input by the key of their projections, which come one behind the other."""
    start = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i][1].key != layers[start][1].key:
            yield layers[start:i]
            start = i


def by_token(x: Tensor) -> Tensor:
    """(T, ...) of that or (1, T, D)."""
    return x.squeeze(0) if x.dim() == 3 else x


def _single(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype in HALF else x


def _times_normalised(dy: Tensor, x: Tensor, eps: float, centred: bool) -> Tensor:
    """dy times x over its root mean square, or its deviation over the standard deviation."""
    if centred:
        x = x - x.mean(-1, keepdim=True)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return (dy * x).mul_(square.div_(x.shape[-1]).add_(eps).rsqrt_())
