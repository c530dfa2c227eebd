"""Which backend runs, and what a launch records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastpref_kernels import _launch, linear_dpo, tile_calls

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_said", set())


@pytest.mark.parametrize(
    "backend,device,dtype,interpret,expected",
    [
        ("auto", CPU, torch.float32, "1", "torch"),
        ("auto", CUDA, torch.bfloat16, "0", "triton"),
        ("auto", CUDA, torch.float64, "0", "torch"),
        ("torch", CUDA, torch.bfloat16, "0", "torch"),
        ("triton", CUDA, torch.float16, "0", "triton"),
        ("triton", CPU, torch.float32, "1", "triton"),
    ],
)
def test_choice(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    interpret: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert _launch.resolve_backend(backend, device, dtype) == expected


def test_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="pair_loss: .* needs CUDA tensors, got a cpu tensor"):
        _launch.resolve_backend("triton", CPU, op="pair_loss")
    with pytest.raises(ValueError, match="got torch.float64"):
        _launch.resolve_backend("triton", CUDA, torch.float64)
    monkeypatch.setattr(_launch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="pip install triton"):
        _launch.resolve_backend("triton", CUDA)


def test_auto_without_triton_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_launch, "HAS_TRITON", False)
    with caplog.at_level("INFO", logger="fastpref_kernels"):
        assert _launch.resolve_backend("auto", CUDA) == "torch"
    assert "auto -> torch (triton is not installed: pip install triton)" in caplog.text


def test_a_launch_is_recorded_in_place_of_running() -> None:
    seen: list[Any] = []
    with _launch.recorded(seen.append):
        _launch.launch("kernel", (3,), {"x": 1}, warps=4, rewritten=("x",))
    assert seen == [("kernel", (3,), {"x": 1}, 4, 2, ("x",), {})]


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be the tensors': the ops change it."""
    inside: list[torch.device] = []
    launched = []

    @contextlib.contextmanager
    def surroundings(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    def launch(kernel: Any, *arguments: Any, **named: Any) -> None:
        assert inside, kernel
        launched.append(kernel)
        original(kernel, *arguments, **named)

    original = _launch.launch
    monkeypatch.setattr(_launch, "surroundings", surroundings)
    monkeypatch.setattr(_launch, "launch", launch)
    monkeypatch.setattr(tile_calls, "launch", launch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(4, 3, device=device, requires_grad=True)
    weight = torch.randn(9, 3, device=device, requires_grad=True)
    target = torch.arange(4, device=device)
    out = linear_dpo(hidden, weight, target, target, beta=0.1, num_segments=4, backend="triton")
    out.loss.sum().backward()
    assert len(launched) >= 6
