"""Probes while a run runs: what the model thinks of fixed responses, every `probe_every` steps.

The table is scored in packed batches, a prompt once for all its responses, by forwards whose head
never stores logits: memory is that of a micro-batch of training, without its gradients. Batches are
dealt out over the ranks, and their plan depends on the table alone: the same weights give the same
bits on any number of ranks. Nothing here changes a weight or draws a random number.

The first evaluation is of the model as training begins (step 0), also in a resumed run, which
computes it again: what the argmax was then, `argmax_changed` is counted against.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastpref import dist
from fastpref.config import Config
from fastpref.data.branches import Probe, pack_probes, plan_probes
from fastpref.dynamics.influence import Moved
from fastpref.dynamics.probes import (
    METRICS,
    POSITION_STATS,
    VALUES,
    Levels,
    changed_fraction,
    levels,
    response_values,
    squeezes,
    type_means,
)
from fastpref.dynamics.recorder import Recorder
from fastpref.dynamics.schema import PROBES
from fastpref.dynamics.taps import Taps
from fastpref.influence import Influence
from fastpref.journal import Journal
from fastpref.model import PairModel
from fastpref.step import StepResult

log = logging.getLogger(__name__)

_HEAD_STATS = (*POSITION_STATS[1:], "argmax")


class Probing:
    """The probes of a run. Every rank makes one, and calls it alike.

    ``vocab``: entries of the model's output. Raises ValueError for a token id beyond them, and for
    a probe larger than `max_tokens_per_microbatch`.
    """

    def __init__(
        self, config: Config, probes: Sequence[Probe], behaviors: Sequence[str], vocab: int
    ) -> None:
        self.every, self.probes, self.behaviors = config.probe_every, list(probes), behaviors
        self.vocab = vocab
        self._demand_vocabulary()
        plan = plan_probes(self.probes, config.max_tokens_per_microbatch)
        self.batches = plan[dist.rank() :: dist.world_size()]
        self.scored = np.array([probe.scored for probe in self.probes], np.int64)
        self.types = np.array([probe.response_type for probe in self.probes])
        self._behavior = np.array([probe.behavior for probe in self.probes], np.int64)
        self._initial: dict[str, np.ndarray] = {}  # of step 0
        self._levels: dict[str, Levels] = {}  # at the last evaluation
        self._alarms: dict[str, int] = {}  # behavior -> evaluations at which it was squeezed
        self._influence: Influence | None = None
        self._moved: Moved | None = None  # by the step under way
        self._budget = config.max_tokens_per_microbatch

    def due(self, step: int) -> bool:
        """Whether the probes are scored after ``step``, were it not the last."""
        return step % self.every == 0

    def watch(self, model: PairModel, taps: Taps) -> None:
        """Measure from now on how the steps that are due move the probes (`probe_influence`)."""
        self._influence = Influence(self.probes, self.behaviors, model, taps, self._budget)

    def measures(self, step: int) -> bool:
        """Whether influence is measured around ``step``, which then needs taps."""
        return self._influence is not None and self.due(step)

    def before(self) -> None:
        """Just before a step that `measures`."""
        assert self._influence
        self._influence.before()

    def after(self, step: int, result: StepResult, num_pairs: int) -> None:
        """After ``step``, before anything else changes the weights; `run` comes next."""
        if self._influence and self.measures(step):
            self._moved = self._influence.after(result, num_pairs)

    def begin(self, model: PairModel) -> None:
        """Score the model as training begins; before a checkpoint is restored."""
        self._initial = self.score(model)
        log.info(
            "probes: %d responses of %d types, %d positions",
            *(len(self.probes), len(set(self.types.tolist())), int(self.scored.sum())),
        )

    @torch.no_grad()
    def score(self, model: PairModel) -> dict[str, np.ndarray]:
        """VALUES of `fastpref.dynamics.probes`, (N,) float64 each, and `argmax` (R,) int64."""
        values, argmax = [], []
        starts = np.cumsum(self.scored) - self.scored
        for groups in self.batches:
            own = np.array([i for group in groups for i in group], np.int64)
            batch = pack_probes([[self.probes[i] for i in group] for group in groups])
            found = model.row_logp(batch.to(model.device), _HEAD_STATS)
            positions = torch.stack([getattr(found, name) for name in POSITION_STATS])
            host = positions.cpu().numpy()
            values.append(np.vstack([own, response_values(host, self.scored[own], self.vocab)]).T)
            assert found.argmax is not None
            count = self.scored[own]
            before = np.repeat(np.cumsum(count) - count, count)
            place = np.repeat(starts[own], count) + np.arange(count.sum()) - before
            argmax.append(np.stack([place, found.argmax.cpu().numpy()], axis=1))
        table = _of_all_ranks(values, 1 + len(VALUES), np.float64, model.device)
        tokens = _of_all_ranks(argmax, 2, np.int64, model.device)
        order = np.argsort(table[:, 0])
        columns = dict(zip(VALUES, table[order, 1:].T, strict=True))
        return {**columns, "argmax": tokens[np.argsort(tokens[:, 0]), 1]}

    def run(
        self,
        model: PairModel,
        step: int,
        epoch: float,
        journal: Journal,
        recorder: Recorder | None,
    ) -> None:
        """Score after ``step``: a line of metrics, one of clocks, records; a warning where a
        behavior is squeezed for the first time. Step 0 is what `begin` found."""
        began = time.perf_counter()
        found = self._initial if step == 0 else self.score(model)
        seconds = time.perf_counter() - began
        argmax = found["argmax"]
        values = {name: found[name] for name in VALUES}
        values["argmax_changed"] = changed_fraction(argmax, self._initial["argmax"], self.scored)
        line: dict[str, object] = {
            f"{kind}/{name}": means[name]
            for kind, means in type_means(values, self.types).items()
            for name in METRICS
        }
        line |= self._squeezing(step, values, recorder)
        journal.metrics({"step": step, "epoch": epoch, "split": PROBES, **line})
        if step:
            clocks = {"probe_runtime": seconds, "probes_per_second": len(self.probes) / seconds}
            journal.perf({"step": step, **clocks})
        if recorder:
            recorder.rows("probes", step, self._rows(values, argmax))
        if recorder and self._influence and self._moved:
            rows = self._influence.rows(self._moved, values["logp"])
            recorder.rows("influence", step, rows)
        self._moved = None

    def index_rows(self, tokenizer: Any) -> list[dict[str, object]]:
        """Rows of the `probe_index` table."""
        return [
            {
                "probe_id": probe.probe_id,
                "prompt_id": probe.prompt_id,
                "id": probe.id,
                "file": probe.source,
                "line": probe.line if probe.source else None,
                "behavior": self._name(probe),
                "response_type": probe.response_type,
                "prompt_len": len(probe.prompt),
                "response": probe.response,
                "text": tokenizer.decode(probe.response.tolist()),
            }
            for probe in self.probes
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        own = {k: [v.chosen, v.rejected, v.argmax] for k, v in self._levels.items()}
        return {"levels": own, "alarms": dict(self._alarms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._levels = {name: Levels(*own) for name, own in state["levels"].items()}
        self._alarms = dict(state["alarms"])

    def _squeezing(
        self, step: int, values: Mapping[str, np.ndarray], recorder: Recorder | None
    ) -> dict[str, object]:
        """The part of the line of metrics that tells of squeezing; nothing at the first one."""
        now = levels(
            values["logp"], values["argmax_logp"], self.types, self._behavior, self.behaviors
        )
        changes = squeezes(self._levels, now)
        self._levels = now
        for change in changes:
            if change.alarm and change.behavior not in self._alarms:
                log.warning(
                    "squeezing at step %d, behavior %s: mean log-prob of chosen %+.3g and of "
                    "rejected %+.3g nats since the last probes, of the likeliest tokens %+.3g "
                    "(docs/probes.md); counted from here on",
                    *(step, change.behavior, change.chosen, change.rejected, change.argmax),
                )
            if change.alarm:
                self._alarms[change.behavior] = self._alarms.get(change.behavior, 0) + 1
        if recorder and changes:
            rows = [
                {
                    "behavior": c.behavior,
                    "chosen": c.chosen,
                    "rejected": c.rejected,
                    "argmax": c.argmax,
                    "alarm": c.alarm,
                }
                for c in changes
            ]
            recorder.rows("squeezing", step, rows)
        if not changes:
            return {}
        line: dict[str, object] = {
            "squeezing": sum(change.alarm for change in changes),
            "squeezing_total": sum(self._alarms.values()),
        }
        return line | {f"behavior/{c.behavior}/squeezing": int(c.alarm) for c in changes}

    def _rows(
        self, values: Mapping[str, np.ndarray], argmax: np.ndarray
    ) -> list[dict[str, object]]:
        tokens = np.split(argmax, np.cumsum(self.scored)[:-1])
        return [
            {
                "probe_id": probe.probe_id,
                "prompt_id": probe.prompt_id,
                "behavior": self._name(probe),
                "response_type": probe.response_type,
                "tokens": probe.scored,
                "argmax_id": tokens[i],
                **{name: column[i] for name, column in values.items()},
            }
            for i, probe in enumerate(self.probes)
        ]

    def _name(self, probe: Probe) -> str | None:
        return self.behaviors[probe.behavior] if probe.behavior >= 0 else None

    def _demand_vocabulary(self) -> None:
        for probe in self.probes:
            top = max(int(ids.max(initial=0)) for ids in (probe.prompt, probe.response))
            if top >= self.vocab:
                raise ValueError(
                    f"probe {probe.id or probe.probe_id} ({probe.response_type}) holds token id "
                    f"{top}, but the model has {self.vocab} outputs: the tokenizer is not its own."
                )


def _of_all_ranks(
    parts: Sequence[np.ndarray], width: int, dtype: type, device: torch.device
) -> np.ndarray:
    """(n, width) rows of all ranks, from this rank's parts."""
    own = np.concatenate([np.empty((0, width), dtype), *parts])
    if dist.world_size() == 1:
        return own
    return torch.cat(dist.all_gather_rows(torch.from_numpy(own).to(device))).cpu().numpy()
