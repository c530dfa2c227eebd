"""What a run recorded of update rates: curves per behavior, and the interaction matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from fastpref.dynamics import schema
from fastpref.dynamics.parts import list_parts
from fastpref.dynamics.recorder import read_records

COLUMNS = (
    *("rate_obs", "rate_pred_opt", "rate_pred_opt_error", "rate_pred_sgd"),
    *("share", "share_error", "coherence", "coherence_error"),
)


@dataclass(frozen=True, slots=True)
class Rates:
    """Empty where a run measured none.

    curves[behavior][column]: (M,) over the measured steps, nan = unknown; "step" is among them.
    """

    curves: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    step: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (M,) of the matrices
    names: tuple[str, ...] = ()  # (K,) behaviors of the matrices
    gamma: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))  # (M, K, K) Gamma_kl

    def ordered(self, order: Sequence[str]) -> np.ndarray:
        """(M, K', K') the matrices of the behaviors in ``order``."""
        index = [self.names.index(name) for name in order]
        return self.gamma[:, index][:, :, index]


def read_rates(run: Path) -> Rates:
    """Of the run folder ``run``; a pair of behaviors without a row has Gamma 0."""
    if not list_parts(run, "behaviors"):
        return Rates()
    table = read_records(run, "behaviors", ["step", "split", "behavior", *COLUMNS])
    table = table.filter(pa.array([s == schema.RATE_SAMPLE for s in table["split"].to_pylist()]))
    if not len(table):
        return Rates()
    names = np.array(table["behavior"].to_pylist())
    columns = {c: table[c].cast(pa.float64()).to_numpy() for c in ("step", *COLUMNS)}
    curves = {
        str(name): {c: values[names == name] for c, values in columns.items()}
        for name in dict.fromkeys(names)
    }
    return Rates(curves, *_matrices(run, tuple(curves)))


def _matrices(run: Path, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    table = read_records(run, "gram", ["step", "behavior", "other", "dot"])
    step, at = np.unique(table["step"].to_numpy(), return_inverse=True)
    place = {name: i for i, name in enumerate(names)}
    row, column = (
        np.array([place[name] for name in table[side].to_pylist()], int)
        for side in ("behavior", "other")
    )
    gamma = np.zeros((len(step), len(names), len(names)))
    gamma[at.ravel(), row, column] = table["dot"].cast(pa.float64()).to_numpy()
    return step, names, gamma
