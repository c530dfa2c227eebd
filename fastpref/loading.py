"""From a name or a folder to a `PairModel` that packing gets right: weights, precision, adapter,
attention, device."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastpref import attention, last_block, lora, quantised
from fastpref.architecture import NO_INTERFACE
from fastpref.attention_backends import choose_backend, demand_backend
from fastpref.config import Config, unplanned
from fastpref.heap import keep_freed_memory
from fastpref.model import PairModel
from fastpref.recompute import checkpoint_layers, last_layer
from fastpref.router import Router, find_router
from fastpref.weights import Source, read_model_config, read_tokenizer, read_weights

log = logging.getLogger(__name__)


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of ``config.model_name_or_path``; ValueError where there is none."""
    lora.refuse_as_model(config.model_name_or_path)
    return read_tokenizer(_policy(config))


def load_model(config: Config, tokenizer: Any = None) -> PairModel:
    """Load the weights of ``config.model_name_or_path`` and prepare them for packing.

    Raises ValueError as `read_weights` does: for what packing would get wrong, for weights that are
    not safetensors or not all there.
    """
    device = resolve_device(config.device)
    demand_backend(config.attn_implementation, device, resolve_dtype(config.dtype, device))
    if config.trainable == "lora":
        lora.check_available()
    if config.load_in_4bit:
        quantised.demand_packages()
    tokenizer = tokenizer or load_tokenizer(config)
    model = _load(config, _policy(config), tokenizer)
    model = replace(model, router=_router(model, config))
    if config.trainable == "lora":
        model = _adapted(model, config)
    return _with_attention(_placed(model), config.attn_implementation)


def skeleton(config: Config) -> PairModel:
    """The model that `load_model` would give, with weights that nobody has set: for torch's meta
    device. On the CPU, without a tokenizer."""
    model = _skeleton(config, _policy(config))
    model = replace(model, router=_router(model, config))
    return _adapted(model, config) if config.trainable == "lora" else model


def reference_skeleton(config: Config) -> PairModel:
    """As `skeleton`, of `load_reference`."""
    return _skeleton(config, _reference(config))


def _skeleton(config: Config, source: Source) -> PairModel:
    from transformers import AutoModelForCausalLM

    model_config = read_model_config(source, config.max_length)[0]
    cpu = torch.device("cpu")
    dtype = resolve_dtype(config.dtype, cpu)
    module = AutoModelForCausalLM.from_config(model_config, dtype=_kept_dtype(config, dtype, cpu))
    quantised.stand_in(module, config)
    prepare(module)
    if config.torch_compile:
        last_block.widen(module)
    checkpoint_layers(module, config.gradient_checkpointing)
    return PairModel(module, None, cpu, dtype, "")


def load_reference(config: Config) -> PairModel:
    """The model of ``config.ref_model_name_or_path`` with its tokenizer, frozen; as `load_model`.

    Whether it reads the same tokens is for the caller to see.
    """
    source = _reference(config)
    reference = _load(config, source, read_tokenizer(source))
    reference.module.requires_grad_(False)
    return _with_attention(_placed(reference), "auto")


def _policy(config: Config) -> Source:
    return Source("model_name_or_path", config.model_name_or_path, config.model_revision)


def _reference(config: Config) -> Source:
    assert config.ref_model_name_or_path
    name, revision = config.ref_model_name_or_path, config.ref_model_revision
    return Source("ref_model_name_or_path", name, revision)


def _load(config: Config, source: Source, tokenizer: Any) -> PairModel:
    """Still on the CPU."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    kept = _kept_dtype(config, dtype, device)
    more = quantised.loading_options(config, dtype, device)
    module, identity = read_weights(source, kept, config.max_length, device, more)
    identity += quantised.identity(config)
    quantised.settle(module)
    if kept is torch.bfloat16:  # other log-probs than those of the files' own precision
        identity += " weights:bfloat16"
    if device.type == "cpu":
        keep_freed_memory()
    prepare(module)
    checkpoint_layers(module, unplanned(config).gradient_checkpointing)
    return PairModel(module, tokenizer, device, dtype, identity)


def _kept_dtype(config: Config, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the weights in memory, beside products in ``dtype``."""
    if dtype is torch.float64:
        return dtype
    kept: torch.dtype = getattr(torch, config.weights_dtype)
    if kept is torch.bfloat16 and dtype is not torch.bfloat16:
        raise ValueError(
            f"weights_dtype: bfloat16 needs products in bfloat16, and dtype: {config.dtype} means "
            f"{str(dtype)[6:]} on {device}. Set dtype: bfloat16."
        )
    return kept


def _router(model: PairModel, config: Config) -> Router | None:
    if config.trainable == "head":  # no gradient reaches a router
        return None
    router = find_router(model.module.config, config.router_aux_loss_coef)
    if router and config.trainable == "lora" and config.lora_dropout:
        raise ValueError(
            f"lora_dropout={config.lora_dropout}: the load-balancing loss of this model's routers "
            f"(router_aux_loss_coef={router.coef}) wants the routing of a whole step before its "
            "gradient, and dropout would change it in between. Set one of the two to 0."
        )
    if router and config.torch_compile:
        raise ValueError(
            "torch_compile: the load-balancing loss of this model's routers (router_aux_loss_coef="
            f"{router.coef}) reads what they chose, which a compiled block does not show. Set "
            "torch_compile: false, or router_aux_loss_coef: 0."
        )
    return router


def routes(config: Config) -> bool:
    """Whether the balance of routers is part of the loss, from the model's configuration alone."""
    if config.trainable == "head":
        return False
    model_config = read_model_config(_policy(config), config.max_length)[0]
    return find_router(model_config, config.router_aux_loss_coef) is not None


def _adapted(model: PairModel, config: Config) -> PairModel:
    adapter = lora.attach(model.module, config)
    reference_off = not config.adapter_name_or_path or config.adapter_reference == "base"
    identity = model.identity
    if not reference_off:
        identity += f" adapter:{lora.digest(model.module)}"
    return replace(model, adapter=adapter, reference_off=reference_off, identity=identity)


def _placed(model: PairModel) -> PairModel:
    try:
        model.module.to(model.device)
    except torch.OutOfMemoryError as error:
        size = sum(p.numel() * p.element_size() for p in model.module.parameters())
        raise ValueError(
            f"{size / 2**30:.1f} GiB of weights ({type(model.module).__name__}) do not fit on "
            f"{model.device}: {error}"
        ) from error
    return model


def _with_attention(model: PairModel, name: str) -> PairModel:
    backend, others = choose_backend(name, model.device, model.dtype, model.lacks)
    why = "".join(f"; not {other}: {reason}" for other, reason in others.items())
    log.info("attention: %s%s", backend.name, why if model.device.type == "cuda" else "")
    return replace(model, attention=backend)


def prepare(module: nn.Module) -> None:
    """Put `pair_attention` into a causal LM, switch its dropout off and narrow its last block
    (fastpref.last_block), in place."""
    attention.register()
    module.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    if module.config._attn_implementation != attention.NAME:  # type: ignore[union-attr]
        raise ValueError(f"{type(module).__name__} {NO_INTERFACE}. Not supported.")
    # The sampled routing and the noise of some mixtures of experts end with the training mode too.
    module.eval()
    for layer in module.modules():  # for those that are put into training mode again
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(getattr(layer, "attention_dropout", None), float):
            layer.attention_dropout = 0.0  # type: ignore[assignment]
    if next(module.parameters()).dtype is torch.float64:
        _experts_one_by_one(module)
    found = last_layer(module)
    if found:
        last_block.narrow(*found)


def _experts_one_by_one(module: Any) -> None:
    """torch has grouped products of experts in single and half precision only."""
    if module._can_set_experts_implementation():
        module.set_experts_implementation("eager")


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; under torchrun the rank's own."""
    if name != "auto":
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device={name!r}: there are {torch.cuda.device_count()} CUDA devices here. Set "
                "device to auto or cpu, or install a torch with CUDA."
            )
        return device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 compute on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
