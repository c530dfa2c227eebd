"""Fused operations for training on preference pairs; needs torch only.

    from fastpref_kernels import linear_logprob
    out = linear_logprob(hidden, lm_head.weight, target, segment_id, num_segments=S)
    out.logp                    # (S,) log-probability of every segment, differentiable

`reference` holds every operation in plain torch.
"""

from __future__ import annotations

from . import reference
from .linear_logprob import LinearLogprob, linear_logprob

__version__ = "0.1.0"  # with fastpref's own: both come in one wheel

__all__ = ["LinearLogprob", "linear_logprob", "reference"]
