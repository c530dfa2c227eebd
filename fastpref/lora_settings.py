"""What peft is told about an adapter: from the configuration, or from an adapter's own file.

Targets and options are peft's, under the names of `fastpref.config`. Two rules are ours: the output
head has no adapter, because log-probs come from its weight and not from its forward (design 5); and
nothing that was asked for is passed over in silence.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastpref.config import Config
from fastpref.config_lora import is_pattern, read_pattern

log = logging.getLogger(__name__)

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # peft's names
ALL_LINEAR = "all-linear"
# Fields of peft's LoraConfig that an adapter which is continued may bring.
UNDERSTOOD = set(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern use_dora lora_bias target_parameters runtime_config eva_config".split()
)
# First values that leave the model's own weights as they are.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True)
class OutputHead:
    """The output embedding before there are adapters: its name and its weight (V, D)."""

    name: str
    weight: Tensor


def find_head(module: nn.Module) -> OutputHead:
    """The output head of a causal LM."""
    layer = module.get_output_embeddings()  # type: ignore[operator]
    return OutputHead(next(n for n, m in module.named_modules() if m is layer), layer.weight)


def fresh(module: nn.Module, config: Config) -> Any:
    """peft's `LoraConfig` for a new adapter; ValueError for names that the model has not."""
    import peft
    from transformers.pytorch_utils import Conv1D

    names = [name for name, _ in module.named_modules() if name]
    parameters = [name for name, _ in module.named_parameters()]
    for field, among in (
        ("lora_target_modules", names),
        ("lora_exclude_modules", names),
        ("lora_layers_pattern", names),
        ("lora_modules_to_save", names),
        ("lora_target_parameters", parameters),
    ):
        _demand_known(field, getattr(config, field), among, module)
    _demand_weights(module, config)
    _demand_layers(names, config)
    wanted = config.lora_target_modules or (() if config.lora_target_parameters else (ALL_LINEAR,))
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=module.name_or_path,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=all_linear(module) if wanted == (ALL_LINEAR,) else _for_peft(wanted),
        exclude_modules=_for_peft(config.lora_exclude_modules) or None,
        target_parameters=list(config.lora_target_parameters) or None,
        layers_to_transform=list(config.lora_layers_to_transform) or None,
        layers_pattern=list(config.lora_layers_pattern) or None,
        rank_pattern=dict(_patterns(config, "lora_rank_pattern")),
        alpha_pattern=dict(_patterns(config, "lora_alpha_pattern")),
        modules_to_save=list(config.lora_modules_to_save) or None,
        bias=config.lora_train_biases,
        lora_bias=config.lora_bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights == "true" or config.init_lora_weights,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in module.modules()),
    )


def continued(folder: Path, module: nn.Module, config: Config) -> Any:
    """peft's `LoraConfig` of the adapter in ``folder``; ValueError for a kind that is not ours."""
    import peft

    where = folder / SETTINGS
    try:
        settings = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{where}: not the settings of a peft adapter: {error!r}") from error
    if type(settings) is not peft.LoraConfig:
        raise ValueError(f"{where}: expected peft_type LORA, got {settings.peft_type}")
    plain = peft.LoraConfig()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in UNDERSTOOD and value and value != getattr(plain, field.name):
            raise ValueError(f"{where}: {field.name}={value!r} is an option that fastpref lacks")
    start = settings.init_lora_weights
    if start not in HARMLESS_STARTS:
        raise ValueError(
            f"{where}: init_lora_weights={start!r} changes the model's own weights when it is put "
            "on. Save the adapter with peft's path_initial_model_for_weight_conversion; or save "
            "the changed model as model_name_or_path, and init_lora_weights: true in this file."
        )
    if start != "mica":  # which also says what stays frozen
        settings.init_lora_weights = True
    if config.adapter_reference == "base" and settings.bias != "none":
        raise ValueError(
            f"{where}: bias={settings.bias!r} replaces biases of the model, so the model without "
            "the adapter cannot be the reference. Set adapter_reference: initial."
        )
    if settings.base_model_name_or_path != module.name_or_path:
        log.warning(
            "%s was made on %s and goes on %s",
            folder,
            settings.base_model_name_or_path,
            module.name_or_path,
        )
    settings.base_model_name_or_path = module.name_or_path
    settings.task_type, settings.inference_mode = "CAUSAL_LM", False
    settings.lora_dropout = config.lora_dropout
    return settings


def adapter_folder(name: str) -> Path:
    """Local folder of a peft adapter, from disk or the Hub; ValueError where there is none."""
    folder = Path(name).expanduser()
    expected = f"Expected: a folder or Hub name with {SETTINGS} and {WEIGHTS}."
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=[SETTINGS, WEIGHTS]))
        except Exception as error:  # there are as many kinds as ways not to reach the Hub
            raise ValueError(
                f"adapter_name_or_path={name!r} cannot be loaded: {error}\n{expected}"
            ) from error
    for file in (SETTINGS, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"adapter_name_or_path={name!r}: no {file} there. {expected}")
    return folder


def all_linear(module: nn.Module) -> list[str]:
    """Names of all linear layers but the head; their last words where those say the same."""
    from transformers.pytorch_utils import Conv1D

    head = module.get_output_embeddings()  # type: ignore[operator]
    linear = {
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    }
    ends = {name.rpartition(".")[2] for name in linear}
    alike = {name for name, _ in module.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if alike == linear else linear)


def demand_head_free(module: nn.Module, head: OutputHead, where: str) -> None:
    """Raise ValueError where an adapter, or a copy that learns, stands on the head's weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            field, own = "target_modules", layer.get_base_layer()
        elif isinstance(layer, ModulesToSaveWrapper):
            field, own = "modules_to_save", layer.original_module
        else:
            continue
        if not any(p is head.weight for p in own.parameters()):
            continue
        what = "is the output head"
        if name != head.name:
            what = f"shares its weight with the output head {head.name} (tie_word_embeddings)"
        raise ValueError(
            f"{where}: {name}, one of the {field}, {what}. Log-probs are computed from the head's "
            f"weight itself, which LoRA leaves as it is; leave {name} out."
        )


def demand_all_used(config: Config, targeted: Sequence[str]) -> None:
    """Raise ValueError for an option that chose nothing; peft would go on without it."""
    for field in ("lora_target_modules", "lora_target_parameters"):
        for name in getattr(config, field):
            if name != ALL_LINEAR and not any(_stands_for(name, target) for target in targeted):
                raise ValueError(
                    f"{field}: nothing is left of {name!r}; lora_exclude_modules, "
                    "lora_modules_to_save or lora_layers_to_transform leave all of it out"
                )
    layers = _layer_numbers(targeted)
    for number in config.lora_layers_to_transform:
        if number not in layers:
            raise ValueError(
                f"lora_layers_to_transform: nothing to adapt in layer {number}; what is adapted "
                f"lies in layers {', '.join(map(str, sorted(layers)))}"
            )
    for field in ("lora_rank_pattern", "lora_alpha_pattern"):
        for name, _ in _patterns(config, field):
            if not any(re.match(rf"(.*\.)?({name})$", target) for target in targeted):  # as peft
                raise ValueError(f"{field}: {name!r} stands for none of the adapted modules")


def demand_mergeable(module: nn.Module, where: str) -> None:
    """Raise ValueError where an adapter's bias has no place in the model that it merges into."""
    from peft.tuners.lora import LoraLayer

    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and any(layer.lora_bias.values()):
            if layer.get_base_layer().bias is None:
                raise ValueError(
                    f"{where}: save_merged: the adapter of {name} has a bias (lora_bias) and the "
                    "module has none to add it to; set lora_bias: false or save_merged: false"
                )


def _demand_known(
    field: str, wanted: Iterable[str], names: Sequence[str], module: nn.Module
) -> None:
    """Raise ValueError for a name (or regular expression) that nothing in the model has."""
    for name in wanted:
        if name == ALL_LINEAR or any(_stands_for(name, n) for n in names):
            continue
        length = name.count(".") + 1
        ends = sorted({".".join(n.split(".")[-length:]) for n in names})
        words = [*ends, ALL_LINEAR] if field == "lora_target_modules" else ends
        near = difflib.get_close_matches(name, words, n=1)
        hint = f"its linear layers are {', '.join(all_linear(module))}"
        if "," in name and re.fullmatch(r"[\w., -]+", name):
            hint = "name several as a list, without commas on the command line"
        elif near and not is_pattern(name):
            hint = f"did you mean {near[0]}?"
        raise ValueError(f"{field}: nothing in {type(module).__name__} is {name!r}; {hint}")


def _demand_weights(module: nn.Module, config: Config) -> None:
    """Raise ValueError for a target that has no weight matrix; peft's answer is the whole model."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding | Conv1D):
            continue
        if any(_stands_for(out, name) for out in config.lora_exclude_modules):
            continue
        for target in config.lora_target_modules:
            if name and target != ALL_LINEAR and _stands_for(target, name):
                raise ValueError(
                    f"lora_target_modules: {target!r} stands for {name} too, a "
                    f"{type(layer).__name__}; adapters go on linear layers and embeddings, such as "
                    f"{', '.join(all_linear(module))}"
                )


def _demand_layers(names: Sequence[str], config: Config) -> None:
    """Raise ValueError for the number of a layer that the model has not."""
    layers = _layer_numbers(names)
    for number in config.lora_layers_to_transform:
        if number not in layers:
            raise ValueError(
                f"lora_layers_to_transform: there is no layer {number}; layers are numbered "
                f"{min(layers)} to {max(layers)}"
            )


def _layer_numbers(names: Iterable[str]) -> set[int]:
    """The first number in every name, which is a layer's: 3 of `model.layers.3.mlp.up_proj`."""
    return {int(n) for name in names for n in re.findall(r"\.(\d+)\.", name)[:1]}


def _for_peft(names: Sequence[str]) -> str | list[str]:
    """peft takes a text for a regular expression and a list for names."""
    return names[0] if len(names) == 1 and is_pattern(names[0]) else list(names)


def _patterns(config: Config, field: str) -> list[tuple[str, int]]:
    return [read_pattern(field, entry) for entry in getattr(config, field)]


def _stands_for(wanted: str, name: str) -> bool:
    """peft's rule: a regular expression fits the whole ``name``, a name its end."""
    if is_pattern(wanted):
        return bool(re.fullmatch(wanted, name))
    return name == wanted or name.endswith("." + wanted)
