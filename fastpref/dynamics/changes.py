"""What became of every evaluated pair since the evaluation before: flips and forgetting. No torch.

*Flip*: logp_chosen > logp_rejected became false or true. *Forgotten*: the margin was above 0 and is
not any more (Toneva et al. 2019, arXiv 1812.05159, of classes; here of preferences).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.dynamics.parts import first_step_of, list_parts, read_part

COLUMNS = ("pair_id", "margin", "logp_chosen", "logp_rejected")


@dataclass(frozen=True)
class Standing:
    """How the P pairs of a split stood at an evaluation."""

    pair_id: np.ndarray  # (P,)
    learned: np.ndarray  # (P,) bool, margin > 0
    preferred: np.ndarray  # (P,) bool, logp_chosen > logp_rejected

    @staticmethod
    def of(columns: Mapping[str, np.ndarray]) -> Standing:
        """Of columns of the `pairs` table."""
        preferred = columns["logp_chosen"] > columns["logp_rejected"]
        return Standing(columns["pair_id"], columns["margin"] > 0, preferred)


def change_rows(
    before: Standing | None, after: Standing, behavior: np.ndarray
) -> dict[int, dict[str, int | None]]:
    """`flips` and `forgotten` of the `behaviors` table by index; None at a first evaluation, or
    where the pairs are others than before. behavior: (P,) of the pairs in ``after``."""
    rows: dict[int, dict[str, int | None]] = {}
    same = before is not None and np.array_equal(before.pair_id, after.pair_id)
    for k in np.unique(behavior).tolist():
        own = behavior == k
        if not same or before is None:
            rows[k] = {"flips": None, "forgotten": None}
            continue
        rows[k] = {
            "flips": int((before.preferred != after.preferred)[own].sum()),
            "forgotten": int((before.learned & ~after.learned)[own].sum()),
        }
    return rows


def recorded_standings(run: Path, splits: Iterable[str], step: int) -> dict[str, Standing]:
    """By split, how its pairs stood at its last evaluation up to ``step``, from the records."""
    found: dict[str, Standing] = {}
    missing = set(splits)
    parts = [part for part in list_parts(run, "pairs") if first_step_of(part) <= step]
    for part in reversed(parts):
        if not missing:
            break
        if not missing & set(_splits(part)):
            continue
        table = read_part(part, "pairs", ["step", "split", *COLUMNS])
        split, at = table["split"].cast(pa.string()).to_numpy(), table["step"].to_numpy()
        for name in sorted(missing):
            own = (split == name) & (at <= step)
            if own.any():
                last = pa.array(own & (at == at[own].max()))
                rows = table.filter(last)
                found[name] = Standing.of({c: rows[c].to_numpy() for c in COLUMNS})
                missing.discard(name)
    return found


def _splits(part: Path) -> list[str]:
    """The splits that a part has rows of."""
    column = pq.read_table(part, columns=["split"])["split"]
    return [str(value) for value in column.unique().to_pylist()]
