"""Update rates of behaviors from sketches of their gradients, with error bars. Numpy only.

For a behavior k: M_k = mean of grad m over its pairs, the direction in which its mean margin grows;
G_l = -(1/N) sum of grad L_j over the pairs j of behavior l among the N of a step, G = sum_l G_l the
direction that plain gradient descent takes. To first order a change of the weights delta changes
the mean margin by <M_k, delta>, and under gradient descent, delta = lr G, by lr sum_l Gamma_kl:

    Gamma_kl = <M_k, G_l>             who teaches whom: l's pairs of this step move k's margins
    share_l  = <G_l, G> / |G|^2       l's part of the step's gradient; shares sum to one
    C_k      = |E grad m|^2 / E |grad m|^2        coherence: 1 if all pairs of k pull one way
    B        = tr cov(g) / |E g|^2    gradient noise scale (McCandlish et al. 2018, arXiv
                                      1812.06162, eq. 2.9), the batch beyond which noise is small

Gradients come as sketches S, one (k, k) matrix per layer group, whose entries' products estimate
inner products. What is computed from them first is a *layout*: (..., k, k) terms whose mean is the
estimate, its rows by independent projections of the weights' outputs, its columns of their inputs.
Layouts add, subtract and scale as the quantities they estimate do, and every layout tells the
standard error of its mean (`mean_of`). A number that is known exactly is the layout of equal terms.

The layer groups have independent projections, so their layouts are added: less noise than adding
the sketches, which would have to average out what groups have not in common. Shapes: G layer
groups, K behaviors, L behaviors of the step, k sketch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray

BLOCK = 2**20  # numbers of a layout of two sets of behaviors that stand in memory at a time


class Estimate(NamedTuple):
    """float64 arrays of one shape. `error`: a standard error; nan for k = 1, which tells none."""

    value: Array
    error: Array


def products(a: Array, b: Array) -> Array:  # (..., k, k)
    """Layout of <a, b> from sketches (G, ..., k, k) of two gradients, or of a gradient and a change
    of the weights; the leading dimensions after G broadcast."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape[-2:] != b.shape[-2:] or a.shape[-1] != a.shape[-2] or a.shape[0] != b.shape[0]:
        raise ValueError(
            f"sketches of shapes {a.shape} and {b.shape}: expected (G, ..., k, k) with one G and "
            "one k; they compare only under one set of layer groups, one seed and one sketch_dim"
        )
    total = np.float64(0.0)
    for own, other in zip(a, b, strict=True):  # one group at a time
        total = total + own * other
    return np.asarray(total) * a.shape[-1] ** 2


def known(value: Array | float, k: int) -> Array:  # (..., k, k)
    """Layout of numbers (...) that need no estimate."""
    exact = np.asarray(value, np.float64)[..., None, None]
    return np.broadcast_to(exact, (*exact.shape[:-2], k, k))


def mean_of(layout: Array) -> Estimate:
    """What the layout (..., k, k) estimates, and its standard error.

    Rows and columns are random effects of a two-way layout without replication, as in
    `fastpref_kernels.sketch_estimates`, where the variance is derived.
    """
    layout = np.asarray(layout, np.float64)
    k = layout.shape[-1]
    value = layout.mean((-2, -1))
    if k == 1:
        return Estimate(value, np.full_like(value, np.nan))
    rows, columns = layout.mean(-1), layout.mean(-2)
    rest = layout - rows[..., :, None] - columns[..., None, :] + value[..., None, None]
    mean_square = (rest**2).sum((-2, -1)) / (k - 1) ** 2
    variance = (rows.var(-1, ddof=1) + columns.var(-1, ddof=1)) / k - mean_square / k**2
    # Unbiased, so single values may be negative: then no effect stands out of the rest.
    return Estimate(value, np.sqrt(np.where(variance > 0, variance, mean_square / k**2)))


def ratio_of(numerator: Array, denominator: Array) -> Estimate:
    """Ratio of what two layouts estimate; its error by first-order expansion, its bias O(1/k).

    nan where the denominator does not come out above 0.
    """
    below = denominator.mean((-2, -1))
    below = np.where(below > 0, below, np.nan)
    value = numerator.mean((-2, -1)) / below
    linear = (numerator - value[..., None, None] * denominator) / below[..., None, None]
    return Estimate(value, mean_of(linear).error)


def length_of(square: Array) -> Estimate:
    """Root of what a layout of a squared norm estimates."""
    value, error = mean_of(square)
    length = np.sqrt(np.maximum(value, 0.0))
    return Estimate(length, error / np.where(length > 0, 2 * length, np.nan))


def interactions(means: Array, parts: Array) -> Estimate:  # (K, L)
    """Gamma_kl from the sketches of M_k (G, K, k, k) and of G_l (G, L, k, k)."""
    return _by_rows(lambda own: mean_of(_all_products(own, parts)), means, parts)


def cosines(means: Array, parts: Array) -> Estimate:  # (K, L)
    """Cosines of the angles between M_k and G_l, within -1 .. 1; nan where one of them is 0."""
    square = products(parts, parts)
    return _by_rows(lambda own: _cosines(own, parts, square), means, parts)


def _cosines(means: Array, parts: Array, parts_square: Array) -> Estimate:
    dots = _all_products(means, parts)
    first, second = products(means, means)[:, None], parts_square[None]
    lengths = [layout.mean((-2, -1)) for layout in (first, second)]
    lengths = [np.where(length > 0, length, np.nan) for length in lengths]
    scale = np.sqrt(lengths[0] * lengths[1])
    value = dots.mean((-2, -1)) / scale
    relative = first / lengths[0][..., None, None] + second / lengths[1][..., None, None]
    linear = dots / scale[..., None, None] - value[..., None, None] * relative / 2
    return Estimate(value, mean_of(linear).error)


def _all_products(means: Array, parts: Array) -> Array:  # (K, L, k, k)
    """`products` of every one of ``means`` with every one of ``parts``."""
    k = means.shape[-1]
    dots = means.transpose(2, 3, 1, 0) @ parts.transpose(2, 3, 0, 1)  # (k, k, K, L)
    return np.ascontiguousarray(dots.transpose(2, 3, 0, 1)) * k**2


def _by_rows(estimate: Callable[[Array], Estimate], means: Array, parts: Array) -> Estimate:
    """``estimate`` of some behaviors of ``means`` at a time: K L k^2 numbers are many."""
    step = max(1, BLOCK // max(1, parts[0].size))
    found = [estimate(means[:, i : i + step]) for i in range(0, means.shape[1], step)]
    return Estimate(*(np.concatenate(own) for own in zip(*found, strict=True)))


def shares(parts: Array) -> Estimate:  # (L,)
    """share_l from the sketches of G_l (G, L, k, k). Their estimates sum to one as shares do."""
    whole = parts.sum(axis=1)
    return ratio_of(products(parts, whole[:, None]), products(whole, whole))


def first_order(means: Array, change: Array) -> Estimate:  # (K,)
    """<M_k, change>: what a change of the weights (G, k, k), whoever made it, does to the mean
    margins. Of lr G it is the rate under plain gradient descent, of what an optimizer did to the
    weights the optimizer-true rate."""
    return mean_of(products(means, change[:, None]))


def excess(mean: Array, squares: Array, count: Array) -> Array:
    """Layout of what |mean g|^2 of n pairs is too long by, from those of |mean g|^2 and mean |g|^2.

    The mean of n independent gradients has E |mean g|^2 = |E g|^2 + tr cov(g) / n; an unbiased
    estimate of the latter is (mean |g|^2 - |mean g|^2) / (n - 1). nan for n = 1, which tells none.
    """
    n = np.asarray(count, np.float64)[..., None, None]
    return np.where(n > 1, squares - mean, np.nan) / np.maximum(n - 1, 1)


def excess_of_strata(mean: Array, squares: Array, count: Array, of: Array, size: int) -> Array:
    """`excess` of each of K = ``size`` behaviors whose pairs were drawn stratum by stratum (labels
    in proportion), from layouts (S, k, k) of the strata, their n (S,), and the behaviors ``of``.

    Between strata nothing is left to chance, so that only what is left over within them adds to
    |mean g|^2: sum_s (n_s / n)^2 tr cov_s / n_s (Cochran, Sampling Techniques, theorem 5.3). nan
    where a stratum has one pair.
    """
    weight = count / np.bincount(of, count, size)[of]
    total = np.zeros((size, *mean.shape[1:]))
    np.add.at(total, of, weight[:, None, None] ** 2 * excess(mean, squares, count))
    return total


def coherence(true: Array, squares: Array) -> Estimate:
    """C from layouts of |E g|^2, which is |mean g|^2 - `excess`, and of mean |g|^2.

    |mean g|^2 / mean |g|^2 of n pairs that have nothing in common is 1/n; this is 0 on average.
    """
    return ratio_of(true, squares)


def noise_scale(true: Array, squares: Array) -> Estimate:
    """B from the same layouts; nan where |E g|^2 does not come out above 0. Its error is that of
    the sketches: n pairs leave more uncertainty than that."""
    return ratio_of(squares - true, true)


def mean_change(before: Array, after: Array, behavior: Array, count: int) -> Estimate:  # (K,)
    """Mean of after - before over the pairs of each of K = ``count`` behaviors, and the standard
    error of that mean over pairs (nan for one pair). before, after, behavior: (P,)."""
    change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    n = np.bincount(behavior, minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(behavior, change, count) / n
        deviation = np.bincount(behavior, (change - mean[behavior]) ** 2, count)
        return Estimate(mean, np.where(n > 1, np.sqrt(deviation / (n * (n - 1.0))), np.nan))
