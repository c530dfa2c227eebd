"""Fused operations for training on preference pairs; needs torch only.

    from fastpref_kernels import linear_dpo
    out = linear_dpo(hidden, lm_head.weight, target, segment_id, ref_chosen, ref_rejected, beta=0.1)
    out.loss.mean().backward()          # rewards, margins, log-probs: out.reward_chosen, ...

    from fastpref_kernels import linear_logprob
    out = linear_logprob(hidden, lm_head.weight, target, segment_id, num_segments=S)
    out.logp                    # (S,) log-probability of every segment, differentiable

`reference` holds every operation in plain torch.
"""

from __future__ import annotations

from . import reference
from .linear_dpo import linear_dpo, sequence_logprob
from .linear_logprob import LinearLogprob, linear_logprob
from .pair_loss import PairLoss, pair_loss

__version__ = "0.1.0"  # with fastpref's own: both come in one wheel

__all__ = [
    "LinearLogprob",
    "PairLoss",
    "linear_dpo",
    "linear_logprob",
    "pair_loss",
    "reference",
    "sequence_logprob",
]
