"""Norms of the head's gradients on the device against float64, in a CUDA graph, without a wait: for
the `correctness` part of `bench gpu`. A check gives numbers and their bounds, as there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from fastpref_kernels import LinearLogprob, head_norms, linear_logprob, reference
from fastpref_kernels._launch import HAS_TRITON
from fastpref_kernels.spans import group_counts
from torch import Tensor

from bench import head_ops
from bench.capture import captured, waiting_is_an_error

Found = Mapping[str, tuple[float, float]]  # what -> (measured, bound)
Check = Callable[[Any], Found]  # takes a session, of which device and dry are read
# Rows of segments: groups of one to four rows, that share a block, of some blocks, long ones.
COUNTS = [1, 0, 0, 1, 1, 2, 3, 5, 6, 0, 9, 9, 20, 11, 2, 60, 41, 43, 0, 150, 133, 1, 1, 700]


def checks() -> Iterator[tuple[str, Check]]:
    """(name, check), the most important first."""
    for dtype in (torch.bfloat16, torch.float32):
        for group in (1, 3):
            for way in ("rows", "gradients"):
                name = f"head's Gram matrices by {way}, {str(dtype)[6:]}, groups of {group}"
                yield name, functools.partial(_gram, dtype=dtype, group=group, way=way)
    yield "head's norms captured in a CUDA graph, no wait for the device", _captured


@contextlib.contextmanager
def _long_groups(way: str) -> Iterator[None]:
    """Inside, groups with rows go by products of rows, or by their segments' gradients."""

    def sort_groups(counts: Sequence[int], group_size: int, *_: Any) -> Any:
        lengths = group_counts(counts, group_size)
        groups = tuple(i for i, n in enumerate(lengths) if n)
        return (groups, ()) if way == "rows" else ((), groups)

    longest = 10**9 if way == "rows" else 0
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(head_norms, "longest_head_gram", lambda *_: longest))
        if HAS_TRITON:
            from fastpref_kernels import triton_norms

            enter(mock.patch.object(triton_norms, "sort_groups", sort_groups))
        yield


def _gram_problem(session: Any, dtype: torch.dtype) -> tuple[head_ops.Problem, Tensor]:
    vocab = 700 if session.dry else 9000
    problem = head_ops.make_problem(sum(COUNTS), 136, vocab, 4, dtype=dtype, device=session.device)
    problem = dataclasses.replace(problem, target=problem.target % 11)
    ids = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    return problem, ids.int().to(session.device)


def _gram(session: Any, dtype: torch.dtype, group: int, way: str) -> Found:
    """Relative to the norms; all tiles kept, some, none."""
    problem, segment_id = _gram_problem(session, dtype)
    same: dict[str, Any] = {"num_segments": len(COUNTS), "group_size": group, "norms": "exact"}
    inputs = (problem.target, segment_id)
    wide = (problem.hidden.double(), problem.weight.double())
    truth = reference.linear_logprob(*wide, *inputs, **same).gram
    assert truth is not None
    sizes = truth.diagonal(dim1=1, dim2=2).sqrt()
    scale = (sizes.unsqueeze(1) * sizes.unsqueeze(2)).clamp(min=1e-30)
    found = {}
    for mode, cache in (("full", -1), ("full", 1), ("frozen", -1)):
        with _long_groups(way):
            out = linear_logprob(*problem.leaves(mode), *inputs, cache=cache, **same)
        assert out.gram is not None
        gap = float(((out.gram.double() - truth).abs() / scale).max())
        found[f"{mode}, cache {cache}"] = (gap, 4e-3 if dtype == torch.bfloat16 else 1e-4)
    return found


def _captured(session: Any) -> Found:
    """Replayed, exact norms and sketches have the bits of a call; with `counts` nothing waits."""
    problem, segment_id = _gram_problem(session, torch.bfloat16)
    leaves = problem.leaves("full")
    cuda = session.device.type == "cuda"
    found = {}
    for way in ("rows", "gradients"):

        def call() -> list[Tensor]:
            out: LinearLogprob = linear_logprob(
                *leaves, problem.target, segment_id, counts=COUNTS, group_size=3, norms="both"
            )
            gradients = torch.autograd.grad(out.logp.sum(), leaves)
            assert out.gram is not None and out.sketch is not None
            return [*gradients, out.gram, out.sketch]

        with _long_groups(way):
            expected = call()
            replayed = captured(call) if cuda else call()
            with waiting_is_an_error(session.device):
                call()
        differ = sum(not torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))
        found[f"by {way}: tensors that differ"] = (float(differ), 0.0)
    return found
