"""Which layers of a model taps stand behind; the layer group and place of their weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastpref.dynamics import tap_layers
from fastpref.dynamics.places import Place, VocabularyPlace
from fastpref.dynamics.tap_layers import Embedding, Kind, Linear, Norm

_BLOCK = re.compile(r"^(?:.*?\.)??(\d+)\.(.+)$")


@dataclass(frozen=True)
class Layer:
    """A layer with trained weights, or an embedding."""

    name: str
    module: nn.Module
    kind: Kind
    group: int  # -1: nothing of it is trained
    weight: Place | None  # where its weight's part goes; None: frozen
    bias: Place | None


@dataclass(frozen=True)
class Found:
    """What `find` found."""

    layers: list[Layer]
    groups: tuple[str, ...]  # of the trained weights
    head: VocabularyPlace | None  # of the head's weight; None: frozen
    tied: str | None  # name of the embedding that has the head's weight


def find(module: Any) -> Found:
    """Of a causal LM of transformers; ValueError as `taps.attach` says."""
    head, head_weight = module.get_output_embeddings(), None
    uses: dict[int, list[str]] = {}
    for name, _, own, parameter in tap_layers.own_parameters(module):
        uses.setdefault(id(parameter), []).append(f"{name}.{own}")
    kinds: dict[str, tuple[nn.Module, Kind]] = {}
    missing = []
    for name, layer in module.named_modules():
        trained = [n for n, p in layer.named_parameters(recurse=False) if p.requires_grad]
        if layer is head:
            if head.weight.requires_grad:
                head_weight = head.weight
            missing += [(name, layer, n) for n in trained if n != "weight"]
        elif trained or isinstance(layer, nn.Embedding):
            kind = tap_layers.kind_of(layer)
            if kind is not None:
                kinds[name] = (layer, kind)
            else:
                missing += [(name, layer, n) for n in trained]
    if missing:
        raise ValueError(_refusal(missing))
    names = {name: _group(name, kind) for name, (layer, kind) in kinds.items() if _trains(layer)}
    tied = None
    for name, (layer, kind) in kinds.items():
        for parameter in layer.parameters(recurse=False):
            if not parameter.requires_grad or len(uses[id(parameter)]) == 1:
                continue
            if parameter is head_weight and isinstance(kind, Embedding):
                tied = name
            if len(uses[id(parameter)]) > 2 or tied != name:
                others = " and ".join(uses[id(parameter)])
                raise ValueError(
                    f"{others} are one trained parameter: taps know no shared weight but that of "
                    "an input embedding and the head. Set track: head."
                )
    groups = _ordered([*names.values(), *(["head"] if head_weight is not None else [])], tied)
    offsets: dict[str, int] = {}
    layers = []
    head_place: VocabularyPlace | None = None
    for name, (layer, kind) in kinds.items():
        group = groups.index(names[name]) if name in names else -1
        weight, bias = _places(name, layer, kind, group, offsets, name == tied)
        layers.append(Layer(name, layer, kind, group, weight, bias))
        if name == tied:
            assert isinstance(weight, VocabularyPlace)
            head_place = weight
    if head_weight is not None and tied is None:
        name = next(n for n in uses[id(head_weight)])
        head_place = VocabularyPlace.hashed(name, head_weight, groups.index("head"))
    return Found(layers, groups, head_place, tied)


def _trains(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def _refusal(missing: Sequence[tuple[str, nn.Module, str]]) -> str:
    shown: dict[tuple[type, str], str] = {}  # one of every kind
    for name, layer, own in missing:
        shape = tuple(dict(layer.named_parameters(recurse=False))[own].shape)
        shown.setdefault((type(layer), own), f"{name} ({type(layer).__name__}): {own} {shape}")
    more = f" and {len(missing) - len(shown)} more" if len(missing) > len(shown) else ""
    return (
        f"no tap knows the trained {', '.join(shown.values())}{more}. "
        "Gradients of a pair are known of linear layers, embeddings, RMSNorm, LayerNorm and the "
        "head's weight (not of fused experts, quantised weights, DoRA, a head's bias). Set track: "
        "head, or freeze them."
    )


def block_of(name: str) -> str | None:
    """Number of the block that the layer of this name lies in; None outside of blocks."""
    found = _BLOCK.match(name)
    return found[1] if found else None


def _group(name: str, kind: Kind) -> str:
    if isinstance(kind, Embedding):
        return "embedding"
    if isinstance(kind, Norm):
        return "norms"
    found = _BLOCK.match(name)
    if not found:
        return "other"
    child = found[2].partition(".")[0].lower()
    return f"block.{found[1]}.{'attention' if 'attn' in child or 'attention' in child else 'mlp'}"


def _ordered(names: Sequence[str], tied: str | None) -> tuple[str, ...]:
    present = set(names) - ({"head"} if tied is not None else set())

    def place(name: str) -> tuple[int, int, str]:
        if name.startswith("block."):
            return (1, int(name.split(".")[1]), name)
        return (("embedding", "", "other", "norms", "head").index(name), 0, name)

    return tuple(sorted(present, key=place))


def _places(
    name: str,
    layer: nn.Module,
    kind: Kind,
    group: int,
    offsets: dict[str, int],  # outputs so far of the linear layers of one parent
    tied: bool,
) -> tuple[Place | None, Place | None]:
    own = dict(layer.named_parameters(recurse=False))
    weight, bias = own["weight"], own.get("bias")
    own_key = f"{name}.weight"
    place: Place | None = None
    if isinstance(kind, Linear):
        # Layers of one parent are one tall matrix: q, k and v, which have one input, share its
        # projection.
        parent = name.rpartition(".")[0]
        outputs, first = weight.shape[1 if kind.transposed else 0], offsets.get(parent, 0)
        offsets[parent] = first + outputs
        place = Place(own_key, weight, group, parent, kind.transposed, first)
    elif isinstance(kind, Embedding):
        make = VocabularyPlace.hashed if tied else VocabularyPlace.plain
        place = make(own_key, weight, group)
    else:
        place = Place(own_key, weight, group, own_key)
    beside = f"{name}.bias"
    return (
        place if weight.requires_grad else None,
        Place(beside, bias, group, beside) if bias is not None and bias.requires_grad else None,
    )
