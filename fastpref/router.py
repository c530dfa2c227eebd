"""The load-balancing loss of mixtures of experts, from pairs that share their prefixes.

    aux = E sum_e f_e P_e,   f_e = tokens sent to expert e / tokens,   P_e = mean probability of e

over all sequences of an optimizer step, all their tokens and all layers with experts; a token of
k experts counts k times. Fedus et al. 2021 (arXiv 2101.03961), eq. 4-6, as TRL 1.16 adds it
to the loss of a micro-batch (`load_balancing_loss_func` of transformers' Mixtral).

Two things make it exact here. A token of a prefix stands in two sequences, so it counts twice; and
a completion's last token, which predicts nothing but is routed, is fed (`pack_pairs(whole=True)`).
f changes in steps, so it has no gradient, and once it is known of the whole step,

    d aux = E sum_e f_e dP_e

is a sum over tokens: micro-batches and ranks add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Load:
    """What the routers did with some tokens, over all layers."""

    routed: Tensor  # (E,) int64, tokens sent to each expert
    probability: Tensor  # (E,) sum of the tokens' probabilities; differentiable
    tokens: Tensor  # () int64, times layers

    def packed(self) -> Tensor:  # (2 E + 1,) float64
        """For a sum over batches and ranks."""
        return torch.cat([self.routed, self.probability.detach(), self.tokens[None]]).double()


@dataclass(frozen=True)
class Balance:
    """How a whole optimizer step is routed: what `Router.loss` must know beforehand."""

    share: Tensor  # (E,) float64, f / tokens
    value: Tensor  # () float64, aux of the step


@dataclass(frozen=True)
class Router:
    """The routers of a model whose balance is part of the loss."""

    coef: float  # router_aux_loss_coef
    experts: int
    top_k: int

    def load(self, logits: Sequence[Tensor], weight: Tensor) -> Load:
        """Of one forward: ``logits`` (T, E) of every layer, ``weight`` (T,) int64 sequences that
        each token stands in. Raises ValueError where there are none of this router's."""
        if not logits or logits[0].shape[-1] != self.experts:
            found = f"{logits[0].shape[-1]} experts" if logits else "no layer with experts"
            raise ValueError(f"the model shows {found}, its configuration has {self.experts}")
        routed = torch.zeros(self.experts, dtype=torch.int64, device=weight.device)
        total = torch.promote_types(logits[0].dtype, torch.float32)
        probability = torch.zeros(self.experts, dtype=total, device=weight.device)
        for layer in logits:
            likely = layer.reshape(len(weight), self.experts).to(total).softmax(dim=-1)
            chosen = likely.topk(self.top_k, dim=-1).indices
            # Whole numbers: the order in which they are added changes nothing.
            routed.scatter_add_(0, chosen.flatten(), weight.repeat_interleave(self.top_k))
            probability = probability + weight.to(total) @ likely
        return Load(routed, probability, weight.sum() * len(logits))

    def balance(self, summed: Tensor) -> Balance:
        """Of a step whose loads, `Load.packed`, sum to ``summed``."""
        routed, probability = summed[: self.experts], summed[self.experts : -1]
        share = routed / summed[-1].clamp(min=1) ** 2
        return Balance(share, self.experts * share @ probability)

    def loss(self, load: Load, balance: Balance) -> Tensor:
        """() what ``load`` adds to the step's loss; its gradient is that of coef x aux."""
        share = balance.share.to(load.probability.dtype)
        return self.coef * self.experts * share @ load.probability


def find_router(model_config: Any, coef: float | None) -> Router | None:
    """The routers of a model whose balance belongs to the loss; None where there are none, or
    where their coefficient is 0.

    ``coef``: router_aux_loss_coef; None: the model's own, as TRL has it. Raises ValueError where
    one is asked of a model that has no routers, or whose routers cannot be asked.
    """
    text = model_config.get_text_config(decoder=True)
    known = hasattr(text, "output_router_logits")
    own = (getattr(text, "router_aux_loss_coef", None) or 0.0) if coef is None else coef
    if not own:
        return None
    if not known:
        if coef is None:
            return None
        raise ValueError(
            f"router_aux_loss_coef={coef!r}: {model_config.model_type} is no mixture of experts "
            "whose routers transformers shows, so there is nothing to balance. Remove it."
        )
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    if not experts or not getattr(text, "num_experts_per_tok", None):
        raise ValueError(
            f"{model_config.model_type} does not say how many experts it has (num_experts, "
            "num_experts_per_tok), which its load-balancing loss needs. Set "
            "router_aux_loss_coef: 0 to train without it."
        )
    return Router(own, experts, text.num_experts_per_tok)
