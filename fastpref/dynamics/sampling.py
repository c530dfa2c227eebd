"""What a sample of each behavior's pairs says of all of them: the group jackknife. Numpy only.

The pairs of a sample are dealt into J folds, in which labels stand in the sample's proportion. With
one fold left out in turn, quantities vary; from that come their standard error over pairs, and the
part of their bias that goes with 1 / n: M_k and G_k of the same pairs agree more than those of all
pairs do (Quenouille 1956; Shao & Tu 1995, The Jackknife and Bootstrap, 2.3). Shapes: K behaviors, S
strata (labels of a behavior), G layer groups, k sketch size, J folds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastpref.dynamics import rates
from fastpref.dynamics.rate_rows import Totals
from fastpref.dynamics.rates import Estimate

Array = np.ndarray
FOLDS = 8
# Quantities that are estimated for all pairs of the data.
ESTIMATED = ("dot", "cos", "share", "rate", "chosen_rate")
UNBIASED = ("dot", "share", "rate", "chosen_rate")  # a cosine stays within -1 .. 1 as it is


@dataclass(frozen=True)
class FoldSums:
    """Sums over the pairs of each fold of each behavior."""

    count: Array  # (K, J)
    sketch: Array  # (G, K, J, k, k)

    def mean(self, without: int | None = None) -> Array:  # (K, G k k)
        """The mean gradient of each behavior, flat, without the pairs of one fold; of a behavior
        that has no others, of all its pairs."""
        kept = np.ones(self.count.shape[1])
        if without is not None:
            kept[without] = 0.0
        count = self.count @ kept
        all_pairs = count == 0
        weight = np.where(all_pairs[:, None], 1.0, kept)  # (K, J)
        total = np.einsum("gkjab,kj->kgab", self.sketch, weight)
        return total.reshape(len(count), -1) / (self.count * weight).sum(axis=1)[:, None]


def fold_sums(strata: Totals, of: Array, size: int) -> FoldSums:
    """Sums of the folds of K = ``size`` behaviors, from those of S J folds of strata, the folds of
    a stratum together; ``of`` (S,) says of which behavior each stratum is."""
    into = (of[:, None] * FOLDS + np.arange(FOLDS)).reshape(-1)
    own = strata.merged(into, size * FOLDS)
    g, _, *sides = own.sketch.shape
    return FoldSums(own.count.reshape(size, FOLDS), own.sketch.reshape(g, size, FOLDS, *sides))


def over_folds(strata: Totals) -> Totals:
    """Of S strata, from the sums of their folds."""
    size = len(strata.count) // FOLDS
    return strata.merged(np.repeat(np.arange(size), FOLDS), size)


def of_the_whole(taken: Totals, whole: Array) -> Totals:
    """The sums, as those of all ``whole`` (K,) pairs of each behavior would be."""
    factor = whole / taken.count
    return Totals(
        whole.astype(np.float64),
        taken.sketch * factor[:, None, None],
        taken.square * factor[:, None, None],
        taken.norm_sq * factor,
        taken.norm_error * factor,
        taken.change,
    )


def quantities(margin: Array, parts: Array, chosen: Array | None) -> dict[str, Array]:
    """Gamma and what follows from it: sketches flat, whose products estimate inner products.

    margin: (K, F) of M_k; parts: (K, F) of G_k; chosen: (K, F) of mean grad logp_chosen.
    """
    whole = parts.sum(axis=0)
    dot = margin @ parts.T
    lengths = np.sqrt(np.outer((margin**2).sum(axis=1), (parts**2).sum(axis=1)))
    square = float(whole @ whole)
    found = {
        "dot": dot,
        "cos": dot / np.where(lengths > 0, lengths, np.nan),
        "share": parts @ whole / (square if square > 0 else np.nan),
        "rate": margin @ whole,
    }
    return found if chosen is None else found | {"chosen_rate": chosen @ whole}


def estimated(
    margin: FoldSums,  # of grad m
    losses: FoldSums,  # of the gradients of the losses
    chosen: FoldSums | None,  # of grad logp_chosen
    whole: Array,  # (K,) pairs of each behavior in the data
    sketch_error: dict[str, Array],
) -> dict[str, Estimate]:
    """`ESTIMATED` for all pairs of the data, G_l being its part of full-batch gradient descent.

    The error is that over pairs, where not all are looked at, and that of the sketches together.
    """
    fraction = (whole / whole.sum())[:, None]

    def found(without: int | None = None) -> dict[str, Array]:
        parts = -losses.mean(without) * fraction
        beside = None if chosen is None else chosen.mean(without)
        return quantities(margin.mean(without), parts, beside)

    plain = found()
    if (margin.count.sum(axis=1) >= whole).all():
        return {name: Estimate(value, sketch_error[name]) for name, value in plain.items()}
    folds = margin.count.shape[1]
    left_out = [found(j) for j in range(folds)]
    estimates = {}
    for name, value in plain.items():
        each = np.stack([one[name] for one in left_out])
        error = np.sqrt((folds - 1) / folds * ((each - each.mean(axis=0)) ** 2).sum(axis=0))
        if name in UNBIASED:
            value = folds * value - (folds - 1) * each.mean(axis=0)
        estimates[name] = Estimate(value, np.hypot(error, sketch_error[name]))
    return estimates


def data_noise_scale(strata: Totals, of: Array, whole: Array) -> Estimate:
    """Gradient noise scale of the losses of all pairs of the data, from samples of each behavior.

    strata: sums over the sample's pairs, by stratum; ``of`` (S,) their behaviors; whole: (K,) pairs
    of each behavior in the data. |mean g|^2 is too long by what each behavior's own mean is, times
    its squared part of the data. Of a behavior with a single pair that is not known, and E|g|^2,
    which it cannot pass, stands in.
    """
    size, fraction = len(whole), whole / whole.sum()
    losses = strata.merged(of, size)
    count = losses.count[:, None, None]
    means, squares = losses.sketch / count, losses.squares().sum(axis=0) / count
    n = strata.count[:, None, None]
    own = strata.sketch / n
    too_long = rates.excess_of_strata(
        rates.products(own, own), strata.squares().sum(axis=0) / n, strata.count, of, size
    )
    for stand_in in (rates.excess(rates.products(means, means), squares, losses.count), squares):
        too_long = np.where(np.isnan(too_long), stand_in, too_long)
    direction = np.einsum("k,gkab->gab", fraction, means)
    bias = np.einsum("k,kab->ab", fraction**2, too_long)
    true = rates.products(direction, direction) - bias
    return rates.noise_scale(true, np.einsum("k,kab->ab", fraction, squares))
