"""What sketches tell: inner products, squared norms, cosines, each with its standard error.

A sketch has k columns by independent projections of the inputs and k rows by independent
projections of the outputs, so the k^2 terms of an estimate form a two-way layout without
replication: t_ab = mean + row effect + column effect + rest, all uncorrelated. The variance of
their mean follows from them without bias (Scheffe, The Analysis of Variance, chapter 7):

    var = (s^2_rows + s^2_columns) / k - MS_rest / k^2

s^2_rows the sample variance of the k row means, MS_rest the mean square of what rows and columns
leave over, with (k - 1)^2 degrees of freedom. It needs no knowledge of the gradient, and holds for
sums of sketches of any number of weights. Shapes: k sketch size; leading dimensions broadcast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._route import is_plain


class Estimate(NamedTuple):
    """float64. `error`: one standard error; NaN for k = 1, where nothing tells it."""

    value: Tensor
    error: Tensor


def sketch_dot(a: Tensor, b: Tensor | None = None) -> Estimate:
    """<G_a, G_b> of sketches (..., k, k) of one seed and the same keys; of a with itself, the
    squared norm, for b None. Unbiased."""
    name = "sketch_dot"
    a, b = _checked(name, a, b)
    if a.shape[-1] > 1 and a.shape == b.shape and _plainly(a) and _plainly(b):
        return Estimate(*_native.sketch_dots(a, b))
    terms = a.double() * b.double() * a.shape[-1] ** 2
    return Estimate(terms.mean((-2, -1)), _standard_error(terms))


def sketch_cosine(a: Tensor, b: Tensor) -> Estimate:
    """Cosine of the angle between G_a and G_b, within -1 .. 1; biased by O(1 / k).

    Its error is that of the first-order expansion in the three inner products.
    """
    a, b = (x.double() for x in _checked("sketch_cosine", a, b))
    square = a.shape[-1] ** 2
    dots, first, second = a * b * square, a * a * square, b * b * square
    length_a, length_b = first.mean((-2, -1)), second.mean((-2, -1))
    scale = (length_a * length_b).sqrt()
    value = dots.mean((-2, -1)) / scale
    terms = dots / _over(scale) - _over(value) * 0.5 * (
        first / _over(length_a) + second / _over(length_b)
    )
    return Estimate(value, _standard_error(terms))


def relative_spread(k: int, participation: float = 1.0) -> float:
    """Standard deviation of an estimated squared norm over that norm, at most, before any run.

        sqrt(2 / k^2 + (4 / k + 2 / k^2) / n)

    n, the participation, is (sum s^2)^2 / sum s^4 over the singular values s of one weight's
    gradient; of a sum over weights with shares e_l of the squared norm, 1 / n = sum e_l^2 / n_l. n
    = 1, one weight whose gradient has rank one, is the worst. Exact for Gaussian entries, an upper
    bound for signs.
    """
    if k < 1 or not participation >= 1:
        raise ValueError(
            f"relative_spread: k and participation must be at least 1, got {k!r} and "
            f"{participation!r}."
        )
    return float((2 / k**2 + (4 / k + 2 / k**2) / participation) ** 0.5)


def _plainly(x: Tensor) -> bool:
    return is_plain(x) and _native.fits(x) and not (x.requires_grad and torch.is_grad_enabled())


def _checked(name: str, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    for label, tensor in (("a", a), ("b", a if b is None else b)):
        if tensor.dim() < 2 or tensor.shape[-1] != tensor.shape[-2] or not tensor.shape[-1]:
            raise ValueError(
                f"{name}: expected {label} (..., k, k) with k >= 1, got {tuple(tensor.shape)}."
            )
    if b is not None and a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{name}: a and b have different k, {a.shape[-1]} and {b.shape[-1]}; sketches compare "
            "only under one k, one seed and the same keys."
        )
    return a, a if b is None else b


def _over(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).unsqueeze(-1)


def _standard_error(terms: Tensor) -> Tensor:
    k = terms.shape[-1]
    if k == 1:
        return torch.full_like(terms[..., 0, 0], torch.nan)
    rows, columns = terms.mean(-1), terms.mean(-2)
    # What rows and columns leave over, by sums of squares: one pass over the terms, not six.
    whole = rows.mean(-1)
    left = terms.square().sum((-2, -1)) - k * (
        rows.square().sum(-1) + columns.square().sum(-1) - k * whole.square()
    )
    mean_square = left.clamp(min=0) / (k - 1) ** 2
    variance = (rows.var(-1) + columns.var(-1)) / k - mean_square / k**2
    # Its mean is right, single values may be negative: then no effect stands out, and what the
    # rest alone gives is the estimate.
    return torch.where(variance > 0, variance, mean_square / k**2).sqrt()
