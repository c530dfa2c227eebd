"""Argument checks of the head's functions, and those that norms and sketches share with them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import nearest

SEGMENT_STATS = (
    "entropy",
    "sum_sq_prob",
    "log_sum_sq_prob",
    "residual_sq",
    "top1",
    "argmax_logp",
    "mean_logit",
)
ROW_STATS = ("argmax", "log1m_pmax", "row_norm_sq", "row_logp")
LEAST_BUCKETS, MOST_BUCKETS = 64, 8192  # of the vocabulary, in a CountSketch
FEW = 1024  # numbers that are read as a list in less time than an op takes to be called
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Described(NamedTuple):
    """What can be told of a tensor without reading it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    wants_grad: bool  # requires_grad, in grad mode

    @staticmethod
    def of(x: Tensor) -> Described:
        return Described(x.shape, x.dtype, x.device, x.requires_grad and torch.is_grad_enabled())


def check_tensors(**tensors: Tensor | None) -> None:
    """That they are tensors; segment_id and bias may be None."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and not (x is None and name in ("segment_id", "bias")):
            raise ValueError(f"linear_logprob: {name} must be a tensor, got {type(x).__name__}.")


def check_shapes(
    hidden: Described,
    weight: Described,
    target: Described,
    segment_id: Described | None,
    bias: Described | None,
) -> None:
    """Shapes, dtypes and devices."""
    if len(hidden.shape) != 2 or len(weight.shape) != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "linear_logprob: expected hidden (R, D) and weight (V, D), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if weight.shape[0] < 1:
        raise ValueError("linear_logprob: weight has no rows; the vocabulary needs at least one.")
    if hidden.dtype not in DTYPES or hidden.dtype != weight.dtype:
        raise ValueError(
            "linear_logprob: hidden and weight must have one dtype of float64, float32, bfloat16, "
            f"float16, got {hidden.dtype} and {weight.dtype}. "
            "Convert one, e.g. hidden.to(weight.dtype)."
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"linear_logprob: expected target ({hidden.shape[0]},) int64, got "
            f"{tuple(target.shape)} {target.dtype}."
        )
    if segment_id is not None and (
        segment_id.shape != target.shape or segment_id.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"linear_logprob: expected segment_id ({hidden.shape[0]},) int32 or int64, got "
            f"{tuple(segment_id.shape)} {segment_id.dtype}."
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in DTYPES):
        raise ValueError(
            f"linear_logprob: expected bias ({weight.shape[0]},) of float64, float32, bfloat16 or "
            f"float16, got {tuple(bias.shape)} {bias.dtype}."
        )
    for name, tensor in (
        ("weight", weight),
        ("target", target),
        ("segment_id", segment_id),
        ("bias", bias),
    ):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"linear_logprob: hidden is on {hidden.device} but {name} on {tensor.device}; "
                "move one."
            )


def check_numbers(
    softcap: float | None, logit_scale: float, temperature: float, cache: int, group_size: int
) -> None:
    """ValueError for an option of `linear_logprob` that is no number of its range."""
    scales = (("softcap", softcap), ("temperature", temperature), ("logit_scale", logit_scale))
    for name, value in scales:
        # A tensor would get no gradient, and its value may change after it was checked.
        known = isinstance(value, (Real, torch.SymFloat, torch.SymInt))
        if not known and not (name == "softcap" and value is None):
            raise ValueError(f"linear_logprob: {name} must be a number, got {value!r}.")
    for name, value in scales[:2]:
        if value is not None and not 0 < value < math.inf:
            raise ValueError(
                f"linear_logprob: {name} must be positive and finite, got {value!r}."
                + (" Use None for no softcap." if name == "softcap" else "")
            )
    if not abs(logit_scale) < math.inf:
        raise ValueError(f"linear_logprob: logit_scale must be finite, got {logit_scale!r}.")
    if not isinstance(cache, int) or cache < -1:
        raise ValueError(
            "linear_logprob: cache must be -1 (keep every tile) or a number of tiles >= 0, got "
            f"{cache!r}."
        )
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f"linear_logprob: group_size must be an int of at least 1, got {group_size!r}."
        )


def check_names(stats: Sequence[str], norms: str | None) -> None:
    """ValueError for statistics or norms that `linear_logprob` does not know."""
    known = SEGMENT_STATS + ROW_STATS
    if not isinstance(stats, Collection):
        raise ValueError(f"linear_logprob: stats must be a sequence of names, got {stats!r}.")
    if isinstance(stats, str):
        raise ValueError(
            f"linear_logprob: stats must be a sequence of names, got the string {stats!r}; write "
            f"({stats!r},)."
        )
    for name in stats:
        if name not in known:
            raise ValueError(
                f"linear_logprob: unknown statistic {name!r}; known are "
                f"{', '.join(known)}.{nearest(str(name), known)}"
            )
    if norms not in (None, "exact", "sketch", "both"):
        raise ValueError(
            f"linear_logprob: norms must be None, 'exact', 'sketch' or 'both', got {norms!r}."
            f"{nearest(str(norms), ('exact', 'sketch', 'both'))}"
        )


def check_sketch(
    op: str, k: int, buckets: int | None, seed: int, key: str, *, prefix: str = ""
) -> None:
    """A sketch has at least one row and column, a vocabulary goes through a power of two buckets
    (None: not a vocabulary). `prefix`: what the caller's names begin with."""
    k_name, buckets_name = f"{prefix}dim" if prefix else "k", f"{prefix}buckets"
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(
            f"{op}: {k_name} must be an int of at least 1, got {k!r}. Common are 16, 32 and 64."
        )
    if buckets is not None and (
        not isinstance(buckets, int)
        or not LEAST_BUCKETS <= buckets <= MOST_BUCKETS
        or buckets & (buckets - 1)
    ):
        raise ValueError(
            f"{op}: {buckets_name} must be a power of two from {LEAST_BUCKETS} to {MOST_BUCKETS}, "
            f"got {buckets!r}. K buckets give a squared norm a standard error of at most "
            "sqrt(2 / K) of it."
        )
    # 1, 1.0 and True hash to different signs, and such sketches would compare in silence.
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"{op}: {prefix}seed must be an int, got {seed!r}.")
    if not isinstance(key, str):
        raise ValueError(
            f"{op}: {prefix}key must be a string, the name of the weight, got {key!r}."
        )


def count_segments(
    hidden: Described, segment_id: Described | None, num_segments: int | None
) -> int:
    """S, as given or of the shapes; `last_segment` has read it where neither tells."""
    rows = hidden.shape[0]
    number = isinstance(num_segments, (int, torch.SymInt)) and not isinstance(num_segments, bool)
    if num_segments is not None and (not number or num_segments < 0):
        raise ValueError(
            f"linear_logprob: num_segments must be >= 0 and an int, got {num_segments!r}."
        )
    if segment_id is None:
        if num_segments is not None and num_segments != rows:
            raise ValueError(
                "linear_logprob: without segment_id every row is a segment, so num_segments "
                f"must be None or {rows}, got {num_segments}."
            )
        return rows
    return 0 if num_segments is None else num_segments  # None: there are no rows


def last_segment(segment_id: Tensor) -> int | None:
    """The segments that (R,) ids say there are, at least 0; waits for the device. None where they
    are no (R,) of integers, which the checks report."""
    if segment_id.dim() != 1 or segment_id.is_floating_point() or not segment_id.numel():
        return None
    if torch.compiler.is_compiling():
        raise ValueError(
            "linear_logprob: give num_segments under torch.compile; reading it off segment_id "
            "breaks the graph."
        )
    return max(int(segment_id[-1]) + 1, 0)


def number_of_counts(op: str, counts: Sequence[int] | Tensor) -> int:
    """How many there are; ValueError where they are not ints on the host."""
    if isinstance(counts, Tensor):
        raise ValueError(
            f"{op}: counts must be ints on the host, got a tensor {tuple(counts.shape)} on "
            f"{counts.device}. Give what row_counts(segment_id, num_segments) returns."
        )
    if not isinstance(counts, Collection):
        raise ValueError(f"{op}: counts must be a sequence of ints, got {counts!r}.")
    for kind in set(map(type, counts)):  # one or two, of maybe thousands of numbers
        if kind is bool or not issubclass(kind, (Integral, torch.SymInt)):
            wrong = next(count for count in counts if type(count) is kind)
            raise ValueError(f"{op}: counts must be ints, got {wrong!r} among them.")
    return len(counts)


def check_counts(op: str, rows: int, segments: int, counts: Sequence[int] | Tensor) -> None:
    """As many counts as segments, and as many rows as the counts say."""
    number = number_of_counts(op, counts)
    if number != segments:
        raise ValueError(f"{op}: expected counts of {segments} segments, got {number}.")
    least, total = min(counts, default=0), sum(map(int, counts))
    if least < 0 or total != rows:
        raise ValueError(
            f"{op}: counts must be the rows of every segment, >= 0 and {rows} together, got a "
            f"smallest of {least} and a sum of {total}."
        )


def check_values(
    target: Tensor,
    segment_id: Tensor | None,
    vocab: int,
    num_segments: int,
    counts: Sequence[int] | None = None,
) -> None:
    """Range of targets, order, range and counts of segment ids; only on the CPU, where reading is
    free.

    On CUDA a target out of range makes its row's log-prob NaN, or trips an index assertion (torch
    backend, frozen head or one tile), as a segment id out of range does.
    """
    if target.device.type != "cpu" or not target.numel():
        return
    if target.shape[0] <= FEW:
        ids = target.tolist()
        low, high = min(ids), max(ids)
    else:
        low, high = (int(x) for x in target.aminmax())
    if low < 0 or high >= vocab:
        row = int(((target < 0) | (target >= vocab)).nonzero()[0])
        value = int(target[row])
        hint = " Only scored rows belong here: drop rows labelled -100." if value == -100 else ""
        raise ValueError(
            f"linear_logprob: target[{row}] = {value} is not a row of weight, which has rows "
            f"0..{vocab - 1}.{hint}"
        )
    if segment_id is not None:
        check_segments("linear_logprob", segment_id, num_segments)
    if counts is not None:
        check_rows_of_segments("linear_logprob", segment_id, counts)


def check_rows_of_segments(op: str, segment_id: Tensor | None, counts: Sequence[int]) -> None:
    """That `counts` are the rows of the segments; only on the CPU, where reading is free."""
    if segment_id is not None and segment_id.device.type != "cpu":
        return
    if segment_id is None:
        found = [1] * len(counts)
    else:
        found = torch.bincount(segment_id.to(torch.int64), minlength=len(counts)).tolist()
    if found != list(counts):
        wrong = next(i for i, (a, b) in enumerate(zip(found, counts, strict=True)) if a != b)
        raise ValueError(
            f"{op}: counts[{wrong}]={counts[wrong]}, but segment_id holds {found[wrong]} "
            f"rows of segment {wrong}. Give what row_counts(segment_id, num_segments) returns."
        )


def check_segments(op: str, segment_id: Tensor, num_segments: int) -> None:
    """Order and range of segment ids; only on the CPU, where reading is free."""
    if segment_id.device.type != "cpu" or not segment_id.numel():
        return
    if segment_id.shape[0] <= FEW:
        ids = segment_id.tolist()
        falls, first, last = ids != sorted(ids), ids[0], ids[-1]
    else:
        falls = int(segment_id.diff().amin()) < 0
        first, last = int(segment_id[0]), int(segment_id[-1])
    if falls:
        row = int((segment_id.diff() < 0).nonzero()[0]) + 1
        raise ValueError(
            f"{op}: segment_id must be non-decreasing, but "
            f"segment_id[{row}]={int(segment_id[row])} follows {int(segment_id[row - 1])}. "
            "Sort the rows by segment_id."
        )
    if first < 0 or last >= num_segments:
        row, value = (0, first) if first < 0 else (segment_id.shape[0] - 1, last)
        raise ValueError(
            f"{op}: segment_id[{row}]={value} is outside 0..{num_segments - 1} "
            f"(num_segments={num_segments})."
        )
