"""Sketches of every pair's gradients: small matrices whose inner products estimate the gradients'.

    S_i = R_out^T G_i R_in  (k, k),      E[<S_i, S_j>] = <G_i, G_j>,      G_i = sum_t dy_t x_t^T

R_out and R_in are fixed matrices of signs over sqrt(k) (`projection`) by seed and key of the
weight. A sketch is linear in the gradient, so sketches of one key add up over micro-batches, ranks
and uses of a tied weight; sketches of different keys add up too: the sum estimates inner products
over all those weights, because what different weights have in common vanishes in the mean. A change
of a weight is sketched under the same projections (`weight_sketch`), so <S_i, S_delta> estimates
<G_i, delta W>, what an update does to pair i, whatever optimizer made it.

Shapes: T rows, S segments, d inputs, p outputs, D features, k sketch size. Results (S, k, k) are
float32 (float64 for float64 inputs); `sketch_estimates` reads them. Variance: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _head_checks, _launch, _norm_checks
from .column_sums import column_sums
from .count_sketch import project_vocabulary, vocabulary_signs
from .pair_norms import adapter_sides
from .projection import Projection, project
from .segment_products import segment_products

WEIGHT_ENTRIES = 1 << 20  # entries of a weight's change that stand in memory, in float64


def linear_sketch(
    x: Tensor,  # (T, d)
    dy: Tensor,  # (T, p)
    segment_id: Tensor,  # (T,) non-decreasing
    k: int,
    *,
    seed: int,
    key: str,
    num_segments: int,
    counts: Sequence[int] | None = None,
    first_input: int = 0,
    first_output: int = 0,
    buckets: int | None = None,
    backend: str = "auto",
) -> Tensor:  # (S, k, k)
    """Sketch of sum_t dy_t x_t^T over the rows of each segment.

    `key` names the weight, alike in all runs, ranks and calls that are to be added or compared; the
    weight's layout does not matter here. `first_input`, `first_output`: where x and dy begin in the
    whole layer if they are a tensor-parallel rank's share. `buckets`: of a head outside
    `linear_logprob`, whose outputs are a vocabulary; its `sketch_buckets`.

    Cost      2 T k (d + p) operations, one read of x and dy
    Errors    ValueError as `linear_norms`, and for k < 1 or buckets that are no power of two
    """
    name = "linear_sketch"
    _head_checks.check_sketch(name, k, buckets, seed, key)
    _norm_checks.check_rows(name, ("x", x), ("dy", dy))
    _norm_checks.check_matrix(name, "x", x)
    _norm_checks.check_matrix(name, "dy", dy)
    _norm_checks.check_ids(name, "segment_id", segment_id, "x", x)
    _norm_checks.check_segments(name, x.shape[0], num_segments, None, counts)
    _norm_checks.check_count(name, "first_input", first_input)
    _norm_checks.check_count(name, "first_output", first_output)
    inside = Projection.of(seed, key, "in")
    outside = Projection.of(seed, key, "out")
    inputs = project(x, inside, k, first_row=first_input, backend=backend, name=name)
    if buckets is None:
        outputs = project(dy, outside, k, first_row=first_output, backend=backend, name=name)
    else:
        outputs = project_vocabulary(
            dy, k, seed=seed, key=key, buckets=buckets, first_id=first_output
        )
    return _combine(outputs, inputs, segment_id, num_segments, counts, k, backend, name)


def lora_sketch(
    x: Tensor,  # (T, d), what A is applied to: after the adapter's dropout
    dy: Tensor,  # (T, p)
    lora_a: Tensor,  # (r, d)
    lora_b: Tensor,  # (p, r)
    segment_id: Tensor,  # (T,) non-decreasing
    k: int,
    *,
    seed: int,
    key: str,
    scale: float,
    num_segments: int,
    counts: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:  # (S, k, k)
    """Sketch of both matrices of an adapter y = W x + scale B (A x), added.

    Their keys, under which `weight_sketch` sketches their updates, are key + ".lora_A" and
    ".lora_B".
    """
    name = "lora_sketch"
    _head_checks.check_sketch(name, k, None, seed, key)
    inner, outer = adapter_sides(name, x, dy, lora_a, lora_b)
    _norm_checks.check_ids(name, "segment_id", segment_id, "x", x)
    _norm_checks.check_segments(name, x.shape[0], num_segments, None, counts)
    _norm_checks.check_scale(name, scale)
    sketches = []
    for matrix, inputs, outputs in (("lora_A", x, outer), ("lora_B", inner, dy)):
        left, right = (
            project(
                side, Projection.of(seed, f"{key}.{matrix}", end), k, backend=backend, name=name
            )
            for end, side in (("out", outputs), ("in", inputs))
        )
        sketches.append(_combine(left, right, segment_id, num_segments, counts, k, backend, name))
    return (sketches[0] + sketches[1]) * scale


def embedding_sketch(
    token_id: Tensor,  # (T,) int32 | int64
    dy: Tensor,  # (T, D) gradient of the embedding's output
    segment_id: Tensor,  # (T,) non-decreasing
    k: int,
    *,
    seed: int,
    key: str,
    num_segments: int,
    scale: float = 1.0,
    padding_idx: int | None = None,
    counts: Sequence[int] | None = None,
    buckets: int | None = None,
    backend: str = "auto",
) -> Tensor:  # (S, k, k)
    """Sketch of an embedding's gradient, (V, D): sum_t scale dy_t at row token_id_t.

    Its vocabulary is the "out" side and its features the "in" side, as of a head (V, D): the
    sketches of a tied embedding and head add up under one key, their common term included, if
    `buckets` is the head's `sketch_buckets`. `scale` and `padding_idx` as in `embedding_norms`.
    """
    name = "embedding_sketch"
    _head_checks.check_sketch(name, k, buckets, seed, key)
    _norm_checks.check_rows(name, ("dy", dy))
    _norm_checks.check_matrix(name, "dy", dy)
    _norm_checks.check_ids(name, "token_id", token_id, "dy", dy)
    _norm_checks.check_ids(name, "segment_id", segment_id, "dy", dy)
    _norm_checks.check_segments(name, dy.shape[0], num_segments, None, counts)
    _norm_checks.check_scale(name, scale)
    inputs = project(dy, Projection.of(seed, key, "in"), k, backend=backend, name=name)
    rows = token_id.to(torch.int64)
    outputs = _row_signs(rows, k, inputs.dtype, seed, key, buckets)
    if padding_idx is not None:
        outputs = outputs.masked_fill((rows == padding_idx).unsqueeze(1), 0.0)
    sketch = _combine(outputs, inputs, segment_id, num_segments, counts, k, backend, name)
    return sketch * scale


def column_sketch(
    dy: Tensor,  # (T, D) | (T, H, D)
    segment_id: Tensor,  # (T,) non-decreasing
    k: int,
    *,
    seed: int,
    key: str,
    num_segments: int,
    x: Tensor | None = None,
    eps: float = 0.0,
    centred: bool = False,
    backend: str = "auto",
) -> Tensor:  # (S, k, k)
    """Sketch of the gradient of a bias, or of a norm's weight where x is what it normalises.

    The gradient is as in `bias_norms`, `rmsnorm_norms` and, `centred`, `layernorm_norms`; a vector
    of D is projected to k k numbers at once.
    """
    name = "column_sketch"
    _head_checks.check_sketch(name, k, None, seed, key)
    _norm_checks.check_rows(name, ("dy", dy), *([] if x is None else [("x", x)]))
    if dy.dim() > 3 or (x is not None and x.shape != dy.shape):
        raise ValueError(
            f"{name}: expected dy, and x if given, of one shape, (T, D) or (T, H, D), got "
            f"{tuple(dy.shape)} and {None if x is None else tuple(x.shape)}."
        )
    if not eps >= 0:
        raise ValueError(f"{name}: eps must be >= 0, got {eps!r}.")
    if centred and x is None:
        raise ValueError(
            f"{name}: centred=True is of a LayerNorm's weight and needs x, what it normalises; its "
            "bias takes centred=False."
        )
    _norm_checks.check_ids(name, "segment_id", segment_id, "dy", dy)
    _norm_checks.check_segments(name, dy.shape[0], num_segments, None, None)
    sums = column_sums(
        dy, segment_id, num_segments, x=x, eps=eps, centred=centred, name=name, backend=backend
    )
    flat = project(sums, Projection.of(seed, key, "vector"), k * k, backend=backend, name=name)
    return flat.view(-1, k, k) / k


def weight_sketch(
    new: Tensor,  # (p, d) | (D,), the weight after an update
    old: Tensor | None,  # as new, before it; None: `new` is itself what is to be sketched
    k: int,
    *,
    seed: int,
    key: str,
    transposed: bool = False,
    buckets: int | None = None,
    first_input: int = 0,
    first_output: int = 0,
) -> Tensor:  # (k, k) float64
    """Sketch of new - old under the projections of the weight's gradients.

    `transposed`: the weight is stored (d, p), as GPT-2's Conv1D. `first_input`, `first_output`:
    where a shard begins in the whole weight; sketches of shards add up. An embedding is (V, D), a
    head too; `buckets` as in their gradients' sketches. A vector's first element is `first_output`.

    Memory    a tile of the difference in float64; no copy of a weight
    Numerics  the difference is formed and summed up in float64: an update is small beside a weight
    """
    name = "weight_sketch"
    _head_checks.check_sketch(name, k, buckets, seed, key)
    _norm_checks.check_count(name, "first_input", first_input)
    _norm_checks.check_count(name, "first_output", first_output)
    if new.dim() not in (1, 2):
        raise ValueError(
            f"{name}: expected new (p, d) or (D,), got {tuple(new.shape)}; sketch the experts of a "
            "stack one by one, each under its own key."
        )
    _norm_checks.check_dtype(name, "new", new)
    if old is not None:
        _norm_checks.check_dtype(name, "old", old)
        _norm_checks.check_device(name, "new", new, "old", old)
        if old.shape != new.shape:
            raise ValueError(
                f"{name}: expected old of new's shape {tuple(new.shape)}, got {tuple(old.shape)}."
            )
    with torch.no_grad():
        if new.dim() == 1:
            change = _difference(new, old).unsqueeze(0)
            side = Projection.of(seed, key, "vector")
            flat = project(change, side, k * k, first_row=first_output, backend="torch")
            return flat.view(k, k) / k
        if transposed:
            new, old = new.t(), None if old is None else old.t()
        return _matrix_sketch(new, old, k, seed, key, buckets, first_input, first_output)


def _matrix_sketch(
    new: Tensor,
    old: Tensor | None,
    k: int,
    seed: int,
    key: str,
    buckets: int | None,
    first_input: int,
    first_output: int,
) -> Tensor:
    total = new.new_zeros(k, k, dtype=torch.float64)
    step = max(WEIGHT_ENTRIES // max(new.shape[1], 1), 1)
    inputs = Projection.of(seed, key, "in")
    for i in range(0, new.shape[0], step):
        change = _difference(new[i : i + step], None if old is None else old[i : i + step])
        inner = project(change, inputs, k, first_row=first_input, backend="torch")
        rows = torch.arange(i, i + change.shape[0], device=new.device) + first_output
        total.addmm_(_row_signs(rows, k, torch.float64, seed, key, buckets).t(), inner)
    return total / k


def _row_signs(
    rows: Tensor, k: int, dtype: torch.dtype, seed: int, key: str, buckets: int | None
) -> Tensor:  # (N, k)
    if buckets is None:
        return Projection.of(seed, key, "out").signs(rows, k, dtype)
    return vocabulary_signs(rows, k, dtype, seed=seed, key=key, buckets=buckets)


def _difference(new: Tensor, old: Tensor | None) -> Tensor:
    wide = new.detach().double()
    return wide if old is None else wide - old.detach()


def _combine(
    outputs: Tensor,
    inputs: Tensor,
    segment_id: Tensor,
    num_segments: int,
    counts: Sequence[int] | None,
    k: int,
    backend: str,
    name: str,
) -> Tensor:
    chosen = _launch.resolve_backend(backend, inputs.device, inputs.dtype, op=name)
    sums = segment_products(
        outputs, inputs, segment_id, num_segments, counts=counts, backend=chosen, name=name
    )
    return sums / k
