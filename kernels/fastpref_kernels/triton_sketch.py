# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The Triton kernels of sketches: a projection whose signs are made on the chip, and products over
the rows of every segment.

Shapes: T rows, N features, k columns of a projection, S segments, r narrow side, d other side.
Formulas: kernels/README.md; the hash: projection.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import AotCase
from ._launch import launch
from .projection import Projection, buckets_of
from .spans import kept_tables, starts, to_device


@triton.jit
def _stir(h):
    """The finaliser of MurmurHash3, on uint32."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def project_kernel(
    x,  # (T, N)
    out,  # (T, k) fp32
    rows,
    features,
    stride,
    columns,  # k
    first,  # row of the projection for the first feature, mod 2^32, as int32
    low,  # K0 as int32
    high,  # K1 as int32
    BITS: tl.constexpr,  # k rounded up to a power of two is 2^BITS
    BLOCK: tl.constexpr,  # rows of x
    DEPTH: tl.constexpr,  # features at a time
    WIDTH: tl.constexpr,  # columns of a program, a multiple of 16
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x times the signs; a sign is made where it is needed, and is exact in every dtype."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = row < rows
    source = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * stride
    low_, high_ = low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)
    for_sign, for_turn = _stir(high_), _stir(high_ + 1)
    lane = column.to(tl.uint32)
    depth = tl.arange(0, DEPTH)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for k in range(0, features, DEPTH):
        at = k + depth
        if EVEN:
            a = tl.load(source + at[None, :])
        else:
            a = tl.load(source + at[None, :], mask=(at < features)[None, :], other=0.0)
        feature = (at + first).to(tl.uint32)
        own = _stir(_stir(feature + low_) ^ for_sign)
        place = feature ^ _stir(_stir((feature >> BITS) + low_) ^ for_turn)
        ones = place[:, None] & lane[None, :]
        if BITS > 16:
            ones ^= ones >> 16
        if BITS > 8:
            ones ^= ones >> 8
        if BITS > 4:
            ones ^= ones >> 4
        if BITS > 2:
            ones ^= ones >> 2
        ones ^= ones >> 1
        sign = ((own[:, None] ^ ones) & 1).to(tl.float32) * 2.0 - 1.0
        acc = tl.dot(a, sign.to(a.dtype), acc, input_precision=PRECISION)
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, acc, mask=inside[:, None] & (column < columns)[None, :])


@triton.jit
def segment_products_kernel(
    left,  # (T, r)
    right,  # (T, d)
    first,  # (S + 1,) int32: first row of every segment
    out,  # (S, r, d) fp32
    narrow,  # r
    other,  # d
    stride_left,
    stride_right,
    NARROW: tl.constexpr,  # r rounded up to a power of 2, at least 16
    WIDTH: tl.constexpr,  # columns of `right` of a program
    BLOCK: tl.constexpr,  # rows at a time
    EVEN: tl.constexpr,  # r is NARROW, d a multiple of WIDTH: no mask on columns splits a load
):
    """left_s^T right_s of one segment, one block of columns."""
    segment, block = tl.program_id(0), tl.program_id(1)
    lo, hi = tl.load(first + segment), tl.load(first + segment + 1)
    i, j = tl.arange(0, NARROW), block * WIDTH + tl.arange(0, WIDTH)
    lane = tl.arange(0, BLOCK)
    acc = tl.zeros((NARROW, WIDTH), tl.float32)
    for start in range(lo, hi, BLOCK):
        row = start + lane
        inside = (row < hi)[:, None]
        at = row.to(tl.int64)[:, None]
        mask_left, mask_right = inside, inside
        if not EVEN:
            mask_left, mask_right = inside & (i < narrow)[None, :], inside & (j < other)[None, :]
        a = tl.load(left + at * stride_left + i[None, :], mask=mask_left, other=0.0)
        b = tl.load(right + at * stride_right + j[None, :], mask=mask_right, other=0.0)
        a, b = tl.trans(a.to(tl.float32)), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    place = (segment.to(tl.int64) * narrow + i[:, None]) * other + j[None, :]
    tl.store(out + place, acc, mask=(i < narrow)[:, None] & (j < other)[None, :])


def triton_project(x: Tensor, projection: Projection, k: int, first_row: int) -> Tensor:
    """As `projection.torch_project`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, features = x.shape
    out = x.new_empty(rows, k, dtype=torch.float32)
    width = min(64, _power(k))
    block, depth = project_shape(x.dtype, width)
    launch(
        project_kernel,
        (-(-rows // block), -(-k // width)),
        {
            "x": x,
            "out": out,
            "rows": rows,
            "features": features,
            "stride": x.stride(0),
            "columns": k,
            "first": _signed(first_row),
            "low": _signed(projection.low),
            "high": _signed(projection.high),
            "BITS": buckets_of(k).bit_length() - 1,
            "BLOCK": block,
            "DEPTH": depth,
            "WIDTH": width,
            "EVEN": features % depth == 0,
            "PRECISION": "tf32x3",
        },
        warps=4,
        stages=3,
    )
    return out


def triton_segment_products(left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    """As `segment_products.torch_segment_products`."""
    left, right = (a if a.stride(-1) == 1 else a.contiguous() for a in (left, right))
    segments, (narrow, other) = len(counts), (left.shape[1], right.shape[1])
    out = left.new_empty(segments, narrow, other, dtype=torch.float32)
    size = _power(narrow)
    width = min(32 if size > 64 else 64, _power(other))
    launch(
        segment_products_kernel,
        (segments, -(-other // width)),
        {
            "left": left,
            "right": right,
            "first": _first_rows(tuple(counts), left.device),
            "out": out,
            "narrow": narrow,
            "other": other,
            "stride_left": left.stride(0),
            "stride_right": right.stride(0),
            "NARROW": size,
            "WIDTH": width,
            "BLOCK": 32,
            "EVEN": size == narrow and other % width == 0,
        },
        warps=4,
    )
    return out


@kept_tables
def _first_rows(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(S + 1,) int32."""
    return to_device(starts(counts), device)


def _power(n: int) -> int:
    """The next power of two, at least 16: a side of a dot."""
    return max(16, triton.next_power_of_2(n))


def project_shape(dtype: torch.dtype, width: int) -> tuple[int, int]:
    """Rows and features at a time. float32 operands are split in three for the tensor cores, which
    takes registers."""
    if dtype == torch.float32:
        return 64, 16
    return (64 if width > 32 else 128), 64


def _signed(n: int) -> int:
    """n mod 2^32 as a signed 32-bit number."""
    n &= 0xFFFFFFFF
    return n - (1 << 32) if n >> 31 else n


def aot_cases() -> list[AotCase]:
    """Projections to 16 .. 64 columns and more, products of sketches and of adapters."""
    cases = []
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for dtype, width in (
        ("bf16", 16),
        ("bf16", 32),
        ("bf16", 64),
        ("fp16", 32),
        ("fp32", 32),
        ("fp32", 64),
    ):
        block, depth = project_shape(types[dtype], width)
        cases.append(
            AotCase(
                name=f"project {dtype} {block}x{width}",
                kernel=project_kernel,
                signature={
                    "x": f"*{dtype}",
                    "out": "*fp32",
                    **dict.fromkeys(
                        ("rows", "features", "stride", "columns", "first", "low", "high"), "i32"
                    ),
                },
                constexprs={
                    "BLOCK": block,
                    "DEPTH": depth,
                    "WIDTH": width,
                    "BITS": width.bit_length() - 1,
                    "EVEN": True,
                    "PRECISION": "tf32x3",
                },
                divisible=("x", "out", "features", "stride", "columns"),
                stages=3,
                archs=(80, 90, 100),
                wide_loads=True,
                wide_stores=True,
            )
        )
    for left, right, narrow, width in (
        ("fp32", "fp32", 32, 32),
        ("fp32", "fp32", 64, 64),
        ("fp32", "bf16", 16, 64),
        ("fp32", "bf16", 128, 32),
    ):
        cases.append(
            AotCase(
                name=f"segment_products {left} {right} {narrow}x{width}",
                kernel=segment_products_kernel,
                signature={
                    "left": f"*{left}",
                    "right": f"*{right}",
                    "first": "*i32",
                    "out": "*fp32",
                    **dict.fromkeys(("narrow", "other", "stride_left", "stride_right"), "i32"),
                },
                constexprs={"NARROW": narrow, "WIDTH": width, "BLOCK": 32, "EVEN": True},
                divisible=("left", "right", "out", "other", "stride_left", "stride_right"),
                archs=(80, 90, 100),
            )
        )
    return cases
