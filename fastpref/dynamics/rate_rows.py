"""From sums of gradients over pairs to the columns of rates in the records. Numpy only.

`fastpref.track` makes the sums, `fastpref.dynamics.rates` knows the equations. Shapes: K behaviors
of the run, K' those of the sample, L those of the step, S strata of the sample, G layer groups, k
sketch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from fastpref.dynamics import rates
from fastpref.dynamics.inequality import atkinson, gini

Array = np.ndarray


@dataclass(frozen=True)
class Totals:
    """Sums over the pairs of each behavior, of one gradient each: of m, or of the loss."""

    count: Array  # (K,) pairs
    sketch: Array  # (G, K, k, k)
    square: Array  # (G, K, k, k) of the sketches' entries, squared
    norm_sq: Array  # (G, K) of squared norms
    norm_error: Array  # (G, K) of their standard errors: 0 where they are exact
    change: Array  # (K,) of inner products with what the step did to the weights; 0 if not known

    def squares(self) -> Array:
        """(G, K, k, k) layouts of the summed squared norms: the norms themselves in a group where
        they are exact, what the sketches say elsewhere."""
        k = self.sketch.shape[-1]
        exact = (self.norm_error == 0)[..., None, None]
        return np.where(exact, rates.known(self.norm_sq, k), self.square * k**2)

    def merged(self, into: Array, size: int) -> Totals:
        """The same sums of ``size`` larger groups; ``into`` (K,) says which one takes in which."""
        parts = {}
        for spec in fields(self):
            old = getattr(self, spec.name)
            axis = 1 if old.ndim > 1 else 0
            first = np.moveaxis(old, axis, 0)
            new = np.zeros((size, *first.shape[1:]))
            np.add.at(new, into, first)
            parts[spec.name] = np.moveaxis(new, 0, axis)
        return Totals(**parts)


@dataclass(frozen=True)
class Measured:
    """Around one step."""

    strata: Totals  # of grad m over the rate sample, before the step: (S,) in the place of (K,)
    stratum_of: Array  # (S,) behaviors of the strata
    step: Totals  # of the gradients of the losses of the step's pairs
    num_pairs: int  # of the step
    learning_rate: float
    update: Array  # (G, k, k) sketch of what the step did to the weights
    exact: bool  # strata.change is known

    @cached_property
    def sample(self) -> Totals:
        """`strata` by behavior."""
        return self.strata.merged(self.stratum_of, len(self.step.count))

    @property
    def present(self) -> Array:
        """(K',) indices of the behaviors of the sample."""
        return np.flatnonzero(self.sample.count)

    @property
    def teachers(self) -> Array:
        """(L,) indices of the behaviors with pairs in the step."""
        return np.flatnonzero(self.step.count)

    def means(self) -> Array:
        """(G, K', k, k) sketches of M_k."""
        own = self.present
        return self.sample.sketch[:, own] / self.sample.count[own][:, None, None]

    def parts(self) -> Array:
        """(G, L, k, k) sketches of G_l."""
        return -self.step.sketch[:, self.teachers] / self.num_pairs


def behavior_columns(of: Measured) -> dict[str, Array]:
    """Columns of `behaviors`, (K',) each, of the behaviors `of.present`."""
    own, means, parts = of.present, of.means(), of.parts()
    count = of.sample.count[own]
    squares = of.sample.squares()[:, own].sum(axis=0) / count[:, None, None]
    mean = rates.products(means, means)
    true = mean - _excess(of, mean, squares)
    share = np.zeros((2, len(of.sample.count)))  # behaviors without a pair have no part in it
    share[:, of.teachers] = rates.shares(parts)
    optimizer = rates.first_order(means, of.update)
    if of.exact:
        optimizer = rates.Estimate(of.sample.change[own] / count, np.zeros(len(own)))
    found = {
        "gnorm_m_sq": rates.mean_of(squares),
        "group_gnorm": rates.length_of(mean),
        "coherence": rates.coherence(true, squares),
        "gradient_noise_scale": rates.noise_scale(true, squares),
        "share": rates.Estimate(*share[:, own]),
        "rate_pred_sgd": rates.first_order(means, of.learning_rate * parts.sum(axis=1)),
        "rate_pred_opt": optimizer,
    }
    columns = {name: estimate.value for name, estimate in found.items()}
    return columns | {f"{name}_error": estimate.error for name, estimate in found.items()}


def _excess(of: Measured, mean: Array, squares: Array) -> Array:
    """(K', k, k) what |M_k|^2 is too long by, as its pairs were drawn: in proportion from strata,
    or, where a stratum has one pair only, as if from the behavior at large."""
    strata, own = of.strata, of.present
    present = np.flatnonzero(strata.count)
    n = strata.count[present]
    means = strata.sketch[:, present] / n[:, None, None]
    within = rates.excess_of_strata(
        rates.products(means, means),
        strata.squares()[:, present].sum(axis=0) / n[:, None, None],
        n,
        of.stratum_of[present],
        len(of.step.count),
    )[own]
    return np.where(np.isnan(within), rates.excess(mean, squares, of.sample.count[own]), within)


def gram_rows(of: Measured, behaviors: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `gram`: K' times L of them."""
    means, parts = of.means(), of.parts()
    dot, cos = rates.interactions(means, parts), rates.cosines(means, parts)
    return [
        {
            "behavior": behaviors[k],
            "other": behaviors[other],
            "dot": known(dot.value[i, j]),
            "dot_error": known(dot.error[i, j]),
            "cos": known(cos.value[i, j]),
            "cos_error": known(cos.error[i, j]),
        }
        for i, k in enumerate(of.present)
        for j, other in enumerate(of.teachers)
    ]


def noise_columns(of: Measured, grad_norm: float) -> dict[str, Any]:
    """Gradient noise scales of the step, in all weights and by layer group, for `steps`.

    grad_norm: norm of the mean gradient of the step's pairs, before clipping.
    """
    n = np.array(of.num_pairs)
    squares = of.step.squares().sum(axis=1) / of.num_pairs  # (G, k, k)
    whole = of.parts().sum(axis=1)
    apart = rates.products(whole[None], whole[None])
    mean = rates.known(grad_norm**2, whole.shape[-1])
    whole_squares = squares.sum(axis=0)
    together = rates.noise_scale(mean - rates.excess(mean, whole_squares, n), whole_squares)
    groups = rates.noise_scale(apart - rates.excess(apart, squares, n), squares)
    return {
        "gradient_noise_scale": known(float(together.value)),
        "gradient_noise_scale_error": known(float(together.error)),
        "gradient_noise_scale_groups": [known(value) for value in groups.value],
    }


def moved_columns(moved: Array) -> dict[str, Any]:
    """`module_update_norm` and its error from the sketch (G, k, k) of weights - their start."""
    length = rates.length_of(rates.products(moved[None], moved[None]))
    return {
        "module_update_norm": [known(value) for value in length.value],
        "module_update_norm_error": [known(value) for value in length.error],
    }


def inequality_columns(rate: Array, margin: Array) -> dict[str, Any]:
    """Gini and Atkinson over behaviors of (K',) rates and mean margins, for `steps`."""
    values = {"rate": rate, "margin": margin}
    return {
        f"{name}_{index.__name__}": known(index(own))
        for name, own in values.items()
        for index in (gini, atkinson)
    }


def known(value: float | np.floating) -> float | None:
    """None for what is not a finite number, as the records write it."""
    return float(value) if math.isfinite(value) else None
