"""A Hugging Face causal LM as fastpref uses it: packed body, then the head on scored rows only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from fastpref_kernels import LinearLogprob, linear_logprob
from torch import Tensor, nn

from fastpref import attention, last_block, lora
from fastpref.architecture import logit_transform
from fastpref.attention import Layout
from fastpref.attention_backends import SDPA, Backend
from fastpref.batch import PairBatch, ProbeBatch
from fastpref.router import Load, Router
from fastpref.tracing import named

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """Output embedding and what stands between its product and the logits."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float


@dataclass(frozen=True)
class HeadNorms:
    """What `linear_logprob` is to bring of the gradients in the head's weight."""

    method: str = "exact"  # its `norms`
    sketch_dim: int = 16
    seed: int = 0
    key: str = "lm_head"
    rows: bool = False  # and every row's log-prob and state

    def arguments(self) -> dict[str, Any]:
        """Of `linear_logprob`."""
        sketch = {"sketch_dim": self.sketch_dim, "sketch_seed": self.seed, "sketch_key": self.key}
        return {"norms": self.method, **sketch}


@dataclass(frozen=True)
class Scored(LinearLogprob):
    """`LinearLogprob`, and the states that were scored where `HeadNorms.rows` asks for them."""

    hidden: Tensor | None = None  # (R, D) detached


@dataclass(frozen=True)
class PairModel:
    """A causal LM, its tokenizer, and where and in which precision it computes.

    Weights are kept in float32 (float64 where asked for), or in bfloat16 by `weights_dtype`;
    bfloat16 as the precision of products is autocast's.
    """

    module: nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype  # of the products
    identity: str  # names the reference's very weights, for the reference cache
    adapter: Any = None  # peft's PeftModel around `module` where LoRA learns
    router: Router | None = None  # of a mixture of experts whose balance is part of the loss
    reference_off: bool = False  # the reference is `module` without its adapter
    frozen_body: bool = False  # nothing but the head learns (`fastpref.head`)
    attention: Backend = SDPA

    @property
    def head(self) -> Head:
        """The head, read from the module each time, because a wrapper may replace its tensors."""
        layer = self.module.get_output_embeddings()  # type: ignore[operator]
        if layer is None:
            raise ValueError(f"{type(self.module).__name__} has no output head to score tokens.")
        return Head(layer.weight, getattr(layer, "bias", None), *self._transform)

    @functools.cached_property
    def _transform(self) -> tuple[float | None, float]:
        return logit_transform(self.module.config)

    @functools.cached_property
    def head_is_all(self) -> bool:
        """Whether nothing learns but the head's weight."""
        return self.frozen_body and self.head.bias is None

    @functools.cached_property
    def trained(self) -> list[nn.Parameter]:
        """What learns, in the module's order; read once, as walking a module takes a while."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model computes."""
        if self.dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def hidden(self, batch: PairBatch | ProbeBatch, *, scored_only: bool = False) -> Tensor:
        """(T, D) final hidden states of the packed tokens, after the last norm; those that the
        batch brings along, where it does.

        ``scored_only``: those at ``batch.rows`` are all that is read. What no other state needs of
        the rest is then not computed (fastpref.last_block), and the rest is not right.
        """
        if batch.hidden is not None:
            return batch.hidden
        return self._body(batch, scored_only).last_hidden_state[0]

    def _body(self, batch: PairBatch | ProbeBatch, scored_only: bool = False, **asked: bool) -> Any:
        with named("data"):
            layout = attention.build_layout(batch.lengths, self.device, self.attention)
            read = last_block.read_tokens(batch, self.device) if scored_only else None
        with last_block.reading(read):
            return self._run(batch.tokens, batch.positions, layout, **asked)

    def _run(self, tokens: Tensor, positions: Tensor, layout: Layout, **asked: bool) -> Any:
        with named("forward"), self.autocast(), attention.ambient(layout):
            return self.module.base_model(  # type: ignore[operator]
                input_ids=tokens[None],
                position_ids=positions[None],
                pair_layout=layout,
                use_cache=False,
                **asked,
            )

    @torch.no_grad()
    def lacks(self, backends: Sequence[Backend]) -> dict[str, str]:
        """Backend of attention -> what it does not compute of what the layers ask for.

        From a forward of a few tokens. Where that fails it says nothing: the self-check will.
        """
        layout = attention.NotingLayout(attention.build_dense([(2, 1, 1)], self.device), backends)
        tokens, positions = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 2]], device=self.device)
        try:
            self._run(tokens, positions, layout)
        except Exception as error:
            log.debug("no forward of four tokens: %s", error)
        return layout.lacks

    def logp(
        self,
        batch: PairBatch | ProbeBatch,
        norms: HeadNorms | str | None = None,
        stats: Sequence[str] = (),
        *,
        head_frozen: bool = False,
    ) -> Scored:
        """Log-probabilities of the batch's segments; `stats` as in `linear_logprob`.

        `head_frozen`: the head counts as a constant, so that no gradient of it is made.
        """
        hidden = self.hidden(batch, scored_only=True)
        return self._score(hidden, batch, norms, stats, head_frozen=head_frozen)

    def row_logp(self, batch: ProbeBatch, stats: Sequence[str] = ()) -> Scored:
        """`logp` with every row a segment of its own."""
        hidden = self.hidden(batch, scored_only=True)
        return self._score(hidden, batch, None, stats, by_row=True)

    def logp_and_features(
        self, batch: PairBatch, norms: HeadNorms | str | None = None, stats: Sequence[str] = ()
    ) -> tuple[Scored, Tensor]:
        """`logp`, and (P, D) each pair's feature as `fastpref.frozen` defines it: the state that
        predicts the first token in which the completions part, times the logit scale."""
        hidden = self.hidden(batch, scored_only=True)
        row = batch.first_own_rows().amax(dim=0)  # one of them may be missing, not both
        features = hidden.index_select(0, batch.rows[row]) * self.head.logit_scale
        return self._score(hidden, batch, norms, stats), features

    def routed_logp(
        self, batch: PairBatch, norms: HeadNorms | str | None = None, stats: Sequence[str] = ()
    ) -> tuple[Scored, Load | None]:
        """`logp`; and, where the balance of routers is part of the loss, what they did with the
        batch's tokens in the same forward."""
        if self.router is None:
            return self.logp(batch, norms, stats), None
        hidden, load = self._routed(self.router, batch)
        return self._score(hidden, batch, norms, stats), load

    @torch.no_grad()
    def load(self, batch: PairBatch) -> Tensor:
        """What the routers do with the batch's tokens, as `Load.packed`."""
        assert self.router
        return self._routed(self.router, batch)[1].packed()

    def _routed(self, router: Router, batch: PairBatch) -> tuple[Tensor, Load]:
        assert batch.whole, "every token is routed, also those that predict nothing"
        out = self._body(batch, output_router_logits=True)
        load = router.load(out.router_logits, batch.sequences_of_token())
        return out.last_hidden_state[0], load

    def _score(
        self,
        hidden: Tensor,
        batch: PairBatch | ProbeBatch,
        norms: HeadNorms | str | None,
        stats: Sequence[str],
        *,
        head_frozen: bool = False,
        by_row: bool = False,
    ) -> Scored:
        with named("head"):
            return self._scored(hidden, batch, norms, stats, head_frozen, by_row)

    def _scored(
        self,
        hidden: Tensor,
        batch: PairBatch | ProbeBatch,
        norms: HeadNorms | str | None,
        stats: Sequence[str],
        head_frozen: bool,
        by_row: bool,
    ) -> Scored:
        head = self.head
        if isinstance(norms, str):
            norms = HeadNorms(norms)
        kept = norms is not None and norms.rows
        rows = hidden.index_select(0, batch.rows).to(self.dtype)
        out = linear_logprob(
            rows,
            (head.weight.detach() if head_frozen else head.weight).to(self.dtype),
            batch.target,
            None if by_row else batch.segment_id,
            num_segments=batch.rows.numel() if by_row else batch.num_segments,
            counts=None if by_row else batch.counts,
            group_size=1 if by_row else batch.group,
            bias=None if head.bias is None else head.bias.to(self.dtype),
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            stats=(*stats, "row_logp") if kept else stats,
            **(norms.arguments() if norms else {}),
        )
        return Scored(**vars(out), hidden=rows.detach() if kept else None)

    def as_reference(self) -> AbstractContextManager[None]:
        """Inside, before training, the module computes as its own reference."""
        return lora.off(self.adapter) if self.reference_off else nullcontext()

    def dropout(self) -> AbstractContextManager[None]:
        """Inside, what dropout there is, is on: a training step."""
        return nullcontext() if self.adapter is None else lora.dropout(self.adapter)

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Inside, the module computes as transformers ships it, one sequence a row."""
        plain = "sdpa" if getattr(self.module, "_supports_sdpa", False) else "eager"
        self.module.set_attn_implementation(plain)  # type: ignore[operator]
        try:
            yield
        finally:
            self.module.set_attn_implementation(attention.NAME)  # type: ignore[operator]
