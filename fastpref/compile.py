"""torch.compile of the decoder blocks.

What is compiled is a block without its attention: norms, projections, rotations, activations and
residual sums. Attention over packed branches stays what it is, opaque to the compiler, so that a
backend's kernels and the batch's layout, which is another one every time, are no part of a graph.
The number of tokens is a symbol, not a constant, so that a batch of another size compiles nothing;
blocks of one kind share their graphs, the last one too, which for that is computed for every token
(fastpref.last_block). Values are the plain ones to rounding: a compiler fuses, and so rounds fewer
intermediate results.
"""

from __future__ import annotations

import logging
import os
import shutil
from typing import Any

import torch
from torch import nn

from fastpref import attention, last_block, recompute

log = logging.getLogger(__name__)

COMPILERS = {"cpu": ("CXX", ("g++", "clang++", "c++")), "cuda": ("CC", ("gcc", "clang", "cc"))}


def demand_compiler(device: torch.device) -> None:
    """ValueError where torch's inductor finds no compiler for ``device``: on a CPU it writes C++,
    on CUDA triton builds its launcher in C."""
    variable, usual = COMPILERS["cpu" if device.type == "cpu" else "cuda"]
    given = os.environ.get(variable)
    names = (given.split()[0],) if given else usual
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"torch_compile: true needs a compiler on {device.type}, and there is no "
            f"{' or '.join(names)} here. Install g++ (and gcc), name one in {variable}, or set "
            "torch_compile: false."
        )


def compile_blocks(module: nn.Module) -> int:
    """Compile the decoder blocks of a causal LM, in place, at their next call; how many.

    Checkpointing that is around them stays around them. Raises ValueError where the model has no
    blocks that transformers knows.
    """
    blocks = recompute.decoder_layers(module)
    if not blocks:
        raise ValueError(
            f"torch_compile: {type(module).__name__} has no decoder blocks that transformers "
            "names as such. Set torch_compile: false."
        )
    attention.hide_from_compiler()
    last_block.widen(module)  # or the last block would be cut into many graphs of its own
    for block in blocks:
        own: Any = block.forward
        plain, mode = getattr(own, "recomputed", (own, None))
        compiled = torch.compile(plain, dynamic=True)
        block.forward = compiled if mode is None else recompute.recomputed(compiled, mode)
    log.info("torch.compile: %d blocks; the first steps compile them", len(blocks))
    return len(blocks)
