"""Passes over memory in C (native.c), for what torch needs several calls for on a CPU.

Compiled when first needed by the C compiler that is there (`$CC`, else `cc`), in a fifth of a
second. Without one, or with FASTPREF_NATIVE=0 in the environment, torch's own calls do the same, to
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
    "segment_products": (
        *(_pointer, _pointer, _pointer, _long),
        *(_pointer, _long, _long, _long, _float, _pointer),
    ),
    "segment_sums": (_pointer, _pointer, _pointer, *[_long] * 3, _int, _float, _pointer),
    "sketch_dots": (_pointer, _pointer, _long, _long, *[_pointer] * 3),
    "project": (*_matrix, _long, _pointer, _pointer, _long, _long, _int, _pointer),
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
        type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
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


def segment_products_(
    out: Tensor,
    groups: Sequence[int],
    y: Sequence[Tensor],
    x: Sequence[Tensor],
    first: Tensor,
    scale: float,
) -> None:
    """out[groups[e]] (S, a, b) += scale times sums over the rows first[s] .. first[s + 1] - 1 of
    y_t x_t^T, of each of E matrices y (T, a), x (T, b); out (G, S, a, b), first (S + 1,) int64."""
    count = len(y)
    sides = [(ctypes.c_void_p * count)(*[m.data_ptr() for m in side]) for side in (y, x)]
    places = (ctypes.c_int64 * count)(*groups)
    sizes = (first.data_ptr(), *out.shape[1:], scale, out.data_ptr())
    _library().segment_products(*sides, places, count, *sizes)


def segment_sums(
    y: Tensor, x: Tensor | None, first: Tensor, eps: float | None, centred: bool
) -> Tensor:
    """(S, D) sums over the rows first[s] .. first[s + 1] - 1, and heads, of y (T, D) | (T, H, D),
    times x where it is given: as it is, or with eps normalised as `column_sums` does."""
    segments, cols = len(first) - 1, y.shape[-1]
    out = y.new_empty(segments, cols)
    each = y.shape[1] if y.dim() == 3 else 1
    kind = 0 if x is None else 1 if eps is None else 3 if centred else 2
    sides = (y.data_ptr(), None if x is None else x.data_ptr(), first.data_ptr())
    _library().segment_sums(*sides, segments, each, cols, kind, eps or 0.0, out.data_ptr())
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


class Signs:
    """Those of a `Projection` with k columns: its row_signs (N,) float32 and turns, int32, from a
    multiple of K = `size` on."""

    __slots__ = ("k", "pointers", "tensors")

    def __init__(self, row_signs: Tensor, turns: Tensor, size: int, k: int) -> None:
        self.k, self.tensors = k, (row_signs, turns)
        self.pointers = (row_signs.data_ptr(), turns.data_ptr(), size // 16, k)


def project(x: Tensor, signs: Signs, before: Tensor | None) -> Tensor:
    """(T, k): x (T, N), whose rows are contiguous, times the signs. Added to ``before``, in place,
    where given."""
    rows, cols = x.shape
    if before is None:
        out, adds = x.new_empty(rows, signs.k), 0
    else:
        out, adds = before, 1
    _library().project(x.data_ptr(), rows, cols, x.stride(0), *signs.pointers, adds, out.data_ptr())
    return out


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "asked for without `fits`"
    return found
