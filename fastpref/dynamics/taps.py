"""Taps: norms and sketches of every pair's gradient, out of one backward of a packed batch.

    taps = attach(module, "sketch")            # a causal LM of transformers, as PairModel holds it
    with taps.watching(batch):
        logp = ...                             # forward
        logp.backward(slopes)                  # backward of a sum over pairs
    values = taps.collect()                    # of each pair's part of what was differentiated

A *tap* stands behind a layer: it keeps the layer's input as autograd does, and sees the gradient of
its output come back. Both together are the layer's gradient, pair by pair, without forming it
(fastpref_kernels, *Norms of any layer*). The layer itself computes as without a tap, the same calls
on the same numbers, so the weights' gradients are the same bits. Taps work through non-reentrant
activation checkpointing; no module hook is used.

A *layer group* is `embedding`, `block.<i>.attention`, `block.<i>.mlp`, `other` (linear layers
outside of blocks), `norms` (every norm's weight and bias) or `head`; only those with trained
weights are there. A head that is tied to the embedding belongs to `embedding`.

Memory    Of a tap: nothing beyond what autograd keeps for the layer's own gradient. Sketches: k^2
          numbers for every pair and group. Layers that share an input wait for each other: the
          gradients of their outputs live until the last of them has come.
Shapes    T tokens, P pairs, G groups, k sketch size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastpref_kernels import weight_sketch
from torch import Tensor, nn

from fastpref import last_block
from fastpref.batch import PairBatch
from fastpref.dynamics import tap_groups, tap_layers
from fastpref.dynamics.pair_ops import Signs
from fastpref.dynamics.pair_parts import PairParts, Place, VocabularyPlace
from fastpref.dynamics.tap_groups import Layer
from fastpref.dynamics.tap_layers import Embedding, Linear, Norm

MODES = ("sketch", "exact")


@dataclass(frozen=True)
class TapValues:
    """Of every pair's part of what was differentiated, without the head's weight."""

    norm_sq: dict[str, Tensor]  # layer group -> (P,); "sketch" mode: those that are exact there
    sketch: Tensor  # (G, P, k, k)
    change: Tensor | None  # (G, P) inner products with a change of the weights, where one is given


class Tap:
    """Stands behind a layer."""

    plain: Any = None  # the layer's own forward, while it is watched

    def __init__(self, layer: Layer, taps: Taps) -> None:
        self.name, self.module, self.kind = layer.name, layer.module, layer.kind
        self.group, self.weight, self.bias = layer.group, layer.weight, layer.bias
        self.taps = taps
        self.rows = tap_layers.TokenRows(f"{layer.name} ({type(layer.module).__name__})")

    # What follows is met once a layer and step, between products that have emptied the caches: a
    # line of Python is dear there (docs/lab-log.md), so frames and checks are few.

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        """In the place of the own one of a layer that is not linear."""
        if not torch.is_grad_enabled():
            return self.plain(x, *more, **named)
        y = self.plain(x, *more, **named)
        if self.taps.anchors is not None and isinstance(self.kind, Embedding):
            y = y.detach().requires_grad_()
            self.taps.anchors.append((self, x, y))
            return y
        if self.group < 0 or not y.requires_grad:
            return y
        kept = x if self.gain(y.dtype) is None else y
        return tap_layers.Kept.apply(y, kept.detach(), self, None)

    def gain(self, dtype: torch.dtype) -> Tensor | None:
        """`tap_layers.gains`, where the layer's output is what is kept of it, in the place of its
        input."""
        return self.taps.gains(dtype).get(self.name)

    def linear(self, x: Tensor, *more: Any, **named: Any) -> Any:
        """In the place of a linear layer's own."""
        if self.group < 0 or not torch.is_grad_enabled():
            return self.plain(x, *more, **named)
        x = tap_layers.as_autocast(x)
        shared = tap_layers.input_of(x)
        place = self.weight
        if place is not None and place.key not in shared.factors:
            # Before the layer, which then finds what was read of the input in the cache.
            parts = self.taps.parts
            assert parts is not None
            shared.factors[place.key] = parts.project_input(self.tokens(x, parts), place)
        y = self.plain(x, *more, **named)
        if self.taps.keeps_inputs:
            return tap_layers.Kept.apply(y, x.detach(), self, shared)
        # Nothing is kept of the input, so a hook on the output's gradient does, at a fraction of
        # the cost of a Function: the graph is a few hundred nodes long where models are small.
        y.register_hook(tap_layers.Seen(self, shared))
        return y

    def tokens(self, x: Tensor, parts: PairParts) -> Tensor:
        """Tokens first: the rows of x."""
        if x.dim() == 3 and x.shape[1] == parts.tokens and x.shape[0] == 1:
            return x.squeeze(0)
        read = [parts.read] if id(self.module) in self.taps.inside else []
        return self.rows(x, parts.tokens, *read)


class Taps:
    """What `attach` gives. One batch is watched at a time, and collected before the next."""

    def __init__(self, module: nn.Module, mode: str, sketch_dim: int, seed: int) -> None:
        self.module, self.mode = module, mode
        self.sketch_dim, self.seed = sketch_dim, seed
        self.signs = Signs(seed)
        self.anchors: list[tuple[Tap, Tensor, Tensor]] | None = None
        self.parts: PairParts | None = None
        self.keeps_inputs = self.exact  # of linear layers, for the backward
        self._watched = False
        self._gains: dict[torch.dtype, dict[str, Tensor | None]] = {}  # with the weights as watched
        # An input, and the layers that had it with the gradients of their outputs.
        self._waiting: tuple[tap_layers.Input, Tensor, list[tuple[Tap, Tensor]]] | None = None
        found = tap_groups.find(module)
        self.groups, self.head = found.groups, found.head
        self.layers = [Tap(layer, self) for layer in found.layers]
        # The embedding that has the head's weight.
        self.tied = next((tap for tap in self.layers if tap.name == found.tied), None)

    @property
    def exact(self) -> bool:
        """Whether squared norms are exact in every group."""
        return self.mode == "exact"

    @functools.cached_property
    def inside(self) -> set[int]:
        """Ids of the layers within those that compute what is read alone (fastpref.last_block),
        which take all tokens themselves."""
        parts = last_block.narrowed(self.module)
        return {id(m) for part in parts for m in part.modules() if m is not part}

    @functools.cached_property
    def late(self) -> set[str]:
        """Names of the norms of a narrowed block, and of those outside of blocks."""
        parts = {id(part) for part in last_block.narrowed(self.module)}
        names = [name for name, layer in self.module.named_modules() if id(layer) in parts]
        narrow = {tap_groups.block_of(name) for name in names} | {None}
        return {tap.name for tap in self.layers if tap_groups.block_of(tap.name) in narrow}

    def gains(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Of norms whose output layers behind them keep anyhow, not only some of its rows."""
        found = self._gains.get(dtype)
        if found is None:
            norms = [
                (tap.name, tap.kind, tap.weight.parameter)
                for tap in self.layers
                if isinstance(tap.kind, Norm) and tap.weight is not None
                if tap.name not in self.late
            ]
            of_each = tap_layers.gains([(kind, weight) for _, kind, weight in norms], dtype)
            found = dict(zip([name for name, *_ in norms], of_each, strict=True))
            self._gains[dtype] = found
        return found

    @contextmanager
    def watching(
        self,
        batch: PairBatch,
        *,
        change: Mapping[nn.Parameter, Tensor] | None = None,
        anchored: bool = False,
    ) -> Iterator[None]:
        """Around forward and backward of ``batch``; outside, the module is the plain one.

        ``change``: what the trained weights are compared with, see `TapValues.change`; weights that
        are not in it count as unchanged. ``anchored``: the outputs of embeddings are leaves, and
        stand in `anchors` (fastpref.gradients).
        """
        assert not self._watched, "a batch is watched already"
        parts = PairParts.of(batch, len(self.groups), self.exact, self.sketch_dim, self.signs)
        parts.changes = change
        if change is not None:
            parts.change = parts.norm_sq.new_zeros(parts.norm_sq.shape)
        self.parts, self._watched = parts, True
        self.keeps_inputs = self.exact or change is not None
        self.anchors, self._gains = [] if anchored else None, {}
        before = [tap.module.__dict__.get("forward") for tap in self.layers]
        try:
            for tap in self.layers:
                tap.plain = tap.module.forward
                linear = isinstance(tap.kind, Linear)
                tap.module.__dict__["forward"] = tap.linear if linear else tap.forward
            yield
            self._flush()
        finally:
            for tap, own in zip(self.layers, before, strict=True):
                if own is None:
                    del tap.module.__dict__["forward"]
                else:
                    tap.module.__dict__["forward"] = own
            self._watched, self._waiting, self.anchors = False, None, None

    def collect(self) -> TapValues:
        """What the taps saw since the last call: of the batch that was watched."""
        parts, self.parts = self.parts, None
        assert parts is not None, "nothing was watched since the last collect()"
        parts.finish()
        exact = {
            name: parts.norm_sq[i]
            for i, name in enumerate(self.groups)
            if name != "head" and (self.exact or name == "norms")
        }
        return TapValues(exact, parts.sketch, parts.change)

    def receive(
        self, tap: Tap, x: Tensor | None, dy: Tensor, shared: tap_layers.Input | None
    ) -> None:
        """A tap's layer has been passed by the backward."""
        parts = self.parts
        assert parts is not None and self._watched, "the backward ran outside of watching()"
        kind, dy = tap.kind, tap.tokens(dy, parts)
        if isinstance(kind, Linear):
            assert shared is not None
            if tap.weight is not None:
                parts.project_output(shared.factors[tap.weight.key], dy, tap.weight)
                if x is not None:
                    self._wait(tap, x, dy, shared)
            if tap.bias is not None:
                parts.bias(dy, tap.bias)
            return
        assert x is not None
        if isinstance(kind, Norm):
            rows, gain = tap.tokens(x, parts), tap.gain(dy.dtype)
            parts.norm(rows, dy, kind, tap.weight, tap.bias, gain)
        elif tap.weight is not None:
            assert isinstance(tap.weight, VocabularyPlace)
            ids = x.reshape(-1)
            parts.embedding(ids, dy, kind.scale, kind.padding_idx, tap.weight)
            if tap is self.tied:
                parts.tied = (ids, dy)

    def _wait(self, tap: Tap, x: Tensor, dy: Tensor, shared: tap_layers.Input) -> None:
        """For the other layers of the same input and group: their norms cost less together."""
        waiting = self._waiting
        if waiting and (waiting[0] is not shared or waiting[2][0][0].group != tap.group):
            self._flush()
        if self._waiting is None:
            self._waiting = (shared, x, [])
        self._waiting[2].append((tap, dy))

    def _flush(self) -> None:
        """What waited for layers of the same input."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        assert self.parts is not None
        _, x, layers = waiting
        rows = layers[0][0].tokens(x, self.parts)
        self.parts.linear(rows, [(dy, tap.weight) for tap, dy in layers if tap.weight is not None])

    def weight_sketch(self) -> Tensor:
        """(G, k, k) float64: sketch of the trained weights as they are, under the projections of
        their gradients. The difference of two is the sketch of what happened to the weights in
        between, without a copy of them: rounded to about 1e-16 of the weights' own size."""
        k = self.sketch_dim
        device = next(iter(self.module.parameters())).device
        total = torch.zeros(len(self.groups), k, k, dtype=torch.float64, device=device)
        for place in self.places():
            total[place.group] += self.sketch_of(place, place.parameter)
        return total

    def sketch_of(self, place: Place, values: Tensor) -> Tensor:
        """(k, k) float64: sketch of ``values``, of the shape of the weight at ``place``."""
        return weight_sketch(
            values,
            None,
            self.sketch_dim,
            seed=self.seed,
            key=place.key,
            transposed=place.transposed,
            first_output=place.first_output,
            buckets=place.buckets,
        )

    def places(self) -> Iterator[Place]:
        """All trained weights, each once."""
        for tap in self.layers:
            yield from (place for place in (tap.weight, tap.bias) if place is not None)
        if self.head is not None and self.tied is None:
            yield self.head


def attach(module: nn.Module, mode: str, *, sketch_dim: int = 16, seed: int = 0) -> Taps:
    """Taps on all trained weights of ``module``, a causal LM of transformers.

    ``mode``: "sketch", or "exact" for exact norms beside the sketches. ``seed`` chooses the
    projections: sketches compare under one seed, sketch_dim and model.

    Raises ValueError that names the layer and the parameter where a trained weight is not that of a
    linear layer, embedding, RMSNorm or LayerNorm, or is shared by several layers.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if sketch_dim < 1:
        raise ValueError(f"sketch_dim must be at least 1, got {sketch_dim!r}.")
    return Taps(module, mode, sketch_dim, seed)
