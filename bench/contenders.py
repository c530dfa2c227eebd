"""Trainers that are compared: each runs slices of a fixed list of batches with its own, whole loop.

A slice's time per step is the wall time from the end of one step to the end of the next, inside the
trainer's own loop: fetching and collating the batch, forward, loss, backward, clipping, optimizer,
schedule, metrics, and in fastpref's case the records, whose gradient norms (`track: head`) TRL has
not. The first step of a slice warms up and is not timed. Nobody logs, saves, evaluates or draws a
progress bar within the timed steps.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bench.flops import Shape, Work, add_up
from fastpref.attention_dense import build_dense
from fastpref.best import Best
from fastpref.config import Config
from fastpref.data.dataset import Dataset
from fastpref.data.formats import Pair
from fastpref.data.loader import Loader, StepPlan
from fastpref.data.pack import (
    Packer,
    fed_tokens,
    pack_pairs,
    parts,
    plan_microbatches,
    scored_rows,
)
from fastpref.data.tokenize import TokenPair, tokenize_pairs
from fastpref.dynamics.recorder import read_jsonl
from fastpref.features import with_features
from fastpref.flops import Shape as Useful
from fastpref.head import freeze_body
from fastpref.loading import load_model
from fastpref.loop import run_loop
from fastpref.losses import get_loss
from fastpref.observe import Window
from fastpref.optim import build_optimizer
from fastpref.refcache import PLAN_TOKENS, reference_logp
from fastpref.schedule import Schedule
from fastpref.state import State

COMPARED = ("loss", "logps/chosen", "logps/rejected", "num_tokens")


@dataclass(frozen=True)
class Job:
    """What all contenders train: pairs in this order, ``batch`` a step, and the model's folder."""

    pairs: Sequence[Pair]
    batch: int
    model: str
    scratch: Path
    learning_rate: float = 1e-4
    beta: float = 0.1
    max_length: int = 1024
    append_eos: str = "auto"

    @property
    def batches(self) -> int:
        """Whole batches in ``pairs``."""
        return len(self.pairs) // self.batch

    def span(self, first: int, steps: int) -> range:
        """Indices of the pairs of ``steps`` batches from number ``first`` on, from the start again
        where the end is reached."""
        first %= self.batches - steps + 1
        return range(first * self.batch, (first + steps) * self.batch)


@dataclass(frozen=True)
class Slice:
    """``seconds`` of each timed step; on request ``metrics`` of all, under TRL's names."""

    seconds: list[float]
    metrics: list[dict[str, float]]


class Contender(Protocol):
    """A trainer that keeps its weights and optimizer from slice to slice."""

    name: str
    shape: Shape

    def run(self, first: int, steps: int, observe: bool = False) -> Slice:
        """Train on ``steps`` batches from number ``first`` on; `observe`: log every step."""
        ...

    def work(self, first: int, steps: int) -> list[Work]:
        """The arithmetic of those steps, one by one."""
        ...


class _TimedLoader(Loader):
    """Stamps the end of every step, which is where the loop asks for the next one's plan.

    It ends before the loop's last step: the checkpoint that follows that one is not a step's time.
    """

    stamps: list[float]

    def plan(self, first_step: int, last_step: int) -> Iterator[StepPlan]:
        self.stamps = []
        for plan in super().plan(first_step, last_step - 1):
            yield plan
            self.stamps.append(time.perf_counter())


class Fastpref:
    """`fastpref.train`'s loop with its defaults: records and head norms on; references in hand.

    ``trainable`` as in the configuration; "head" with its hidden states in hand, or, ``body=True``,
    with a frozen body that computes them in every step, which is what they must agree with.
    """

    name = "fastpref"

    def __init__(
        self, job: Job, *, name: str = name, trainable: str = "all", body: bool = False
    ) -> None:
        self.job, self.name = job, name
        self.config = Config(
            model_name_or_path=job.model,
            device="cpu",
            dtype="float32",
            dataset_name=("bench",),
            eval_steps=0,
            max_length=job.max_length,
            output_dir=str(job.scratch / name),
            trainable=trainable,
            append_eos=job.append_eos,
            beta=job.beta,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            train_batch_size=job.batch,
            shuffle=False,
        )
        self.model = load_model(self.config)
        self.shape = Shape.of(self.model.module.config)
        tokenized = tokenize_pairs(
            job.pairs,
            self.model.tokenizer,
            max_length=job.max_length,
            append_eos=job.append_eos,
        )
        assert tokenized.sources == list(range(len(job.pairs)))
        self.behaviors = tokenized.behaviors
        head = trainable == "head"
        self.sizes = scored_rows if head else fed_tokens
        self.pack: Packer = pack_pairs
        if head:
            self.model = freeze_body(self.model)
        if head and not body:
            folder = str(job.scratch / f"{name}-features")
            features = with_features(self.model, tokenized.pairs, cache_dir=folder, progress=False)
            self.pack = features.pack
        self.computes_body = not head or body
        reference = reference_logp(self.model, tokenized.pairs, pack=self.pack).tolist()
        self.tokens = [
            dataclasses.replace(pair, ref_chosen=chosen, ref_rejected=rejected)
            for pair, (chosen, rejected) in zip(tokenized.pairs, reference, strict=True)
        ]
        optimizer = build_optimizer(self.model.module.named_parameters(), self.config)
        scheduler = Schedule(optimizer, self.config, 10**6)
        window, best = Window(), Best(self.config)
        self.state = State(self.model, optimizer, scheduler, window, best, key="")
        if head:
            self.state.head_start = self.model.head.weight.detach().clone()

    def run(self, first: int, steps: int, observe: bool = False) -> Slice:
        """See `Contender`."""
        pairs = self._pairs(first, steps)
        config = dataclasses.replace(self.config, logging_steps=1) if observe else self.config
        dataset = Dataset(pairs, [], self.behaviors, [], [], sizes=self.sizes, pack=self.pack)
        loader = self._loader(pairs)
        self.state.step = 0
        run = Path(self.config.output_dir)
        run_loop(config, get_loss("sigmoid"), dataset, loader, self.state, steps + 1, False)
        metrics = read_jsonl(run / "metrics.jsonl") if observe else []
        shutil.rmtree(run)
        return Slice(np.diff(loader.stamps).tolist(), metrics)

    def reference_seconds(self, first: int, steps: int) -> float:
        """Wall time of the reference pass over those batches, per step."""
        pairs = self._pairs(first, steps)
        began = time.perf_counter()
        reference_logp(self.model, pairs)
        return (time.perf_counter() - began) / steps

    def work(self, first: int, steps: int) -> list[Work]:
        """See `Contender`."""
        pairs = self._pairs(first, steps)
        return [
            self._sum([pairs[i] for i in own] for own in plan.micro_batches)
            for plan in self._loader(pairs).plan(1, steps + 1)  # it leaves out the last one
        ]

    def reference_work(self, first: int, steps: int) -> Work:
        """The arithmetic of the reference pass over those batches, all together."""
        pairs = self._pairs(first, steps)
        fed = np.array([parts(pair).fed for pair in pairs], np.int64)
        plan = plan_microbatches(fed, np.arange(len(pairs)), PLAN_TOKENS)
        whole = self._sum([pairs[i] for i in own] for own in plan)
        return dataclasses.replace(whole, gram=0, forwards=1, backwards=0, head_products=1)

    def ideal(self, first: int, steps: int) -> list[float]:
        """Operations of those steps with nothing padded, masked or recorded."""
        shape, found = Useful.of(self.model.module), []
        for step in range(first, first + steps):
            batch = pack_pairs(self._pairs(step, 1))
            found.append(shape.step(batch.lengths, batch.rows.numel(), batch.unread))
        return found

    def _pairs(self, first: int, steps: int) -> list[TokenPair]:
        return [self.tokens[i] for i in self.job.span(first, steps)]

    def _loader(self, pairs: Sequence[TokenPair]) -> _TimedLoader:
        budget = self.config.max_tokens_per_microbatch
        return _TimedLoader(
            pairs,
            seed=0,
            batch_size=self.job.batch,
            max_tokens=budget,
            sizes=self.sizes(pairs),
            shuffle=False,
        )

    def _sum(self, micro_batches: Any) -> Work:
        tokens = scores = rows = gram = unread = 0
        for batch in map(pack_pairs, micro_batches):
            layout = build_dense(batch.lengths, "cpu")
            tokens += batch.num_tokens
            scores += sum(block.pairs * block.length**2 for block in layout.blocks)
            rows += batch.rows.numel()
            gram += int(torch.bincount(batch.segment_id // 3).square().sum())
            unread += batch.unread
        if self.computes_body:
            return Work(tokens, scores, rows, gram, 1, 1, 0, head_products=3, unread=unread)
        return Work(0, 0, rows, gram, 0, 0, 0, head_products=2)


class Trl:
    """TRL's DPOTrainer, `trainer.train()` itself once per slice, weights and optimizer kept.

    ``tuned``: reference log-probs precomputed and no gradient checkpointing; otherwise both as TRL
    sets them. float32 in both, where TRL would by default compute in bfloat16. A forward takes all
    pairs of a step, or ``micro`` of them, and gradients accumulate: the fewer in a forward, the
    less of its grid is padding.
    """

    def __init__(self, job: Job, *, tuned: bool, micro: int | None = None) -> None:
        from datasets import Dataset as Rows
        from transformers import PrinterCallback, TrainerCallback
        from trl import DPOConfig, DPOTrainer

        kind = "default" if not tuned else "tuned" if micro is None else "micro"
        self.name, self.job, self.tuned = f"trl_{kind}", job, tuned
        micro = math.gcd(micro or job.batch, job.batch)  # a step is whole micro-batches
        changed: dict[str, Any] = (
            {"gradient_checkpointing": False, "precompute_ref_log_probs": True} if tuned else {}
        )
        arguments = DPOConfig(
            output_dir=str(job.scratch / self.name),
            beta=job.beta,
            max_length=job.max_length,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            num_train_epochs=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=job.batch // micro,
            train_sampling_strategy="sequential",
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **changed,
        )
        rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in job.pairs]
        stamps: list[float] = []

        class Stamp(TrainerCallback):
            def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
                stamps.append(time.perf_counter())

        self.trainer = DPOTrainer(
            job.model, args=arguments, train_dataset=Rows.from_list(rows), callbacks=[Stamp()]
        )
        self.trainer.remove_callback(PrinterCallback)
        self.stamps, self.rows = stamps, self.trainer.train_dataset
        assert len(self.rows) == len(job.pairs), "TRL dropped pairs"
        self.shape = Shape.of(self.trainer.model.config)

    def run(self, first: int, steps: int, observe: bool = False) -> Slice:
        """See `Contender`."""
        self._choose(first, steps)
        self.trainer.args.logging_steps = 1 if observe else 10**6
        self.stamps.clear()
        self.trainer.train()
        lines = [line for line in self.trainer.state.log_history if "loss" in line]
        return Slice(np.diff(self.stamps).tolist(), lines if observe else [])

    def work(self, first: int, steps: int) -> list[Work]:
        """See `Contender`."""
        self._choose(first, steps)
        micro = [self._work_of(batch) for batch in self.trainer.get_train_dataloader()]
        count = self.trainer.args.gradient_accumulation_steps
        return [add_up(micro[i : i + count]) for i in range(0, len(micro), count)]

    def _work_of(self, batch: Any) -> Work:
        count, length = batch["input_ids"].shape
        # On the CPU TRL scores every position but the last, prompt and padding included.
        grid = (count * length, count * length**2, count * (length - 1), 0)
        # Checkpointing repeats the forward of every layer, the reference model adds one more.
        # The head's backward makes the logits again: 1 + 3 products, and 1 for the reference.
        return Work(*grid, 1, 1, 0, 4) if self.tuned else Work(*grid, 2, 1, 1, 5)

    def _choose(self, first: int, steps: int) -> None:
        span = self.job.span(first, steps)
        self.trainer.train_dataset = self.rows.select(span)


def disagreement(contenders: Sequence[Contender], steps: int, within: float) -> str | None:
    """Train all on the same first batches; what differs by more than ``within``, None if nothing.

    Losses are compared as they are, sums of log-probs relative to their size, token counts exactly.
    The loss of the first step is ln 2 for whoever has policy = reference, so that one alone would
    show little.
    """
    found = {c.name: c.run(0, steps, observe=True).metrics for c in contenders}
    first = contenders[0].name
    for name, lines in found.items():
        if len(lines) != steps:
            return f"{name} logged {len(lines)} of {steps} steps"
        for step, (ours, theirs) in enumerate(zip(found[first], lines, strict=True)):
            for key in COMPARED:
                a, b = ours[key], theirs[key]
                limit = 0.0 if key == "num_tokens" else within * max(1.0, abs(b))
                if not abs(a - b) <= limit:
                    return f"step {step}: {key} is {a!r} in {first} and {b!r} in {name}"
    return None
