"""What `track` costs a training step: models, pairs, and what is measured on them.

A step is `train_step` and what the records want of it (forward, backward, clipping, AdamW, the one
copy to the host), on packed, prefix-shared pairs. The contenders share one model, one optimizer and
in each turn one batch. Random weights: what is measured does not depend on them. Shapes: P pairs,
G layer groups, k sketch size, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fastpref_kernels import _native
from fastpref_kernels.gram_products import HEAD_ENTRIES, longest_head_gram
from fastpref_kernels.token_blocks import ENTRIES, TokenBlocks

from bench import measure
from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.data.dataset import Dataset
from fastpref.data.loader import StepPlan
from fastpref.data.pack import fed_tokens, pack_pairs, plan_microbatches
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics.taps import attach
from fastpref.heap import keep_freed_memory
from fastpref.loading import prepare
from fastpref.losses import get_loss
from fastpref.model import PairModel
from fastpref.observe import StepView
from fastpref.optim import build_optimizer
from fastpref.step import StepResult, train_step
from fastpref.tapcheck import check_taps
from fastpref.track import RateTracker

MODES = ("none", "head", "sketch", "exact")  # of `track`
SKETCH_DIM = 16
WARM_UP = 2
BATCHES = 4  # different ones, in turn
RATE_PAIRS = 16
Clock = Callable[[Callable[[], object], torch.device], float]


@dataclass(frozen=True)
class Size:
    """A Llama."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def config(self) -> Any:
        """As transformers has it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
        )


TINY = Size("5m", 256, 688, 4, 4, 2, 4096)  # fastpref-tiny
MIDDLE = Size("100m", 768, 2048, 12, 12, 12, 8192)
LLAMA_8B = Size("8b", 4096, 14336, 32, 32, 8, 128256)
DRY = Size("dry", 32, 64, 2, 4, 2, 300)


@dataclass(frozen=True)
class Lengths:
    """Logarithms of lengths in tokens: mean and standard deviation of prompt, chosen, rejected."""

    name: str
    prompt: tuple[float, float]
    chosen: tuple[float, float]
    rejected: tuple[float, float]

    def pairs(self, count: int, vocab: int, seed: int) -> list[TokenPair]:
        """Made up; ids as unequally frequent as those of text."""
        rng = np.random.default_rng(seed)

        def some(mean: float, deviation: float) -> np.ndarray:
            length = int(np.clip(round(np.exp(rng.normal(mean, deviation))), 2, 800))
            return (rng.zipf(1.3, length) % vocab).astype(np.int32)

        pairs = []
        for i in range(count):
            prompt, chosen, rejected = some(*self.prompt), some(*self.chosen), some(*self.rejected)
            rejected[0] = (chosen[0] + 1) % vocab  # they part at once
            made = TokenPair(i, i % 4, "", prompt, chosen, rejected, ())
            pairs.append(replace(made, ref_chosen=-5.0, ref_rejected=-5.0))
        return pairs


# Anthropic's persona statements under fastpref-tiny's tokenizer: an answer is " Yes" and an end.
PERSONA = Lengths("persona", (3.40, 0.31), (0.69, 0.0), (0.69, 0.0))
HH = Lengths("hh", (4.27, 1.05), (3.25, 0.99), (3.46, 1.02))  # HH-RLHF, at 4.2 characters a token
LONG = Lengths("512", (5.545, 0.0), (4.852, 0.0), (4.852, 0.0))  # 256 + 128 + 128 tokens


class Subject:
    """A model, some batches, and a step under every `track`."""

    def __init__(
        self,
        size: Size,
        lengths: Lengths,
        pairs: int,  # a step
        device: torch.device,
        weights_dtype: torch.dtype = torch.float32,
        max_tokens: int = 16384,  # a micro-batch
    ) -> None:
        from transformers import LlamaForCausalLM

        self.name, self.size, self.device = f"{size.name}_{lengths.name}", size, device
        self.config = Config(
            model_name_or_path="bench",
            dataset_name=("bench",),
            learning_rate=1e-6,
            track="exact",
            rate_every=1,
            rate_pairs=RATE_PAIRS,
            sketch_dim=SKETCH_DIM,
            max_tokens_per_microbatch=max_tokens,
        )
        torch.manual_seed(0)
        with torch.device(device):
            module = LlamaForCausalLM(size.config()).to(weights_dtype)
        keep_freed_memory()
        prepare(module)
        products = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.model = PairModel(module, None, device, products, "bench")
        self.taps = {m: attach(module, m, sketch_dim=SKETCH_DIM) for m in ("sketch", "exact")}
        self.optimizer = build_optimizer(module.named_parameters(), self.config)
        self.loss = get_loss("sigmoid")
        self.pairs = lengths.pairs(BATCHES * pairs, size.vocab, seed=1)
        self.steps = [self.pairs[i * pairs : (i + 1) * pairs] for i in range(BATCHES)]
        self.tokens = sum(int(fed_tokens(own).sum()) for own in self.steps) // BATCHES
        self.weight_bytes = sum(p.numel() * p.element_size() for p in module.parameters())

    def micro_batches(self, turn: int) -> list[list[TokenPair]]:
        """The pairs of a step."""
        own = self.steps[turn % BATCHES]
        sizes = fed_tokens(own)
        budget = self.config.max_tokens_per_microbatch
        return [[own[i] for i in x] for x in plan_microbatches(sizes, np.arange(len(own)), budget)]

    def train(self, track: str, turn: int) -> StepResult:
        """The step without what the records want of it."""
        batches = self.micro_batches(turn)
        return train_step(
            self.model,
            (pack_pairs(own).to(self.device) for own in batches),
            self.loss,
            self.config,
            sum(map(len, batches)),
            self.optimizer,
            None if track == "none" else "exact",
            taps=self.taps.get(track),
        )

    def step(self, track: str, turn: int) -> None:
        """A whole step, its columns on the host."""
        result = self.train(track, turn)
        plan = StepPlan(1, 0.0, len(self.steps[0]), 0, [])
        view = StepView(plan, result, 1e-6)
        assert view.columns

    def wrong(self) -> str | None:
        """Why nothing is timed: norms that are not those of plain gradients, or gradients that are
        other bits when they are watched. None where all is well."""
        short = sorted(self.pairs, key=lambda p: fed_tokens([p])[0])[:4]
        for taps in self.taps.values():
            try:
                self.error = check_taps(self.model, taps, short)
            except ValueError as error:
                return str(error)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        found = {track: self._bits(track) for track in MODES}
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate
        other = [track for track in MODES if found[track] != found["none"]]
        return f"gradients are other bits with track {', '.join(other)}" if other else None

    def _bits(self, track: str) -> list[int]:
        """Of every weight's gradient, the sum of its bit patterns as integers."""
        self.train(track, 0)
        kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = []
        for parameter in self.model.trained:
            assert parameter.grad is not None
            bits = parameter.grad.view(kinds[parameter.grad.itemsize])
            sums.append(bits.sum(dtype=torch.int64))
        found: list[int] = torch.stack(sums).tolist()
        return found

    def times(self, repeats: int, clock: Clock) -> dict[str, list[float]]:
        """track -> seconds of a step in each turn."""
        seconds: dict[str, list[float]] = {track: [] for track in MODES}
        for turn, track in measure.interleaved(MODES, repeats + WARM_UP):
            took = clock(lambda: self.step(track, turn), self.device)  # noqa: B023
            if turn >= WARM_UP:
                seconds[track].append(took)
        return seconds

    def rate_times(self, repeats: int, clock: Clock) -> dict[str, list[float]]:
        """track -> seconds in each turn of what rates take beside the step, when they are due."""
        dataset = Dataset(self.pairs, [], list("abcd"), [], [], sizes=fed_tokens, pack=pack_pairs)
        seconds: dict[str, list[float]] = {}
        for track, taps in self.taps.items():
            config = replace(self.config, track=track)
            tracker = RateTracker(config, dataset, self.model, self.loss, taps)
            self.rate_sample = tracker.size
            seconds[track] = []
            for turn in range(repeats):
                before = clock(tracker.before, self.device)
                result = self.train(track, turn)
                after = clock(lambda: tracker.after(result, 1, 1e-6), self.device)  # noqa: B023
                seconds[track].append(before + after)
        return seconds

    def peak_bytes(self, track: str, turn: int = 0) -> int:
        """Bytes of tensors that a step allocates and holds at its peak. Gradients of a step before
        are there when it begins, and count for none."""
        self.step(track, turn)
        return measure.peak_of(lambda: self.step(track, turn), self.device)


def stated_bytes(subject: Subject, track: str, turn: int, plain: int) -> int:
    """Bytes that a step with taps is stated to hold beyond one without, whose peak is ``plain``;
    the formula of docs/taps.md, *Memory*.

    The head's numbers are gone when the backward begins, and count where activations are most of
    the plain step, whose peak lies there. Exact norms work on one layer, where the activations of
    what is behind it are gone.
    """
    if track == "none":
        return 0
    c: Any = subject.model.module.config
    batches = subject.micro_batches(turn)
    largest = max(batches, key=lambda own: int(fed_tokens(own).sum()))
    packed = pack_pairs(largest)
    hidden = max(plain - subject.weight_bytes, 0)  # activations are gone after the backward
    # Where activations are most of the plain step, its peak is where the backward begins.
    begins = hidden > subject.weight_bytes
    head = _head_numbers(packed, c.vocab_size, c.hidden_size) if begins else 0
    taps = subject.taps.get(track)
    if taps is None:
        return 4 * head
    k, groups = SKETCH_DIM, len(taps.groups)
    counts = fed_tokens(largest).tolist()
    tokens, most, step = sum(counts), len(largest), len(subject.steps[0])
    blocks = TokenBlocks.make(counts, torch.device("cpu")).blocks
    slots = max(len(block.lengths) * block.length for block in blocks)
    # In the last block, where activations are still there, k's and v's gradients wait for q's.
    waiting = 2 * tokens * c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    sketches = k * k * groups * (step + most)
    within = head + waiting + sketches
    if _native.library() is None:  # factors of an input, as they are and in dense blocks
        within += 2 * k * (2 * tokens + slots)
    if track == "exact":
        grams = max(len(block.lengths) * block.length**2 for block in blocks)
        head = c.hidden_size // c.num_attention_heads
        heads = head * (c.num_attention_heads + c.num_key_value_heads)
        # The last block's MLP is small; at its attention the final states, in and out of the last
        # norm, the MLP's and the head's exponentials are gone; at another block the activations of
        # those behind it. All of what goes into the narrowed output projection is kept.
        gone = hidden // (4 * (c.num_hidden_layers + 1))
        mlp = (tokens + slots) * max(c.intermediate_size, heads) - gone
        last = tokens * heads + (slots - 2 * tokens) * c.hidden_size
        work = 2 * min(ENTRIES, grams) + (slots + tokens) * c.hidden_size + max(mlp, last)
        read = int(packed.read_spans()[1].sum())
        work -= c.vocab_size * len(packed.segment_id) + 3 * read * c.intermediate_size
        within = max(within, sketches + work)
    return 4 * within


def _head_numbers(batch: PairBatch, vocab: int, dim: int) -> int:
    """What the head's op holds for norms beside E: L^2 products and targets for a pair of L scored
    rows, gradients of a piece of the vocabulary for one of more than pay so; a copy of the rows."""
    rows = torch.bincount(batch.segment_id.long() // batch.group, minlength=batch.num_pairs)
    longest = longest_head_gram(vocab, dim, batch.group, kept=True)
    short = rows[rows <= longest]
    pieces = 3 * batch.group * HEAD_ENTRIES if len(short) < len(rows) else 0
    return int(2 * short.square().sum()) + pieces + len(batch.segment_id) * dim
