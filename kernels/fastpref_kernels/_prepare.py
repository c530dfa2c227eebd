"""What a call of `linear_logprob` does, as far as shapes, dtypes and options tell.

Calls that differ in the numbers alone are checked and planned once: after a matrix product has
emptied the caches, checks that take 4 microseconds in a loop take 100 (docs/lab-log.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import _launch
from ._head_checks import (
    Described,
    check_names,
    check_numbers,
    check_shapes,
    check_sketch,
    count_segments,
)
from ._plan import Plan, make_plan
from .head_norms import SketchPlan
from .torch_tiles import accumulate_dtype


class Prepared(NamedTuple):
    """What is handed to the ops beside tensors."""

    segments: int  # S
    scales: tuple[float, ...]  # logit scale, temperature, softcap if there is one
    plan: Plan
    stats: str  # names, sorted
    sketch: str  # `SketchPlan.text`, or nothing
    differentiable: bool
    one_tile: bool  # `one_tile_logprob` does it


def prepare(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], plain: bool, *options: Any
) -> Prepared:
    """The tensors are hidden, weight, target, segment_id, bias; the options those of `_prepare`.

    What it found for the last 256 calls that differed in them is remembered, where tensors are
    `plain`: others' sizes may be symbols.
    """
    described: Any = [None if x is None else Described.of(x) for x in tensors]
    if plain:
        try:
            return _remembered(*described, *options)
        except TypeError:  # an option that has no hash
            pass
    return _prepare(*described, *options)


def _prepare(
    hidden: Described,
    weight: Described,
    target: Described,
    segment_id: Described | None,
    bias: Described | None,
    num_segments: int | None,
    group_size: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    cache: int,
    stats: Sequence[str],
    norms: str | None,
    sketch_dim: int,
    sketch_seed: int,
    sketch_key: str,
    sketch_buckets: int,
    backend: str,
) -> Prepared:
    check_shapes(hidden, weight, target, segment_id, bias)
    check_numbers(softcap, logit_scale, temperature, cache, group_size)
    check_names(stats, norms)
    sketch = ""
    if norms in ("sketch", "both"):
        asked = (sketch_dim, sketch_buckets, sketch_seed, sketch_key)
        check_sketch("linear_logprob", *asked, prefix="sketch_")
        exact = norms == "both"
        sketch = SketchPlan(sketch_dim, sketch_buckets, sketch_seed, exact, sketch_key).text()
    segments = count_segments(hidden, segment_id, num_segments)
    if norms is not None and segments % group_size:
        raise ValueError(
            f"linear_logprob: norms need whole groups, but num_segments={segments} is not a "
            f"multiple of group_size={group_size}. Pad the last group with empty segments."
        )
    triton = _launch.resolve_backend(backend, hidden.device, hidden.dtype) == "triton"
    plan = make_plan(hidden, weight, bias, cache, group_size if norms else 0, triton)
    vocab = weight.shape[0]
    bare = bias is None and softcap is None and not stats and norms is None
    one_tile = bare and 1 < vocab <= plan.width and not triton and plan.kept == plan.need_weight
    return Prepared(
        segments,
        (logit_scale, temperature) if softcap is None else (logit_scale, temperature, softcap),
        plan,
        ",".join(sorted(set(stats))),
        sketch,
        bool(plan.need_hidden or plan.need_weight or plan.need_bias),
        one_tile and hidden.dtype == accumulate_dtype(hidden.dtype),
    )


_remembered = functools.lru_cache(maxsize=256, typed=True)(_prepare)
