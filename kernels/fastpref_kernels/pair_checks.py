"""Argument checks of `pair_loss`: what can be told without reading a tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _launch

LOSS_TYPES = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm")
SMOOTHED = ("sigmoid", "robust", "sigmoid_norm")


def check_pair_loss(
    logp: Tensor,
    segment_id: Tensor | None,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    group_size: int,
    num_segments: int | None,
    chosen_len: Tensor | None,
    rejected_len: Tensor | None,
    per_token: bool,
) -> int:
    """Raises ValueError naming argument, expectation and offender; returns the number of pairs."""
    check_options(beta, loss_type, label_smoothing, group_size)
    if logp.dim() != 1 or logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"pair_loss: expected logp (R,) float32 or float64, got {tuple(logp.shape)} "
            f"{logp.dtype}."
            + (" Half types cannot hold sums of log-probs." if logp.dtype.itemsize == 2 else "")
        )
    if segment_id is not None and (
        segment_id.shape != logp.shape or segment_id.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"pair_loss: expected segment_id ({logp.shape[0]},) int32 or int64, as many as logp, "
            f"got {tuple(segment_id.shape)} {segment_id.dtype}."
        )
    pairs = _count_pairs(logp, segment_id, ref_chosen, ref_rejected, group_size, num_segments)
    named = {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    lengths = {"chosen_len": chosen_len, "rejected_len": rejected_len}
    for one, both in (("ref", named), ("len", lengths)):
        missing = [name for name, tensor in both.items() if tensor is None]
        if len(missing) == 1:
            raise ValueError(f"pair_loss: give both {' and '.join(both)} or neither; no {one}.")
    if per_token and chosen_len is None and segment_id is None:
        raise ValueError(
            f"pair_loss: {loss_type} divides by the number of scored tokens, which cannot be "
            "counted without segment_id. Give chosen_len and rejected_len."
        )
    for name, tensor in {**named, **lengths}.items():
        if tensor is not None:
            _check_per_pair(name, tensor, pairs, floating=name in named)
    for name, tensor in {"segment_id": segment_id, **named, **lengths}.items():
        if tensor is not None and tensor.device != logp.device:
            raise ValueError(
                f"pair_loss: logp is on {logp.device} but {name} on {tensor.device}; move one."
            )
    return pairs


def check_options(beta: float, loss_type: str, label_smoothing: float, group_size: int) -> None:
    """The numbers and names alone, so that a caller can check them before any work is done."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(
            f"pair_loss: loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}."
            f"{_launch.nearest(str(loss_type), LOSS_TYPES)}"
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"pair_loss: beta must be positive and finite, got {beta!r}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            "pair_loss: label_smoothing is the probability that a label is wrong, 0 or more and "
            f"below 0.5, got {label_smoothing!r}."
        )
    if label_smoothing and loss_type not in SMOOTHED:
        raise ValueError(
            f"pair_loss: label_smoothing={label_smoothing!r} is not defined for {loss_type}, only "
            f"for {', '.join(SMOOTHED)}. Set it to 0."
        )
    if group_size not in (2, 3):
        raise ValueError(
            "pair_loss: group_size must be 2 (chosen, rejected) or 3 (shared rows, rest of "
            f"chosen, rest of rejected), got {group_size!r}."
        )


def _count_pairs(
    logp: Tensor,
    segment_id: Tensor | None,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    group_size: int,
    num_segments: int | None,
) -> int:
    rows = logp.shape[0]
    if segment_id is None:
        if num_segments not in (None, rows):
            raise ValueError(
                "pair_loss: without segment_id logp holds one number per segment, so num_segments "
                f"must be None or {rows}, got {num_segments}."
            )
        num_segments = rows
    reference = ref_chosen if ref_chosen is not None else ref_rejected
    if num_segments is None and reference is not None and reference.dim() == 1:
        return reference.shape[0]
    if num_segments is None:
        raise ValueError(
            "pair_loss: give num_segments, group_size times the number of pairs: without reference "
            "log-probs nothing else says how many pairs there are."
        )
    if num_segments < 0 or num_segments % group_size:
        kind = "odd" if group_size == 2 and num_segments % 2 else "no multiple of group_size"
        raise ValueError(
            f"pair_loss: every pair has {group_size} segments, but there are {num_segments}, "
            f"{kind}. Pad with empty segments, or see group_size."
        )
    return num_segments // group_size


def _check_per_pair(name: str, tensor: Tensor, pairs: int, *, floating: bool) -> None:
    if tensor.shape != (pairs,) or (floating and not tensor.dtype.is_floating_point):
        raise ValueError(
            f"pair_loss: expected {name} ({pairs},), one per pair"
            f"{', of a floating dtype' if floating else ''}, got {tuple(tensor.shape)} "
            f"{tensor.dtype}."
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"pair_loss: {name} requires grad, but is a constant of the loss. Give {name}.detach()."
        )
