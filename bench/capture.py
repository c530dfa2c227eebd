"""What is to run without the host waiting for the device: a wait is an error, or a CUDA graph has
captured it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def waiting_is_an_error(device: Any) -> Iterator[None]:
    """Inside, whatever waits for a GPU raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a CUDA graph of the call gives, replayed twice."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up, as torch's notes on capture ask for
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return [x.detach().clone() for x in out]
