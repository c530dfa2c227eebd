"""Argument checks of the per-pair norms and sketches: which argument, what was expected, what came.

Shapes: T rows, S segments, g group_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._head_checks import DTYPES, check_counts

_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def check_rows(name: str, first: tuple[str, Tensor], *others: tuple[str, Tensor]) -> None:
    """Floating tensors of at least two dimensions with one row for every row of the first."""
    lead, model = first
    for label, tensor in (first, *others):
        if tensor.dim() < 2:
            raise ValueError(
                f"{name}: expected {label} (T, ...) with at least two dimensions, got "
                f"{tuple(tensor.shape)}. Flatten batch and position: {label}.flatten(0, -2)."
            )
        check_dtype(name, label, tensor)
        if tensor.shape[0] != model.shape[0]:
            raise ValueError(
                f"{name}: expected {label} with the {model.shape[0]} rows of {lead}, got "
                f"{tuple(tensor.shape)}."
            )
        check_device(name, lead, model, label, tensor)


def check_matrix(name: str, label: str, tensor: Tensor, columns: int | None = None) -> None:
    """Two dimensions, and as many columns as given."""
    if tensor.dim() != 2 or (columns is not None and tensor.shape[1] != columns):
        wanted = "(rows, columns)" if columns is None else f"(rows, {columns})"
        raise ValueError(f"{name}: expected {label} {wanted}, got {tuple(tensor.shape)}.")
    check_dtype(name, label, tensor)


def check_dtype(name: str, label: str, tensor: Tensor) -> None:
    """One of the floating dtypes that are supported."""
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name}: {label} must have a dtype of {_NAMES}, got {tensor.dtype}. "
            f"Convert it, e.g. {label}.float()."
        )


def check_device(name: str, lead: str, model: Tensor, label: str, tensor: Tensor) -> None:
    """Both on one device."""
    if tensor.device != model.device:
        raise ValueError(
            f"{name}: {lead} is on {model.device} but {label} on {tensor.device}; move one."
        )


def check_ids(name: str, label: str, ids: Tensor, lead: str, model: Tensor) -> None:
    """int32 or int64, one for every row of `model`."""
    if ids.shape != model.shape[:1] or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: expected {label} ({model.shape[0]},) int32 or int64, got "
            f"{tuple(ids.shape)} {ids.dtype}."
        )
    check_device(name, lead, model, label, ids)


def check_count(name: str, label: str, value: int) -> None:
    """A whole number that is not negative."""
    if not isinstance(value, (int, torch.SymInt)) or value < 0:
        raise ValueError(f"{name}: {label} must be >= 0 and an int, got {value!r}.")


def check_scale(name: str, scale: float) -> None:
    """A finite number."""
    if not abs(scale) < math.inf:
        raise ValueError(f"{name}: scale must be finite, got {scale!r}.")


def check_segments(
    name: str,
    rows: int,
    num_segments: int,
    group_size: int | None,
    counts: Sequence[int] | None,
) -> int:
    """Numbers of segments that fit together; returns g, which is 1 for None."""
    check_count(name, "num_segments", num_segments)
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(
            f"{name}: group_size must be an int of at least 1 or None, got {group_size!r}."
        )
    size = group_size or 1
    if num_segments % size:
        raise ValueError(
            f"{name}: num_segments={num_segments} is not a multiple of group_size={size}. "
            "Pad the last group with empty segments."
        )
    if counts is not None:
        check_counts(name, rows, num_segments, counts)
    return size
