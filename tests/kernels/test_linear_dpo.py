"""`linear_dpo` and `sequence_logprob` against the oracles; the example of the README as it is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpref_kernels import PairLoss, linear_dpo, linear_logprob, reference, sequence_logprob
from fastpref_kernels.pair_checks import LOSS_TYPES
from torch import Tensor

from tests.kernels.cases import Case, make_case

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"


def refs(pairs: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(-20 * torch.rand(2, pairs, generator=g))  # type: ignore[return-value]


def by_oracles(case: Case, group: int, ref: tuple[Tensor, Tensor], **options: Any) -> Any:
    """(result, gradients of hidden, weight, bias) in float64."""
    wide = case.to(torch.float64)
    leaves = [x.requires_grad_() for x in (wide.hidden, wide.weight, wide.bias) if x is not None]
    rows = reference.linear_logprob(
        leaves[0],
        leaves[1],
        wide.target,
        bias=leaves[2] if len(leaves) == 3 else None,
        **wide.options,
    ).logp
    out = reference.pair_loss(
        rows,
        wide.segment_id,
        *(x.double() for x in ref),
        group_size=group,
        num_segments=wide.num_segments,
        **options,
    )
    return out, torch.autograd.grad(out.loss.mean(), leaves)


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equal_to_the_oracles(loss_type: str, group: int, dtype: torch.dtype, bound: float) -> None:
    head: dict[str, Any] = {"softcap": 9.0, "logit_scale": 0.7, "temperature": 1.3}
    case = make_case(60, 8, 120, dtype=dtype, segments=4 * group, bias=True, **head)
    ref = tuple(x.to(dtype) for x in refs(4))
    options = {"beta": 0.3, "loss_type": loss_type}
    truth, true_grads = by_oracles(case, group, ref, **options)  # type: ignore[arg-type]
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]  # type: ignore[union-attr]
    out = linear_dpo(
        leaves[0],
        leaves[1],
        case.target,
        case.segment_id,
        *ref,
        bias=leaves[2],
        group_size=group,
        **options,
        **head,
    )
    for field in fields(PairLoss):
        ours, true = getattr(out, field.name).detach(), getattr(truth, field.name).detach()
        size = max(1.0, float(true.abs().max()))
        torch.testing.assert_close(ours.double(), true, rtol=0, atol=bound * size, msg=field.name)
    grads = torch.autograd.grad(out.loss.mean(), leaves)
    for ours, true in zip(grads, true_grads, strict=True):
        error = (ours.double() - true).norm()
        assert float(error) <= bound * float(true.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [2, 3])
def test_a_policy_that_is_its_own_reference_has_margin_zero(group: int, dtype: torch.dtype) -> None:
    case = make_case(70, 16, 300, dtype=dtype, segments=5 * group)
    head = (case.hidden, case.weight, case.target, case.segment_id)
    assert case.segment_id is not None
    ref = sequence_logprob(*head, num_segments=5 * group, group_size=group)  # type: ignore[arg-type]
    assert all(x.shape == (5,) and x.dtype == torch.float32 for x in ref)
    out = linear_dpo(*head, *ref, beta=0.1, group_size=group)  # type: ignore[arg-type]
    assert torch.equal(out.logp_chosen, ref[0]) and torch.equal(out.logp_rejected, ref[1])
    assert not out.margin.any()


def test_sequence_logprob_needs_no_gradient_and_keeps_no_graph() -> None:
    case = make_case(20, 8, 50, dtype=torch.float32, segments=4)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    assert case.segment_id is not None
    chosen, rejected = sequence_logprob(
        hidden, weight, case.target, case.segment_id, num_segments=4
    )
    logp = linear_logprob(hidden, weight, case.target, case.segment_id, num_segments=4).logp
    assert not chosen.requires_grad
    torch.testing.assert_close(torch.stack((chosen, rejected), 1).flatten(), logp.detach())


def test_frozen_head_and_upstream_gradient() -> None:
    case = make_case(40, 8, 90, segments=6)
    hidden, ref = case.hidden.requires_grad_(), refs(3)
    weights = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    call = (hidden, case.weight, case.target, case.segment_id, *ref)
    out = linear_dpo(*call, beta=0.2)  # type: ignore[arg-type]
    (weighted,) = torch.autograd.grad((out.loss * weights).sum(), hidden, retain_graph=True)
    each = [torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in out.loss]
    total = sum(w * g for w, g in zip(weights, each, strict=True))
    torch.testing.assert_close(weighted, total, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": "dpo"}, "loss_type must be one of sigmoid"),
        ({"target": torch.tensor([0, 1, 9, 0])}, r"target\[2\] = 9 is not a row of weight"),
        ({"hidden": torch.zeros(4, 5)}, r"got \(4, 5\) and \(9, 3\)"),
        ({"segment_id": torch.tensor([0, 1, 3, 2])}, r"segment_id\[3\]=2 follows 3"),
        ({"segment_id": torch.tensor([0, 1, 3, 5])}, r"segment_id\[3\]=5 is outside 0..3"),
        ({"ref_chosen": torch.zeros(3)}, r"expected ref_rejected \(3,\)"),
    ],
)
def test_errors_name_what_came(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(9, 3),
        "target": torch.zeros(4, dtype=torch.int64),
        "segment_id": torch.tensor([0, 1, 2, 3]),
        "ref_chosen": torch.zeros(2),
        "ref_rejected": torch.zeros(2),
        "beta": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        linear_dpo(**good | changes)


def test_the_example_of_the_readme_runs() -> None:
    """Ten lines, from hidden states to a gradient; what they claim is checked here."""
    text = README.read_text(encoding="utf-8")
    found = re.search(r"## linear_dpo: an example\n.*?```python\n(.*?)```", text, re.DOTALL)
    assert found, "kernels/README.md has no example of linear_dpo"
    code = found.group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    out = names["out"]
    assert isinstance(out, PairLoss)
    torch.testing.assert_close(out.loss, torch.full_like(out.loss, 0.6931472))
    assert names["head"].weight.grad.abs().sum() > 0
