"""Passes over memory in C (native.c), for what torch needs several calls for on a CPU.

Compiled when first needed by the C compiler that is there (`$CC`, else `cc`), in a second or two.
Without one, or with FASTPREF_NATIVE=0 in the environment, torch's own calls do the same, to
other last bits. Nothing is kept on disk, so no machine meets what another has compiled. The threads
are torch's: those of the OpenMP runtime that it has loaded. Shapes: C rows of a matrix, R columns.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

LOGGER = logging.getLogger("fastpref_kernels")
SOURCE = Path(__file__).with_name("native.c")
# No errno and no traps, so that loops vectorise; every multiply-add that is to be fused says so.
FLAGS = ("-O3", "-std=c11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
PARTS, WORK = 8, 48  # rows of what column_maxima and exp_sums work in: PARTS of native.c, 6 each

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_matrix = (_pointer, _long, _long)
SIGNATURES = {
    "column_maxima": (*_matrix, _pointer, _pointer),
    "exp_sums": (*_matrix, _pointer, _float, *[_pointer] * 4),
    "log_odds": (_pointer, _pointer, _pointer, _long, _pointer),
    "log_probs": (_pointer, _long, _pointer),
    "one_tile": (*_matrix, _pointer, _float, _int, *[_pointer] * 3),
    "group_products": (*_matrix, _pointer, _pointer, _long, _long, *[_pointer] * 3),
    "group_gram": (*[_pointer] * 3, _long, *[_pointer] * 6, *[_long] * 3, _pointer),
    "project_columns": (*_matrix, _pointer, _pointer, _long, _long, _pointer, _pointer),
    "head_outputs": (*[_pointer] * 6, _long, _long, _pointer),
    "segment_products": (_pointer, _pointer, _pointer, *[_long] * 3, _float, _pointer),
    "segment_sums": (_pointer, _pointer, _pointer, *[_long] * 3, _int, _float, _pointer),
    "sketch_dots": (_pointer, _pointer, _long, _long, *[_pointer] * 3),
    "project": (*_matrix, _long, _pointer, _pointer, _long, _long, _pointer),
    "linear_sketches": (_pointer, _long, _pointer, *[_long] * 3, _float, _pointer),
    "vector_sketches": (*(_pointer, _long) * 2, _long, _float, _pointer, _pointer),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """What native.c compiled to; None where it may not or cannot be."""
    if os.environ.get("FASTPREF_NATIVE", "1") == "0":
        return None
    try:
        compiler = shlex.split(os.environ.get("CC", "cc"))
    except ValueError as error:
        LOGGER.warning("CC=%r: %s; the CPU's passes are torch's", os.environ["CC"], error)
        return None
    if not compiler or shutil.which(compiler[0]) is None:
        LOGGER.info("no C compiler (%s): the CPU's passes are torch's", " ".join(compiler))
        return None
    # With OpenMP and without: not every compiler has it, not every torch has its runtime loaded.
    for more in (["-fopenmp"], []):
        found = _compiled([*compiler, *FLAGS, *_machine_flags(), *more])
        if isinstance(found, ctypes.CDLL):
            return found
    LOGGER.warning("native.c was not compiled, the CPU's passes are torch's: %s", found)
    return None


def _compiled(command: list[str]) -> ctypes.CDLL | str:
    """The library, or why there is none. Linked without OpenMP, whose symbols are then looked for
    among what torch has loaded: a second runtime would have threads of its own."""
    plain = [part for part in command if part != "-fopenmp"]
    try:
        with tempfile.TemporaryDirectory(prefix="fastpref-native-") as folder:
            made, linked = f"{folder}/native.o", f"{folder}/native.so"
            for step in (
                [*command, "-c", str(SOURCE), "-o", made],
                [*plain, "-shared", made, "-o", linked, "-lm"],
            ):
                subprocess.run(step, check=True, capture_output=True, text=True, timeout=120)
            found = ctypes.CDLL(linked)
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(error.cmd)}: {error.stderr.strip()[:500]}"
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    for name, arguments in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


def _machine_flags() -> list[str]:
    """For the processor at hand; compilers avoid its widest registers unless they are asked for."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


def fits(x: Tensor, contiguous: bool = True) -> bool:
    """Whether C may work on x: float32 in a CPU's memory, contiguous if asked for. What nothing
    looks on at (`is_plain`), and no gradient is asked of, is for the caller to know."""
    return (
        x.dtype is torch.float32
        and type(x) is Tensor
        and x.is_cpu
        and (not contiguous or x.is_contiguous())
        and not x.is_neg()
        and library() is not None
    )


def column_maxima(z: Tensor) -> Tensor:
    """(R,) the largest of every column of z (C, R)."""
    rows, cols = z.shape
    work, out = z.new_empty(PARTS * cols), z.new_empty(cols)
    _library().column_maxima(z.data_ptr(), rows, cols, work.data_ptr(), out.data_ptr())
    return out


def exp_sums_(
    z: Tensor, maximum: Tensor, floor: float, plogp: bool = False, square: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """e = exp(max(z - maximum, floor)) in the place of z (C, R); (R,) sums of e, e log e, e^2."""
    rows, cols = z.shape
    work, total = z.new_empty(WORK * cols), z.new_empty(cols)
    logs = z.new_empty(cols) if plogp else None
    squares = z.new_empty(cols) if square else None
    found = (total, logs, squares)
    places = [None if x is None else x.data_ptr() for x in found]
    _library().exp_sums(
        z.data_ptr(), rows, cols, maximum.data_ptr(), floor, work.data_ptr(), *places
    )
    return found


def log_odds(maximum: Tensor, total: Tensor, own: Tensor) -> Tensor:
    """(R,) log((1 - p) / p) = maximum - own + log total, (R,) each."""
    odds = maximum.new_empty(len(maximum))
    _library().log_odds(
        maximum.data_ptr(), total.data_ptr(), own.data_ptr(), len(odds), odds.data_ptr()
    )
    return odds


def log_probs(odds: Tensor) -> Tensor:
    """(R,) log p."""
    logp = odds.new_empty(len(odds))
    _library().log_probs(odds.data_ptr(), len(odds), logp.data_ptr())
    return logp


def one_tile_(z: Tensor, target: Tensor, floor: float, keep: bool) -> tuple[Tensor, Tensor]:
    """Of all logits z (V, R), in their place e, with -total at the targets (R,) if `keep`: (3, R)
    maximum, total and log-odds, and (R,) log p."""
    (vocab, rows), target = z.shape, target.contiguous()
    state, logp, work = z.new_empty(3, rows), z.new_empty(rows), z.new_empty((WORK + 1) * rows)
    _library().one_tile(
        z.data_ptr(),
        vocab,
        rows,
        target.data_ptr(),
        floor,
        keep,
        work.data_ptr(),
        state.data_ptr(),
        logp.data_ptr(),
    )
    return state, logp


def group_products(z: Tensor, target: Tensor, first: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Of groups of neighbouring columns of z (C, R), first[b] .. first[b + 1] - 1 in group b, at
    most ``most`` each: (R, most), [t, j] column t times the j'th of its group, and the latter's
    entry at row target[t]. What is beyond a group's columns is not written."""
    (vocab, rows), target = z.shape, target.contiguous()
    products, met = z.new_empty(rows, most), z.new_empty(rows, most)
    work = z.new_empty(2 * PARTS * most * rows)
    sizes = (target.data_ptr(), first.data_ptr(), len(first) - 1, most)
    places = (work.data_ptr(), products.data_ptr(), met.data_ptr())
    _library().group_products(z.data_ptr(), vocab, rows, *sizes, *places)
    return products, met


def group_gram_(
    out: Tensor,  # (B, g, g)
    found: tuple[Tensor, Tensor],  # of `group_products`
    hidden: Tensor,  # (R, D)
    target: Tensor,  # (R,)
    segment: Tensor,  # (R,) int64
    total: Tensor,
    miss: Tensor,
    phi: Tensor | None,
    first: Tensor,
) -> None:
    """As `GroupGram.finish`."""
    per_row = [None if x is None else x.contiguous() for x in (target, segment, total, miss, phi)]
    sizes = (out.shape[0], found[0].shape[1], out.shape[1], out.data_ptr())
    _library().group_gram(
        *(x.data_ptr() for x in found),
        *(hidden.data_ptr(), hidden.shape[1]),
        *(None if x is None else x.data_ptr() for x in per_row),
        *(first.data_ptr(), *sizes),
    )


def project_columns_(out: Tensor, z: Tensor, bucket: Tensor, sign: Tensor, size: int) -> None:
    """out (k, R) += z (C, R) times the signs of its rows, of a `Projection` with K = ``size``:
    bucket (C,) int32, b_i, and sign (C,), s_i."""
    work = z.new_empty(PARTS * size * z.shape[1])
    signs = (bucket.data_ptr(), sign.data_ptr(), size, out.shape[0])
    _library().project_columns(z.data_ptr(), *z.shape, *signs, work.data_ptr(), out.data_ptr())


def head_outputs(
    sums: Tensor, table: Tensor, target: Tensor, total: Tensor, miss: Tensor, phi: Tensor | None
) -> Tensor:
    """(R, k) the projected gradients of rows, of sums (k, R) of F and the signs ``table`` (V, k):
    miss (phi table[target] - sums / total), (R,) each."""
    rows, k = sums.shape[1], sums.shape[0]
    out = sums.new_empty(rows, k)
    per_row = [None if x is None else x.contiguous() for x in (target, total, miss, phi)]
    places = (None if x is None else x.data_ptr() for x in per_row)
    _library().head_outputs(sums.data_ptr(), table.data_ptr(), *places, rows, k, out.data_ptr())
    return out


def segment_products_(out: Tensor, y: Tensor, x: Tensor, first: Tensor, scale: float) -> None:
    """out (S, a, b) += scale times sums over the rows first[s] .. first[s + 1] - 1 of y_t x_t^T, of
    y (T, a), x (T, b); first (S + 1,) int64."""
    sizes = (first.data_ptr(), *out.shape, scale, out.data_ptr())
    _library().segment_products(y.data_ptr(), x.data_ptr(), *sizes)


def segment_sums(y: Tensor, x: Tensor | None, first: Tensor, eps: float, centred: bool) -> Tensor:
    """(S, D) sums over the rows first[s] .. first[s + 1] - 1, and heads, of y (T, D) | (T, H, D),
    times x where it is given, normalised as `column_sums` does."""
    segments, cols = len(first) - 1, y.shape[-1]
    out = y.new_empty(segments, cols)
    each = y.shape[1] if y.dim() == 3 else 1
    kind = ALONE if x is None else CENTRED if centred else RMS
    sides = (y.data_ptr(), None if x is None else x.data_ptr(), first.data_ptr())
    _library().segment_sums(*sides, segments, each, cols, kind, eps, out.data_ptr())
    return out


def sketch_dots(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Values and errors (...) float64 of sketches (..., k, k), as `sketch_estimates.sketch_dot`."""
    k = a.shape[-1]
    value, error = (a.new_empty(a.shape[:-2], dtype=torch.float64) for _ in range(2))
    work = value.new_empty(k)
    found = (value.numel(), k, work.data_ptr(), value.data_ptr(), error.data_ptr())
    _library().sketch_dots(a.data_ptr(), b.data_ptr(), *found)
    return value, error


def projects(k: int) -> bool:
    """Whether `project` is there, and has as many columns."""
    return 8 < k <= 16384 and library() is not None


def buckets_of(k: int) -> int:
    """K of `Signs`: k rounded up to a power of two."""
    return 1 << (k - 1).bit_length()


class Signs:
    """Those of a `Projection` with k columns: its row_signs (N,) float32 and turns, int32, from a
    multiple of K = `size` on."""

    __slots__ = ("k", "pointers", "tensors")

    def __init__(self, row_signs: Tensor, turns: Tensor, size: int, k: int) -> None:
        self.k, self.tensors = k, (row_signs, turns)
        self.pointers = (row_signs.data_ptr(), turns.data_ptr(), size // 16, k)


def project(x: Tensor, signs: Signs) -> Tensor:
    """(T, k): x (T, N), whose rows are contiguous, times the signs."""
    rows, cols = x.shape
    out = x.new_empty(rows, signs.k)
    _library().project(x.data_ptr(), rows, cols, x.stride(0), *signs.pointers, out.data_ptr())
    return out


NARROW = 2048  # k of `LinearSketches` at most
MOST_FEATURES = 1 << 14  # of `VectorSketches`, whose sums stand on a thread's stack


class Sums:
    """What the sketches of a batch are added to, ``scale`` / k times, as C takes it: sketch
    (G, S, k, k) and norm_sq (G, S), contiguous float32, of segments s with the rows
    first[s] .. first[s + 1] - 1, (S + 1,) int64."""

    __slots__ = ("linear", "tensors", "vectors")

    def __init__(self, norm_sq: Tensor, sketch: Tensor, first: Tensor, scale: float) -> None:
        k, out = sketch.shape[-1], _pointer(sketch.data_ptr())
        rows = (_pointer(first.data_ptr()), _long(sketch.shape[1]))
        sizes = (_long(k * k), _float(scale / k), _pointer(norm_sq.data_ptr()))
        self.tensors = (norm_sq, sketch, first)
        self.linear = (*rows, _long(buckets_of(k) // 16), _long(k), _float(scale / k), out)
        self.vectors = (*rows, *sizes, out)


# Which of `given` is meant, an input of linear layers or the gradient of an output: its features,
# signs, and the group of an input; -1 for an output of the input before it.
Side = tuple[int, int, Signs, int]


class LinearSketches:
    """Sketches of gradients of linear layers, of which all is known but where the numbers are.

    ``sides``: inputs, the outputs of each behind it, one at least. k is at most NARROW.
    """

    __slots__ = ("arguments", "call", "numbers", "places", "signs")

    def __init__(self, sides: Sequence[Side]) -> None:
        self.signs = [side[2] for side in sides]  # whose addresses stand in the table
        rows = [(0, 0, cols, *signs.pointers[:2], group) for _, cols, signs, group in sides]
        table = [number for row in rows for number in row]
        self.numbers = (ctypes.c_int64 * len(table))(*table)
        self.places = [(n * len(rows[0]), side[0]) for n, side in enumerate(sides)]
        self.arguments = (_pointer(ctypes.addressof(self.numbers)), _long(len(sides)))
        self.call = _library().linear_sketches

    def add_(self, sums: Sums, given: Sequence[Tensor | None]) -> bool:
        """Adds sums over a segment's rows of g_t p_t^T, p an input, projected, g the sum of its
        projected outputs, of ``given`` (T, d) | (1, T, d). False, with nothing added, where C may
        not work on one of them."""
        numbers = self.numbers
        for at, i in self.places:
            x = given[i]
            if type(x) is not Tensor or x.dtype is not torch.float32 or x.is_neg():
                return False
            step = x.stride()
            if step[-1] != 1:
                return False
            numbers[at] = x.data_ptr()
            numbers[at + 1] = step[-2]
        self.call(*self.arguments, *sums.linear)
        return True


ALONE, RMS, CENTRED = 0, 1, 2  # what is made of x beside y, see native.c
# Which of `given` y and x are (ALONE: any), features, kind, eps, signs, group.
Vector = tuple[int, int, int, int, float, Signs, int]


class _Vector(ctypes.Structure):
    """That of native.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("y", "x", "each", "cols", "kind")),
        *((name, ctypes.c_int64) for name in ("sign", "turn", "quads", "group")),
        ("eps", ctypes.c_double),
    )


class VectorSketches:
    """Norms and sketches of gradients that are vectors, of which all is known but where the numbers
    are: those of `segment_sums` of each of ``vectors``, whose signs are as many for each."""

    __slots__ = ("arguments", "call", "each", "numbers", "places", "signs", "table")

    def __init__(self, vectors: Sequence[Vector]) -> None:
        self.signs = [vector[5] for vector in vectors]
        self.table = (_Vector * len(vectors))()
        for i, (_, _, cols, kind, eps, signs, group) in enumerate(vectors):
            self.table[i] = _Vector(0, 0, 1, cols, kind, *signs.pointers[:3], group, eps)
        words = ctypes.sizeof(_Vector) // 8
        self.numbers = (ctypes.c_int64 * (words * len(vectors))).from_buffer(self.table)
        self.places, self.each = (
            [],
            [],
        )  # of y and x, and of `each`, with which of `given` says them
        for n, (y, x, _, kind, *_) in enumerate(vectors):
            first = words * n
            self.places += [(first, y)] if kind == ALONE else [(first, y), (first + 1, x)]
            self.each.append((first + 2, y))
        self.arguments = (_pointer(ctypes.addressof(self.table)), _long(len(vectors)))
        self.call = _library().vector_sketches

    def add_(self, sums: Sums, given: Sequence[Tensor | None]) -> bool:
        """Adds those of ``given``: (T, D), (1, T, D) or (T, H, D). False, with nothing added, where
        C may not work on one of them."""
        numbers = self.numbers
        for at, i in self.places:
            x = given[i]
            if (
                type(x) is not Tensor
                or x.dtype is not torch.float32
                or not x.is_contiguous()
                or x.is_neg()
            ):
                return False
            numbers[at] = x.data_ptr()
        for at, i in self.each:
            shape = given[i].shape  # type: ignore[union-attr]  # a tensor, as the loop before saw
            numbers[at] = 1 if len(shape) == 2 or shape[0] == 1 else shape[1]
        self.call(*self.arguments, *sums.vectors)
        return True


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "asked for without `fits`"
    return found
