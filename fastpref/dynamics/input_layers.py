"""The layers that are given one input, and what is summed of them when their gradients have come.

On a CPU that is met some thirty times in a step, between products that have emptied the caches, and
a line of Python is dear there (docs/lab-log.md). So what C is told of the layers is put down once
for all steps; a step fills in addresses. Shapes: T tokens, d inputs, p outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastpref_kernels import _native
from torch import Tensor

from fastpref.dynamics.pair_ops import Signs, VectorInput, by_token
from fastpref.dynamics.pair_parts import PairParts
from fastpref.dynamics.places import Place, VocabularyPlace
from fastpref.dynamics.tap_layers import Embedding, Norm

if TYPE_CHECKING:
    from fastpref.dynamics.taps import Tap


class InputLayers:
    """Linear layers of one input, q, k and v, or a norm: of those with trained weights."""

    def __init__(self, taps: Sequence[Tap], signs: Signs, k: int) -> None:
        self.taps, self.signs, self.k = list(taps), signs, k
        # Numbers of the layers whose weights are matrices, and what is a vector, a bias or a norm's
        # weight, with what `VectorInput` wants of it.
        self.weights: list[tuple[int, Place]] = []
        self.vectors: list[tuple[int, Place, Norm | None]] = []
        for i, tap in enumerate(taps):
            norm = tap.kind if isinstance(tap.kind, Norm) else None
            if tap.weight is not None and norm is None:
                self.weights.append((i, tap.weight))
            if tap.bias is not None:
                self.vectors.append((i, tap.bias, None))
            if tap.weight is not None and norm is not None:
                self.vectors.append((i, tap.weight, norm))

    @functools.cached_property
    def _linear(self) -> _native.LinearSketches | None:
        return _linear_sketches(self.weights, self.signs, self.k)

    @functools.cached_property
    def _others(self) -> _native.VectorSketches | None:
        return _vector_sketches(self.vectors, self.signs, self.k)

    def add(self, parts: PairParts, x: Tensor | None, gradients: list[Tensor]) -> None:
        """What comes of x, the input, None where no weight wants it, and of the gradient of every
        layer's output."""
        shape = gradients[0].shape
        if len(shape) != 3 or shape[1] != parts.tokens or shape[0] != 1:
            x = None if x is None else self.taps[0].tokens(x, parts)
            gradients = [
                tap.tokens(dy, parts) for tap, dy in zip(self.taps, gradients, strict=True)
            ]
            shape = gradients[0].shape
        row = len(shape) == 3 and shape[0] == 1
        rows = shape[1] if row else shape[0]
        c = parts.for_c(rows)
        given = (x, *gradients)
        if self.weights:
            done = False
            if c is not None and self._linear is not None and (row or len(shape) == 2):
                done = self._linear.add_(c, given)
            if not done or parts.more:
                assert x is not None
                parts.linear(x, [(gradients[i], place) for i, place in self.weights], done)
                c = parts.for_c(rows)  # none any more if the sums are float64 now
        if self.vectors:
            done = False
            if c is not None and self._others is not None:
                done = self._others.add_(c, given)
            if not done or parts.more:
                parts.vectors([self._vector(own, x, gradients) for own in self.vectors], done)

    @staticmethod
    def _vector(
        own: tuple[int, Place, Norm | None], x: Tensor | None, gradients: Sequence[Tensor]
    ) -> VectorInput:
        i, place, norm = own
        if norm is None:
            return place, gradients[i], None, 0.0, False
        return place, gradients[i], x, norm.eps, norm.centred


class EmbeddingLayer:
    """An embedding, in the place of `InputLayers`."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = taps

    def add(self, parts: PairParts, x: Tensor | None, gradients: list[Tensor]) -> None:
        """x: ids."""
        (tap,), (dy,) = self.taps, gradients
        assert x is not None and isinstance(tap.kind, Embedding)
        ids, dy = x.reshape(-1), by_token(tap.tokens(dy, parts))
        if isinstance(tap.weight, VocabularyPlace):
            parts.embedding(ids, dy, tap.kind.scale, tap.kind.padding_idx, tap.weight)
            if tap is tap.taps.tied:
                parts.tied = (ids, dy, parts.scale)


def _linear_sketches(
    weights: Sequence[tuple[int, Place]], signs: Signs, k: int
) -> _native.LinearSketches | None:
    """Of an input and gradients of outputs behind it. None where there is nothing, or C cannot do
    it."""
    sides: list[_native.Side] = []
    key = None
    for i, place in weights:
        cols, outputs = place.parameter.shape[:: 1 if place.transposed else -1]
        left = signs.for_c(place.key, "in", 0, cols, k)
        right = signs.for_c(place.key, "out", place.first_output, outputs, k)
        if left is None or right is None or k > _native.NARROW:
            return None
        sides += [] if place.key == key else [(0, cols, left, place.group)]
        sides.append((i + 1, outputs, right, -1))
        key = place.key
    return _native.LinearSketches(sides) if sides else None


def _vector_sketches(
    vectors: Sequence[tuple[int, Place, Norm | None]], signs: Signs, k: int
) -> _native.VectorSketches | None:
    """As `_linear_sketches`."""
    found: list[_native.Vector] = []
    for i, place, norm in vectors:
        cols = len(place.parameter)
        own = signs.for_c(place.key, "vector", 0, cols, k * k)
        if own is None or cols > _native.MOST_FEATURES:
            return None
        kind, eps = _native.ALONE, 0.0
        if norm is not None:
            kind, eps = _native.CENTRED if norm.centred else _native.RMS, norm.eps
        found.append((i + 1, 0, cols, kind, eps, own, place.group))
    return _native.VectorSketches(found) if found else None
