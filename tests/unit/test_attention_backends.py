"""Which backend a run gets, what errors say, and how each package's function is called."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import attention_backends, attention_reference, attention_torch
from fastpref.attention_backends import (
    SDPA,
    Backend,
    choose_backend,
    demand_backend,
    find_backend,
)
from fastpref.attention_layout import Terms
from fastpref.data.pack import pack_pairs
from fastpref.recompute import checkpoint_layers
from tests.architectures import PAIRS, packed, tiny_model

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
QUERIES, KEYS = [2, 1, 3], [5, 1, 9]


def problem() -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """q, k, v with two queries' heads to a key's, and cu_q, cu_k, max_q, max_k."""
    generator = torch.Generator().manual_seed(0)
    qkv = tuple(
        torch.randn(sum(n), heads, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for n, heads in ((QUERIES, 4), (KEYS, 2), (KEYS, 2))
    )
    cu = tuple(torch.tensor([0, *n]).cumsum(0).int() for n in (QUERIES, KEYS))
    return qkv, (*cu, max(QUERIES), max(KEYS))


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float = 0.0,
) -> Tensor:
    """As flash-attn's documentation has it: query i of n sees the keys j of m with
    i + m - n - left <= j <= i + m - n + right, where a negative number is no limit."""
    outputs = []
    for i in range(len(cu_q) - 1):
        own, to = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        n, m = len(q[own]), len(k[to])
        for query in range(n):
            at = query + m - n
            low = 0 if left < 0 else max(0, at - left)
            high = m if right < 0 else min(m, at + right + 1)
            heads = []
            for head in range(q.shape[1]):
                of = head // (q.shape[1] // k.shape[1])
                scores = k[to][low:high, of] @ q[own][query, head] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                heads.append(scores.softmax(0) @ v[to][low:high, of])
            outputs.append(torch.stack(heads))
    return torch.stack(outputs)


def flash_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `flash_attention` without softcap, by hand: autograd does not see inside an op."""
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for i in range(len(cu_q) - 1):
        n, m = int(cu_q[i + 1] - cu_q[i]), int(cu_k[i + 1] - cu_k[i])
        for query in range(int(cu_q[i]), int(cu_q[i + 1])):
            at = query - int(cu_q[i]) + m - n
            low = 0 if left < 0 else max(0, at - left)
            high = m if right < 0 else min(m, at + right + 1)
            seen = slice(int(cu_k[i]) + low, int(cu_k[i]) + high)
            for head in range(q.shape[1]):
                of = head // (q.shape[1] // k.shape[1])
                p = (k[seen, of] @ q[query, head] * scale).softmax(0)
                dp = v[seen, of] @ grad[query, head]
                ds = scale * p * (dp - p @ dp)
                dv[seen, of] += p[:, None] * grad[query, head]
                dk[seen, of] += ds[:, None] * q[query, head]
                dq[query, head] = ds @ k[seen, of]
    return dq, dk, dv


class Packages:
    """Stand-ins of flash-attn's packages with their own signatures, newest versions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.deterministic: list[bool] = []
        self.monkeypatch = monkeypatch

    def install(self, name: str) -> None:
        module: Any
        if name == "flash_attention_2":
            module = types.ModuleType("flash_attn")
            module.flash_attn_varlen_func = self.version_2
        elif name == "flash_attention_3":
            module = types.ModuleType("flash_attn_interface")
            module.flash_attn_varlen_func = self.version_3
        else:
            package: Any = types.ModuleType("flash_attn")
            package.__path__ = []
            self.monkeypatch.setitem(sys.modules, "flash_attn", package)
            module = types.ModuleType("flash_attn.cute")
            module.flash_attn_varlen_func = self.version_4
        self.monkeypatch.setitem(sys.modules, module.__name__, module)

    def version_2(  # flash-attn 2.8
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        self.deterministic.append(deterministic)
        assert dropout_p == 0.0 and not return_attn_probs
        return flash_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0],
            0 if causal else window_size[1], softcap,
        )  # fmt: skip

    def version_3(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return self.version_2(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale,
            causal, window_size, softcap, None, deterministic,
        )  # fmt: skip

    def version_4(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
        gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, return_lse=False,
    ):  # fmt: skip
        left, right = window_size
        assert (left is None) == (right is None) and -1 not in window_size
        out = self.version_2(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale,
            causal, tuple(-1 if x is None else x for x in window_size), softcap, None,
            deterministic,
        )  # fmt: skip
        return out, None


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Packages:
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    return Packages(monkeypatch)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU of any capability, as far as `find_backend` looks."""

    def has(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    return has


@pytest.fixture
def kernels_on_the_cpu() -> Iterator[list[bool]]:
    """torch's flash kernels on the CPU in plain torch; notes whether the backward was to be
    deterministic. What stands around them is torch's own."""
    library = torch.library.Library("aten", "IMPL")
    noted: list[bool] = []

    def forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        return_debug_mask, *, scale=None, window_size_left=None, window_size_right=None,
        seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert dropout_p == 0 and seqused_k is None and block_table is None
        # The kernels' own rule: causal where nothing limits the left, a window otherwise.
        right = 0 if is_causal else window_size_right
        out = flash_attention(query, key, value, cum_seq_q, cum_seq_k, scale, window_size_left,
                              right)  # fmt: skip
        lse = query.new_zeros((query.shape[1], query.shape[0]), dtype=torch.float32)
        state = torch.zeros(2, dtype=torch.uint64)
        return out, lse, state, torch.empty(0), torch.empty(0)

    def backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
        dropout_p, is_causal, rng_state, unused, *, scale=None, window_size_left=None,
        window_size_right=None,
    ):  # fmt: skip
        noted.append(torch.are_deterministic_algorithms_enabled())
        if max_q == 13:
            raise RuntimeError("out of memory")
        right = 0 if is_causal else window_size_right
        return flash_gradients(grad_out, query, key, value, cum_seq_q, cum_seq_k, scale,
                               window_size_left, right)  # fmt: skip

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield noted
    library._destroy()


def assert_equals_reference(varlen: Any, window: int | None, softcap: float | None) -> None:
    qkv, lengths = problem()
    results = []
    for function in (varlen, attention_reference.varlen):
        out = function(*qkv, *lengths, scale=0.3, window=window, softcap=softcap)
        probe = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
        results.append([out, *torch.autograd.grad((out * probe).sum(), qkv)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_flash_attention_is_called_so_that_it_equals_the_reference(
    name: str, window: int | None, softcap: float | None, packages: Packages, gpu: Any
) -> None:
    gpu(9, 0)
    packages.install(name)
    for deterministic in (True, False):
        backend = find_backend(name, CUDA, BF16, deterministic=deterministic)
        assert isinstance(backend, Backend) and backend.softcap
        assert_equals_reference(backend.varlen, window, softcap)
        assert packages.deterministic.pop() is deterministic


@pytest.mark.parametrize("window", [None, 1, 3, 30])
def test_torchs_varlen_is_called_so_that_it_equals_the_reference(
    window: int | None, kernels_on_the_cpu: list[bool], gpu: Any
) -> None:
    gpu(8, 0)
    for deterministic in (True, False):
        backend = find_backend("varlen", CUDA, BF16, deterministic=deterministic)
        assert isinstance(backend, Backend) and not backend.softcap
        assert_equals_reference(backend.varlen, window, None)
        assert kernels_on_the_cpu.pop() is deterministic
        assert not torch.are_deterministic_algorithms_enabled()


def test_torchs_mode_is_put_back_where_the_backward_fails(kernels_on_the_cpu: list[bool]) -> None:
    qkv, (cu_q, cu_k, _, max_k) = problem()
    out = attention_torch.varlen(*qkv, cu_q, cu_k, 13, max_k, scale=1.0, window=None, softcap=None)
    with pytest.raises(RuntimeError, match="out of memory"):
        out.sum().backward()
    assert kernels_on_the_cpu == [True] and not torch.are_deterministic_algorithms_enabled()


def test_torchs_varlen_without_the_option_for_grouped_heads(
    kernels_on_the_cpu: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in torch 2.11, whose function has no `enable_gqa` and needs none."""
    newest = attention_torch.varlen_attn

    def early(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
              window_size=(-1, -1)):  # fmt: skip
        return newest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux,
                      scale=scale, window_size=window_size, enable_gqa=True)  # fmt: skip

    monkeypatch.setattr(attention_torch, "varlen_attn", early)
    assert_equals_reference(attention_torch.varlen, 3, None)


def test_custom_ops_hold_what_torch_asks_of_them(kernels_on_the_cpu: list[bool]) -> None:
    qkv, (cu_q, cu_k, max_q, max_k) = problem()
    call = (*qkv, cu_q, cu_k, max_q, max_k, 0.3, 2, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attention_torch._forward, call, test_utils=checks)
    detached = [x.detach() for x in qkv]
    out, lse = attention_torch._forward(*detached, *call[3:])
    torch.library.opcheck(
        attention_torch._backward, (out, *detached, out, lse, *call[3:]), test_utils=checks
    )


def nothing_lacks(backends: list[Backend]) -> dict[str, str]:
    return {}


def test_auto_takes_what_is_installed_and_fits(packages: Packages, gpu: Any) -> None:
    def chosen(dtype: torch.dtype = BF16, lacks: Any = nothing_lacks) -> str:
        return choose_backend("auto", CUDA, dtype, lacks)[0].name

    gpu(9, 0)
    assert chosen() == "varlen"
    assert chosen(torch.float32) == "sdpa"
    assert chosen(torch.float16) == "varlen"
    packages.install("flash_attention_2")
    assert chosen() == "flash_attention_2"
    packages.install("flash_attention_3")
    assert chosen() == "flash_attention_3"
    gpu(10, 0)
    assert chosen() == "flash_attention_2"
    gpu(7, 5)
    assert chosen() == "sdpa"
    gpu(8, 0)
    everything = {name: "heads of width 512" for name in attention_backends.KINDS}
    assert chosen(lacks=lambda backends: everything) == "sdpa"
    assert chosen(lacks=lambda backends: {"flash_attention_2": "attention sinks"}) == "varlen"
    backend, why = choose_backend("auto", torch.device("cpu"), BF16, nothing_lacks)
    assert backend is SDPA and all("NVIDIA GPU" in reason for reason in why.values())


def test_auto_says_why_not(packages: Packages, gpu: Any) -> None:
    gpu(9, 0)
    _, why = choose_backend("auto", CUDA, BF16, lambda backends: {"varlen": "attention sinks"})
    assert "flash_attn_interface" in why["flash_attention_3"]
    assert 'pip install "fastpref[flash]"' in why["flash_attention_2"]
    assert why["varlen"] == "it has no attention sinks"


@pytest.mark.parametrize(
    "name,capability,dtype,message",
    [
        ("flash_attention_2", (9, 0), BF16, r"flash-attn: pip install \"fastpref\[flash\]\""),
        ("flash_attention_3", (9, 0), BF16, "flash_attn_interface: build it from the folder hop"),
        ("flash_attention_4", (9, 0), BF16, "pip install --pre flash-attn-4"),
        ("flash_attention_2", (7, 5), BF16, "8.0 or above.*Some GPU has 7.5.*auto or sdpa"),
        ("flash_attention_3", (8, 0), BF16, "Hopper GPU.*has 8.0"),
        ("flash_attention_4", (12, 0), BF16, "Hopper or Blackwell.*has 12.0"),
        ("varlen", (9, 0), torch.float32, "dtype is float32. Set dtype: bfloat16, attn_impl"),
        ("flash", (9, 0), BF16, "'flash' is not one of auto, sdpa, flash_attention_2"),
    ],
)
def test_errors_name_the_remedy(
    name: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    message: str,
    packages: Packages,
    gpu: Any,
) -> None:
    gpu(*capability)
    with pytest.raises(ValueError, match=message):
        demand_backend(name, CUDA, dtype)


def test_a_named_backend_without_a_gpu_or_without_what_the_model_asks(gpu: Any) -> None:
    with pytest.raises(ValueError, match="varlen: it needs an NVIDIA GPU, and the device is cpu"):
        demand_backend("varlen", torch.device("cpu"), BF16)
    gpu(9, 0)
    with pytest.raises(ValueError, match="varlen has no heads of width 512, which the model asks"):
        choose_backend("varlen", CUDA, BF16, lambda backends: {"varlen": "heads of width 512"})


def test_calls_that_a_backend_does_not_compute(packages: Packages, gpu: Any) -> None:
    gpu(8, 6)
    backend = find_backend("varlen", CUDA, BF16)
    assert isinstance(backend, Backend)
    q, wide = torch.empty(4, 2, 64, dtype=BF16), torch.empty(4, 2, 256, dtype=BF16)
    backend.demand(q, q, Terms(window=5))
    for arguments, message in (
        ((q, q, Terms(softcap=50.0)), "no capped scores .softcap 50.*sdpa, or flash_attention_2"),
        ((q, q, Terms(sinks=torch.zeros(2))), "no attention sinks. Set attn_implementation: sdpa"),
        ((q, q, Terms(dropout=0.1)), "no dropout in attention"),
        ((q, wide, Terms()), "no values of another width than keys .256 and 64"),
        ((wide, wide, Terms()), "no heads of width 256"),
        ((q[..., :60], q[..., :60], Terms()), "no heads of width 60"),
        ((q.float(), q, Terms()), "no float32 .it computes in bfloat16 and float16"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.demand(*arguments)  # type: ignore[arg-type]
    gpu(10, 0)
    packages.install("flash_attention_4")
    newest = find_backend("flash_attention_4", CUDA, BF16)
    assert isinstance(newest, Backend)
    assert [d for d in (64, 128, 192, 256) if newest.head_dims(d)] == [64, 128, 256]


@pytest.mark.parametrize("mode,forwards", [("none", 4), ("selective", 4), ("full", 8)])
def test_activation_checkpointing_keeps_results_of_torchs_varlen(
    mode: str, forwards: int, kernels_on_the_cpu: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two layers with two calls each; the gradients have the same bits."""
    count: list[int] = []
    newest = attention_torch.varlen_attn

    def counting(*given: Any, **options: Any) -> Any:
        count.append(1)
        return newest(*given, **options)

    batch = pack_pairs(PAIRS)
    module = tiny_model("llama")
    model = dataclasses.replace(packed(module), attention=Backend("varlen", attention_torch.varlen))
    plain = torch.autograd.grad(model.logp(batch).logp.sum(), model.trained)
    checkpoint_layers(module, mode)
    monkeypatch.setattr(attention_torch, "varlen_attn", counting)
    monkeypatch.setattr(attention_torch, "_knows_groups", lambda function: True)
    ours = torch.autograd.grad(model.logp(batch).logp.sum(), model.trained)
    assert len(count) == forwards
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
