"""Will it fit, and in which pieces: the memory of a run before its model is loaded.

A step is rehearsed without numbers (`fastpref.rehearsal`) on the largest micro-batch that the pairs
give. Where the configuration leaves it to the planner, it takes the least recomputation, and with
it the most tokens per micro-batch, that fit: recomputing costs arithmetic in every step, smaller
micro-batches cost nothing as long as the device stays busy.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastpref import dist
from fastpref.config import Config, unplanned
from fastpref.config_course import DEFAULT_TOKENS
from fastpref.data.dataset import Dataset
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.loading import resolve_device, resolve_dtype, routes
from fastpref.memory import Memory, gib
from fastpref.recompute import MODES
from fastpref.rehearsal import Rehearsed, rehearse

log = logging.getLogger(__name__)

ENOUGH_TOKENS = 8192  # of a micro-batch that keeps a device busy; below it, recompute instead
GRAIN = 256  # tokens that a choice is rounded down to
# Of what a step allocates and frees: what a GPU's caching allocator holds beyond what is in use.
FRAGMENTATION = 0.04
TEXTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer (moments, masters)",
    "activations": "activations, casts of weights",
    "head": "head",
    "track": "track",
    "reference": "reference that follows",
    "allocator": "allocator's fragmentation",
    "context": "device context, workspaces",
}
REMEDIES: tuple[dict[str, Any], ...] = (  # in the order of what they cost
    {"gradient_checkpointing": "full"},
    {"weights_dtype": "bfloat16"},
    {"optim": "adamw_8bit"},
    {"trainable": "lora"},
    {"load_in_4bit": True},
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run holds at its peak, with what was chosen for it."""

    config: Config  # nothing left to the planner
    memory: Memory
    step: Rehearsed
    tokens: int  # of the largest micro-batch
    pairs: int  # of it
    several: bool  # a step may take several micro-batches

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by kind, in the order of the table."""
        found = dict(self.step.peak)
        if self.memory.gpu:
            passing = sum(size for kind, size in found.items() if kind != "weights")
            found["allocator"] = int(FRAGMENTATION * passing)
            found["context"] = self.memory.context
        always = ("weights", "gradients", "optimizer", "activations", "head")
        return {k: found.get(k, 0) for k in TEXTS if k in always or found.get(k)}

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the device has that much."""
        return self.total <= self.memory.size

    @property
    def refused(self) -> bool:
        """Whether the run cannot go on: a CPU, which can swap, refuses nothing."""
        return self.memory.gpu and not self.fits

    def table(self) -> str:
        """For people."""
        c, step = self.config, self.step
        lines = [f"{TEXTS[kind]:<32}{gib(size):>14}" for kind, size in self.parts.items()]
        lines.append(f"{'total at the peak (' + step.worst + ')':<32}{gib(self.total):>14}")
        lines.append(f"{'available: ' + self.memory.name:<32}{gib(self.memory.size):>14}")
        more = "several micro-batches a step" if self.several else "one micro-batch a step"
        what = f"{step.weights:,} weights, of which {step.trained:,} learn"
        return "\n".join(
            [
                f"{c.model_name_or_path}: {what}; dtype {c.dtype}, weights_dtype "
                f"{c.weights_dtype}, optim {c.optim}, track {c.track if c.record else 'none'}",
                f"gradient_checkpointing: {c.gradient_checkpointing}   "
                f"max_tokens_per_microbatch: {c.max_tokens_per_microbatch} "
                f"({self.pairs} pairs, {self.tokens} tokens; {more})",
                *lines,
            ]
        )


def plan_run(config: Config, dataset: Dataset) -> Config:
    """``config`` with nothing left to the planner, for training on ``dataset``; the table goes to
    the log.

    Raises ValueError where the run cannot fit on the GPU, with numbers and a remedy that fits. On
    a CPU it warns.
    """
    device = resolve_device(config.device)
    memory = Memory.of(device)
    try:
        plan = make_plan(config, dataset.train, dataset.sizes(dataset.train), memory)
    except Unknown as error:
        log.warning("memory: not planned: %s", error)
        return unplanned(config)
    log.info("memory\n%s", plan.table())
    if plan.refused:
        raise ValueError(refusal(plan, dataset.train, dataset.sizes(dataset.train)))
    if not plan.fits:
        log.warning(
            "memory: the run takes about %s and %s has %s left: it may swap, or be killed. %s",
            gib(plan.total).strip(),
            memory.name,
            gib(memory.size).strip(),
            _smaller(plan),
        )
    return plan.config


def made_pairs(prompt: int, completion: int, count: int) -> list[TokenPair]:
    """``count`` pairs of these lengths, for a plan without data; the completions differ at once."""
    zeros = np.zeros(prompt, np.int32)
    chosen, rejected = np.zeros(completion, np.int32), np.ones(completion, np.int32)
    return [
        TokenPair(i, 0, "", zeros, chosen, rejected, (), ref_chosen=0.0, ref_rejected=0.0)
        for i in range(count)
    ]


class Unknown(Exception):
    """A model whose step cannot be rehearsed."""


def make_plan(
    config: Config, pairs: Sequence[TokenPair], sizes: np.ndarray, memory: Memory
) -> Plan:
    """The plan of a run over ``pairs``, ``sizes`` (N,) of which count for
    max_tokens_per_microbatch. Where nothing fits it is the smallest there is.

    Raises ValueError for a model that fastpref refuses, Unknown for one that cannot be rehearsed.
    """
    planner = _Planner(config, pairs, sizes, memory)
    auto, fixed = config.gradient_checkpointing == "auto", config.max_tokens_per_microbatch
    best: Plan | None = None
    for mode in MODES if auto else (config.gradient_checkpointing,):
        plan = planner.plan(mode, fixed) if fixed else planner.largest(mode)
        enough = fixed or plan.config.max_tokens_per_microbatch >= min(
            ENOUGH_TOKENS, planner.most_tokens
        )
        if plan.fits and enough:
            return plan
        larger = (
            best is None
            or not best.fits
            or (plan.config.max_tokens_per_microbatch > best.config.max_tokens_per_microbatch)
        )
        if larger and (plan.fits or best is None or plan.total < best.total):
            best = plan
    assert best is not None
    return best


class _Planner:
    def __init__(
        self, config: Config, pairs: Sequence[TokenPair], sizes: np.ndarray, memory: Memory
    ) -> None:
        self.pairs, self.memory = pairs, memory
        self.whole = routes(config)  # routed tokens are fed, also those that predict nothing
        device = torch.device("cuda" if memory.gpu else "cpu")
        dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
        self.config = dataclasses.replace(config, dtype=dtype)
        self.order = np.argsort(sizes, kind="stable")  # as micro-batches are cut
        self.sizes = sizes[self.order]
        self.ends = np.concatenate([[0], np.cumsum(self.sizes)])
        self.per_step = math.ceil(config.train_batch_size / dist.world_size())
        self.longest = int(self.sizes[-1])
        self.step_tokens = int(self.sizes[-self.per_step :].sum())
        # More would be of no use.
        self.most_tokens = max(min(DEFAULT_TOKENS, self.step_tokens), self.longest)

    def plan(self, mode: str, tokens: int) -> Plan:
        """With these settings, of the micro-batch that holds the most."""
        config = dataclasses.replace(
            self.config, gradient_checkpointing=mode, max_tokens_per_microbatch=tokens
        )
        several = self.step_tokens > tokens
        found = []
        for own in self._windows(max(tokens, self.longest)):
            pairs = [self.pairs[i] for i in own]
            batch = pack_pairs(pairs, whole=self.whole)
            try:
                step = rehearse(config, batch, accumulates=several, gpu=self.memory.gpu)
            except ValueError:
                raise
            except Exception as error:  # there are as many kinds as models
                raise Unknown(f"{type(error).__name__}: {error}") from error
            count = int(self.sizes[np.isin(self.order, own)].sum())
            found.append(Plan(config, self.memory, step, count, len(own), several))
        return max(found, key=lambda plan: plan.total)

    def largest(self, mode: str) -> Plan:
        """The most tokens that fit; the fewest possible where none do."""
        high = self.plan(mode, self.most_tokens)
        if high.fits:
            return high
        least = max(self.longest, min(GRAIN, self.most_tokens))
        low = self.plan(mode, least)
        while low.fits and high.tokens > low.tokens:
            # Bytes are nearly a line in tokens.
            slope = (high.total - low.total) / (high.tokens - low.tokens)
            room = (self.memory.size - low.total) / max(slope, 1)
            tokens = int(low.tokens + 0.98 * room) // GRAIN * GRAIN
            if tokens <= max(low.config.max_tokens_per_microbatch, least):
                break
            if tokens >= high.config.max_tokens_per_microbatch:
                tokens = high.config.max_tokens_per_microbatch - GRAIN
                if tokens <= low.config.max_tokens_per_microbatch:
                    break
            tried = self.plan(mode, tokens)
            if not tried.fits:
                high = tried
                continue
            return tried
        return low

    def _windows(self, tokens: int) -> Iterator[np.ndarray]:
        """Micro-batches as they are cut, of pairs of about one length: the longest pairs, where
        attention holds the most, and those with the most rows, where the head does."""
        last = np.searchsorted(self.ends, self.ends[:-1] + tokens, side="right") - 1
        last = np.minimum(last, np.arange(len(self.sizes)) + self.per_step)
        full = np.flatnonzero(last == len(self.sizes))
        first = int(full[0]) if len(full) else len(self.sizes) - 1
        yield self.order[first:]
        rows = np.array(
            [len(self.pairs[i].chosen) + len(self.pairs[i].rejected) for i in self.order]
        )
        sums = np.concatenate([[0], np.cumsum(rows)])
        held = sums[last] - sums[:-1]
        most = int(held.argmax())
        if held[most] > 1.05 * held[first]:
            yield self.order[most : last[most]]


def refusal(plan: Plan, pairs: Sequence[TokenPair], sizes: np.ndarray) -> str:
    """What to say where ``plan`` does not fit: numbers, and the nearest settings that do."""
    parts = ", ".join(f"{TEXTS[kind]} {gib(size).strip()}" for kind, size in plan.parts.items())
    text = (
        f"the run does not fit: {gib(plan.total).strip()} at the peak with "
        f"max_tokens_per_microbatch {plan.config.max_tokens_per_microbatch} and "
        f"gradient_checkpointing {plan.config.gradient_checkpointing} ({parts}), and "
        f"{plan.memory.name} has {gib(plan.memory.size).strip()}. "
    )
    config, said = plan.config, dict[str, Any]()
    longest = int(sizes.max())
    if config.max_tokens_per_microbatch > longest:
        said["max_tokens_per_microbatch"] = longest
    for remedy in REMEDIES:
        for name, value in remedy.items():
            if getattr(config, name) != value:
                said[name] = value
        try:
            tried = make_plan(dataclasses.replace(config, **said), pairs, sizes, plan.memory)
        except (ValueError, Unknown, TypeError):
            continue  # a combination that there is not
        if tried.fits:
            named = ", ".join(f"{name}: {_shown(value)}" for name, value in said.items())
            left = ""
            if "max_tokens_per_microbatch" in said:
                left = " (0 leaves max_tokens_per_microbatch to the planner)"
            return f"{text}It takes {gib(tried.total).strip()} with {named}{left}."
    return f"{text}Nothing makes it fit: take a smaller model, a shorter max_length, a larger GPU."


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _smaller(plan: Plan) -> str:
    less = []
    if plan.config.max_tokens_per_microbatch > plan.tokens // max(plan.pairs, 1):
        less.append("max_tokens_per_microbatch lower")
    if plan.config.gradient_checkpointing != "full":
        less.append("gradient_checkpointing: full")
    return f"Set {' or '.join(less or ['trainable: lora'])} for less."
