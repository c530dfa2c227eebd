"""The arithmetic of an optimizer step, counted: what a speed-up were if all else cost nothing.

Only matrix products count (a multiplication and an addition are 2). One backward of a product is
two of them. Numbers are of the padded or packed grids that are really computed, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama that decide its arithmetic."""

    layers: int
    layer_weights: int  # multiplied with every token, per layer
    last_weights: int  # of these, the layer's last product
    attention_width: int  # heads x head size
    hidden: int
    vocab: int
    behind_weights: int = 0  # of a layer's, those behind its attention

    @staticmethod
    def of(config: Any) -> Shape:
        """From a transformers `LlamaConfig`."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        last = config.hidden_size * config.intermediate_size
        own = config.hidden_size * (2 * width + 2 * kv) + 3 * last
        sizes = (config.hidden_size, config.vocab_size)
        behind = config.hidden_size * width + 3 * last
        return Shape(config.num_hidden_layers, own, last, width, *sizes, behind)


@dataclass(frozen=True)
class Work:
    """What one optimizer step computes, in units that do not depend on the model."""

    tokens: int  # tokens per pass of the body
    scores: int  # attention scores per head and pass, masked ones included: sum of length^2
    rows: int  # positions that meet the head, per pass
    gram: int  # sum over pairs of (scored rows)^2, where gradient norms are recorded
    forwards: int  # passes of the body
    backwards: int  # each as much as two forwards
    repeated: int  # forwards done again for the backward, up to each layer's last product
    head_products: int  # (rows, D, V) products
    unread: int = 0  # of `tokens`, those that the last layer leaves out behind its attention

    @property
    def passes(self) -> int:
        """Passes of the body in units of a forward."""
        return self.forwards + 2 * self.backwards + self.repeated

    def flops(self, shape: Shape) -> float:
        """Floating-point operations of the step."""
        linear = 2.0 * self.tokens * shape.layer_weights
        again = linear - 2.0 * self.tokens * shape.last_weights
        # Scores and their product with the values: 2 products forward. Backward: 4, and the scores
        # once more, because flash-style kernels do not keep them.
        attention = 4.0 * self.scores * shape.attention_width
        body = shape.layers * (
            self.forwards * (linear + attention)
            + self.backwards * (2 * linear + 2.5 * attention)
            + self.repeated * (again + attention)
        )
        body -= 2.0 * self.unread * shape.behind_weights * self.passes
        head = 2.0 * self.rows * shape.hidden * shape.vocab * self.head_products
        norms = 2.0 * self.gram * shape.vocab
        return body + head + norms


def add_up(work: Sequence[Work]) -> Work:
    """Micro-batches as one step; all of them make the same passes."""
    total = {
        name: sum(getattr(own, name) for own in work)
        for name in ("tokens", "scores", "rows", "gram", "unread")
    }
    return replace(work[0], **total)
