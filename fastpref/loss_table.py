"""What is known of every loss without computing it: the configuration checks itself against this.

The functions stand in `fastpref.loss_functions` under the same names, `fastpref.losses` joins the
two. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

LOG2 = math.log(2.0)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the trainer and the configuration must know about a loss."""

    needs_reference: bool = True  # reads the reference's log-probs
    margin_only: bool = False  # depends on the margin alone (under reverse KL), see `Loss`
    # What a pair's value needs of the other pairs of its optimizer step: "" nothing, "tokens" the
    # number of their chosen tokens, "order" their log-probs, which are sorted.
    batch_coupled: str = ""
    smoothing: bool = False  # label_smoothing is defined for it
    f_divergence: bool = False  # f_divergence_type is defined for it
    weighting: bool = True  # use_weighting is defined for it
    per_token: bool = False  # compares log-probs per token, and so do its rewards
    # (beta, label_smoothing) -> value where policy = reference; None: there is no such value
    at_equal: Callable[[float, float], float] | None = None


def _always(value: float) -> Callable[[float, float], float]:
    return lambda beta, smoothing: value


def _exo_at_equal(beta: float, smoothing: float) -> float:
    return -LOG2 - 0.5 * (math.log1p(-smoothing) + math.log(smoothing))


TABLE: dict[str, Facts] = {
    "sigmoid": Facts(margin_only=True, smoothing=True, f_divergence=True, at_equal=_always(LOG2)),
    "hinge": Facts(margin_only=True, f_divergence=True, at_equal=_always(1.0)),
    "ipo": Facts(f_divergence=True, at_equal=lambda beta, smoothing: 0.25 / beta**2),
    "exo_pair": Facts(margin_only=True, smoothing=True, f_divergence=True, at_equal=_exo_at_equal),
    "nca_pair": Facts(at_equal=_always(2 * LOG2)),
    "robust": Facts(margin_only=True, smoothing=True, f_divergence=True, at_equal=_always(LOG2)),
    "bco_pair": Facts(at_equal=_always(2 * LOG2)),
    "sppo_hard": Facts(at_equal=lambda beta, smoothing: 0.5 / beta**2),
    "aot": Facts(
        margin_only=True,
        batch_coupled="order",
        smoothing=True,
        weighting=False,
        at_equal=_always(LOG2),
    ),
    "aot_unpaired": Facts(
        batch_coupled="order", smoothing=True, weighting=False, at_equal=_always(LOG2)
    ),
    "apo_zero": Facts(at_equal=_always(1.0)),
    "apo_down": Facts(at_equal=_always(1.0)),
    "discopop": Facts(margin_only=True, f_divergence=True, at_equal=_always(0.5 + 0.5 * LOG2)),
    "sft": Facts(needs_reference=False, batch_coupled="tokens", f_divergence=True, weighting=False),
    "sigmoid_norm": Facts(smoothing=True, f_divergence=True, at_equal=_always(LOG2)),
    "simpo": Facts(needs_reference=False, smoothing=True, per_token=True),
    "orpo": Facts(needs_reference=False, weighting=False, per_token=True),
    "cpo": Facts(needs_reference=False, batch_coupled="tokens", smoothing=True, weighting=False),
    "rpo": Facts(smoothing=True, f_divergence=True, weighting=False),
}

ALIASES = {"dpo": "sigmoid", "cdpo": "sigmoid", "dpo_norm": "sigmoid_norm"}

# What other trainers and papers call a loss, and is a loss with an option here, or is not here.
ANSWERS = {
    "wpo": "set loss_type: sigmoid and use_weighting: true",
    "mpo": "set loss_type: [sigmoid, bco_pair, sft] and loss_weights: [0.8, 0.2, 1.0]",
    "ld_dpo": "set loss_type: sigmoid and ld_alpha",
    "tr_dpo": "set loss_type: sigmoid and sync_ref_model: true",
    "cpo_simpo": "set loss_type: [simpo, sft] and loss_weights: [1.0, <cpo_alpha>]",
    "slic": "set loss_type: hinge",
    "bco": "set loss_type: bco_pair",
    "kto": "KTO's loss of unpaired rows is not in this version; bco_pair is its nearest for pairs",
    "kto_pair": "removed (in TRL too); bco_pair is its nearest",
    "alphapo": "AlphaPO's reward is not in this version; simpo is its limit for alpha = 0",
}
