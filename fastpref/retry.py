"""A step that ran out of memory is tried once more, with half the tokens per micro-batch.

Results do not depend on how a step is cut, beyond rounding, and nothing of the step has happened
yet: the weights are moved after the last backward. So the gradients are dropped, random generators
are put back where they were, and the step's pairs are cut again. The smaller budget stays: what did
not fit once would not fit again, and a failure costs a step's time.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import numpy as np
import torch

from fastpref import dist
from fastpref.data.loader import Loader, StepPlan
from fastpref.data.pack import plan_microbatches
from fastpref.errors import OutOfMemory
from fastpref.step import StepResult

log = logging.getLogger(__name__)

REMEDY = (
    "Set gradient_checkpointing: full, weights_dtype: bfloat16, optim: adamw_8bit or trainable: "
    "lora for less; fastpref plan says what each takes."
)


class TokenBudget:
    """`max_tokens_per_microbatch` as it stands in a run, and how often it was halved."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.retries = 0

    def run(
        self,
        attempt: Callable[[StepPlan], StepResult],
        plan: StepPlan,
        undo: Callable[[], None],  # what an attempt did beside the model's gradients
    ) -> StepResult:
        """``attempt(plan)``; where that raises OutOfMemory, once more with smaller micro-batches.

        ValueError, with numbers and what to set, where that does not fit either.
        """
        try:
            return attempt(plan)
        except OutOfMemory as error:
            reason = str(error)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"step {plan.step}: out of memory where a step cannot be tried again, in the "
                "optimizer or, with several ranks, among losses that tie them together (aot, sft, "
                f"cpo, load balancing): {error} {REMEDY} Or set max_tokens_per_microbatch lower."
            ) from error
        plan = self.smaller(plan, reason)
        undo()
        try:
            return attempt(plan)
        except OutOfMemory as error:
            reason = str(error)
        held = max((int(self.loader.sizes[own].sum()) for own in plan.micro_batches), default=0)
        raise ValueError(
            f"step {plan.step}: out of memory again, with micro-batches of at most {held} tokens, "
            f"half of what did not fit before: {reason} Set max_tokens_per_microbatch to "
            f"{max(held // 2, 1)} or less. {REMEDY}"
        )

    def smaller(self, plan: StepPlan, reason: str) -> StepPlan:
        """``plan`` with micro-batches of half the tokens, as those of later steps are; every rank
        calls it. ValueError where a pair alone does not fit."""
        sizes = self.loader.sizes
        own = np.concatenate([np.empty(0, np.int64), *plan.micro_batches])
        held = max((int(sizes[batch].sum()) for batch in plan.micro_batches), default=0)
        longest = int(sizes[own].max(initial=0))
        largest, least = (self._over_ranks(n) for n in (held, longest))
        tokens = max(largest // 2, least)
        if tokens >= largest:
            raise ValueError(
                f"step {plan.step}: out of memory with a micro-batch of a single pair of {least} "
                f"tokens, which cannot be cut: {reason} Set max_length lower. {REMEDY}"
            )
        self.set(max(tokens, int(sizes.max())))
        self.retries += 1
        log.warning(
            "step %d: out of memory with a micro-batch of %d tokens; tried again with %d, and "
            "max_tokens_per_microbatch stays at %d (retry %d of this run): %s",
            plan.step, largest, tokens, self.loader.max_tokens, self.retries, reason,
        )  # fmt: skip
        return dataclasses.replace(plan, micro_batches=plan_microbatches(sizes, own, tokens))

    def set(self, tokens: int) -> None:
        """Of the steps to come."""
        self.loader.max_tokens = tokens

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps; empty where nothing was halved."""
        if not self.retries:
            return {}
        return {"tokens": self.loader.max_tokens, "retries": self.retries}

    def load_state_dict(self, saved: dict[str, int]) -> None:
        """Go on as saved: the same cuts give the same bits."""
        if saved:
            self.set(saved["tokens"])
            self.retries = saved["retries"]

    def _over_ranks(self, number: int) -> int:
        parts = dist.all_gather(torch.tensor(number, device=self.device))
        return max(int(part) for part in parts)
