"""Fused operations for training on preference pairs; needs torch only.

    from fastpref_kernels import linear_dpo
    out = linear_dpo(hidden, lm_head.weight, target, segment_id, ref_chosen, ref_rejected, beta=0.1)
    out.loss.mean().backward()          # rewards, margins, log-probs: out.reward_chosen, ...

    from fastpref_kernels import linear_logprob
    out = linear_logprob(hidden, lm_head.weight, target, segment_id, num_segments=S)
    out.logp                    # (S,) log-probability of every segment, differentiable

Gradient norms of every pair, from any layer's input and output gradient: `linear_norms` and its
neighbours, exact; `linear_sketch` and its neighbours, sketches that add up over layers and ranks.
`reference` holds every operation in plain torch.
"""

from __future__ import annotations

from . import reference
from .embeddings import embedding_norms, tied_norms, unique_ids
from .linear_dpo import linear_dpo, sequence_logprob
from .linear_logprob import LinearLogprob, linear_logprob
from .pair_loss import PairLoss, pair_loss
from .pair_norms import bias_norms, layernorm_norms, linear_norms, lora_norms, rmsnorm_norms
from .sketch import (
    column_sketch,
    embedding_sketch,
    linear_sketch,
    lora_sketch,
    weight_sketch,
)
from .sketch_estimates import Estimate, relative_spread, sketch_cosine, sketch_dot
from .spans import row_counts

__version__ = "0.1.0"  # with fastpref's own: both come in one wheel

__all__ = [
    "Estimate",
    "LinearLogprob",
    "PairLoss",
    "bias_norms",
    "column_sketch",
    "embedding_norms",
    "embedding_sketch",
    "layernorm_norms",
    "linear_dpo",
    "linear_logprob",
    "linear_norms",
    "linear_sketch",
    "lora_norms",
    "lora_sketch",
    "pair_loss",
    "reference",
    "relative_spread",
    "rmsnorm_norms",
    "row_counts",
    "sequence_logprob",
    "sketch_cosine",
    "sketch_dot",
    "tied_norms",
    "unique_ids",
    "weight_sketch",
]
