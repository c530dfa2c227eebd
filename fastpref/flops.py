"""The arithmetic of a training step that nothing can do without: what MFU is measured by.

Only matrix products count, a multiplication and an addition as 2. Useful is what the loss and its
gradient need once: no padding, no token twice (a pair's shared prefix is computed once), no masked
score, no recomputation (checkpointing, the scores of flash attention's backward), no tracking and
no optimizer. Nor does what the loss never reads: the last block behind its attention, of tokens
that predict no scored one. With T fed tokens, N of them read by the head, R scored rows, W weights
multiplied with every token and L with those that are read, W' and L' of them trained, A visible
(query, key) pairs of a layer with H heads of width d, hidden size D, vocabulary V:

    forward   2 (T W + N L)  +  sum over layers of 2 A H (d_k + d_v)  +  2 R D V
    backward  2 T (W + W') + 2 N (L + L')  +  twice the forward's attention  +  2 R D V, twice if
              the head learns

    A of a pair = a(p + c) + a(p + r) - a(p),   a(n) = 1 + 2 + ... + n, terms at most the window

p, c, r: fed tokens of the prefix, the chosen, the rejected rest. MFU (Chowdhery et al. 2022,
arXiv 2204.02311, appendix B) is that over seconds and the device's peak; theirs counts every
score, masked ones too, ours the visible ones.

What is not taken off: the last block's queries of tokens that are not read, and all of that block
where it is a mixture of experts; the row in which the completions of a pair part, which R counts
for each of the two that it scores, as the head computes it; and the gradient of the first layer's
inputs where embeddings are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fastpref.last_block import find
from fastpref.recompute import last_layer


@dataclass(frozen=True)
class Attention:
    """Layers of one kind."""

    layers: int
    width: int  # heads x (width of a key + width of a value)
    window: int | None = None  # keys that a query sees, itself included


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal LM that decide its arithmetic."""

    weights: float  # multiplied with tokens, all layers; of experts those of one token
    trained: float  # of these, the ones that learn
    attention: tuple[Attention, ...]
    hidden: int
    vocab: int
    head_trained: bool = True
    body_trained: bool = True  # something below the head learns, so that gradients go through
    last: float = 0.0  # of `weights`, those multiplied with tokens that the head reads alone
    last_trained: float = 0.0

    @staticmethod
    def of(module: Any) -> Shape:
        """From a transformers causal LM, adapters and frozen weights as they are now.

        Weights may be on any device, meta too, and quantised.
        """
        config = module.config.get_text_config(decoder=True)
        head = module.get_output_embeddings()
        embeddings = [m for m in module.modules() if isinstance(m, nn.Embedding)]
        apart = {id(p) for m in [head, *embeddings] for p in m.parameters()}
        found = last_layer(module)
        behind = {id(p) for m in (find(*found) if found else []) for p in m.parameters()}
        weights = trained = last = last_trained = 0.0
        for size, learns, key in _products(module, config):
            if key in apart:
                continue
            weights += size
            trained += size if learns else 0.0
            if key in behind:
                last += size
                last_trained += size if learns else 0.0
        below = any(p.requires_grad and p is not head.weight for p in module.parameters())
        return Shape(
            weights,
            trained,
            _attention(config),
            int(config.hidden_size),
            int(head.weight.shape[0]),
            bool(head.weight.requires_grad),
            below,
            last,
            last_trained,
        )

    @staticmethod
    def of_config(config: Any) -> Shape:
        """From a transformers configuration, all weights learning; no weight is made."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return Shape.of(AutoModelForCausalLM.from_config(config))

    def forward(self, lengths: Sequence[Sequence[int]], rows: int, unread: int = 0) -> float:
        """FLOPs of one forward over pairs of these fed tokens (prefix, chosen, rejected; more
        branches or fewer are fine), ``rows`` of them scored, ``unread`` of the tokens ones that
        predict no scored token."""
        body, attention = self._body(lengths, unread)
        return body + attention + self._head(rows)

    def step(
        self,
        lengths: Sequence[Sequence[int]],
        rows: int,
        unread: int = 0,
        *,
        states: bool = False,
        reference: bool = False,
    ) -> float:
        """FLOPs of forward and backward, of what `forward` takes. ``states``: the body's are there
        already, so that the head is all; ``reference``: another model of this shape scores the
        pairs too."""
        head = self._head(rows)
        total = head * (1 + self._backwards())
        if not states:
            body, attention = self._body(lengths, unread)
            total += body + attention
            if self.body_trained:
                tokens = sum(map(sum, lengths))
                learn = 2.0 * (tokens * self.trained - unread * self.last_trained)
                total += body + learn + 2 * attention
        return total + (self.forward(lengths, rows, unread) if reference else 0.0)

    def _backwards(self) -> int:
        """Products of the head's backward."""
        return int(self.body_trained) + int(self.head_trained)

    def _head(self, rows: int) -> float:
        return 2.0 * rows * self.hidden * self.vocab

    def _body(self, lengths: Sequence[Sequence[int]], unread: int = 0) -> tuple[float, float]:
        if not len(lengths):
            return 0.0, 0.0
        tokens = float(sum(sum(own) for own in lengths))
        scores = sum(
            2.0 * kind.layers * kind.width * visible(lengths, kind.window)
            for kind in self.attention
        )
        return 2.0 * (tokens * self.weights - unread * self.last), scores


def visible(lengths: Sequence[Sequence[int]], window: int | None = None) -> float:
    """(query, key) pairs that causal attention over packed branches needs: of each pair (prefix,
    branch, branch, ...) in fed tokens."""
    if len({len(own) for own in lengths}) > 1:
        return sum(visible([own], window) for own in lengths)
    parts = np.asarray(lengths, np.float64)
    prefix, ends = parts[:, :1], parts[:, :1] + parts[:, 1:]
    alone = _seen(prefix, window)
    return float(alone.sum() + (_seen(ends, window) - alone).sum())


def _seen(n: np.ndarray, window: int | None) -> np.ndarray:
    """Keys that the first n positions of a sequence see, together."""
    full = n if window is None else np.minimum(n, window)
    return full * (full + 1) / 2 + (n - full) * full


def _products(module: nn.Module, config: Any) -> Iterable[tuple[float, bool, int]]:
    """(weights multiplied with a token, whether they learn, id of the parameter)."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    part = (getattr(config, "num_experts_per_tok", None) or 1) / (experts or 1)
    seen: set[int] = set()
    for layer in module.modules():
        sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
        for name, p in layer.named_parameters(recurse=False):
            if id(p) in seen:
                continue
            seen.add(id(p))
            if name == "weight" and all(isinstance(n, int) for n in sizes):
                yield float(sizes[0] * sizes[1]), p.requires_grad, id(p)  # type: ignore[operator]
            elif p.ndim == 2:
                yield float(p.numel()), p.requires_grad, id(p)
            elif p.ndim == 3:  # experts, one after another
                yield p.numel() * part, p.requires_grad, id(p)


def _attention(config: Any) -> tuple[Attention, ...]:
    heads = config.num_attention_heads
    own = getattr(config, "head_dim", None) or config.hidden_size // heads
    key = getattr(config, "qk_head_dim", None) or own
    value = getattr(config, "v_head_dim", None) or own
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    sliding = sum(kind == "sliding_attention" for kind in kinds) if kinds else layers
    if window is None:
        sliding = 0
    found = (
        Attention(layers - sliding, heads * (key + value)),
        Attention(sliding, heads * (key + value), window),
    )
    return tuple(kind for kind in found if kind.layers)
