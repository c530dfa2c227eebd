"""What a trainer does around the ops: compile, autocast, checkpointing, several uses, FSDP2.

Run as a script under torchrun's environment, this file is one of two FSDP2 ranks: `_be_a_rank`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpref_kernels import linear_dpo, linear_logprob, sequence_logprob
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.ranks import run_two_ranks

ROOT = Path(__file__).resolve().parents[2]
DIM, VOCAB, PAIRS = 12, 300, 4

has_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")),
    reason="inductor needs a C++ compiler",
)


class Policy(nn.Module):
    """A layer and a head whose weight meets the op inside the module's forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=True)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor, target: Tensor, segment_id: Tensor, ref: Tensor) -> Tensor:
        return linear_dpo(
            self.hidden(x),
            self.head.weight,
            target,
            segment_id,
            *ref.unbind(),
            beta=0.3,
            bias=self.head.bias,
        ).loss.mean()


def batch(seed: int = 0, rows: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, DIM, generator=g)
    target = torch.randint(0, VOCAB, (rows,), generator=g)
    segment_id = torch.randint(0, 2 * PAIRS, (rows,), generator=g).sort().values.int()
    ref = -30 * torch.rand(2, PAIRS, generator=g)
    return x, target, segment_id, ref


def grads(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(a: list[Tensor], b: list[Tensor], **tolerance: float) -> None:
    for one, two in zip(a, b, strict=True):
        if tolerance:
            torch.testing.assert_close(one, two, **tolerance)
        else:
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[has_compiler, pytest.mark.slow])]
)
def test_compile_full_graph(backend: str) -> None:
    """The ops are opaque: only what stands around them may differ, by rounding."""
    model = Policy()
    plain = grads(model, model(*batch()))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    exact = {} if backend == "aot_eager" else {"rtol": 1e-5, "atol": 1e-6}
    same(grads(model, compiled(*batch())), plain, **exact)


def test_compile_with_other_numbers_of_rows() -> None:
    model = Policy()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (40, 33, 57):
        same(grads(model, compiled(*batch(rows, rows))), grads(model, model(*batch(rows, rows))))


def test_compiled_reference_pass() -> None:
    x, target, segment_id, _ = batch()
    model = Policy()
    call = partial(sequence_logprob, num_segments=2 * PAIRS)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    arguments = (model.hidden(x), model.head.weight, target, segment_id)
    for one, two in zip(compiled(*arguments), call(*arguments), strict=True):
        assert torch.equal(one, two)


def test_autocast_rounds_the_body_and_not_the_log_probs() -> None:
    """Under autocast the head's products and the sums stay what they are outside of it."""
    model, (x, target, segment_id, ref) = Policy(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hidden(x).float().detach()
    weight = model.head.weight
    results = []
    for inside in (True, False):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            out = linear_dpo(leaf, weight, target, segment_id, *ref.unbind(), beta=0.3)
            loss = out.loss.mean()
        assert out.loss.dtype == torch.float32
        results.append([loss.detach(), *torch.autograd.grad(loss, (leaf, weight))])
    same(*results)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = Policy()
    x, *rest = batch()
    plain = grads(model, model(x, *rest))
    x.requires_grad_()  # reentrant checkpointing needs an input with a gradient
    again = checkpoint(model, x, *rest, use_reentrant=reentrant)
    same(grads(model, again), plain)


def test_two_uses_in_one_graph() -> None:
    """Policy terms of two batches through one head; the gradients add up."""
    model = Policy()
    one, two = grads(model, model(*batch(1))), grads(model, model(*batch(2)))
    both = grads(model, model(*batch(1)) + model(*batch(2)))
    same(both, [a + b for a, b in zip(one, two, strict=True)], rtol=1e-6, atol=1e-7)


def test_a_term_on_the_same_log_probs() -> None:
    """Loss and another use of one `linear_logprob`: what it saved serves a backward of the sum."""
    model, (x, target, segment_id, _) = Policy().double(), batch()
    x = x.double()

    def logp() -> Tensor:
        return linear_logprob(
            model.hidden(x), model.head.weight, target, segment_id, num_segments=2 * PAIRS
        ).logp

    shared = logp()
    once = grads(model, shared.sum() + (shared * shared).mean())
    twice = grads(model, logp().sum() + (logp() * logp()).mean())
    same(once[1:], twice[1:], rtol=1e-12, atol=1e-14)


def test_second_backward_is_right() -> None:
    model = Policy()
    loss = model(*batch())
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    same(list(first), list(second))
    with pytest.raises(RuntimeError, match="second time|already been freed"):
        torch.autograd.grad(loss, list(model.parameters()))


def test_tied_weights() -> None:
    """Embedding and head are one parameter: both of its gradients arrive."""
    weight = nn.Parameter(torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(0)))
    _, target, segment_id, ref = batch()

    def loss(embedding: Tensor, head: Tensor) -> Tensor:
        hidden = torch.tanh(embedding[target.roll(1)])
        return linear_dpo(hidden, head, target, segment_id, *ref.unbind(), beta=0.3).loss.mean()

    (tied,) = torch.autograd.grad(loss(weight, weight), weight)
    other = weight.detach().clone().requires_grad_()
    apart = torch.autograd.grad(loss(weight, other), (weight, other))
    torch.testing.assert_close(tied, apart[0] + apart[1])


@pytest.mark.slow
def test_fsdp2_unshards_the_weight_for_the_forward() -> None:
    """Two gloo ranks, each with half of every weight, have the gradients of one process."""
    run_two_ranks(__file__)


def _be_a_rank() -> None:
    import torch.distributed as distributed  # noqa: TID251  no part of fastpref: a user's FSDP2
    from torch.distributed.fsdp import fully_shard  # noqa: TID251

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    whole, model = Policy(), Policy()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))  # noqa: TID251
    fully_shard(model, mesh=mesh)
    local: Callable[[Any], Tensor] = lambda x: x.full_tensor()  # noqa: E731
    for reshard in (True, False):
        model.set_reshard_after_forward(reshard)
        model.zero_grad()
        loss = model(*batch(rank))
        loss.backward()
        mean = [torch.zeros_like(p) for p in whole.parameters()]
        for seed in (0, 1):
            own = torch.autograd.grad(whole(*batch(seed)), list(whole.parameters()))
            mean = [total + one / 2 for total, one in zip(mean, own, strict=True)]
            if seed == rank:
                assert torch.equal(loss, whole(*batch(seed)))
        for parameter, expected in zip(model.parameters(), mean, strict=True):
            assert parameter.grad is not None and parameter.to_local().shape != expected.shape  # type: ignore[attr-defined]
            torch.testing.assert_close(local(parameter.grad), expected, rtol=1e-5, atol=1e-7)
    distributed.barrier()
    distributed.destroy_process_group()
    print("all held")


if __name__ == "__main__":
    _be_a_rank()
