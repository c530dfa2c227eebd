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
from fastpref.loading import load_model, resolve_device
from fastpref.model import PairModel
from fastpref.refmodel import find_reference
from fastpref.reproduce.behaviors import choose, find_files
from fastpref.reproduce.names import STATEMENTS
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
        the model's logit scale. Raises ValueError for states that are not finite.
        """
        batch = self.dataset.pack(pairs)
        assert batch.hidden is not None
        segment = batch.segment_id.numpy()
        rows = np.bincount(segment, minlength=GROUP * len(pairs)).reshape(-1, GROUP)
        assert (rows[:, 1:] == 1).all(), "`head_only` has refused other answers"
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
    _demand_answers(model, dataset)
    model = freeze_body(model)
    check_model(model, dataset.train, config.max_tokens_per_microbatch)
    dataset = with_states(config, model, dataset, progress=False)
    found = find_reference(config, model, model.tokenizer, pairs, False, pack=dataset.pack)[0]
    count = len(dataset.train)
    dataset = replace(dataset, train=found.pairs[:count], held_out=found.pairs[count:])
    return HeadOnly(config, model, dataset)


def _demand_answers(model: PairModel, dataset: Dataset) -> None:
    """Raise ValueError, before any states are computed, for answers that the theory is not exact
    for, naming file and line, and for a behavior one of whose two answers is never chosen."""
    pairs = dataset.train + dataset.held_out
    firsts = first_tokens(pairs)
    if firsts.longer or firsts.without:
        bad = [p for p in pairs if (one := first_tokens([p])).longer or one.without]
        answers = [model.tokenizer.decode(own) for own in (bad[0].chosen, bad[0].rejected)]
        place = next(r for r in dataset.index if r["pair_id"] == bad[0].pair_id)
        raise ValueError(
            f"{place['file']}:{place['line']}: this experiment needs answers that end with the "
            f"first token in which they differ; {answers[0]!r} and {answers[1]!r} do not (tokens "
            f"{bad[0].chosen.tolist()} and {bad[0].rejected.tolist()}), nor do those of "
            f"{len(bad) - 1} more of {len(pairs)} pairs. For later tokens the theory is not exact: "
            "take answers of one token, such as Yes and No."
        )
    train = first_tokens(dataset.train).pairs
    kept, behavior = np.unique([pair.behavior for pair in train], return_inverse=True)
    tokens = (np.array([own.chosen[0] for own in train]), np.array([p.rejected[0] for p in train]))
    names = [dataset.behaviors[k] for k in kept]
    behavior_statistics(frozen_pairs(np.ones((len(train), 1)), *tokens, behavior, names))


def behavior_files(settings: Settings, official: Official) -> tuple[dict[str, str], list[str]]:
    """Name -> file of the behaviors to take, in order, and notes on what was missing.

    Raises ValueError for names and numbers that no file has.
    """
    files = find_files(settings.data, STATEMENTS)
    names, notes = choose(
        files,
        official.behaviors,
        settings.behaviors,
        lambda others: _sampled_delta(settings, official, files, others),
    )
    return {name: files[name] for name in names}, notes


def _sampled_delta(
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
