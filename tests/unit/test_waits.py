"""A training step asks the device for nothing: neither a number, nor how many there are.

Two stand-ins for a device. Tensors of the meta device have no values, so that whatever reads one
raises: the step, with every loss and every kind of tracking, goes through on them. On the CPU,
where values are there, a dispatch mode counts the operations for which a GPU would be waited for.
`python -m bench gpu --part correctness` runs a step with torch's own alarm on.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import step as step_module
from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.data.loader import StepPlan
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics import pair_parts
from fastpref.dynamics.pair_ops import FusedOps
from fastpref.dynamics.taps import Taps, attach
from fastpref.errors import NonFiniteError
from fastpref.loading import prepare
from fastpref.losses import LOSSES, get_loss
from fastpref.model import PairModel
from fastpref.observe import StepView
from fastpref.step import StepResult, demand_finite, train_step

# Their results' sizes, or what they return, depend on values: a GPU is waited for.
WAITING = (
    "local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
)


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for. Indexing with booleans is a `nonzero` in disguise."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.strip("_").rstrip("2").removesuffix("_impl")
        if name in WAITING:
            self.found[name] += 1
        if name in ("index", "index_put") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            self.found["index by bool"] += 1
        return func(*args, **(kwargs or {}))


def pairs(count: int = 4) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    sizes = [(40, 12, 30), (7, 1, 9), (20, 5, 3), (20, 1, 1), (3, 4, 4)]
    found = []
    for n in range(count):
        prompt, chosen, rejected = (
            rng.integers(0, 512, k).astype(np.int32) for k in sizes[n % len(sizes)]
        )
        reference = {"ref_chosen": -3.0 - n, "ref_rejected": -4.0}
        found.append(TokenPair(n, n % 2, "", prompt, chosen, rejected, (), **reference))
    return found


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    module = LlamaForCausalLM(config)
    prepare(module)
    return module


def on(device: str, track: str = "none") -> tuple[PairModel, Taps | None]:
    """A model, and the taps that `track` wants, which look at values when they are put in."""
    module = llama()
    taps = attach(module, track) if track in ("sketch", "exact") else None
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # the taps know the parameters
    try:
        module.to(device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    return PairModel(module, None, torch.device(device), torch.float32, ""), taps


def config(**changes: Any) -> Config:
    return Config(model_name_or_path="m", dataset_name=("d",), output_dir="o", **changes)


@pytest.fixture(autouse=True)
def _autocast_of_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast knows no meta device: there it is off."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def none(kind: str, *more: Any, **options: Any) -> Any:
        return nullcontext() if kind == "meta" else autocast(kind, *more, **options)

    monkeypatch.setattr(torch, "autocast", none)
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind)
    )


def a_step(
    model: PairModel, taps: Taps | None, track: str, settings: Config, **more: Any
) -> StepResult:
    batches: list[PairBatch] = [pack_pairs(own).to(model.device) for own in (pairs(5), pairs(2))]
    # The plain one reads its counts of steps, which it keeps on the host.
    optimizer = torch.optim.AdamW(model.trained, lr=1e-3, fused=model.device.type == "cpu")
    loss = get_loss(settings.loss_type, settings.loss_weights)
    norms = None if track == "none" else "exact"
    return train_step(model, batches, loss, settings, 7, optimizer, norms, None, taps, **more)


@pytest.mark.parametrize("track", ["none", "head", "sketch", "exact"])
def test_a_step_reads_no_value_of_the_device(track: str) -> None:
    model, taps = on("meta", track)
    result = a_step(model, taps, track, config(), wait=False)
    assert result.health.is_meta and result.grad_norm.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        demand_finite(result)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_no_loss_reads_a_value(loss: str) -> None:
    model, _ = on("meta")
    smoothing = 1e-3 if loss == "exo_pair" else 0.0
    settings = config(loss_type=loss, label_smoothing=smoothing)
    assert a_step(model, None, "head", settings, wait=False).health.is_meta


@pytest.mark.parametrize(
    "changes",
    [
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"max_grad_norm": 0.0},
        {"f_divergence_type": "js_divergence"},
        {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.5)},
    ],
)
def test_no_option_reads_a_value(changes: dict[str, Any]) -> None:
    model, _ = on("meta")
    assert a_step(model, None, "head", config(**changes), wait=False).health.is_meta


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_reads_no_value(mode: str) -> None:
    from fastpref.recompute import checkpoint_layers

    model, _ = on("meta")
    checkpoint_layers(model.module, mode)
    assert a_step(model, None, "head", config(), wait=False).health.is_meta


def test_what_is_shown_of_a_step_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns and sums are made without a value being read; the copy is what remains."""
    from fastpref import transfer

    copies = []
    monkeypatch.setattr(transfer, "_Copy", copies.append)
    model, taps = on("meta", "sketch")
    result = a_step(model, taps, "sketch", config(), wait=False)
    StepView(StepPlan(1, 0.1, 7, 100, []), result, 1e-3)
    assert len(copies) == 1 and copies[0].is_meta


@contextmanager
def without_finite(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Counts, leaving out the one reading that the CPU does because it is free there."""
    monkeypatch.setattr(step_module, "demand_finite", lambda result: None)
    with Waits() as waits:
        yield waits


@pytest.mark.parametrize("track", ["none", "head", "sketch"])
def test_on_the_cpu_nothing_would_wait_either(track: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref_kernels import _head_checks

    model, taps = on("cpu", track)
    # What is read on the CPU alone, where it is free: the checks of segments and of targets, and
    # the clipping factor.
    for name in ("check_rows_of_segments", "check_segments"):
        monkeypatch.setattr(_head_checks, name, lambda *a, **k: None)
    monkeypatch.setattr(pair_parts, "BlockOps", FusedOps)  # a GPU's way of summing
    with without_finite(monkeypatch) as waits:
        a_step(model, taps, track, config(max_grad_norm=0.0), wait=False)
    assert not waits.found


def test_the_count_sees_what_waits() -> None:
    x = torch.arange(5.0)
    with Waits() as waits:
        x.sum().item()
        x[x > 2]
        x.nonzero()
        torch.unique(x)
        torch.bincount(x.long())
        x[x > 3] = torch.ones(1)
        bool(x.sum() > 0)
    assert sum(waits.found.values()) == 7, waits.found


class Sends(TorchFunctionMode):
    """Counts numbers that go to the device in a copy of their own, which the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if isinstance(out, torch.Tensor) and out.is_meta:
            made = name in ("tensor", "as_tensor", "from_numpy")
            moved = name in ("to", "cuda", "copy_") and args[0].device.type == "cpu"
            if made or (moved and not kwargs.get("non_blocking")):
                self.found.append(f"{name} in {_caller()}")
        return out


def _caller() -> str:
    import traceback

    stack = traceback.extract_stack()
    last = ([f for f in stack if "/fastpref" in f.filename] or stack)[-1]
    return f"{last.filename}:{last.lineno}"


@pytest.mark.parametrize("track", ["none", "head", "sketch", "exact"])
def test_no_number_is_sent_that_the_host_waits_for(track: str) -> None:
    model, taps = on("meta", track)
    with Sends() as sends:
        a_step(model, taps, track, config(ld_alpha=0.5), wait=False)
    assert not sends.found


def test_such_sending_would_be_seen() -> None:
    with Sends() as sends:
        torch.tensor([1.0], device="meta")
        torch.ones(2).to("meta")
        torch.ones(2).to("meta", non_blocking=True)
    assert len(sends.found) == 2


class Poisoned(nn.Module):
    """Nothing: a place to keep a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("bad", [False, True])
def test_a_fused_optimizer_leaves_the_weights_of_a_bad_step(kind: Any, bad: bool) -> None:
    module, plain = Poisoned(), Poisoned()
    zero = torch.zeros(())
    for own in (module, plain):
        own.weight.grad = torch.tensor([1.0, float("nan") if bad else 2.0, 3.0])
    optimizer = kind(module.parameters(), lr=0.1, fused=True)
    result = StepResult([], zero, module.weight.grad.norm(), zero)
    step_module._step_if_finite(optimizer, result)
    assert not hasattr(optimizer, "found_inf")
    if bad:
        assert torch.equal(module.weight, torch.ones(3))
        return
    kind(plain.parameters(), lr=0.1, fused=True).step()
    assert torch.equal(module.weight, plain.weight)


def test_a_bad_step_is_told_when_its_view_arrives() -> None:
    model, _ = on("cpu")
    result = a_step(model, None, "head", config())
    broken = dataclasses.replace(result, loss=torch.tensor(float("nan"), dtype=torch.float64))
    view = StepView(StepPlan(1, 0.1, 7, 100, []), broken, 1e-3)
    with pytest.raises(NonFiniteError, match="loss nan"):
        view.demand_finite()
    StepView(StepPlan(1, 0.1, 7, 100, []), result, 1e-3).demand_finite()
