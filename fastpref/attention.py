"""Attention over packed branches of shared prefixes, for any model that uses `AttentionInterface`.

A pair is a prefix with two branches, the chosen and the rejected rest (design 2.4); a probed prompt
has as many as it has responses. A branch attends to its prefix and to itself, causally:

                 prefix  branch 1  branch 2          keys
        prefix     \\
        branch 1   x       \\
        branch 2   x       .         \\
        queries

`register()` makes the function known to transformers as ``attn_implementation="fastpref_pair"``;
the body of the model is called with the keyword ``pair_layout``, which transformers hands through.

How it is computed is the layout's: in dense blocks by scaled_dot_product_attention
(`fastpref.attention_dense`), or in two calls of a backend for sequences of varying length
(`fastpref.attention_varlen`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpref import last_block
from fastpref.attention_backends import SDPA, Backend
from fastpref.attention_dense import DenseLayout, build_dense
from fastpref.attention_layout import Terms, in_autocast
from fastpref.attention_varlen import VarlenLayout, build_varlen

NAME = "fastpref_pair"
# Terms of the scores that transformers' models may hand to an attention function, not known here.
UNKNOWN_TERMS = ("position_bias", "alibi", "sinks", "attention_bias")


@dataclass(frozen=True)
class NotingLayout:
    """Dense blocks; and a note of the first thing a model asks for that a backend has not."""

    dense: DenseLayout
    backends: Sequence[Backend]
    lacks: dict[str, str] = field(default_factory=dict)  # backend -> what it has not

    def attend(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
        """As `DenseLayout.attend`."""
        for backend in self.backends:
            lack = backend.lack(in_autocast(q[:0]), v, terms)
            if lack is not None:
                self.lacks.setdefault(backend.name, lack)
        return self.dense.attend(q, k, v, terms)


Layout = DenseLayout | VarlenLayout | NotingLayout


def build_layout(
    lengths: Sequence[Sequence[int]],  # of each pair: fed tokens of its prefix, of each branch
    device: torch.device | str,
    backend: Backend = SDPA,
) -> DenseLayout | VarlenLayout:
    """The layout of pairs packed in this order; made on the host, once per batch."""
    if backend.varlen is None:
        return build_dense(lengths, device)
    return build_varlen(lengths, device, backend)


_ambient: ContextVar[Layout | None] = ContextVar("pair_layout", default=None)


def pair_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, d)
    key: Tensor,  # (1, kv heads, T, d)
    value: Tensor,  # (1, kv heads, T, d)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (heads,) attention sinks
    pair_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, T, heads, d)
    """transformers' attention function; its signature is theirs.

    Raises ValueError when called without `pair_layout`, or with a term that it does not honour.
    """
    pair_layout = pair_layout or _ambient.get()
    if pair_layout is None:
        raise ValueError(
            f"attn_implementation {NAME!r} needs the keyword pair_layout, which "
            f"{type(module).__name__} did not receive: call the model through fastpref's PairModel."
        )
    for term in UNKNOWN_TERMS:
        if kwargs.get(term) is not None:
            raise ValueError(f"{type(module).__name__} passes {term}, which {NAME!r} lacks.")
    if not (getattr(module, "is_causal", True) and kwargs.get("is_causal", True)):
        raise ValueError(
            f"{type(module).__name__} attends to later tokens too; it is no causal LM."
        )
    if attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} passes an attention mask of its own to {NAME!r}."
        )

    # Token-major, as packed; a view of what the model's own layers made.
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    terms = Terms(scaling, sliding_window, softcap, s_aux, dropout)
    return _attend(pair_layout, q, k, v, terms)[None], None


def _plain_attend(layout: Layout, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    return layout.attend(q, k, v, terms)


_attend = _plain_attend


def hide_from_compiler() -> None:
    """From here on torch.compile sees nothing of what a layout computes; harmless when repeated."""
    global _attend
    if _attend is _plain_attend:
        _attend = torch.compiler.disable(_plain_attend)


@contextmanager
def ambient(layout: Layout) -> Iterator[None]:
    """Inside, attention finds ``layout`` where the model drops the keyword on its way there.

    Some layers (StableLM, Nemotron) take no keywords. The keyword goes first: it is bound to its
    call, whatever runs the layer again.
    """
    token = _ambient.set(layout)
    try:
        yield
    finally:
        _ambient.reset(token)


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as it runs here and now, whenever it is called: with the layout of `ambient`
    and what `last_block.reading` tells."""
    layout, read = _ambient.get(), last_block.current()
    if layout is None:
        return function

    def inside(*args: Any, **kwargs: Any) -> Any:
        with ambient(layout), last_block.reading(read):
            return function(*args, **kwargs)

    return inside


def register() -> None:
    """Make `pair_attention` known to transformers under NAME; harmless when repeated.

    transformers then makes no attention mask of its own for this name, which is what we need.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, pair_attention)
