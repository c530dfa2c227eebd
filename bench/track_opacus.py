"""Opacus' fast gradient clipping beside taps: norms of every sample's gradient in one backward.

What it can do: a sample is a row of a padded batch, here a prompt with its chosen completion, so
its norms are those of grad log pi(chosen), which taps give as well (``of="chosen"``); they are
compared before anything is timed. What it cannot: a pair as one sample (its two sequences are two
rows, and the product of their gradients is lost), packed batches, a head tied to the embedding,
non-reentrant activation checkpointing. It instantiates the gradients of Llama's norms sample by
sample, as it has a norm of its own only for linear layers and embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import measure
from bench.measure import Quantiles
from bench.track_cases import PERSONA, TINY, Clock, Subject
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.gradients import pair_gradients
from fastpref.step import backward

NAMES = ("opacus", "opacus_plain", "exact", "exact_plain")
PAIRS = 16
WITHIN = 1e-3  # relative, of a norm
WARM_UP = 2


def run(
    repeats: int, clock: Clock
) -> tuple[dict[str, Any], dict[str, dict[str, float] | None], str | None]:
    """Facts, values, and why Opacus is not among them."""
    values: dict[str, dict[str, float] | None] = dict.fromkeys(
        ("opacus_backward_share", "exact_backward_share")
    )
    try:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
    except ImportError:
        return {}, values, "not installed (pip install fastpref[bench]; opacus, 310 kB, Apache-2.0)"
    subject = Subject(TINY, PERSONA, PAIRS, torch.device("cpu"))
    pairs = subject.steps[0]
    watched = GradSampleModuleFastGradientClipping(
        _plain_model(subject), strict=False, loss_reduction="sum"
    )
    calls = _calls(subject, watched, _plain_model(subject), pairs)
    calls["opacus"]()
    theirs = watched.get_norm_sample().double()
    ours = pair_gradients(subject.model, subject.taps["exact"], pack_pairs(pairs), of="chosen")
    error = float((theirs / ours.gnorm().double() - 1).abs().max())
    if not error <= WITHIN:
        return {"error": error}, values, f"its norms differ from ours by {error:.1e}"
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn, name in measure.interleaved(NAMES, repeats + WARM_UP):
        took = clock(calls[name], subject.device)
        if turn >= WARM_UP:
            seconds[name].append(took)
    for name in ("opacus", "exact"):
        both = zip(seconds[name], seconds[f"{name}_plain"], strict=True)
        share = Quantiles.of([a / b - 1 for a, b in both])
        values[f"{name}_backward_share"] = {"value": share.q50, "q20": share.q20, "q80": share.q80}
    print(f"Opacus, {PAIRS} sequences of {subject.name}: norms equal ours to {error:.0e}")
    for name, own in seconds.items():
        print(f"  {name:14}{1e3 * Quantiles.of(own).q50:9.1f} ms, forward and backward")
    facts = {name: asdict(Quantiles.of(own)) for name, own in seconds.items()}
    return {"error": error, "seconds": facts}, values, None


def _plain_model(subject: Subject) -> Any:
    """Transformers' own, of the same weights."""
    from transformers import LlamaForCausalLM

    module = LlamaForCausalLM(subject.size.config())
    module.load_state_dict(subject.model.module.state_dict())
    module.set_attn_implementation("sdpa")
    return module.train()


def _calls(
    subject: Subject, watched: Any, plain: Any, pairs: list[TokenPair]
) -> dict[str, Callable[[], object]]:
    """Forward and backward: of the padded chosen sequences, and of the packed pairs."""
    batch = pack_pairs(pairs)
    padded = _padded(pairs)

    def chosen(module: Any) -> None:
        for parameter in module.parameters():
            parameter.grad = None
        ids, target = padded
        logits = module(input_ids=ids).logits[:, :-1]
        rows = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), target, ignore_index=-100, reduction="sum"
        )
        rows.backward()

    def ours(track: str) -> None:
        for parameter in subject.model.trained:
            parameter.grad = None
        taps = subject.taps.get(track)
        config = subject.config
        backward(subject.model, batch, subject.loss, config, len(pairs), None, taps=taps)

    return {
        "opacus": lambda: chosen(watched),
        "opacus_plain": lambda: chosen(plain),
        "exact": lambda: ours("exact"),
        "exact_plain": lambda: ours("none"),
    }


def _padded(pairs: list[TokenPair]) -> tuple[Tensor, Tensor]:
    """ids (B, T), padded at the end, and targets (B, T - 1), -100 where nothing is scored."""
    rows = [np.concatenate([pair.prompt, pair.chosen]) for pair in pairs]
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int64)
    target = np.full((len(rows), width - 1), -100, np.int64)
    for i, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        ids[i, : len(row)] = row
        target[i, len(pair.prompt) - 1 : len(row) - 1] = pair.chosen
    return torch.from_numpy(ids), torch.from_numpy(target)
