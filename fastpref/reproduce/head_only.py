"""What a run of `trainable: head` has before it: the very states, pairs and head of its steps.

The theory's pairs are made from the states that the trainer reads, so that prediction and run
differ by nothing but how they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastpref.batch import GROUP
from fastpref.config import Config
from fastpref.data.dataset import Dataset, load_dataset, sample_pairs
from fastpref.data.pack import demand_vocabulary
from fastpref.data.tokenize import TokenPair
from fastpref.features import with_states
from fastpref.frozen import first_tokens, prefix_features
from fastpref.head import freeze_body
from fastpref.model import PairModel, load_model, resolve_device
from fastpref.refmodel import find_reference
from fastpref.reproduce.runs import run_config
from fastpref.reproduce.settings import Official, Settings
from fastpref.selfcheck import check_model
from fastpref.theory.distinguish import behavior_statistics
from fastpref.theory.pairs import FrozenPairs, frozen_pairs

# A head-only run in the theory's setting. Nothing stands between a step and plain SGD.
PLAIN: dict[str, Any] = {
    "append_eos": "false",  # " Yes" and " No" are one token
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
}
EVERYONE = 10**9  # pairs of a batch, or of a behavior in an evaluation: all there are
SAMPLED = 100  # pairs of a behavior whose delta only decides which behaviors are taken


@dataclass(frozen=True)
class HeadOnly:
    """A frozen body's data: batches of `dataset` bring their states and reference log-probs."""

    config: Config
    model: PairModel
    dataset: Dataset

    def pairs(self, pairs: Sequence[TokenPair]) -> FrozenPairs:
        """These pairs with the states that the trainer reads them off.

        The feature is the state that predicts the first token in which the answers differ, times
        the model's logit scale. Raises ValueError, naming file and line, for answers that go on
        behind that token, and for states that are not finite.
        """
        batch = self.dataset.pack(pairs)
        assert batch.hidden is not None
        segment = batch.segment_id.numpy()
        rows = np.bincount(segment, minlength=GROUP * len(pairs)).reshape(-1, GROUP)
        several = np.flatnonzero((rows[:, 1:] != 1).any(axis=1))
        if several.size:
            self._refuse_answers(pairs[several[0]], several.size, len(pairs))
        own = np.searchsorted(segment, GROUP * np.arange(len(pairs)))  # first row of each pair
        chosen, rejected = own + rows[:, 0], own + rows[:, 0] + 1
        state = batch.rows[torch.from_numpy(chosen)]
        assert torch.equal(state, batch.rows[torch.from_numpy(rejected)])
        target = batch.target.numpy()
        kept, behavior = np.unique([pair.behavior for pair in pairs], return_inverse=True)
        return frozen_pairs(
            batch.hidden[state].double().numpy() * self.model.head.logit_scale,
            *(target[chosen], target[rejected], behavior),
            [self.dataset.behaviors[k] for k in kept],
        )

    def _refuse_answers(self, pair: TokenPair, count: int, total: int) -> None:
        answers = [self.model.tokenizer.decode(own) for own in (pair.chosen, pair.rejected)]
        lengths = f"{len(pair.chosen)} and {len(pair.rejected)} tokens"
        raise ValueError(
            f"{self.place(pair)}: this experiment needs answers that end with the first token in "
            f"which they differ; {answers[0]!r} and {answers[1]!r} have {lengths}, as have "
            f"{count} of {total} pairs. Later tokens have features of their own, and the theory is "
            "not exact for them: take answers of one token such as Yes and No."
        )

    def place(self, pair: TokenPair) -> str:
        """File and line of a pair."""
        row = next(r for r in self.dataset.index if r["pair_id"] == pair.pair_id)
        return f"{row['file']}:{row['line']}"


def head_only(config: Config) -> HeadOnly:
    """Load model and data as a run of ``config`` will; states and reference come from their caches.

    Raises ValueError for whatever the run would refuse, and for a head whose margins are not linear
    in its weight: capped logits, or a bias that would learn too.
    """
    model = load_model(config)
    if model.head.softcap is not None or model.head.bias is not None:
        what = "caps its logits" if model.head.softcap is not None else "has a bias in its head"
        raise ValueError(
            f"{config.model_name_or_path} {what}, so that margins are not linear in the head's "
            "weight alone and the prediction does not hold. Take another model."
        )
    dataset = load_dataset(config, model.tokenizer)
    pairs = dataset.train + dataset.held_out
    demand_vocabulary(pairs, len(model.head.weight))
    model = freeze_body(model)
    check_model(model, dataset.train, config.max_tokens_per_microbatch)
    dataset = with_states(config, model, dataset, progress=False)
    found = find_reference(config, model, model.tokenizer, pairs, False, pack=dataset.pack)[0]
    count = len(dataset.train)
    dataset = replace(dataset, train=found.pairs[:count], held_out=found.pairs[count:])
    return HeadOnly(config, model, dataset)


def sampled_delta(
    settings: Settings, official: Official, files: Mapping[str, str], names: Sequence[str]
) -> np.ndarray:
    """(K,) distinguishability of the files of ``names`` on `SAMPLED` pairs of each, by a pass that
    keeps nothing: to choose behaviors by."""
    settings = replace(settings, dtype=precision(official, settings.dtype, settings.device, False))
    config = run_config(settings, official, [files[name] for name in names], "sample", **PLAIN)
    model = load_model(config)
    dataset = load_dataset(config, model.tokenizer)
    pairs = first_tokens(sample_pairs(dataset.train, SAMPLED, official.seed)).pairs
    features = prefix_features(model, pairs, max_tokens=config.max_tokens_per_microbatch)
    index = {name: k for k, name in enumerate(dataset.behaviors)}
    frozen = frozen_pairs(
        features,
        np.array([pair.chosen[0] for pair in pairs]),
        np.array([pair.rejected[0] for pair in pairs]),
        np.array([pair.behavior for pair in pairs]),
        dataset.behaviors,
    )
    found = behavior_statistics(frozen)
    return np.array([found[index[name]].delta for name in names])


def precision(official: Official, asked: str, device: str, fine: bool) -> str:
    """The dtype of a head-only run: as asked; else float64 where ``fine`` and on a CPU, or float32.

    Raises ValueError for bfloat16, in which the head's small changes would vanish.
    """
    if asked == "bfloat16":
        raise ValueError(
            f"--dtype bfloat16: logits of bfloat16 products do not show head changes of learning "
            f"rate {official.learning_rate:g}; use float32 or float64 for this experiment."
        )
    if asked != "auto":
        return asked
    return "float64" if fine and resolve_device(device).type == "cpu" else "float32"


def relative(observed: np.ndarray, predicted: np.ndarray) -> float:
    """||observed - predicted|| / ||predicted||; nan where nothing is predicted to move."""
    size = float(np.linalg.norm(predicted))
    return float(np.linalg.norm(observed - predicted)) / size if size else math.nan
