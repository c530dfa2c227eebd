"""Checks of a whole training step for `bench gpu --part correctness`: nothing of it waits for the
device, and one that is not finite leaves the weights as they were."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from bench.capture import waiting_is_an_error

Found = Mapping[str, tuple[float, float]]  # what -> (measured, bound)
TRACKS = ("none", "head", "sketch")


class Session(Protocol):
    """What this module needs of `bench.gpu.Session`."""

    device: Any


def checks() -> Iterator[tuple[str, Callable[[Any], Found]]]:
    """(name, check)."""
    for track in TRACKS:
        yield f"a step, no wait, track {track}", functools.partial(_no_wait, track=track)
    yield "a step that is not finite moves no weight", _bad_step


def _parts(session: Session, track: str) -> Any:
    """A step of a small Llama, as a call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastpref.config import Config
    from fastpref.data.pack import pack_pairs
    from fastpref.data.tokenize import TokenPair
    from fastpref.dynamics.taps import attach
    from fastpref.loading import prepare
    from fastpref.losses import get_loss
    from fastpref.model import PairModel
    from fastpref.step import StepResult, train_step

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    module = LlamaForCausalLM(config).to(session.device)
    prepare(module)
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    model = PairModel(module, None, session.device, dtype, "")
    taps = attach(module, track) if track == "sketch" else None
    rng = np.random.default_rng(0)
    pairs = []
    for n, sizes in enumerate([(40, 12, 30), (7, 1, 9), (100, 50, 3), (20, 1, 1)]):
        prompt, chosen, rejected = (rng.integers(0, 512, k).astype(np.int32) for k in sizes)
        known: dict[str, Any] = {"ref_chosen": -80.0, "ref_rejected": -70.0}
        pairs.append(TokenPair(n, 0, "", prompt, chosen, rejected, (), **known))
    settings = Config(model_name_or_path="m", dataset_name=("d",), output_dir="o")
    optimizer = torch.optim.AdamW(model.trained, lr=1e-3, fused=True)

    def step() -> StepResult:
        batches = (pack_pairs(own).to(session.device) for own in (pairs[:3], pairs[3:]))
        return train_step(
            model, batches, get_loss(("sigmoid",)), settings, len(pairs), optimizer,
            None if track == "none" else "exact", None, taps, wait=False,
        )  # fmt: skip

    return model, step


def _no_wait(session: Session, track: str) -> Found:
    """The second step, with every implicit synchronisation made an error."""
    from fastpref.step import demand_finite

    _, step = _parts(session, track)
    step()  # kernels are compiled and tuned
    with waiting_is_an_error(session.device):
        result = step()
    demand_finite(result)
    return {}


def _bad_step(session: Session) -> Found:
    from fastpref.errors import NonFiniteError
    from fastpref.step import demand_finite

    model, step = _parts(session, "none")
    if session.device.type == "cpu":  # there the step itself tells
        return {}
    weight = model.head.weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    before = [p.detach().clone() for p in model.trained]
    result = step()
    moved = sum(
        not torch.equal(a.nan_to_num(), b.detach().nan_to_num())
        for a, b in zip(before, model.trained, strict=True)
    )
    try:
        demand_finite(result)
    except NonFiniteError:
        return {"weights that moved": (float(moved), 0.0)}
    return {"not told": (1.0, 0.0)}
