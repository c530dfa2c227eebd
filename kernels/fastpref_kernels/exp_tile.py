"""The Triton kernels of `linear_logprob`: one pass over a tile of logits, and what goes by rows.

Shapes: R rows, D hidden, V vocab; a tile is (B, C), rows of one block by vocabulary entries, row by
row with a stride that is a multiple of 16. One program holds one row of a tile in registers.
Formulas and numerics: kernels/README.md. tile_calls.py launches each of them.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

# Rows of the (STATES, R) float32 tensor that goes from tile to tile.
OFFSET = tl.constexpr(0)  # o: what E is relative to
TOTAL = tl.constexpr(1)  # S' = sum of E
TARGET = tl.constexpr(2)  # z_y; NaN until it is met
PHI = tl.constexpr(3)  # (dz/da) / k at the target, 1 without a softcap
SHRINK = tl.constexpr(4)  # exp(o before - o after the last tile)
TOP = tl.constexpr(5)  # largest z that is not the target's
ARGMAX = tl.constexpr(6)  # its first place; exact, for V is below 2^24
REST = tl.constexpr(7)  # sum of E without that one
SQUARE = tl.constexpr(8)  # sum of E^2
PLOGP = tl.constexpr(9)  # sum of E log E
LOGIT = tl.constexpr(10)  # sum of z, the target's too
NORM = tl.constexpr(11)  # sum of F^2
STATES = 12
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the offset of a row that has seen no entry


# Integers that change from call to call, and pointers to (R,) rows of larger tensors: compiling a
# kernel anew for each of their alignments would gain nothing.
_LOOSE = ["rows", "first_row", "width"]
_ROWS = ["target", "state", "tile_offset", "offset", "offsets", "own", "shrink", "factor"]
_ROWS += ["now", "before", "final", "total", "phi", "scale"]


@triton.jit
def _transform(a, bias, low, cols, inside, scale, cap, SOFTCAP: tl.constexpr, BIAS: tl.constexpr):
    """(z, phi) of raw logits: bias, then scale; with a softcap scale is s / c and cap c / tau."""
    if BIAS:
        a += tl.load(bias + low + cols, mask=inside, other=0.0).to(tl.float32)
    a *= scale
    phi = tl.full(a.shape, 1.0, tl.float32)
    if SOFTCAP:
        # tanh by e^-2|x| loses its digits to 1 - e near 0, where an odd polynomial (error 2e-9 of
        # the value at 0.3) takes over; 1 - tanh^2 = 4 e / (1 + e)^2 loses none anywhere.
        size = tl.abs(a)
        e = tl.exp(-2.0 * size)
        big = (1.0 - e) / (1.0 + e)
        s = a * a
        odd = s * (-1382.0 / 155925.0) + 62.0 / 2835.0
        odd = s * (s * (s * (s * odd - 17.0 / 315.0) + 2.0 / 15.0) - 1.0 / 3.0) + 1.0
        a = cap * tl.where(size < 0.3, a * odd, tl.where(a < 0, -big, big))
        phi = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return a, phi


@triton.jit
def _place(target, low, width):
    """Where in the tile a row's target lies; -1: not in this one."""
    y = tl.load(target)
    return tl.where((y >= low) & (y < low + width), y - low, -1).to(tl.int32)


@triton.jit
def _carry_statistics(
    here,  # the row's column of `state`
    rows,
    later,
    x,  # logits, -inf at the target
    e,
    cols,
    top,
    before,
    offset,
    shrink,
    total,  # of this tile
    total_before,
    low,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
    SQUARES: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """SQUARE, PLOGP, TOP, ARGMAX and REST, where they are asked for."""
    if SQUARES:
        squared = tl.load(here + SQUARE * rows, mask=later, other=0.0) * shrink * shrink
        tl.store(here + SQUARE * rows, squared + tl.sum(e * e, 0))
    if ENTROPY:
        plogp = tl.sum(tl.where(e > 0, e * (x - offset), 0.0), 0)
        carried = tl.load(here + PLOGP * rows, mask=later, other=0.0)
        # No sum so far makes the shift irrelevant, and it may be infinite.
        shift = tl.where(total_before > 0, before - offset, 0.0)
        tl.store(here + PLOGP * rows, (carried + total_before * shift) * shrink + plogp)
    if ORDER:
        first = tl.min(tl.where(x == top, cols, BLOCK), 0)
        others = tl.sum(tl.where(cols == first, 0.0, e), 0)
        top_before = tl.load(here + TOP * rows, mask=later, other=LOWEST)
        first_before = tl.load(here + ARGMAX * rows, mask=later, other=0.0)
        rest_before = tl.load(here + REST * rows, mask=later, other=0.0)
        # The offset stays where the largest entry does: shrink is 1 then.
        rises = top > top_before
        rest = tl.where(rises, total_before * shrink + others, rest_before + total)
        tl.store(here + TOP * rows, tl.where(rises, top, top_before))
        tl.store(here + ARGMAX * rows, tl.where(rises, (first + low).to(tl.float32), first_before))
        tl.store(here + REST * rows, rest)


@triton.jit
def _carry_sketch(line, f, turn, cols, valid, later, shrink, BUCKETS: tl.constexpr):
    """The row's CountSketch carried on by a tile's F with their signs: see count_sketch.py."""
    BLOCK: tl.constexpr = f.shape[0]
    if BLOCK < BUCKETS:  # the whole vocabulary: every id has a bucket of its own
        tl.store(line + (((cols ^ (turn & 7)) + (turn & ~7)) & (BUCKETS - 1)), f, mask=valid)
    else:
        # Every block of ids in the order of the buckets, so that their sum is a sketch. Reading
        # them in that order would be cheaper, but would change the order of the other sums.
        source = ((cols - (turn & ~7)) & (BUCKETS - 1)) ^ (turn & 7)
        f = tl.gather(f, cols // BUCKETS * BUCKETS + source, 0)
        line += tl.arange(0, BUCKETS)
        every = tl.full((BUCKETS,), 1, tl.int1) & later
        before = tl.load(line, mask=every, other=0.0)  # ahead of the reduction: see below
        summed = tl.sum(tl.reshape(f, (BLOCK // BUCKETS, BUCKETS)), 0)
        tl.store(line, before * shrink + summed)


@triton.jit(do_not_specialize=_LOOSE, do_not_specialize_on_alignment=_ROWS)
def exp_tile_kernel(
    logits,  # (B, C) fp32, raw; columns from `width` on hold anything
    exps,  # (B, C) out: E (with a softcap F = phi E), 0 at the target
    target,  # (R,) int64
    bias,  # (V and up to the next multiple of 16,)
    state,  # (STATES, R) fp32
    tile_offset,  # (R,) fp32 out: the offset that this tile is relative to
    sketch,  # (R, BUCKETS) fp32, the CountSketch of F so far; the first tile writes it
    signs,  # (V and up to the next multiple of 16,) int8
    turns,  # int32, of every block of BUCKETS ids: see count_sketch.py
    rows,  # R
    first_row,  # of this block
    low,  # first vocabulary entry of the tile
    width,  # entries of the tile
    stride,  # C, width rounded up to a multiple of 16
    scale,
    cap,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    LAG: tl.constexpr,  # how far a maximum may pass the offset before the offset follows
    HEADROOM: tl.constexpr,  # an offset stands this far above the maximum that it was taken from
    KEEP: tl.constexpr,  # store E and tile_offset; False where only the sums are wanted
    ORDER: tl.constexpr,  # TOP, ARGMAX, REST
    SQUARES: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    NORMS: tl.constexpr,
    BUCKETS: tl.constexpr,  # 0: no sketch
):
    """E relative to the row's offset, and the row's sums carried on."""
    local = tl.program_id(0).to(tl.int64)
    row = local + first_row
    cols = tl.arange(0, BLOCK)
    # The bound is a multiple of 16, so that the mask breaks no 16-byte load or store.
    inside, valid = cols < stride, cols < width
    raw = tl.load(logits + local * stride + cols, mask=inside, other=0.0)
    z, phi = _transform(raw, bias, low, cols, inside, scale, cap, SOFTCAP, BIAS)
    if SOFTCAP:
        phi = tl.where(valid, phi, 0.0)  # what lies beyond the vocabulary may be NaN
    place = _place(target + row, low, width)
    own = cols == place
    x = tl.where(valid & (cols != place), z, -float("inf"))

    here = state + row
    later = low > 0  # the first tile finds nothing in `state`
    met = place >= 0
    value = tl.sum(tl.where(own, z, 0.0), 0)
    value_before = tl.load(here + TARGET * rows, mask=later, other=float("nan"))
    tl.store(here + TARGET * rows, tl.where(met, value, value_before))
    phi_before = tl.load(here + PHI * rows, mask=later, other=1.0)
    tl.store(here + PHI * rows, tl.where(met, tl.sum(tl.where(own, phi, 0.0), 0), phi_before))

    # What all threads need of `state` is read before a reduction, during which they wait for each
    # other, and written after it; the rest is read and written by one and the same thread.
    before = tl.load(here + OFFSET * rows, mask=later, other=LOWEST)
    if MEAN:
        summed = tl.sum(tl.where(valid, z, 0.0), 0)
        tl.store(here + LOGIT * rows, tl.load(here + LOGIT * rows, mask=later, other=0.0) + summed)
    top = tl.max(x, 0)
    offset = tl.where(top + HEADROOM > before + LAG, top + HEADROOM, before)
    shrink = tl.exp(before - offset)
    e = tl.exp(x - offset)
    total = tl.sum(e, 0)
    total_before = tl.load(here + TOTAL * rows, mask=later, other=0.0)
    # Stored before the statistics: later, phi would still be held in registers, and spill.
    if KEEP:
        # Padding gives 0 in E, whatever phi is there.
        f = tl.where(valid, e * phi, 0.0) if SOFTCAP else e
        tl.store(exps + local * stride + cols, f.to(exps.dtype.element_ty), mask=inside)
        tl.store(tile_offset + row, offset)
    tl.store(here + OFFSET * rows, offset)
    tl.store(here + SHRINK * rows, shrink)
    tl.store(here + TOTAL * rows, total_before * shrink + total)
    if NORMS:
        f = e * phi if SOFTCAP else e
        norm = tl.load(here + NORM * rows, mask=later, other=0.0) * shrink * shrink
        tl.store(here + NORM * rows, norm + tl.sum(f * f, 0))
        if BUCKETS:
            f *= tl.load(signs + low + cols, mask=inside, other=0).to(tl.float32)
            turn = tl.load(turns + low // BUCKETS + cols // BUCKETS)
            _carry_sketch(sketch + row * BUCKETS, f, turn, cols, valid, later, shrink, BUCKETS)
    _carry_statistics(
        here,
        rows,
        later,
        x,
        e,
        cols,
        top,
        before,
        offset,
        shrink,
        total,
        total_before,
        low,
        BLOCK,
        ORDER,
        SQUARES,
        ENTROPY,
    )


@triton.jit(do_not_specialize=_LOOSE, do_not_specialize_on_alignment=_ROWS)
def exp_again_kernel(
    logits,  # (B, C) fp32, raw
    exps,  # (B, C) out: F, and `own` at the target
    target,  # (R,) int64
    bias,  # (V and up to the next multiple of 16,)
    offset,  # (R,) fp32, the final one
    own,  # (R,) fp32
    first_row,
    low,
    width,
    stride,
    scale,
    cap,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
):
    """A tile that was not kept, ready for the product that gives its rows of dW."""
    local = tl.program_id(0).to(tl.int64)
    row = local + first_row
    cols = tl.arange(0, BLOCK)
    inside, valid = cols < stride, cols < width
    raw = tl.load(logits + local * stride + cols, mask=inside, other=0.0)
    z, phi = _transform(raw, bias, low, cols, inside, scale, cap, SOFTCAP, BIAS)
    f = tl.exp(tl.where(valid, z, -float("inf")) - tl.load(offset + row))
    if SOFTCAP:
        f = tl.where(valid, f * phi, 0.0)
    f = tl.where(cols == _place(target + row, low, width), tl.load(own + row), f)
    tl.store(exps + local * stride + cols, f.to(exps.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_LOOSE, do_not_specialize_on_alignment=_ROWS)
def own_entry_kernel(
    exps,  # kept tiles one after the other, each (R, C)
    offsets,  # (kept, R) fp32, what each kept tile is relative to
    target,  # (R,) int64
    offset,  # (R,) fp32, the final one
    own,  # (R,) fp32
    rows,  # R
    tile_width,  # vocabulary entries of every tile but the last
    kept_width,  # entries of all kept tiles, padding included
    BLOCK: tl.constexpr,
):
    """`own` into the target's place. It is relative to the final offset, so the row of the target's
    tile is brought there first where its own offset is another one."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    if (y >= 0) & (y < kept_width):
        tile = y // tile_width
        low = tile * tile_width
        stride = tl.minimum(tile_width, kept_width - low)
        line = exps + low * rows + row * stride
        final = tl.load(offset + row)
        here = offsets + tile * rows + row
        value = tl.load(own + row)
        before = tl.load(here)
        if before == final:
            tl.store(line + y - low, value.to(exps.dtype.element_ty))
        else:
            cols = tl.arange(0, BLOCK)
            inside = cols < stride
            f = tl.load(line + cols, mask=inside, other=0.0).to(tl.float32) * tl.exp(before - final)
            f = tl.where(cols == y - low, value, f)
            tl.store(line + cols, f.to(exps.dtype.element_ty), mask=inside)
            tl.debug_barrier()  # all threads have read `before` before one of them changes it
            tl.store(here, final)


@triton.jit(do_not_specialize=_LOOSE, do_not_specialize_on_alignment=_ROWS)
def shrink_rows_kernel(
    mixed,  # (B, D) fp32, in place
    shrink,  # (R,) fp32
    first_row,
    DIM: tl.constexpr,  # D
    BLOCK: tl.constexpr,
):
    """Rows whose offset has moved, brought to the new one; the others are not touched."""
    local = tl.program_id(0).to(tl.int64)
    factor = tl.load(shrink + local + first_row)
    if factor != 1.0:
        for start in range(0, DIM, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < DIM
            value = tl.load(mixed + local * DIM + cols, mask=inside, other=0.0)
            tl.store(mixed + local * DIM + cols, value * factor, mask=inside)


@triton.jit(do_not_specialize=_LOOSE, do_not_specialize_on_alignment=_ROWS)
def hidden_grad_kernel(
    mixed,  # (R, D) fp32: U
    out,  # (R, D) dtype of weight
    weight,  # (V, D)
    target,  # (R,) int64
    total,  # (R,) fp32: S'
    phi,  # (R,) fp32
    scale,  # (R,) fp32: g k (1 - p)
    vocab,  # V
    DIM: tl.constexpr,  # D
    row_stride,  # of weight
    column_stride,
    BLOCK: tl.constexpr,
):
    """scale (phi W_y - U / S')."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    # A target outside the vocabulary has left NaN in the row's log-prob, which goes on from there.
    y = tl.where((y >= 0) & (y < vocab), y, 0)
    by, sum_of_exps = tl.load(scale + row), tl.load(total + row)
    by_lead = by * tl.load(phi + row)
    # Nothing but the target is possible: U and scale are 0.
    by_mixed = by / tl.where(sum_of_exps == 0.0, 1.0, sum_of_exps)
    line = weight + y * row_stride
    for start in range(0, DIM, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < DIM
        u = tl.load(mixed + row * DIM + cols, mask=inside, other=0.0)
        place = cols.to(tl.int64) * column_stride  # V D in all where weight is a transpose
        lead = tl.load(line + place, mask=inside, other=0.0).to(tl.float32)
        grad = by_lead * lead - by_mixed * u
        tl.store(out + row * DIM + cols, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_LOOSE, do_not_specialize_on_alignment=_ROWS)
def scale_rows_kernel(
    hidden,  # (R, D)
    scaled,  # (R, D) out, dtype of hidden
    factor,  # (R,) fp32
    now,  # (R,) fp32 offset of the tile that comes next
    before,  # (R,) fp32 offset that `scaled` stands for so far
    final,  # (R,) fp32
    DIM: tl.constexpr,  # D
    FIRST: tl.constexpr,  # `scaled` holds nothing yet
    BLOCK: tl.constexpr,
):
    """hidden times factor exp(now - final): the operand that makes a tile's product its rows of dW.
    Rows whose tile has the offset of the one before stay as they are."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.load(now + row)
    stale = True
    if not FIRST:
        stale = tl.load(before + row) != offset
    if stale:
        # A row without any entry but its target's has the least number as both offsets.
        by = tl.load(factor + row) * tl.exp(offset - tl.load(final + row))
        for start in range(0, DIM, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < DIM
            value = tl.load(hidden + row * DIM + cols, mask=inside, other=0.0).to(tl.float32) * by
            tl.store(scaled + row * DIM + cols, value.to(scaled.dtype.element_ty), mask=inside)
