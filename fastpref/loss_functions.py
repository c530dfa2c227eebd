"""Every loss as a function ``loss(PairLogp, LossOptions) -> (P,)``, its equation and its source.

Letters of the equations: r_c and r_r are the log-ratios log pi - log pi_ref of the chosen and the
rejected completion, m = r_c - r_r the margin, |y| the scored tokens, sigma the logistic function,
eps the label smoothing. s_c and s_r are the scores: the log-ratios themselves, or what
`f_divergence_type` makes of them (`score`). What is known of each loss without computing it stands
in `fastpref.loss_table`; docs/losses.md is made from both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PairLogp:
    """Summed log-probabilities in nats, float32 (float64 in tests), and scored lengths.

    Under ``ld_alpha`` the sums are weighted ones; `chosen_full` is then the plain sum.
    """

    chosen: Tensor  # (P,) policy, differentiable
    rejected: Tensor  # (P,)
    ref_chosen: Tensor | None  # (P,) reference; None: the loss has none
    ref_rejected: Tensor | None  # (P,)
    chosen_len: Tensor  # (P,) scored tokens |y|
    rejected_len: Tensor  # (P,)
    chosen_full: Tensor | None = None  # (P,) policy, every token counted once; None: `chosen` is
    step_len: Tensor | None = None  # () mean chosen_len of the step's pairs; None: of these
    weighting: Tensor | None = None  # (P,) what the pair's loss is multiplied by; None: 1

    @property
    def chosen_ratio(self) -> Tensor:
        """(P,) log pi - log pi_ref of the chosen completion; log pi without a reference."""
        return self.chosen if self.ref_chosen is None else self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """(P,) the same of the rejected completion."""
        return self.rejected if self.ref_rejected is None else self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """(P,) m = chosen log-ratio - rejected log-ratio, without beta."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def nll(self) -> Tensor:
        """(P,) -log pi of the chosen completion, every token counted once."""
        return -(self.chosen if self.chosen_full is None else self.chosen_full)

    @property
    def mean_chosen_len(self) -> Tensor:
        """() mean scored length of the chosen completions of the optimizer step."""
        if self.step_len is not None:
            return self.step_len
        return self.chosen_len.to(self.chosen.dtype).mean()


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The numbers that losses read, under their names in `Config`."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    rpo_alpha: float = 1.0


def score(ratio: Tensor, o: LossOptions) -> Tensor:  # (P,) -> (P,)
    """What an f-divergence in the place of the reverse KL makes of a log-ratio r = log t.

        reverse_kl        s = r
        forward_kl        s = f'(t) = 1 - 1/t                    = 1 - e^-r
        js_divergence     s = f'(t) = log(2 t/(t + 1))           = log 2 + log sigma(r)
        alpha_divergence  s = f'(t) = (t^(a-1) - 1)/(a - 1)      = (e^((a-1) r) - 1)/(a - 1)

    Wang et al. 2023 (arXiv 2309.16240). For a = f_alpha_divergence_coef = 1 the last is the first;
    its exponent is cut at 80, as TRL does, lest it overflow.
    """
    if o.f_divergence_type == "forward_kl":
        return 1 - torch.exp(-ratio)
    if o.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    power = o.f_alpha_divergence_coef - 1
    if o.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        return (torch.exp((power * ratio).clamp(max=80.0)) - 1) / power
    return ratio


def _score_margin(x: PairLogp, o: LossOptions) -> Tensor:
    return score(x.chosen_ratio, o) - score(x.rejected_ratio, o)


def _token_margin(x: PairLogp, o: LossOptions) -> Tensor:
    return score(x.chosen_ratio, o) / x.chosen_len - score(x.rejected_ratio, o) / x.rejected_len


def _logistic(z: Tensor, eps: float) -> Tensor:
    """-(1 - eps) log sigma(z) - eps log sigma(-z)."""
    return (eps - 1) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


def sigmoid(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """DPO; with smoothing its conservative form, cDPO, which TRL 1.16 leaves out in silence.

        L = -(1 - eps) log sigma(beta (s_c - s_r)) - eps log sigma(-beta (s_c - s_r))

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; eps: Mitchell 2023, "A note on DPO with noisy
    preferences", eq. 3.
    """
    return _logistic(o.beta * _score_margin(x, o), o.label_smoothing)


def hinge(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """SLiC's hinge on DPO's margin; 1/beta is the margin it asks for.

        L = max(0, 1 - beta (s_c - s_r))

    Zhao et al. 2023 (arXiv 2305.10425), section 2; on log-ratios: Liu et al. 2023 (arXiv
    2309.06657).
    """
    return torch.relu(1 - o.beta * _score_margin(x, o))


def ipo(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """Squared distance of the margin per token from 1/(2 beta).

        L = (s_c/|y_c| - s_r/|y_r| - 1/(2 beta))^2

    Azar et al. 2023 (arXiv 2310.12036), eq. 17, per token by TRL's convention.
    """
    return (_token_margin(x, o) - 0.5 / o.beta) ** 2


def exo_pair(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """KL from the policy's choice between the two completions to the smoothed label's.

        L = q log(q/(1 - eps)) + (1 - q) log((1 - q)/eps),   q = sigma(beta (s_c - s_r))

    Ji et al. 2024 (arXiv 2402.00856), eq. 16; eps must be more than 0, they recommend 0.001.
    """
    z = o.beta * _score_margin(x, o)
    win = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-o.label_smoothing))
    return win + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(o.label_smoothing))


def nca_pair(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """Noise contrastive alignment: raises the chosen likelihood itself, not only the margin.

        L = -log sigma(beta r_c) - 1/2 log sigma(-beta r_c) - 1/2 log sigma(-beta r_r)

    Chen et al. 2024 (arXiv 2402.05369), section 4.1.
    """
    chosen, rejected = o.beta * x.chosen_ratio, o.beta * x.rejected_ratio
    noise = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * noise


def robust(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """DPO's loss without bias where a label is flipped with probability eps.

        L = (-(1 - eps) log sigma(z) + eps log sigma(-z)) / (1 - 2 eps),   z = beta (s_c - s_r)

    Chowdhury et al. 2024 (arXiv 2403.00409), section 3.1.
    """
    z, eps = o.beta * _score_margin(x, o), o.label_smoothing
    return (eps * F.logsigmoid(-z) - (1 - eps) * F.logsigmoid(z)) / (1 - 2 * eps)


def bco_pair(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """A classifier whose logit is the reward: chosen is 1, rejected 0. No running reward shift.

        L = -log sigma(beta r_c) - log sigma(-beta r_r)

    Jung et al. 2024 (arXiv 2404.04656), section 4, on pairs.
    """
    return -F.logsigmoid(o.beta * x.chosen_ratio) - F.logsigmoid(-o.beta * x.rejected_ratio)


def sppo_hard(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """Self-play preference optimization, the chosen completion winning with probability 1.

        L = (r_c - 1/(2 beta))^2 + (r_r + 1/(2 beta))^2

    Wu et al. 2024 (arXiv 2405.00675), eq. 4.7.
    """
    return (x.chosen_ratio - 0.5 / o.beta) ** 2 + (x.rejected_ratio + 0.5 / o.beta) ** 2


def aot(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """The step's policy margins stochastically dominate the reference's, quantile by quantile.

        L_(j) = -(1 - eps) log sigma(beta d_j) - eps log sigma(-beta d_j)
        d_j = sort(log pi_c - log pi_r)_j - sort(log pi_ref,c - log pi_ref,r)_j

    Melnyk et al. 2024 (arXiv 2406.05882), section 3. L_(j) stands at the pair with the j-th policy
    margin.
    """
    assert x.ref_chosen is not None and x.ref_rejected is not None
    policy, order = (x.chosen - x.rejected).sort(stable=True)
    reference = (x.ref_chosen - x.ref_rejected).sort().values
    return _logistic(o.beta * (policy - reference), o.label_smoothing)[order.argsort()]


def aot_unpaired(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """The step's chosen log-ratios stochastically dominate its rejected ones.

        L_(j) = -(1 - eps) log sigma(beta d_j) - eps log sigma(-beta d_j)
        d_j = sort(r_c)_j - sort(r_r)_j

    Melnyk et al. 2024 (arXiv 2406.05882), section 3. L_(j) stands at the pair with the j-th chosen
    log-ratio.
    """
    chosen, order = x.chosen_ratio.sort(stable=True)
    rejected = x.rejected_ratio.sort(stable=True).values
    return _logistic(o.beta * (chosen - rejected), o.label_smoothing)[order.argsort()]


def apo_zero(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """Anchored: chosen up, rejected down; for chosen answers better than the model's own.

        L = 1 - sigma(beta r_c) + sigma(beta r_r)

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7.
    """
    return torch.sigmoid(-o.beta * x.chosen_ratio) + torch.sigmoid(o.beta * x.rejected_ratio)


def apo_down(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """Anchored: both down, rejected more; for chosen answers worse than the model's own.

        L = sigma(beta r_c) + 1 - sigma(beta (r_c - r_r))

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8.
    """
    return torch.sigmoid(o.beta * x.chosen_ratio) + torch.sigmoid(-o.beta * x.margin)


def discopop(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """The logistic and the exponential loss, mixed by the margin's size: log-ratio modulated.

        L = -(1 - w) log sigma(z) + w e^-z,   z = beta (s_c - s_r),   w = sigma(z/tau)

    Lu et al. 2024 (arXiv 2406.08414), eq. 5; tau = discopop_tau. w e^-z is formed as one
    exponential, which does not overflow.
    """
    z = o.beta * _score_margin(x, o)
    gate = z / o.discopop_tau
    return torch.exp(F.logsigmoid(gate) - z) - torch.sigmoid(-gate) * F.logsigmoid(z)


def sft(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """Negative log-likelihood of the chosen completions, per token of the optimizer step.

        L = -log pi(y_c) / n,   n = mean of |y_c| over the step's N pairs
        (1/N) sum L = sum over the step of -log pi(y_c) / sum over the step of |y_c|

    The usual loss of supervised fine-tuning, as TRL normalises it within a batch.
    """
    return x.nll / x.mean_chosen_len


def sigmoid_norm(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """DPO on log-ratios per token; smoothing as for sigmoid.

        L = -(1 - eps) log sigma(z) - eps log sigma(-z),   z = beta (s_c/|y_c| - s_r/|y_r|)

    Lambert et al. 2024 (Tulu 3, arXiv 2411.15124), the length-normalised DPO.
    """
    return _logistic(o.beta * _token_margin(x, o), o.label_smoothing)


def simpo(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """Log-probs per token, no reference, a target margin gamma.

        L = -(1 - eps) log sigma(z) - eps log sigma(-z)
        z = beta (log pi(y_c)/|y_c| - log pi(y_r)/|y_r|) - gamma

    Meng et al. 2024 (arXiv 2405.14734), eq. 6; gamma = simpo_gamma. TRL's CPOTrainer adds
    cpo_alpha x sft to it: here a list, [simpo, sft].
    """
    z = o.beta * (x.chosen / x.chosen_len - x.rejected / x.rejected_len) - o.simpo_gamma
    return _logistic(z, o.label_smoothing)


def orpo(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """Likelihood of the chosen completion plus the odds ratio of the two; beta is its lambda.

        L = -p_c - beta log sigma(log odds_c - log odds_r)
        p = log pi(y)/|y|,   log odds = p - log(1 - e^p)

    Hong et al. 2024 (arXiv 2403.07691), eq. 3, 6 and 7. The likelihood is normalised pair by pair
    over the completion, as there; TRL's ORPOTrainer counts the prompt's tokens in it too.
    """
    chosen, rejected = x.chosen / x.chosen_len, x.rejected / x.rejected_len
    log_odds = chosen - _log1mexp(chosen) - rejected + _log1mexp(rejected)
    return x.nll / x.chosen_len - o.beta * F.logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact near 0, where a sure completion lies."""
    return torch.log(-torch.expm1(x))


def cpo(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """DPO against a uniform reference, plus the likelihood of the chosen completions.

        L = -(1 - eps) log sigma(z) - eps log sigma(-z) - cpo_alpha log pi(y_c)/n
        z = beta (log pi(y_c) - log pi(y_r)),   n = mean of |y_c| over the step's pairs

    Xu et al. 2024 (arXiv 2401.08417), eq. 3; the likelihood per token of the step, as TRL's.
    """
    return _logistic(o.beta * (x.chosen - x.rejected), o.label_smoothing) + o.cpo_alpha * sft(x, o)


def rpo(x: PairLogp, o: LossOptions) -> Tensor:  # (P,)
    """DPO plus the likelihood of the chosen completion, normalised pair by pair.

        L = -(1 - eps) log sigma(z) - eps log sigma(-z) - rpo_alpha log pi(y_c)/|y_c|
        z = beta (s_c - s_r)

    Pang et al. 2024 (arXiv 2404.19733), eq. 1, divided by its alpha = 1/rpo_alpha. What TRL had
    under rpo_alpha until 0.24 is the list [sigmoid, sft], normalised over the step.
    """
    return sigmoid(x, o) + o.rpo_alpha * x.nll / x.chosen_len
