"""Whether a call may leave torch's dispatcher out: a custom op costs more than what it does on few
rows, 0.13 ms of CPU time a call (docs/measured-facts.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing looks on at these tensors' ops, so that a custom op's body may be called.

    Onlookers are torch.compile, tracing, dispatch and function modes (fake tensors, selective
    checkpointing, counters of operations, a default device), functorch's transforms, forward-mode
    derivatives, and subclasses of Tensor. To them an op must be one op, with its fake
    implementation; on a device without memory it is nothing else.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    ):
        return False
    for x in tensors:  # noqa: SIM110: all() of a generator takes a third longer
        if x is not None and (type(x) not in PLAIN or x.is_meta):
            return False
    return True
