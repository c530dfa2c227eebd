"""The features of a behavior before and after training, as points: do its answers come apart?

Two axes for both pictures: the first principal components of all features, before and after,
around their common mean. UMAP, as the official code draws it, where it is installed.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastpref.report.embedding_plots import draw_embeddings
from fastpref.report.files import write_csv
from fastpref.reproduce import runs
from fastpref.reproduce.finetune import CORRECTED, prepare
from fastpref.reproduce.outcome import Outcome, Verdict, ratio
from fastpref.reproduce.settings import DPO_TRAINING, Settings
from fastpref.reproduce.small import compared
from fastpref.reproduce.start import Start, load_ended, look
from fastpref.theory.distinguish import behavior_statistics
from fastpref.theory.pairs import FrozenPairs, frozen_pairs

log = logging.getLogger(__name__)

# DPO_training.py, plotted by plot_embedding_comparison.ipynb.
OFFICIAL = replace(DPO_TRAINING, behaviors=(130,))
UMAP_SEED = 1234  # the official notebook's
MISSING = "UMAP is left out, because umap-learn is not installed: pip install umap-learn."


BEFORE, AFTER = "before", "after"
POINTS_FILE = "points.csv"
CAVEATS = [
    "Two axes hold a part of the features' variance (explained_variance); delta is of all of them.",
    "Before and after are drawn on the same axes. The official pictures are two UMAPs, fitted "
    "apart, whose axes and distances do not compare.",
]


@dataclass(frozen=True)
class Plane:
    """Features on two axes."""

    points: dict[str, np.ndarray]  # BEFORE, AFTER: (P, 2)
    explained: dict[str, list[float]]  # of either set's variance, by each axis; UMAP has none


def run(settings: Settings) -> Outcome:
    """Train on the first behavior; raises ValueError for one class empty, or without a head."""
    prepared = prepare(settings, OFFICIAL)
    name, config = next(iter(prepared.configs.items()))
    log.info("embeddings: %s", name)
    folder = runs.run(config, keep_weights=True)
    model = load_ended(config, folder)
    before, after = (all_pairs(own) for own in (prepared.starts[name], look(model, config)))
    runs.drop_weights(folder)
    planes = {"PCA": pca(before.features, after.features)}
    notes = list(prepared.caveats)
    if importlib.util.find_spec("umap") is None:
        notes.append(MISSING)
    else:
        planes["UMAP"] = umap(before.features, after.features)
    if len(prepared.configs) > 1:
        notes.append(f"Of the behaviors named the first is taken: {name}.")
    numbers = {
        when: _numbers(pairs, planes["PCA"].explained[when])
        for when, pairs in ((BEFORE, before), (AFTER, after))
    }
    answers = {t: model.tokenizer.decode([int(t)]).strip() for t in before.tokens.tolist()}
    _write_points(settings, planes, before, answers)
    figures = draw_embeddings(
        settings.folder,
        name,
        {kind: plane.points for kind, plane in planes.items()},
        [answers[t] for t in before.chosen.tolist()],
        numbers,
    )
    return Outcome(
        experiment="embeddings",
        settings=runs.described(settings, prepared.taken, [name])
        | {"official": compared(OFFICIAL, prepared.taken)},
        numbers={name: numbers},
        verdicts=[
            Verdict(
                "distinguishability after training over that before it, at least 1",
                ratio(numbers[AFTER]["delta"], numbers[BEFORE]["delta"]),
                1.0,
                at_least=True,
            )
        ],
        caveats=[*notes, *CAVEATS, CORRECTED],
        curves=runs.curves(folder, run=name),
        runs=[f"{runs.RUNS}/{name}"],
        figures=[path.name for path in figures],
    )


def all_pairs(start: Start) -> FrozenPairs:
    """The training and the held-out pairs of one behavior together."""
    sides = [own.pairs for own in (start.train, start.held_out) if own is not None]
    return frozen_pairs(
        np.concatenate([own.features for own in sides]),
        np.concatenate([own.chosen for own in sides]),
        np.concatenate([own.rejected for own in sides]),
        behaviors=sides[0].behaviors,
    )


def pca(before: np.ndarray, after: np.ndarray) -> Plane:
    """(P, D) twice onto the first two principal components of both together.

    Both are taken from their common mean, so that a shift of all features shows. Each axis points
    to where its largest loading is positive.
    """
    both = np.concatenate([before, after])
    middle = both.mean(axis=0)
    axes = np.linalg.svd(both - middle, full_matrices=False)[2][:2]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    points, explained = {}, {}
    for when, features in ((BEFORE, before), (AFTER, after)):
        points[when] = (features - middle) @ axes.T
        total = float(features.var(axis=0).sum())
        along = points[when].var(axis=0)
        explained[when] = (along / total if total else np.full(2, np.nan)).tolist()
    return Plane(points, explained)


def umap(before: np.ndarray, after: np.ndarray) -> Plane:
    """The same by UMAP, fitted to both together; ValueError where umap-learn is not installed."""
    try:
        from umap import UMAP
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from None
    both = UMAP(random_state=UMAP_SEED).fit_transform(np.concatenate([before, after]))
    return Plane({BEFORE: both[: len(before)], AFTER: both[len(before) :]}, {})


def _numbers(pairs: FrozenPairs, explained: list[float]) -> dict[str, Any]:
    (stats,) = behavior_statistics(pairs)
    return {
        "delta": stats.delta,
        "concentration": stats.concentration,
        "trace": stats.trace,
        "mu_norm": stats.mu_norm,
        # Above 1 the classes lie apart in any single direction: delta against its own spread.
        "delta_over_spread": stats.delta / (stats.spread_plus + stats.spread_minus),
        "explained_variance": explained,
    }


def _write_points(
    settings: Settings, planes: dict[str, Plane], pairs: FrozenPairs, answers: dict[int, str]
) -> None:
    rows = [
        [kind, when, answers[token], *map(float, point)]
        for kind, plane in planes.items()
        for when, points in plane.points.items()
        for token, point in zip(pairs.chosen.tolist(), points, strict=True)
    ]
    settings.folder.mkdir(parents=True, exist_ok=True)
    write_csv(settings.folder / POINTS_FILE, ["method", "when", "answer", "x", "y"], rows)
