"""What the Triton backend of `linear_logprob` calls: its products, and a launch for every kernel.

Shapes: R rows, D hidden, V vocab; a tile is (B, C), rows of a block by vocabulary entries.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import exp_tile as kernels
from ._launch import TritonTile, launch, padded
from .count_sketch import Buckets, CountSketch, SquareSums, sign_table, turn_table
from .row_sums import ORDER_STATS, SQUARE_STATS
from .torch_tiles import Transform

# Nats by which a maximum may pass a row's offset before the offset follows it, which costs a pass
# over the row's (D,) sums. Squares of E, e^48 at most, stay far inside float32 and bfloat16.
LAG = 24.0
COLUMNS = 1024  # of D that a program holds at once


class Span(NamedTuple):
    """Where a tile stands: rows from `first_row` on, `width` entries from `low` on of `vocab`."""

    first_row: int
    low: int
    width: int
    vocab: int


@dataclass(frozen=True)
class Carried:
    """What the exp pass sums up for norms and sketches."""

    squares: bool  # sum of F^2, in `state`
    buckets: Buckets | None = None
    sketch: Tensor | None = None  # (R, K) out, the CountSketch of F
    signs: Tensor | None = None  # (V, padded) int8
    turns: Tensor | None = None  # one for each block of ids, of a tile's padding too

    @staticmethod
    def of(
        riders: Sequence[CountSketch | SquareSums], hidden: Tensor, vocab: int, tile: TritonTile
    ) -> Carried:
        """What the riders of `linear_logprob` ask for."""
        for rider in riders:
            if isinstance(rider, CountSketch):
                buckets = rider.buckets
                # A tile begins where a block of ids begins.
                assert vocab <= tile.width or tile.width % buckets.count == 0, (tile, buckets)
                shape = (hidden.shape[0], buckets.count)
                sketch = hidden.new_empty(shape, dtype=torch.float32)
                if block_of(tile.width) < buckets.count:
                    sketch.zero_()  # no id falls into some of the buckets
                signs = sign_table(buckets, padded(vocab), torch.int8, hidden.device)
                whole = padded(vocab) + max(buckets.count, block_of(tile.width))
                turns = turn_table(buckets, whole, hidden.device)
                return Carried(True, buckets, sketch, signs, turns)
        return Carried(bool(riders))

    def hand_over(self, riders: Sequence[CountSketch | SquareSums], state: Tensor) -> None:
        """The sums to the riders, after the last tile."""
        for rider in riders:
            if isinstance(rider, CountSketch):
                assert self.sketch is not None
                rider.sums = self.sketch.t()
                rider = rider.squares
            rider.sums = row(state, "norm").unsqueeze(0)

    def arguments(self) -> dict[str, Any]:
        """For the kernel."""
        return {
            "sketch": self.sketch,
            "signs": self.signs,
            "turns": self.turns,
            "NORMS": self.squares,
            "BUCKETS": 0 if self.buckets is None else self.buckets.count,
        }


def new_state(hidden: Tensor) -> Tensor:
    """(STATES, R) float32, what goes from tile to tile; the first tile reads nothing of it."""
    return hidden.new_empty(kernels.STATES, hidden.shape[0], dtype=torch.float32)


def row(state: Tensor, name: str) -> Tensor:
    """(R,) one of: offset total target phi shrink top argmax rest square plogp logit
    norm."""
    return state[getattr(kernels, name.upper()).value]


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into out (float32), accumulated in float32."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # the interpreter's: CPUs have no half product with float32 output
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out (float32) += a @ b."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out)
    if a.device.type == "cpu":
        return out.addmm_(a.to(out.dtype), b.to(out.dtype))
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def rounded_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into out of the operands' own dtype, accumulated in float32 and rounded once."""
    if a.device.type == "cpu":
        return out.copy_(a.to(torch.float32) @ b.to(torch.float32))
    with _full_precision_sums():
        return torch.mm(a, b, out=out)


@contextlib.contextmanager
def _full_precision_sums() -> Iterator[None]:
    """torch lets cuBLAS add up parts of a bfloat16 product in bfloat16 unless told not to."""
    matmul = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    split = getattr(matmul, f"{name}_split_k", None)  # from torch 2.10 or so
    before = getattr(matmul, name) if split is None else (getattr(matmul, name), split)
    setattr(matmul, name, False)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def exp_tile(
    z: Tensor,  # (B, C) raw logits
    exps: Tensor,  # (B, C) out
    target: Tensor,
    transform: Transform,
    state: Tensor,
    tile_offset: Tensor,  # (R,) out
    span: Span,
    tile: TritonTile,
    *,
    store: bool,
    stats: frozenset[str],
    carried: Carried,
) -> None:
    """E of a tile, and the rows' sums in `state` carried on."""
    headroom = exp_headroom(exps.dtype, span.vocab)
    launch(
        kernels.exp_tile_kernel,
        (z.shape[0],),
        {
            "logits": z,
            "exps": exps if store else None,
            "target": target,
            "state": state,
            "tile_offset": tile_offset if store else None,
            "rows": state.shape[1],
            **_tile_arguments(transform, span, tile),
            "LAG": 0.0 if headroom else LAG,
            "HEADROOM": headroom,
            "KEEP": store,
            **statistics(stats),
            **carried.arguments(),
        },
        warps=tile.warps,
        rewritten=("sketch",),
    )


def statistics(stats: frozenset[str]) -> dict[str, bool]:
    """Which sums the kernel carries on, as its compile-time arguments."""
    return {
        "ORDER": bool(stats & ORDER_STATS),
        "SQUARES": bool(stats & SQUARE_STATS),
        "ENTROPY": "entropy" in stats,
        "MEAN": "mean_logit" in stats,
    }


def exp_headroom(dtype: torch.dtype, vocab: int) -> float:
    """Nats from a row's maximum up to its offset: 0, but float16 has to hold S', at most 2^15."""
    if dtype != torch.float16:
        return 0.0
    return math.log(2.0) * max(1, math.ceil(math.log2(vocab)) - 15)


def exp_again(
    z: Tensor,  # (B, C)
    exps: Tensor,  # (B, C) out
    target: Tensor,
    transform: Transform,
    offset: Tensor,  # (R,) the final one
    own: Tensor,  # (R,) the target's entry
    span: Span,
    tile: TritonTile,
) -> None:
    """E of a tile that was not kept, relative to the final offset."""
    launch(
        kernels.exp_again_kernel,
        (z.shape[0],),
        {
            "logits": z,
            "exps": exps,
            "target": target,
            "offset": offset,
            "own": own,
            **_tile_arguments(transform, span, tile),
        },
        warps=tile.warps,
    )


def _tile_arguments(transform: Transform, span: Span, tile: TritonTile) -> dict[str, Any]:
    cap = transform.softcap
    scale, cap_out = transform.slope, 1.0
    if cap is not None:
        scale, cap_out = transform.logit_scale / cap, cap / transform.temperature
    return {
        "bias": transform.bias,
        "first_row": span.first_row,
        "low": span.low,
        "width": span.width,
        "stride": padded(span.width),
        "scale": scale,
        "cap": cap_out,
        "BLOCK": block_of(tile.width),
        "SOFTCAP": cap is not None,
        "BIAS": transform.bias is not None,
    }


def mix(mixed: Tensor, state: Tensor, span: Span, exps: Tensor, weight: Tensor) -> None:
    """U (B, D) of a block: brought to the offset that stands now, plus E W of this tile."""
    if span.low == 0:
        product(exps, weight, mixed)
        return
    launch(
        kernels.shrink_rows_kernel,
        (mixed.shape[0],),
        {
            "mixed": mixed,
            "shrink": row(state, "shrink"),
            "first_row": span.first_row,
            "DIM": mixed.shape[1],
            "BLOCK": COLUMNS,
        },
        warps=4,
        touched={"mixed": 0},
    )
    add_product(mixed, exps, weight)


def hidden_grad(
    mixed: Tensor,
    out: Tensor,
    weight: Tensor,
    target: Tensor,
    total: Tensor,
    phi: Tensor,
    scale: Tensor,
) -> None:
    """scale (phi W_y - U / S') into `out`."""
    rows, dim = out.shape
    launch(
        kernels.hidden_grad_kernel,
        (rows,),
        {
            "mixed": mixed,
            "out": out,
            "weight": weight,
            "target": target,
            "total": total,
            "phi": phi,
            "scale": scale,
            "vocab": weight.shape[0],
            "DIM": dim,
            "row_stride": weight.stride(0),
            "column_stride": weight.stride(1),
            "BLOCK": COLUMNS,
        },
        warps=4,
        touched={"weight": rows * dim * weight.itemsize},
    )


def own_entries(
    exps: Tensor,
    offsets: Tensor,
    target: Tensor,
    offset: Tensor,
    own: Tensor,
    tile: TritonTile,
) -> None:
    """The target's entry of every row whose target lies in a kept tile."""
    launch(
        kernels.own_entry_kernel,
        (target.shape[0],),
        {
            "exps": exps,
            "offsets": offsets,
            "target": target,
            "offset": offset,
            "own": own,
            "rows": target.shape[0],
            "tile_width": tile.width,
            "kept_width": exps.shape[0],
            "BLOCK": block_of(tile.width),
        },
        warps=tile.warps,
        touched={"exps": len(target) * exps.itemsize, "offsets": len(target) * 4},
    )


def scale_rows(
    hidden: Tensor,
    scaled: Tensor,
    factor: Tensor,
    now: Tensor,
    before: Tensor | None,
    final: Tensor,
) -> None:
    """hidden factor exp(now - final) into `scaled`, rows with now = before left as they are."""
    launch(
        kernels.scale_rows_kernel,
        (hidden.shape[0],),
        {
            "hidden": hidden,
            "scaled": scaled,
            "factor": factor,
            "now": now,
            "before": before,
            "final": final,
            "DIM": hidden.shape[1],
            "FIRST": before is None,
            "BLOCK": COLUMNS,
        },
        warps=4,
        touched={} if before is None else {"hidden": 0, "scaled": 0},
    )


def block_of(width: int) -> int:
    """Smallest power of two that holds a tile's row."""
    return 1 << (width - 1).bit_length()
