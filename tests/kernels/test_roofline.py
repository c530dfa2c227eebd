"""Products, passes over the logits and memory of the Triton backend, counted from its calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastpref_kernels import tile_calls

from bench import results, roofline

SHAPE = (8192, 4096, 128256)


def counted() -> dict[str, float]:
    return {
        f"{what}_{name}": value
        for name, case in roofline.CASES.items()
        for what, value in roofline.count(*SHAPE, *case).values(*SHAPE).items()
    }


def missed(values: dict[str, float]) -> set[str]:
    return {check.name for check in results.verdicts("roofline", values) if not check.met}


def test_targets_hold() -> None:
    values = counted()
    assert not missed(values)
    rows, dim, vocab = SHAPE
    # By hand: E, U in float32, dW and the scaled operand exist at once.
    by_hand = 2 * rows * vocab + 4 * rows * dim + 2 * vocab * dim + 2 * rows * dim
    assert values["memory_gb_all_kept"] == pytest.approx(by_hand / 1e9, rel=1e-3)
    assert values["passes_all_kept"] == -(-vocab // 8192)
    assert values["logits_gb_all_kept"] == 6 * rows * vocab / 1e9


@pytest.mark.parametrize("where", ["torch", "triton"])
def test_another_pass_over_the_logits_is_seen(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a torch operation or by a launch: either way all of training's targets are missed."""
    original = tile_calls.exp_tile

    def twice(z: torch.Tensor, *arguments: Any, **named: Any) -> None:
        if where == "torch":
            z.mul_(1.0)
        else:
            original(z, *arguments, **named)
        original(z, *arguments, **named)

    monkeypatch.setattr(tile_calls, "exp_tile", twice)
    assert {f"logits_gb_{name}" for name in roofline.CASES} <= missed(counted())


def test_another_pass_over_the_hidden_sums_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = tile_calls.hidden_grad

    def twice(mixed: torch.Tensor, *arguments: Any) -> None:
        original(mixed.mul_(1.0), *arguments)

    monkeypatch.setattr(tile_calls, "hidden_grad", twice)
    assert missed(counted()) == {f"rows_gb_{name}" for name in ("all_kept", "none_kept", "frozen")}


def test_another_product_and_another_buffer_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = tile_calls.rounded_product

    def wasteful(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        out.copy_(torch.mm(a, b, out_dtype=torch.float32))
        return original(a, b, out)

    monkeypatch.setattr(tile_calls, "rounded_product", wasteful)
    bad = missed(counted())
    assert "products_all_kept" in bad and "products_frozen" not in bad


def test_memory_is_given_back() -> None:
    """A tensor that is gone counts no more; one storage counts once, its views not at all."""
    seen = roofline.Counted(rows_by_dim=1)
    with roofline._Seen(seen):
        a = torch.empty(1000, device="meta")
        b = a[:10].view(2, 5)
        assert seen.live == seen.peak == 4000
        del a, b
        c = torch.empty(500, device="meta")
    assert (seen.live, seen.peak) == (2000, 4000)
    del c
