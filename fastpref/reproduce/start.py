"""What is known before a run whose features move: its pairs with the features of its first moment,
and what training the head alone on these would do.

The prediction takes the run's own batches, learning rates and optimizer, so that it differs from
the run by one thing: that nothing but the head learns.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.dynamics.recorder import read_records
from fastpref.dynamics.schema import HELD_OUT, TRAIN_SAMPLE
from fastpref.frozen import Frozen, demand_head, freeze
from fastpref.loading import load_model
from fastpref.model import PairModel
from fastpref.reproduce.runs import curves, step_columns, trained_pairs
from fastpref.theory.adamw import adamw_recursion
from fastpref.theory.dual import dpo_loss
from fastpref.theory.pairs import FrozenPairs

# LoRA as the official code has it.
LORA: dict[str, Any] = {
    "lora_r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": ("q_proj", "v_proj"),
}
Curve = dict[str, Any]  # a row of curves.csv


@dataclass(frozen=True)
class Start:
    """A run's pairs, seen by the model that it begins with."""

    train: Frozen
    held_out: Frozen | None
    linear: bool  # margins are linear in the head: it does not cap its logits


def without_lora(config: Config, **changes: Any) -> Config:
    """``config`` without an adapter: of the model that a LoRA run begins with, its base."""
    lora: dict[str, Any] = {
        f.name: f.default for f in dataclasses.fields(config) if f.metadata["group"] == "lora"
    }
    return dataclasses.replace(config, **lora | {"trainable": "all"} | changes)


def load_start(config: Config) -> PairModel:
    """The model that runs of ``config`` begin with. Raises ValueError where it has no head."""
    model = load_model(without_lora(config))
    demand_head(model)
    return model


def load_ended(config: Config, folder: Path) -> PairModel:
    """The model that a run of ``config`` left in ``folder``, its adapter attached."""
    if config.trainable != "lora":
        return load_model(dataclasses.replace(config, model_name_or_path=str(folder)))
    adapted = without_lora(config, trainable="lora", adapter_name_or_path=str(folder))
    return load_model(adapted)


def look(model: PairModel, config: Config) -> Start:
    """The pairs that a run of ``config`` trains on and holds out, as ``model`` sees them.

    Raises ValueError, naming the behavior, where one of two answers is never chosen among its
    pairs, and as `freeze`.
    """
    dataset = load_dataset(config, model.tokenizer)
    train = freeze(model, dataset, dataset.train, config)
    for k, name in enumerate(train.pairs.behaviors):
        own = train.pairs.chosen[train.pairs.behavior == k]
        rejected = train.pairs.rejected[train.pairs.behavior == k]
        if len(own) and (own == own[0]).all() and (rejected == rejected[0]).all():
            raise ValueError(
                f"behavior {name!r}: all {len(own)} training pairs choose "
                f"{model.tokenizer.decode([int(own[0])])!r}; the class of the other answer is "
                "empty, so that distinguishability does not exist. Give pairs of both answers."
            )
    held_out = dataset.held_out
    return Start(
        train,
        freeze(model, dataset, held_out, config) if held_out else None,
        model.head.softcap is None,
    )


def head_notes(model: PairModel) -> list[str]:
    """What the prediction of the head alone leaves out, or cannot say, of this model's head."""
    notes, head = [], model.head
    if head.softcap is not None:
        notes.append(
            f"The model caps its logits at {head.softcap:g}, so that margins are not linear in the "
            "head: what the head alone would do is undefined. Delta is that of its features."
        )
    if head.weight is model.module.get_input_embeddings().weight:  # type: ignore[operator]
        notes.append(
            "The head is also the input embedding: the head alone, as predicted, would not move "
            "the features; here it does."
        )
    if head.bias is not None:
        notes.append("The head has a bias; what it adds where it learns is not predicted.")
    return notes


def lora_fields(model: PairModel) -> tuple[dict[str, Any], list[str]]:
    """The official LoRA, on all linear layers where the model has none of the official names."""
    ends = {name.rpartition(".")[2] for name, _ in model.module.named_modules()}
    missing = [name for name in LORA["lora_target_modules"] if name not in ends]
    if not missing:
        return dict(LORA), []
    note = (
        f"{type(model.module).__name__} has no layer called {missing[0]}: adapters stand at all "
        "linear layers, not at the query and value projections alone."
    )
    return LORA | {"lora_target_modules": ("all-linear",)}, [note]


def observed(folder: Path, start: Start, config: Config, **labels: Any) -> list[Curve]:
    """Rows for curves.csv: what the run showed, and in predicted_margin and predicted_loss what the
    head alone would have, by AdamW from the same start (`theory.adamw`); nan: undefined."""
    rows = curves(folder, **labels)
    expected = {} if not start.linear else _head_alone(folder, start, config)
    for row in rows:
        key = (row["step"], row["split"], row["behavior"])
        row["predicted_margin"], row["predicted_loss"] = expected.get(key, (np.nan, np.nan))
    return rows


def _head_alone(
    folder: Path, start: Start, config: Config
) -> dict[tuple[int, str, str], tuple[float, float]]:
    path = adamw_recursion(
        start.train.pairs,
        run_batches(folder, start.train.ids),
        step_columns(folder, ["lr"])["lr"],
        config.beta,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm or None,
        probes=None if start.held_out is None else start.held_out.pairs,
    )
    found = predicted(
        folder, TRAIN_SAMPLE, start.train.ids, start.train.pairs, path.margin, config.beta
    )
    if start.held_out is not None and path.probe_margin is not None:
        side = start.held_out
        found |= predicted(folder, HELD_OUT, side.ids, side.pairs, path.probe_margin, config.beta)
    return found


def predicted(
    folder: Path,
    split: str,
    ids: np.ndarray,  # (P,) pair_ids of that side
    pairs: FrozenPairs,
    margin: np.ndarray,  # (steps + 1, P) of that side's pairs
    beta: float,
) -> dict[tuple[int, str, str], tuple[float, float]]:
    """(step, split, behavior) -> mean margin and mean loss of the pairs that the run's evaluations
    of ``split`` looked at."""
    own = positions(ids, evaluated(folder, split))
    found = {}
    for k, name in enumerate(pairs.behaviors):
        members = own[pairs.behavior[own] == k]
        if members.size:
            for step, row in enumerate(margin[:, members]):
                loss = float(dpo_loss(row, beta).mean())
                found[step, split, name] = (float(row.mean()), loss)
    return found


def evaluated(folder: Path, split: str) -> np.ndarray:
    """The pair_ids that evaluations of ``split`` look at."""
    table = read_records(folder, "pairs", ["step", "split", "pair_id"])
    wanted = pc.and_(pc.equal(table["split"].cast("string"), split), pc.equal(table["step"], 0))
    return table.filter(wanted)["pair_id"].to_numpy()


def run_batches(folder: Path, ids: np.ndarray) -> list[np.ndarray | None]:
    """The batch of every optimizer step, as indices into ``ids``."""
    seen = trained_pairs(folder, ())
    place = positions(ids, seen["pair_id"])
    return [place[seen["step"] == step] for step in np.unique(seen["step"])]


def positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of ``wanted`` stands in ``ids``, which holds them all."""
    order = np.argsort(ids)
    found = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    assert np.array_equal(ids[found], wanted), "a run trains on the pairs that were looked at"
    return found
