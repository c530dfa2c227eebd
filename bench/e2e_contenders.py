"""Who trains in `bench gpu --part e2e`: fastpref, TRL, and TRL's recipe without its trainer.

All of a case share one module, one optimizer with its states, the pairs and their order. The
learning rate is 0, so that every contender sees the same weights in every step, and losses and the
gradient's norm can be compared in each; an AdamW step takes as long as with any other rate.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.e2e_cases import LORA_RANK, MAX_TOKENS, Case, Data
from fastpref import lora
from fastpref.attention_backends import choose_backend
from fastpref.config import Config
from fastpref.data.loader import StepPlan
from fastpref.data.pack import fed_tokens, pack_pairs, plan_microbatches
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics.taps import attach
from fastpref.loading import prepare
from fastpref.losses import get_loss
from fastpref.model import PairModel
from fastpref.observe import StepView
from fastpref.optim import build_optimizer, clip_gradients
from fastpref.refcache import reference_logp
from fastpref.step import train_step

BETA = 0.1
HEAD_ROWS = 4096  # of a tile of the plain head
T = TypeVar("T")
COMPARED = ("loss", "logps/chosen", "logps/rejected", "grad_norm")


@dataclass(frozen=True)
class Step:
    """Seconds of a step, and what it showed under TRL's names."""

    seconds: float
    metrics: dict[str, float]


def settings(case: Case) -> Config:
    """fastpref's, as a user would write them."""
    tuned = case.recipe == "tuned"
    return Config(
        model_name_or_path="bench",
        dataset_name=("bench",),
        dtype="bfloat16",
        weights_dtype="bfloat16" if tuned else "float32",
        master_weights=not tuned,
        trainable=case.trainable,
        lora_r=LORA_RANK,
        beta=BETA,
        max_tokens_per_microbatch=MAX_TOKENS,
        learning_rate=1e-6,
        weight_decay=0.0,
    )


def best_attention(device: torch.device) -> str:
    """TRL's best: flash-attn where it is installed, else torch's kernels."""
    there = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if there else "sdpa"


class Shared:
    """Module, optimizer, adapter: what the contenders of a case train in turn."""

    def __init__(self, case: Case, module: Any, device: torch.device) -> None:
        self.case, self.module, self.device = case, module, device
        self.config = settings(case)
        self.adapter = None
        if case.trainable == "lora":
            lora.check_available()
            self.adapter = lora.attach(module, self.config)
            module.to(device)
        prepare(module)
        model = PairModel(module, None, device, torch.bfloat16, "bench", self.adapter)
        backend, self.not_attention = choose_backend("auto", device, torch.bfloat16, model.lacks)
        self.model = replace(model, attention=backend)
        self.optimizer = build_optimizer(module.named_parameters(), self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        assert self.model.trained  # read before anybody puts other adapters beside ours

    def clear(self) -> None:
        """No gradient lives on to the next contender."""
        self.optimizer.zero_grad(set_to_none=True)

    def finish(self) -> float:
        """The time, once the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def with_reference(
    shared: Shared, other: Any, steps: Sequence[Sequence[TokenPair]]
) -> tuple[list[list[TokenPair]], float]:
    """The pairs with log-probs by ``other`` (None: by the module without its adapter, whose first
    value changes nothing), and seconds that a step's pairs took."""
    model = shared.model
    if other is not None:
        prepare(other)
        model = replace(model, module=other, adapter=None)
    reference_logp(model, steps[0])  # warms up
    began = shared.finish()
    found = reference_logp(model, [pair for own in steps for pair in own])
    seconds = (shared.finish() - began) / len(steps)
    values = iter(found.tolist())
    filled = []
    for own in steps:
        both = [next(values) for _ in own]
        filled.append([replace(p, ref_chosen=c, ref_rejected=r)
                       for p, (c, r) in zip(own, both, strict=True)])  # fmt: skip
    return filled, seconds


def slice_of(steps: Sequence[T], turn: int, count: int) -> list[T]:
    """``count`` steps from number ``turn`` on, round again, and the one before them."""
    return [steps[(turn + i) % len(steps)] for i in range(-1, count)]


class Fastpref:
    """`train_step` and what the records want of it; ``track``: "head", or "sketch"."""

    def __init__(self, shared: Shared, steps: Sequence[Sequence[TokenPair]], track: str) -> None:
        self.name = "ours" if track == "head" else f"ours_{track}"
        self.shared, self.steps, self.loss = shared, steps, get_loss("sigmoid")
        self.max_tokens = shared.config.max_tokens_per_microbatch
        self.taps = None if track == "head" else attach(shared.module, track)
        # Where the head does not learn, its gradients have no norms.
        self.norms = "exact" if shared.case.trainable == "all" else None

    def halve(self) -> str:
        """Smaller micro-batches, after memory was short; says what it is now."""
        self.max_tokens //= 2
        return f"{self.max_tokens} tokens in a micro-batch"

    def run(self, turn: int, count: int) -> list[Step]:
        """``count`` steps from number ``turn`` on, after one more that warms up."""
        prepare(self.shared.module)
        self.shared.module.gradient_checkpointing_disable()
        return [self._step(own) for own in slice_of(self.steps, turn, count)][1:]

    def _step(self, pairs: Sequence[TokenPair]) -> Step:
        shared = self.shared
        began = shared.finish()
        plan = plan_microbatches(fed_tokens(pairs), np.arange(len(pairs)), self.max_tokens)
        result = train_step(
            shared.model,
            (pack_pairs([pairs[i] for i in own]).to(shared.device) for own in plan),
            self.loss,
            shared.config,
            len(pairs),
            shared.optimizer,
            self.norms,
            taps=self.taps,
        )
        view = StepView(StepPlan(1, 0.0, len(pairs), 0, []), result, 0.0)
        assert view.columns
        seconds = shared.finish() - began
        chosen = torch.cat([r.x.chosen for r in result.pairs]).mean()
        rejected = torch.cat([r.x.rejected for r in result.pairs]).mean()
        shown = (result.loss, chosen, rejected, result.grad_norm)
        return Step(seconds, {k: float(v) for k, v in zip(COMPARED, shown, strict=True)})


class Padded:
    """TRL's recipe in plain transformers, without its trainer: chosen and rejected as rows of one
    padded grid, the head on completion tokens in tiles that the backward computes again, and by
    default checkpointing of layers and a forward of the reference in each step."""

    def __init__(
        self, shared: Shared, steps: Sequence[Sequence[TokenPair]], data: Data, other: Any
    ) -> None:
        self.default = shared.case.recipe == "default"
        self.name = f"padded_{shared.case.recipe}"
        self.shared, self.steps, self.other = shared, steps, other
        self.micro = math.gcd(shared.case.trl_micro(data), data.pairs)
        self.attention = best_attention(shared.device) if not self.default else "sdpa"

    def halve(self) -> str:
        """As of `Fastpref`."""
        self.micro = max(1, self.micro // 2)
        return f"{self.micro} pairs in a micro-batch"

    def run(self, turn: int, count: int) -> list[Step]:
        """As of `Fastpref`."""
        plain_again(self.shared.module, self.attention)
        if self.default:
            self.shared.module.gradient_checkpointing_enable({"use_reentrant": False})
            if self.shared.adapter is not None:
                self.shared.module.enable_input_require_grads()
            if self.other is not None:
                plain_again(self.other, self.attention)
                self.other.eval()
        else:
            self.shared.module.gradient_checkpointing_disable()
        return [self._step(own) for own in slice_of(self.steps, turn, count)][1:]

    def _step(self, pairs: Sequence[TokenPair]) -> Step:
        shared = self.shared
        began = shared.finish()
        shared.clear()
        sums = torch.zeros(3, device=shared.device, dtype=torch.float64)
        for i in range(0, len(pairs), self.micro):
            own = pairs[i : i + self.micro]
            grid = [t.to(shared.device) for t in _grid(own)]
            logp = self._logp(shared.module, *grid)
            if self.default:
                reference = self._reference(grid)
            else:
                known = [[p.ref_chosen for p in own], [p.ref_rejected for p in own]]
                reference = torch.tensor(known, device=shared.device).flatten().to(logp.dtype)
            chosen, rejected = (logp - reference).chunk(2)
            loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).sum() / len(pairs)
            loss.backward()
            parts = logp.detach().chunk(2)
            sums += torch.stack([loss.detach(), *(p.sum() / len(pairs) for p in parts)])
        norm, _ = clip_gradients(shared.model.trained, 1.0)
        shared.optimizer.step()
        shown = [*sums.tolist(), float(norm)]
        return Step(shared.finish() - began, dict(zip(COMPARED, shown, strict=True)))

    @torch.no_grad()
    def _reference(self, grid: Sequence[Tensor]) -> Tensor:
        if self.other is not None:
            return self._logp(self.other, *grid)
        with lora.off(self.shared.adapter):
            return self._logp(self.shared.module, *grid)

    def _logp(self, module: Any, ids: Tensor, mask: Tensor, scored: Tensor) -> Tensor:
        with self.shared.model.autocast():
            body = module.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            rows = body.last_hidden_state[:, :-1][scored[:, 1:]]
            target = ids[:, 1:][scored[:, 1:]]
            weight = module.get_output_embeddings().weight
            found = [
                checkpoint(_tile, h, weight, t, use_reentrant=False)
                for h, t in zip(rows.split(HEAD_ROWS), target.split(HEAD_ROWS), strict=True)
            ]
        row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[:, 1:]
        logp = torch.cat(found)
        return logp.new_zeros(len(ids)).index_add(0, row[scored[:, 1:]], logp)


def _tile(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits.float() if logits.itemsize < 4 else logits
    return -torch.nn.functional.cross_entropy(logits, target, reduction="none")


def _grid(pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and scored tokens of the chosen rows, then the rejected ones."""
    sides = [[getattr(p, name) for p in pairs] for name in ("chosen", "rejected")]
    rows = [np.concatenate([p.prompt, c]) for side in sides
            for p, c in zip(pairs, side, strict=True)]  # fmt: skip
    length = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), length), np.int64)
    scored = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        scored[i, len(pairs[i % len(pairs)].prompt) : len(row)] = True
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(scored)


def plain_again(module: Any, attention: str) -> None:
    """As transformers ships it, in training mode, in which dropout is 0 anyway."""
    module.set_attn_implementation(attention)
    module.train()


class Trl:
    """TRL's own `DPOTrainer.train()` over the shared module with the shared optimizer.

    Only what comes before training is left out: tokenisation, and reference log-probs where they
    are known. ``other``: the reference model of its defaults.
    """

    def __init__(
        self, shared: Shared, steps: Sequence[Sequence[TokenPair]], data: Data, other: Any
    ) -> None:
        self.default = shared.case.recipe == "default"
        self.name = f"trl_{shared.case.recipe}"
        self.shared, self.steps, self.other = shared, steps, other
        self.micro = math.gcd(shared.case.trl_micro(data), data.pairs)
        self.attention = best_attention(shared.device) if not self.default else "sdpa"
        self._folder = tempfile.TemporaryDirectory(prefix="fastpref-bench-")
        self.trainer = self._build()

    def halve(self) -> str:
        """As of `Fastpref`."""
        self.micro = max(1, self.micro // 2)
        self.trainer = self._build()
        return f"{self.micro} pairs in a micro-batch"

    def run(self, turn: int, count: int) -> list[Step]:
        """As of `Fastpref`."""
        self.shared.clear()
        plain_again(self.shared.module, self.attention)
        if self.other is not None and self.default:
            plain_again(self.other, self.attention)
            self.other.eval()
        if not self.default:
            self.shared.module.gradient_checkpointing_disable()
        width = len(self.steps[0])
        numbers = slice_of(range(len(self.steps)), turn, count)
        chosen = [n * width + j for n in numbers for j in range(width)]
        self.trainer.train_dataset = self.rows.select(chosen)
        self.stamps.clear()
        self.trainer.train()
        lines = [x for x in self.trainer.state.log_history if "loss" in x]
        seconds = np.diff(self.stamps).tolist()
        return [
            Step(s, {k: float(line[k]) for k in COMPARED})
            for s, line in zip(seconds, lines[1:], strict=True)
        ]

    def _build(self) -> Any:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import DPOConfig, DPOTrainer
        from trl.trainer import dpo_trainer

        rows = {
            "prompt_ids": [p.prompt.tolist() for own in self.steps for p in own],
            "chosen_ids": [p.chosen.tolist() for own in self.steps for p in own],
            "rejected_ids": [p.rejected.tolist() for own in self.steps for p in own],
        }
        if not self.default:
            rows["ref_chosen_logps"] = [p.ref_chosen for own in self.steps for p in own]
            rows["ref_rejected_logps"] = [p.ref_rejected for own in self.steps for p in own]
        self.rows = Dataset.from_dict(rows)
        self.stamps: list[float] = []
        stamps, finish = self.stamps, self.shared.finish

        class Stamp(TrainerCallback):
            def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
                stamps.append(finish())

        class Ready(DPOTrainer):
            """Pairs come as token ids, with their reference log-probs."""

            def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
                return dataset

            def _precompute_ref_logps(self, dataset: Any, *arguments: Any) -> Any:
                return dataset

        tuned: dict[str, Any] = (
            {}
            if self.default
            else {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
        )
        width = len(self.steps[0])
        arguments = DPOConfig(
            output_dir=self._folder.name,
            beta=BETA,
            max_length=None,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            num_train_epochs=1,
            per_device_train_batch_size=self.micro,
            gradient_accumulation_steps=width // self.micro,
            train_sampling_strategy="sequential",
            use_cpu=self.shared.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            **tuned,
        )
        model = self.shared.adapter if self.shared.adapter is not None else self.shared.module
        with _replaced(dpo_trainer, "hash_module", lambda module: ""):
            trainer = Ready(
                model,
                ref_model=self.other if self.default else None,
                args=arguments,
                train_dataset=self.rows,
                processing_class=_tokenizer(),
                optimizers=(self.shared.optimizer, None),
                callbacks=[Stamp()],
            )
        trainer.remove_callback(PrinterCallback)
        return trainer


@contextlib.contextmanager
def _replaced(place: Any, name: str, value: Callable[..., Any]) -> Any:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def _tokenizer() -> Any:
    """One that nobody asks for more than its padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
