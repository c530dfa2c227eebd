"""Choice of backend and tile width, and the launch of a Triton kernel."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

LOGGER = logging.getLogger("fastpref_kernels")
BACKENDS = ("auto", "torch", "triton")


class TritonTile(NamedTuple):
    """How the Triton backend cuts the logits."""

    width: int  # vocabulary entries per tile, a multiple of 16
    warps: int  # of the program that holds one row of a tile
    row_block: int  # rows whose float32 logits of one tile exist at the same time


# (arch at least, dtypes, D at most, V at most, tile), first match. 16 entries a thread: more spill,
# fewer leave too few bytes in flight (kernels/README.md). No entry has been timed on a GPU.
_ANY, _32, _16 = 10**9, (torch.float32,), (torch.float16, torch.bfloat16)
TRITON_TILES = (
    (0, _16 + _32, _ANY, 1024, TritonTile(1024, 2, 131072)),
    (0, _16 + _32, _ANY, 4096, TritonTile(4096, 8, 32768)),
    (0, _16 + _32, _ANY, _ANY, TritonTile(8192, 16, 16384)),
)

# Found, not imported: `import fastpref_kernels` works without triton, and kernels are decorated
# only after the environment has been read (TRITON_INTERPRET).
HAS_TRITON = importlib.util.find_spec("triton") is not None

_said: set[tuple[str, str]] = set()  # (op, backend) already logged
_recorder: ContextVar[Any] = ContextVar("recorder", default=None)


def resolve_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    op: str = "linear_logprob",
) -> str:
    """Name of the backend, torch or triton, that runs `op` on tensors of this device and dtype.

    `auto` is triton on CUDA (float64 apart, which the kernels do not know), torch elsewhere; what
    it chose is logged once. "triton" never falls back: ValueError where it cannot run. On the CPU
    it runs in Triton's interpreter, for tests, and only under TRITON_INTERPRET=1.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}."
            f"{nearest(str(backend), BACKENDS)}"
        )
    if backend == "triton":
        _require_triton(device, dtype, op)
        return "triton"
    if backend == "torch":
        return "torch"
    wanted = device.type == "cuda" and dtype != torch.float64
    chosen = "triton" if wanted and HAS_TRITON else "torch"
    # A log call would break the graph of torch.compile(fullgraph=True).
    if not torch.compiler.is_compiling() and (op, chosen) not in _said:
        _said.add((op, chosen))
        missing = " (triton is not installed: pip install triton)" if chosen != "triton" else ""
        LOGGER.info("%s: backend auto -> %s%s", op, chosen, missing if wanted else "")
    return chosen


def _require_triton(device: torch.device, dtype: torch.dtype, op: str) -> None:
    if not HAS_TRITON:
        raise ValueError(
            f"{op}: backend='triton' needs the package triton, which is not installed. "
            "Run `pip install triton`, or use backend='torch', which gives the same numbers."
        )
    if dtype == torch.float64:
        raise ValueError(
            f"{op}: backend='triton' computes in float32, got torch.float64. Use backend='torch'."
        )
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        raise ValueError(
            f"{op}: backend='triton' needs CUDA tensors, got a {device.type} tensor. Use "
            "backend='torch' (or 'auto'). Triton's interpreter runs on the CPU if "
            "TRITON_INTERPRET=1 is in the environment before Python starts; slow, for tests."
        )


def surroundings(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Without autocast, which would round the products to a half type behind the op's back, and on
    CUDA with the tensors' device as the current one, on which Triton launches."""
    autocast = torch.is_autocast_enabled(device.type) if device.type != "meta" else False
    if not autocast and device.type != "cuda":
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if autocast:
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))
    return stack


class Launch(NamedTuple):
    """A launch of a Triton kernel, as `recorded` hands it on."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int
    stages: int
    rewritten: Sequence[str]
    touched: Mapping[str, int]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    *,
    warps: int,
    stages: int = 2,
    rewritten: Sequence[str] = (),
    touched: Mapping[str, int] | None = None,
) -> None:
    """Launch a Triton kernel; nothing where the grid is empty.

    Every tensor argument is to be read or written once by the launch as a whole, those named in
    `rewritten` both; of those in `touched` so many bytes are read and written, more only for rows
    that the data singles out. `bench roofline` counts a launch's bytes by that.
    """
    if recorder := _recorder.get():
        recorder(Launch(kernel, grid, arguments, warps, stages, rewritten, touched or {}))
    elif all(grid):
        # Triton is about to drop fusing multiply and add by default (docs/measured-facts.md).
        kernel[grid](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


@contextlib.contextmanager
def recorded(recorder: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, `launch` hands what it would launch to `recorder` and runs nothing, so that an op can
    be followed on tensors of the meta device."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def tile_width(dim: int, vocab: int, dtype: torch.dtype) -> int:
    """Vocabulary entries per tile; depends on the weight alone, never on the batch.

    Few, because calls and the products' own overhead count; no more, because float32 logits of some
    hundred rows are to stay in the second-level caches of two cores. Measured: kernels/README.md.
    """
    width = 2048 if dim * vocab > 16_000_000 else 8192 if vocab <= 8192 else 4096
    return min(vocab, width // 2 if dtype == torch.float64 else width)


def triton_tile(dim: int, vocab: int, dtype: torch.dtype, arch: int) -> TritonTile:
    """The entry of TRITON_TILES for this head, cut down to its vocabulary."""
    for least_arch, dtypes, most_dim, most_vocab, tile in TRITON_TILES:
        if arch >= least_arch and dtype in dtypes and dim <= most_dim and vocab <= most_vocab:
            return tile._replace(width=min(tile.width, padded(vocab)))
    raise AssertionError(f"no tile for {dim=}, {vocab=}, {dtype=}, {arch=}")


def padded(size: int) -> int:
    """Up to a multiple of 16 entries: every row of a tile begins and ends on 16 bytes or more."""
    return -(-size // 16) * 16


@torch.compiler.assume_constant_result
def arch_of(device: torch.device) -> int:
    """90 for compute capability 9.0; of a device that is no GPU (the interpreter), 90 too."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def refuse_second_derivative(backward_op: Any, name: str) -> None:
    """Where the gradient of `name`'s gradient is asked for, say so; torch would name an op."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"{name} has no second derivative, and the gradient of its gradient was asked for. "
            f"reference.{name} is plain torch, and is differentiated as often as wanted."
        )

    backward_op.register_autograd(refuse)


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error message: which known name was meant; empty where none is close."""
    near = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {near[0]!r}?" if near else ""
