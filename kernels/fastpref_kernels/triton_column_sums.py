# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The Triton kernel of `column_sums`: sums over every segment's rows, the norm's input read once.

Shapes: T rows, H heads, D features, S segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import AotCase
from ._launch import launch


@triton.jit
def row_moments_kernel(
    x,  # (rows, D)
    mean,  # (rows,) fp32 out; 0 where not CENTRED
    scale,  # (rows,) fp32 out: rsqrt(variance + eps)
    features,
    eps,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a norm makes of one row. The second pass over it comes from the cache."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    source = x + row * features
    total = tl.zeros((BLOCK,), tl.float32)
    if CENTRED:
        for start in range(0, features, BLOCK):
            at = start + lane
            total += tl.load(source + at, mask=at < features, other=0.0).to(tl.float32)
    centre = tl.sum(total, 0) / features
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, features, BLOCK):
        at = start + lane
        value = tl.load(source + at, mask=at < features, other=0.0).to(tl.float32)
        value = tl.where(at < features, value - centre, 0.0)
        square += value * value
    tl.store(mean + row, centre)
    tl.store(scale + row, tl.rsqrt(tl.sum(square, 0) / features + eps))


@triton.jit
def column_sums_kernel(
    dy,  # (T H, D)
    x,  # (T H, D)
    mean,  # (T H,) fp32
    scale,  # (T H,) fp32
    first,  # (S + 1,) int64: first row of every segment, of T
    out,  # (S, D) fp32
    features,
    heads,
    NORM: tl.constexpr,  # False: dy alone
    BLOCK: tl.constexpr,  # rows at a time
    WIDTH: tl.constexpr,  # columns of a program
):
    """out[s] = sum over the rows of s of dy (x - mean) scale."""
    segment, block = tl.program_id(0), tl.program_id(1)
    lo, hi = tl.load(first + segment) * heads, tl.load(first + segment + 1) * heads
    lane, column = tl.arange(0, BLOCK), block * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(lo, hi, BLOCK):
        row = start + lane
        mask = (row < hi)[:, None] & (column < features)[None, :]
        at = row.to(tl.int64)[:, None] * features + column[None, :]
        value = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            inside = row < hi
            other = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            other -= tl.load(mean + row, mask=inside, other=0.0)[:, None]
            value *= other * tl.load(scale + row, mask=inside, other=0.0)[:, None]
        acc += value
    place = out + segment.to(tl.int64) * features + column
    tl.store(place, tl.sum(acc, 0), mask=column < features)


def triton_column_sums(
    dy: Tensor,
    x: Tensor | None,
    segment_id: Tensor,
    segments: int,
    eps: float,
    centred: bool,
) -> Tensor:
    """As `column_sums.torch_column_sums`."""
    features = dy.shape[-1]
    heads = dy.shape[1] if dy.dim() == 3 else 1
    flat = dy.reshape(-1, features).contiguous()
    edges = torch.arange(segments + 1, device=dy.device, dtype=segment_id.dtype)
    first = torch.searchsorted(segment_id.contiguous(), edges)
    out = dy.new_empty(segments, features, dtype=torch.float32)
    source, mean, scale = flat, out, out
    if x is not None:
        source = x.reshape(-1, features).contiguous()
        mean, scale = out.new_empty(2, source.shape[0]).unbind(0)
        arguments = {"x": source, "mean": mean, "scale": scale, "features": features, "eps": eps}
        constants = {"CENTRED": centred, "BLOCK": min(1024, triton.next_power_of_2(features))}
        launch(row_moments_kernel, (source.shape[0],), {**arguments, **constants}, warps=4)
    width = min(128, triton.next_power_of_2(features))
    launch(
        column_sums_kernel,
        (segments, -(-features // width)),
        {
            "dy": flat,
            "x": source,
            "mean": mean,
            "scale": scale,
            "first": first,
            "out": out,
            "features": features,
            "heads": heads,
            "NORM": x is not None,
            "BLOCK": 32,
            "WIDTH": width,
        },
        warps=4,
    )
    return out


def aot_cases() -> list[AotCase]:
    """Sums of biases and of norms; a norm's moments."""
    cases = []
    for dtype in ("bf16", "fp32"):
        for norm in (False, True):
            cases.append(
                AotCase(
                    name=f"column_sums {dtype} {'norm' if norm else 'bias'}",
                    kernel=column_sums_kernel,
                    signature={
                        **dict.fromkeys(("dy", "x"), f"*{dtype}"),
                        **dict.fromkeys(("mean", "scale", "out"), "*fp32"),
                        "first": "*i64",
                        **dict.fromkeys(("features", "heads"), "i32"),
                    },
                    constexprs={"NORM": norm, "BLOCK": 32, "WIDTH": 128},
                    divisible=("dy", "x", "mean", "scale", "out", "features"),
                    archs=(80, 90, 100),
                )
            )
        for centred in (False, True):
            cases.append(
                AotCase(
                    name=f"row_moments {dtype} {'layer' if centred else 'rms'}",
                    kernel=row_moments_kernel,
                    signature={
                        "x": f"*{dtype}",
                        **dict.fromkeys(("mean", "scale"), "*fp32"),
                        "features": "i32",
                        "eps": "fp32",
                    },
                    constexprs={"CENTRED": centred, "BLOCK": 1024},
                    divisible=("x", "features"),
                    archs=(80, 90, 100),
                )
            )
    return cases
