"""Which behavior's pairs move which probes: gradients of probes against gradients of a step.

Before the step: the gradient of every probe's log-prob at theta_t, by its sketch, averaged over the
probes of a behavior and response type (a *cell*). In the step: sketches of the gradients of its
pairs' losses, which the taps see. Their inner products say, to first order, what the pairs of each
behavior do to each cell under plain gradient descent; the sketch of what happened to the weights
says what the optimizer did to it. This is the eNTK term of Ren & Sutherland, <grad log pi(y_o |
x_o), grad L(x_u, y_u)>, summed over the whole network and averaged over groups, at the cost of a
forward and a backward over the probes. No weight, gradient or random number of the run changes.

Shapes: C cells, K behaviors of the run, G layer groups, k sketch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref import dist
from fastpref.data.branches import Probe
from fastpref.data.pack import pack_pairs, plan_microbatches
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics.influence import Moved, influence_rows
from fastpref.dynamics.taps import Taps
from fastpref.gradients import pair_gradients
from fastpref.model import PairModel
from fastpref.step import StepResult

_NOTHING = np.empty(0, np.int32)


class Influence:
    """Measures around the steps that are due. Every rank makes one, and calls it alike."""

    def __init__(
        self,
        probes: Sequence[Probe],
        behaviors: Sequence[str],
        model: PairModel,
        taps: Taps,
        max_tokens: int,
    ) -> None:
        self.model, self.taps, self.behaviors = model, taps, behaviors
        places = [(probe.behavior, probe.response_type) for probe in probes]
        self.cells = sorted(set(places))
        self.cell_of = np.array([self.cells.index(place) for place in places], np.int64)
        # A response by itself: with others in the backward, a prompt's gradients would be of all.
        pairs = [
            TokenPair(p.probe_id, int(c), "", p.prompt, p.response, _NOTHING, ())
            for p, c in zip(probes, self.cell_of, strict=True)
        ]
        fed = np.array([len(p.prompt) + len(p.response) - 1 for p in probes], np.int64)
        plan = plan_microbatches(fed, np.arange(len(pairs)), max_tokens)
        self.batches = [[pairs[i] for i in own] for own in plan[dist.rank() :: dist.world_size()]]
        self._sketch: Tensor | None = None  # (G, k, k) of the weights before the step
        self._probes: tuple[Tensor, Tensor] | None = None  # sums over cells: sketch; count, logp

    def before(self) -> None:
        """Just before the step."""
        groups, k, device = len(self.taps.groups), self.taps.sketch_dim, self.model.device
        cells = len(self.cells)
        sketch = torch.zeros(groups, cells, k, k, dtype=torch.float64, device=device)
        numbers = torch.zeros(2, cells, dtype=torch.float64, device=device)
        for own in self.batches:
            batch = pack_pairs(own).to(device)
            found = pair_gradients(self.model, self.taps, batch, of="chosen")
            assert found.logp_chosen is not None
            sketch.index_add_(1, batch.behavior, found.sketch.double())
            logp = found.logp_chosen.double()
            numbers.index_add_(1, batch.behavior, torch.stack([torch.ones_like(logp), logp]))
        self._probes = dist.all_reduce_sum(sketch), dist.all_reduce_sum(numbers)
        self._sketch = self.taps.weight_sketch()

    def after(self, result: StepResult, num_pairs: int) -> Moved:
        """Just after the step, before anything else changes the weights: what it did to the cells;
        ``num_pairs`` as in `train_step`."""
        assert self._probes is not None and self._sketch is not None, "before() comes first"
        update = self.taps.weight_sketch() - self._sketch
        cells, (count, logp) = self._probes
        behaviors = len(self.behaviors)
        step = torch.zeros(
            (cells.shape[0], behaviors, *cells.shape[2:]), dtype=torch.float64, device=cells.device
        )
        pairs = torch.zeros(behaviors, dtype=torch.float64, device=cells.device)
        for own in result.pairs:
            assert own.gradients is not None, "the step ran without taps"
            step.index_add_(1, own.batch.behavior, own.gradients.sketch.double())
            pairs += torch.bincount(own.batch.behavior, minlength=behaviors)
        step, pairs = dist.all_reduce_sum(step), dist.all_reduce_sum(pairs)
        self._probes = self._sketch = None
        return Moved(
            (cells / count[:, None, None]).cpu().numpy(),
            count.cpu().numpy().astype(np.int64),
            (logp / count).cpu().numpy(),
            (-step / num_pairs).cpu().numpy(),
            pairs.cpu().numpy() > 0,
            update.cpu().numpy(),
        )

    def rows(self, moved: Moved, logp: np.ndarray) -> list[Mapping[str, Any]]:
        """Rows of the `influence` table; ``logp`` (N,) of the probes after the step."""
        count = np.bincount(self.cell_of, minlength=len(self.cells))
        after = np.bincount(self.cell_of, logp, len(self.cells)) / count
        names = [(self.behaviors[k] if k >= 0 else None, kind) for k, kind in self.cells]
        return influence_rows(moved, after, names, self.behaviors)
