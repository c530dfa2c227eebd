"""Taps: norms and sketches of every pair's gradient, out of one backward of a packed batch.

    taps = attach(module, "sketch")            # a causal LM of transformers, as PairModel holds it
    with taps.watching(batch):
        logp = ...                             # forward
        logp.backward(slopes)                  # one backward, of a sum over pairs
    values = taps.collect()                    # of each pair's part of what was differentiated

A *tap* stands behind a layer: it keeps the layer's input as autograd does, and sees the gradient of
its output come back. Both together are the layer's gradient, pair by pair, without forming it
(fastpref_kernels, *Norms of any layer*). The layer itself computes as without a tap, the same calls
on the same numbers, so the weights' gradients are the same bits. Taps work through non-reentrant
activation checkpointing; no module hook is used.

A *layer group* is `embedding`, `block.<i>.attention`, `block.<i>.mlp`, `other` (linear layers
outside of blocks), `norms` (every norm's weight and bias) or `head`; only those with trained
weights are there. A head that is tied to the embedding belongs to `embedding`.

Memory    Of a tap: nothing beyond what autograd keeps for the layer's own gradient, but for norms
          that compute in another dtype, whose input it keeps as it is given. Sketches: k^2
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
from fastpref.dynamics.input_layers import EmbeddingLayer, InputLayers
from fastpref.dynamics.pair_ops import Signs
from fastpref.dynamics.pair_parts import PairParts
from fastpref.dynamics.places import Place
from fastpref.dynamics.tap_groups import Layer
from fastpref.dynamics.tap_layers import Embedding, Input, Linear

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
        # Of the layers that were given an input of which this one was the first.
        self.layers: InputLayers | EmbeddingLayer | None = None
        self.rows = tap_layers.TokenRows(f"{layer.name} ({type(layer.module).__name__})")

    # What follows is met once a layer and step, between products that have emptied the caches: a
    # line of Python is dear there (docs/lab-log.md), so frames and checks are few.

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        """In the place of the own one of a layer that is not linear."""
        y = self.plain(x, *more, **named)
        if not torch.is_grad_enabled():
            return y
        if self.taps.anchors is not None and isinstance(self.kind, Embedding):
            y = y.detach().requires_grad_()
            self.taps.anchors.append((self, x, y))
            return y
        if self.group < 0 or not y.requires_grad:
            return y
        return Input(self.taps).watch(self, y, x)

    def linear(self, x: Tensor, *more: Any, **named: Any) -> Any:
        """In the place of a linear layer's own."""
        if self.group < 0 or not torch.is_grad_enabled():
            return self.plain(x, *more, **named)
        own = x.__dict__
        shared = own.get("_fastpref_input")
        if shared is None or not shared.takes(self):
            shared = own["_fastpref_input"] = Input(self.taps)
        x = tap_layers.as_autocast(x)
        return shared.watch(self, self.plain(x, *more, **named), x)

    def tokens(self, x: Tensor, parts: PairParts) -> Tensor:
        """The rows of x by token: (T, ...), or (1, T, D) as it is."""
        shape = x.shape
        if len(shape) == 3 and shape[1] == parts.tokens and shape[0] == 1:
            return x
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
        self._watched = False
        self.inputs: list[Input] = []  # of the batch
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

    @contextmanager
    def watching(
        self,
        batch: PairBatch,
        *,
        change: Mapping[nn.Parameter, Tensor] | None = None,
        anchored: bool = False,
        scale: float = 1.0,
    ) -> Iterator[None]:
        """Around forward and backward of ``batch``; outside, the module is the plain one.

        ``scale``: what gradients are multiplied by before they are summed, for a backward of slopes
        that were divided by it.
        ``change``: what the trained weights are compared with, see `TapValues.change`; weights that
        are not in it count as unchanged. ``anchored``: the outputs of embeddings are leaves, and
        stand in `anchors` (fastpref.gradients).
        """
        assert not self._watched, "a batch is watched already"
        sizes = (len(self.groups), self.exact, self.sketch_dim)
        self.parts = PairParts.of(batch, *sizes, self.signs, scale, change)
        self._watched = True
        self.anchors = [] if anchored else None
        before = [tap.module.__dict__.get("forward") for tap in self.layers]
        try:
            for tap in self.layers:
                tap.plain = tap.module.forward
                linear = isinstance(tap.kind, Linear)
                tap.module.__dict__["forward"] = tap.linear if linear else tap.forward
            yield
            with torch.no_grad():
                for shared in reversed(self.inputs):  # what the backward has passed in part
                    came = [i for i, own in enumerate(shared.brought) if own]
                    if came:
                        shared.taps = [shared.taps[i] for i in came]
                        shared.brought = [shared.brought[i] for i in came]
                        shared.add()
        finally:
            for tap, own in zip(self.layers, before, strict=True):
                if own is None:
                    del tap.module.__dict__["forward"]
                else:
                    tap.module.__dict__["forward"] = own
            for shared in self.inputs:
                shared.x, shared.brought = None, []  # it hangs on x, which hangs on it
            self._watched, self.anchors = False, None
            self.inputs.clear()

    def collect(self) -> TapValues:
        """What the taps saw since the last call: of the batch that was watched."""
        parts, self.parts = self.parts, None
        assert parts is not None, "nothing was watched since the last collect()"
        if parts.scale != 1.0:
            parts.norm_sq *= parts.scale**2
            if parts.change is not None:
                parts.change *= parts.scale
        exact = {
            name: parts.norm_sq[i]
            for i, name in enumerate(self.groups)
            if name != "head" and (self.exact or name == "norms")
        }
        return TapValues(exact, parts.sketch, parts.change)

    def add_anchor(self, tap: Tap, ids: Tensor, dy: Tensor) -> None:
        """To the sums, of an embedding's output of `anchors`, dy the gradient."""
        assert self.parts is not None
        if tap.group >= 0:
            EmbeddingLayer([tap]).add(self.parts, ids, [dy])

    def layers_of(self, taps: list[Tap]) -> InputLayers | EmbeddingLayer:
        """What is made of the gradients of layers of one input."""
        if isinstance(taps[0].kind, Embedding):
            return EmbeddingLayer(taps)
        return InputLayers(taps, self.signs, self.sketch_dim)

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
