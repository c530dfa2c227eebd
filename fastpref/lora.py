"""LoRA through peft: adapters on a frozen model that stays an ordinary Hugging Face model.

peft puts its layers into the model in place, so everything else here goes on working with the
model's own class, body and head; what is peft's (adapter off, merging) goes through the `PeftModel`
around it. Which modules get an adapter, and what is refused: `fastpref.lora_settings`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastpref import lora_settings
from fastpref.config import Config
from fastpref.lora_settings import SETTINGS, WEIGHTS
from fastpref.quantised import demand_frozen, numbers

log = logging.getLogger(__name__)

NAME = "default"  # of the adapter within peft
PREFIX = "base_model.model."  # peft's, of every weight in a file
# Where biases learn, peft lists those of modules that are trained whole a second time, and frozen.
_TWICE = re.compile(r"\.(modules_to_save|original_module)\.[^.]*bias$")


def check_available() -> None:
    """ValueError that names the remedy where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            'trainable: lora needs peft, which is not installed: pip install "fastpref[lora]"'
        )


def refuse_as_model(name: str) -> None:
    """ValueError where ``name``, a model, is the folder of an adapter."""
    file = Path(name).expanduser() / SETTINGS
    if not file.is_file():
        return
    try:
        made_on = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        made_on = None
    raise ValueError(
        f"model_name_or_path={name!r} holds an adapter ({SETTINGS}), not a model. Set trainable: "
        f"lora, adapter_name_or_path: {name} and model_name_or_path: {made_on or 'its model'}."
    )


def attach(module: nn.Module, config: Config) -> Any:
    """Put the adapter that ``config`` describes or names into the causal LM ``module``, in place,
    and freeze the rest; returns peft's `PeftModel` around it.

    The first values depend on the seed alone, and no one else's random numbers are used. Raises
    ValueError for targets that are not there, for the head, and for what peft cannot combine.
    """
    import peft

    folder = None
    if config.adapter_name_or_path:
        folder = lora_settings.adapter_folder(config.adapter_name_or_path)
        settings, where = lora_settings.continued(folder, module, config), str(folder / SETTINGS)
    else:
        settings, where = lora_settings.fresh(module, config), "trainable: lora"
    head = lora_settings.find_head(module)
    demand_frozen(module, settings.modules_to_save or ())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(config.seed)
        # peft's own use of old names; that B's biases may not merge is said by `demand_mergeable`.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="`lora_bias=True`")
        try:
            adapter = peft.get_peft_model(module, settings, adapter_name=NAME)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: peft cannot make this adapter: {error}") from error
    adapter.eval()  # new layers begin in training mode, with their dropout on
    tuner = adapter.base_model
    targeted = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    lora_settings.demand_head_free(module, head, where)
    lora_settings.demand_all_used(config, targeted)
    if config.save_merged:
        lora_settings.demand_mergeable(module, where)
    if folder is not None:
        load(module, folder)
    _say(module, targeted, config)
    return adapter


def is_adapted(module: nn.Module) -> bool:
    """Whether the model has an adapter, so that the adapter alone is kept in checkpoints."""
    return hasattr(module, "peft_config")


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as they stand in the model, by peft's names without its prefix."""
    import peft

    # The state is handed over because peft, when it looks itself, takes a bias of B for a damaged
    # matrix; embeddings, which it would add to the file, are never changed outside of the adapter.
    state = peft.get_peft_model_state_dict(
        module, module.state_dict(), adapter_name=NAME, save_embedding_layers=False
    )
    return {name: tensor for name, tensor in state.items() if not _TWICE.search(name)}


def save(module: nn.Module, folder: Path) -> None:
    """Write the adapter in peft's layout, for `PeftModel.from_pretrained(base, folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in weights(module).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings: Any = copy.copy(module.peft_config[NAME])  # type: ignore[index]
    settings.inference_mode = True
    for field in ("target_modules", "exclude_modules"):
        if isinstance(getattr(settings, field), set):  # a set's order changes from run to run
            setattr(settings, field, sorted(getattr(settings, field)))
    settings.save_pretrained(folder)


def load(module: nn.Module, folder: Path) -> None:
    """Copy an adapter's saved weights into ``module``; ValueError unless they fit exactly."""
    file = folder / WEIGHTS
    try:
        found = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}
        found = {name: tensor for name, tensor in found.items() if not _TWICE.search(name)}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    own, base = weights(module), module.state_dict()
    # Where an embedding has an adapter, peft puts the model's own embedding into the file too.
    extra = [
        name
        for name in sorted(found.keys() - own.keys())
        if name not in base or not torch.equal(base[name], found[name].to(base[name]))
    ]
    lacking = sorted(own.keys() - found.keys())
    another = "; is it the adapter of another model, or one with other settings?"
    if extra or lacking:
        first = f"holds {extra[0]}, for which" if extra else f"lacks {lacking[0]}, for which"
        raise ValueError(
            f"{file}: {first} {type(module).__name__} has {'no' if extra else 'a'} place "
            f"({len(extra) + len(lacking)} weights do not fit){another}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != found[name].shape:
                raise ValueError(
                    f"{file}: weight {name}: expected {tuple(tensor.shape)}, got "
                    f"{tuple(found[name].shape)}{another}"
                )
            tensor.copy_(found[name])


def digest(module: nn.Module) -> str:
    """Names what the adapter adds to its model: its weights and their scale, nothing else."""
    from peft.tuners.lora import LoraLayer

    text = hashlib.sha256()
    for name, tensor in sorted(weights(module).items()):
        text.update(f"{name} {tuple(tensor.shape)}\n".encode())
        text.update(tensor.detach().double().cpu().contiguous().numpy().tobytes())
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            text.update(f"{name} {layer.scaling[NAME]!r}\n".encode())
    return text.hexdigest()


@torch.no_grad()
def update_norms(module: nn.Module) -> dict[str, Tensor]:
    """Layer -> () float64 Frobenius norm of what its adapter adds to the weight, scale B A.

    By the r x r matrices B^T B and A A^T: |B A|^2 = tr(B^T B A A^T); B A is never formed. Adapters
    on parameters that belong to no layer of their own (fused experts) are left out.
    """
    from peft.tuners.lora import Embedding, LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
            continue
        if isinstance(layer, Embedding):
            a, b = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
        else:
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        a, b = a.detach().double(), b.detach().double()
        square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)
        found[name] = abs(layer.scaling[NAME]) * square.sqrt()
    return found


@contextmanager
def dropout(adapter: Any) -> Iterator[None]:
    """Inside, the adapter's dropout is on, and nothing else of the model's training mode."""
    from peft.tuners.lora import LoraLayer

    on = adapter.peft_config[NAME].lora_dropout > 0
    layers = [m for m in adapter.modules() if isinstance(m, LoraLayer)] if on else []
    try:
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer in layers:
            layer.eval()


@contextmanager
def off(adapter: Any) -> Iterator[None]:
    """Inside, the model computes without its adapter."""
    with warnings.catch_warnings():
        # Said where biases learn; before training they are still the model's own.
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")
        with adapter.disable_adapter():
            yield


def merge(adapter: Any) -> Any:
    """The model with the adapter added into its weights, in place: ``adapter`` is gone then."""
    return adapter.merge_and_unload(safe_merge=True)


def _say(module: nn.Module, targeted: Sequence[str], config: Config) -> None:
    learning = sum(numbers(p) for p in module.parameters() if p.requires_grad)
    reference = "the model without it"
    if config.adapter_name_or_path and config.adapter_reference == "initial":
        reference = f"the model with {config.adapter_name_or_path} as it is now"
    reference = config.ref_model_name_or_path or reference
    log.info(
        "LoRA on %d modules (%s)%s: %d weights learn, %d stay; the reference is %s",
        len(targeted),
        ", ".join(sorted({name.rpartition(".")[2] for name in targeted})),
        _whole(module),
        learning,
        sum(map(numbers, module.parameters())) - learning,
        reference,
    )


def _whole(module: nn.Module) -> str:
    """peft takes a name's last letters for a name here: `norm` also means `input_layernorm`."""
    from peft.utils import ModulesToSaveWrapper

    names = [n for n, layer in module.named_modules() if isinstance(layer, ModulesToSaveWrapper)]
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f", whole {shown}" if names else ""
