"""Backends of attention by name, what each can do, and which one a run gets.

    sdpa               torch's scaled_dot_product_attention over dense blocks: everything, anywhere
    flash_attention_2  package flash-attn
    flash_attention_3  module flash_attn_interface, for Hopper
    flash_attention_4  package flash-attn-4 (flash_attn.cute), for Hopper and Blackwell
    varlen             torch.nn.attention.varlen, which every torch for CUDA brings

All but the first are functions of one signature, that of `fastpref.attention_reference.varlen`, and
compute in half precision on NVIDIA GPUs. Their backwards are deterministic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastpref import attention_torch
from fastpref.attention_layout import Terms

HALF = (torch.bfloat16, torch.float16)
Capability = tuple[int, int]  # of a GPU; (9, 0) is Hopper


class Varlen(Protocol):
    """`fastpref.attention_reference.varlen`, or one that equals it."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """(sum of query lengths, heads, d)."""
        ...


@dataclass(frozen=True)
class Backend:
    """A way of computing attention; without `varlen`, over dense blocks."""

    name: str
    varlen: Varlen | None = None
    softcap: bool = True
    head_dims: Callable[[int], bool] = lambda d: True  # widths that it computes
    dtypes: tuple[torch.dtype, ...] | None = None  # None: any

    def lack(self, q: Tensor, v: Tensor, terms: Terms) -> str | None:
        """What of this call the backend does not compute; None: nothing."""
        if self.varlen is None:
            return None
        if self.dtypes is not None and q.dtype not in self.dtypes:
            return f"{str(q.dtype)[6:]} (it computes in {_names(self.dtypes)})"
        if terms.softcap is not None and not self.softcap:
            return f"capped scores (softcap {terms.softcap:g})"
        if terms.sinks is not None:
            return "attention sinks"
        if terms.dropout:
            return f"dropout in attention ({terms.dropout:g})"
        if q.shape[-1] != v.shape[-1]:
            return f"values of another width than keys ({v.shape[-1]} and {q.shape[-1]})"
        if not self.head_dims(q.shape[-1]):
            return f"heads of width {q.shape[-1]}"
        return None

    def demand(self, q: Tensor, v: Tensor, terms: Terms) -> None:
        """ValueError where there is a `lack`."""
        lack = self.lack(q, v, terms)
        if lack is not None:
            raise ValueError(
                f"attn_implementation: {self.name} has no {lack}. Set attn_implementation: sdpa"
                f"{OTHER_SOFTCAP if terms.softcap is not None and not self.softcap else ''}."
            )


SDPA = Backend("sdpa")
OTHER_SOFTCAP = ", or flash_attention_2, which caps scores"


@dataclass(frozen=True)
class _Kind:
    """What a backend by name needs, and how it is got."""

    load: Callable[[bool], Varlen]  # of whether its backward is to be deterministic; ImportError
    needs: str  # what is missing where `load` fails, and how to get it
    gpus: tuple[int, int]  # major versions of compute capability, first and last
    gpu_names: str
    softcap: bool = True

    def head_dims(self, capability: Capability) -> Callable[[int], bool]:
        """Widths of heads on such a GPU, forward and backward."""
        return functools.partial(_standard_width, 256)


class _TorchKind(_Kind):
    def head_dims(self, capability: Capability) -> Callable[[int], bool]:
        # torch's own rule for its flash kernels: little shared memory there.
        small = capability in ((8, 6), (8, 9)) or capability[0] == 12
        return functools.partial(_standard_width, 192 if small else 256)


class _CuteKind(_Kind):
    def head_dims(self, capability: Capability) -> Callable[[int], bool]:
        if capability[0] == 9:
            return functools.partial(_standard_width, 256)
        return lambda d: _standard_width(128, d) or d == 256


def _standard_width(most: int, d: int) -> bool:
    return d % 8 == 0 and d <= most


def _flash_2(deterministic: bool) -> Varlen:
    from flash_attn import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, deterministic, -1)


def _flash_3(deterministic: bool) -> Varlen:
    from flash_attn_interface import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, deterministic, -1)


def _flash_4(deterministic: bool) -> Varlen:
    from flash_attn.cute import flash_attn_varlen_func

    return _flash(flash_attn_varlen_func, deterministic, None)


def _flash(function: Any, deterministic: bool, unlimited: int | None) -> Varlen:
    """The flash-attn packages' function; versions differ in order and defaults, not in names."""

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        # Its window counts the keys to the left of the query's own.
        left = unlimited if window is None else window - 1
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=scale,
            causal=True,
            window_size=(left, unlimited if window is None else 0),
            softcap=softcap or 0.0,
            deterministic=deterministic,
        )
        return out[0] if isinstance(out, tuple) else out  # with the log-sum-exp, in some versions

    return varlen


def _torch_varlen(deterministic: bool) -> Varlen:
    return functools.partial(attention_torch.varlen, deterministic=deterministic)


KINDS = {
    "flash_attention_3": _Kind(
        _flash_3,
        "the module flash_attn_interface: build it from the folder hopper of "
        "github.com/Dao-AILab/flash-attention",
        (9, 9),
        "a Hopper GPU (compute capability 9)",
    ),
    "flash_attention_2": _Kind(
        _flash_2,
        'the package flash-attn: pip install "fastpref[flash]" --no-build-isolation',
        (8, 99),
        "a GPU of compute capability 8.0 or above (Ampere)",
    ),
    "flash_attention_4": _CuteKind(
        _flash_4,
        "the package flash-attn-4: pip install --pre flash-attn-4",
        (9, 11),
        "a Hopper or Blackwell GPU (compute capability 9 to 11)",
    ),
    "varlen": _TorchKind(
        _torch_varlen,
        "torch.nn.attention.varlen of torch 2.11 or newer",
        (8, 99),
        "a GPU of compute capability 8.0 or above (Ampere)",
        softcap=False,
    ),
}
NAMES = ("auto", "sdpa", *sorted(KINDS))
# flash-attn 4 is a pre-release, and taken on request only.
AUTOMATIC = ("flash_attention_3", "flash_attention_2", "varlen")


def find_backend(
    name: str, device: torch.device, dtype: torch.dtype, *, deterministic: bool = True
) -> Backend | str:
    """The backend of this name for products in ``dtype``; or why there is none here.

    Raises ValueError for a name that there is not.
    """
    if name == "sdpa":
        return SDPA
    if name not in KINDS:
        raise ValueError(
            f"attn_implementation: {name!r} is not one of {', '.join(NAMES)} (docs/attention.md)."
        )
    kind = KINDS[name]
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, and the device is {device}"
    if dtype not in HALF:
        return f"it computes in bfloat16, and dtype is {str(dtype)[6:]}"
    capability = torch.cuda.get_device_capability(device)
    if not kind.gpus[0] <= capability[0] <= kind.gpus[1]:
        have = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        return f"it needs {kind.gpu_names}, and {have}"
    try:
        function = kind.load(deterministic)
    except (ImportError, OSError, AttributeError) as error:
        return f"it needs {kind.needs} ({error})"
    return Backend(name, function, kind.softcap, kind.head_dims(capability), HALF)


def demand_backend(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError where the backend that a user names cannot run here, with the reason."""
    if name != "auto":
        _found(name, device, dtype)


def _found(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    found = find_backend(name, device, dtype)
    if isinstance(found, str):
        half = " dtype: bfloat16," if dtype not in HALF and device.type == "cuda" else ""
        raise ValueError(
            f"attn_implementation: {name}: {found}. Set{half} attn_implementation: auto or sdpa."
        )
    return found


def choose_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    lacks: Callable[[list[Backend]], dict[str, str]],
) -> tuple[Backend, dict[str, str]]:
    """The backend of a run, and why those that would have come first are not it.

    ``lacks`` says, of backends, what each does not compute of what the model asks, if anything.
    ``auto`` takes the first of `AUTOMATIC` that is installed, fits the GPU and lacks nothing, and
    sdpa where there is none. Raises ValueError where ``name`` is a backend that is not here, or
    that lacks something.
    """
    if name != "auto":
        backend = _found(name, device, dtype)
        lack = lacks([backend]).get(name) if backend.varlen else None
        if lack:
            raise ValueError(
                f"attn_implementation: {name} has no {lack}, which the model asks for. Set "
                "attn_implementation: auto or sdpa."
            )
        return backend, {}
    reasons: dict[str, str] = {}
    candidates: list[Backend] = []
    for each in AUTOMATIC:
        found = find_backend(each, device, dtype)
        if isinstance(found, str):
            reasons[each] = found
        else:
            candidates.append(found)
    if candidates:
        lacking = lacks(candidates)
        reasons |= {each: f"it has no {lack}" for each, lack in lacking.items()}
        candidates = [each for each in candidates if each.name not in lacking]
    return (candidates[0] if candidates else SDPA), reasons


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(str(dtype)[6:] for dtype in dtypes)
