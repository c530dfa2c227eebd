"""Frozen weights of 4 bits under adapters: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

Linear layers but the head become bitsandbytes' Linear4bit, quantised while they are read, block by
block of 64 numbers; each product makes the weight again in the precision of the products. Gradients
go through them and none is made of them. Embeddings, norms and the head are of `weights_dtype`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpref.config import Config
from fastpref.optim import import_bitsandbytes

BLOCK, OUTER_BLOCK = 64, 256  # numbers with one scale; scales with one scale, where nested


def demand_packages() -> None:
    """ValueError that names the remedy where something that `load_in_4bit` needs is missing."""
    import_bitsandbytes("load_in_4bit", "qlora")
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            'load_in_4bit needs accelerate, which is not installed: pip install "fastpref[qlora]"'
        )


def loading_options(config: Config, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers' `from_pretrained` is told; nothing without `load_in_4bit`. Weights are
    quantised on ``device`` and stay there."""
    if not config.load_in_4bit:
        return {}
    if dtype is torch.float64:
        raise ValueError(
            "load_in_4bit: bitsandbytes has no products in float64. Set dtype: float32 or bfloat16."
        )
    demand_packages()
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def identity(config: Config) -> str:
    """What names the weights beside their files, which hold other numbers; "" without 4 bits."""
    if not config.load_in_4bit:
        return ""
    nested = " nested" if config.use_bnb_nested_quant else ""
    return f" 4bit:{config.bnb_4bit_quant_type}{nested}"


def layers(module: nn.Module) -> list[Any]:
    """The quantised linear layers; not peft's around them, which have the same name."""
    return [
        m
        for m in module.modules()
        if type(m).__name__ == "Linear4bit" and type(m).__module__.startswith("bitsandbytes")
    ]


def settle(module: nn.Module) -> None:
    """Keep one layout of the weights: on some CPUs a layer would repack them for inference."""
    for layer in layers(module):
        layer.support_avx512bf16_for_cpu = False


def demand_frozen(module: nn.Module, names: Iterable[str]) -> None:
    """ValueError where one of ``names``, of modules that are to be trained whole beside an adapter,
    holds quantised weights."""
    own = {id(layer) for layer in layers(module)}
    for name, part in module.named_modules():
        wanted = any(name == n or name.endswith("." + n) for n in names)
        if wanted and any(id(layer) in own for layer in part.modules()):
            raise ValueError(
                f"lora_modules_to_save: {name} has weights of 4 bits (load_in_4bit), which cannot "
                "learn. Give it an adapter (lora_target_modules), or leave it out."
            )


@contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, products with quantised weights are in ``dtype``."""
    before = [(layer, layer.compute_dtype) for layer in layers(module)]
    for layer, _ in before:
        layer.compute_dtype = dtype
    try:
        yield
    finally:
        for layer, own in before:
            layer.compute_dtype = own


def numbers(parameter: Tensor) -> int:
    """Weights that a parameter holds: two a byte where it is quantised."""
    quantised = parameter.dtype is torch.uint8
    return parameter.numel() * 2 if quantised else parameter.numel()


class Planned(nn.Linear):
    """Holds as much as a Linear4bit, at rest and while it computes, and has no numbers."""

    def __init__(self, plain: nn.Linear, nested: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        count = plain.weight.numel()
        data = torch.empty((count + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(data, requires_grad=False)
        self.bias = plain.bias
        blocks = -(-count // BLOCK)
        scale = torch.uint8 if nested else torch.float32
        self.register_buffer("scales", torch.empty(blocks, dtype=scale))
        outer = -(-blocks // OUTER_BLOCK) if nested else 0
        self.register_buffer("outer_scales", torch.empty(outer))

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features)."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _Product.apply(x, self.weight, (self.out_features, self.in_features))
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(weight)
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ grad.new_empty(ctx.shape), None, None


def stand_in(module: nn.Module, config: Config) -> None:
    """Put `Planned` in the places that `load_in_4bit` quantises, in place."""
    if not config.load_in_4bit:
        return
    from transformers.pytorch_utils import Conv1D

    head = module.get_output_embeddings()  # type: ignore[operator]
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                inputs, outputs = child.weight.shape
                plain = nn.Linear(inputs, outputs, device="meta")
                plain.bias = child.bias
                child = plain
            if isinstance(child, nn.Linear) and child is not head:
                setattr(parent, name, Planned(child, config.use_bnb_nested_quant))
