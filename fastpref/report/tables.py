"""Reads a run folder and sums it up per behavior; the table of it for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from fastpref.dynamics import groups, schema
from fastpref.dynamics.parts import list_parts
from fastpref.dynamics.recorder import read_jsonl, read_records
from fastpref.report.rate_tables import Rates, read_rates

SPLITS = (schema.TRAIN_SAMPLE, schema.HELD_OUT)
Curves = dict[str, dict[str, np.ndarray]]

_CURVE_COLUMNS = ("n", "margin", "loss", "reward_accuracy", "output_accuracy", "rate_obs")
_STEP_COLUMNS = ("step", "loss", "lr", "grad_norm", "clip_coef", "pairs", "tokens")


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run folder holds; empty containers stand for what it does not hold (yet).

    curves[split][behavior][column]: (E,) float64 over the evaluations, nan = unknown; the column
    "step" is among them. steps[column]: (N,) over the optimizer steps. pairs[behavior][column]:
    (n,) over the trained pairs, with step, margin and head_gnorm_m. rates: what was measured of
    update rates, where it was.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    perf: list[dict[str, Any]]
    curves: dict[str, Curves]
    steps: dict[str, np.ndarray]
    pairs: Curves
    rates: Rates
    finished: bool

    @property
    def last_step(self) -> int:
        """Last optimizer step that the files tell of, 0 if none."""
        recorded = [int(self.steps["step"][-1])] if len(self.steps.get("step", ())) else []
        return max([row["step"] for row in self.metrics] + recorded, default=0)


@dataclass(frozen=True, slots=True)
class Summary:
    """One behavior at its last evaluation; the mappings go by split and may lack one.

    rate: mean update rate over all evaluations, nats per step. to_margin, to_accuracy: first
    evaluated step above groups.MARGIN_THRESHOLD and ACCURACY_THRESHOLD, None if not reached.
    """

    behavior: str
    n: dict[str, float]
    margin: dict[str, float]
    loss: dict[str, float]
    accuracy: dict[str, float]
    output_accuracy: dict[str, float]
    rate: dict[str, float | None]
    to_margin: dict[str, int | None]
    to_accuracy: dict[str, int | None]


def read_run(run: str | Path) -> RunFiles:
    """Read the run folder `run`; the run may be going on, finished, or killed.

    Raises ValueError if it is no run folder or its records have another schema version.
    """
    path = demand_run(run)
    settings, metrics, perf = (
        path / name for name in ("config.yaml", "metrics.jsonl", "perf.jsonl")
    )
    config = yaml.safe_load(settings.read_text()) if settings.exists() else {}
    return RunFiles(
        path=path,
        config=config or {},
        metrics=read_jsonl(metrics) if metrics.exists() else [],
        perf=read_jsonl(perf) if perf.exists() else [],
        curves=_curves(path),
        steps=_steps(path),
        pairs=_trained_pairs(path),
        rates=read_rates(path),
        finished=any(path.glob("*.safetensors")),
    )


def demand_run(run: str | Path) -> Path:
    """The path of a run folder; ValueError if it is none."""
    path = Path(run)
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "records")):
        raise ValueError(
            f"{path} is not the folder of a run: expected config.yaml, metrics.jsonl or records "
            "in it; give the output_dir of `fastpref train`"
        )
    return path


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """Column as float64, null = nan."""
    return table[name].cast(pa.float64()).to_numpy()


def _groups(table: pa.Table, columns: Sequence[str]) -> Curves:
    """Split the columns of a table with a `behavior` column by behavior, keeping the order."""
    encoded = table["behavior"].combine_chunks()
    codes, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    arrays = {name: _numbers(table, name) for name in columns}
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(len(names) + 1))
    found = {}
    for k, name in enumerate(names):
        mine = order[ends[k] : ends[k + 1]]
        if mine.size:
            found[name] = {column: array[mine] for column, array in arrays.items()}
    return found


def _curves(path: Path) -> dict[str, Curves]:
    if not list_parts(path, "behaviors"):
        return {}
    table = read_records(path, "behaviors", ["step", "split", "behavior", *_CURVE_COLUMNS])
    curves = {}
    for split in SPLITS:
        chosen = pa.array([value == split for value in table["split"].to_pylist()], pa.bool_())
        found = _groups(table.filter(chosen), ["step", *_CURVE_COLUMNS])
        if found:
            curves[split] = found
    return curves


def _steps(path: Path) -> dict[str, np.ndarray]:
    if not list_parts(path, "steps"):
        return {}
    table = read_records(path, "steps", _STEP_COLUMNS)
    return {name: _numbers(table, name) for name in _STEP_COLUMNS}


def _trained_pairs(path: Path) -> Curves:
    if not list_parts(path, "pairs"):
        return {}
    columns = ["step", "margin", "head_gnorm_m"]
    table = read_records(path, "pairs", ["split", "behavior", *columns])
    split = table["split"].combine_chunks()
    names = split.dictionary.to_pylist()
    train = names.index(schema.TRAIN) if schema.TRAIN in names else -1
    return _groups(table.filter(pa.array(split.indices.to_numpy() == train)), columns)


def summarize(run: RunFiles) -> list[Summary]:
    """One Summary per behavior, the highest update rate (train sample, else held-out) first."""
    names = sorted({name for split in run.curves.values() for name in split})
    rows = []
    for name in names:
        curves = {split: c[name] for split, c in run.curves.items() if name in c}
        rows.append(
            Summary(
                behavior=name,
                n={s: float(c["n"][-1]) for s, c in curves.items()},
                margin={s: float(c["margin"][-1]) for s, c in curves.items()},
                loss={s: float(c["loss"][-1]) for s, c in curves.items()},
                accuracy={s: float(c["reward_accuracy"][-1]) for s, c in curves.items()},
                output_accuracy={s: float(c["output_accuracy"][-1]) for s, c in curves.items()},
                rate={s: groups.update_rate(c["step"], c["margin"]) for s, c in curves.items()},
                to_margin={
                    s: groups.time_to_threshold(c["step"], c["margin"], groups.MARGIN_THRESHOLD)
                    for s, c in curves.items()
                },
                to_accuracy={
                    s: groups.time_to_threshold(
                        c["step"], c["reward_accuracy"], groups.ACCURACY_THRESHOLD
                    )
                    for s, c in curves.items()
                },
            )
        )
    return sorted(rows, key=lambda row: -_sorting_rate(row))


def _sorting_rate(row: Summary) -> float:
    rates = [row.rate[split] for split in SPLITS if row.rate.get(split) is not None]
    return rates[0] if rates and rates[0] is not None else -math.inf


def overall(rows: Sequence[Summary], split: str) -> dict[str, float]:
    """Means over all evaluated pairs of `split` at the last evaluation; empty if there are none."""
    mine = [row for row in rows if split in row.n]
    weights = [row.n[split] for row in mine]
    if not weights:
        return {}
    values = {
        "margin": [row.margin[split] for row in mine],
        "loss": [row.loss[split] for row in mine],
        "accuracy": [row.accuracy[split] for row in mine],
        "output_accuracy": [row.output_accuracy[split] for row in mine],
    }
    return {name: float(np.average(column, weights=weights)) for name, column in values.items()}


def shorten(text: str, width: int) -> str:
    """`text` on one line in at most `width` characters, the middle left out if need be."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    head = width // 2
    return f"{line[:head]}…{line[len(line) - (width - head - 1) :]}"


def decimals(values: Sequence[float | None], digits: int = 3) -> int:
    """Decimals that show `digits` significant digits of the largest of the values."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    if largest == 0.0:
        return digits - 1
    return min(max(digits - 1 - math.floor(math.log10(largest)), 0), 6)


def rate_scale(rows: Sequence[Summary]) -> tuple[float, str]:
    """Factor and unit in which the update rates are written: a power of 1000 nats per step."""
    rates = [abs(r) for row in rows for r in row.rate.values() if r is not None and r != 0.0]
    power = 3 * min(0, math.floor(math.log10(max(rates)) / 3)) if rates else 0
    return 10.0**-power, f"1e{power} nat/step" if power else "nat/step"


def format_column(values: Sequence[float | None], places: int | None = None) -> list[str]:
    """The values with one number of decimals, "-" for None and nan."""
    places = decimals(values) if places is None else places
    return [
        "-" if value is None or math.isnan(value) else f"{value:.{places}f}" for value in values
    ]


def columns_of(rows: Sequence[Summary]) -> list[tuple[str, str, list[str]]]:
    """Columns of the per-behavior table: (quantity, split, one text per row).

    Train sample and held-out of a quantity have the same decimals; absent splits have no column.
    """
    scale, unit = rate_scale(rows)
    splits = [s for s in SPLITS if any(s in row.n for row in rows)]
    quantities: list[tuple[str, list[Mapping[str, float | None]], int | None]] = [
        ("margin, nat", [row.margin for row in rows], None),
        ("accuracy", [row.accuracy for row in rows], 3),
        (f"rate {unit}", [_scaled(row.rate, scale) for row in rows], None),
        (f"steps to m>{groups.MARGIN_THRESHOLD:g}", [row.to_margin for row in rows], 0),
        (f"to acc>{groups.ACCURACY_THRESHOLD:g}", [row.to_accuracy for row in rows], 0),
    ]
    columns = []
    for title, values, places in quantities:
        every = [mapping.get(split) for mapping in values for split in splits]
        shown = decimals(every) if places is None else places
        for split in splits:
            texts = format_column([mapping.get(split) for mapping in values], shown)
            columns.append((title, split, texts))
    return columns


def _scaled(rates: Mapping[str, float | None], scale: float) -> dict[str, float | None]:
    return {split: None if rate is None else rate * scale for split, rate in rates.items()}


def behavior_table(run: RunFiles | str | Path, width: int = 110) -> str:
    """The table of a run's behaviors for a terminal of `width` columns, highest rate first.

    Raises ValueError if the run has recorded no evaluation.
    """
    files = run if isinstance(run, RunFiles) else read_run(run)
    rows = summarize(files)
    if not rows:
        raise ValueError(
            f"{files.path}: no evaluation is recorded (yet): expected records/behaviors/; train "
            "with record: true and eval_steps > 0"
        )
    short = {schema.TRAIN_SAMPLE: "train", schema.HELD_OUT: "held"}
    columns = columns_of(rows)
    splits = list(dict.fromkeys(split for _, split, _ in columns))
    groups_ = [columns[i : i + len(splits)] for i in range(0, len(columns), len(splits))]
    blocks = []
    for group in groups_:
        inner = [max(len(short[s]), *map(len, texts)) for _, s, texts in group]
        total = max(sum(inner) + len(inner) - 1, len(group[0][0]))
        inner[0] += total - (sum(inner) + len(inner) - 1)
        head = " ".join(short[s].rjust(w) for (_, s, _), w in zip(group, inner, strict=True))
        lines = [
            " ".join(texts[i].rjust(w) for (_, _, texts), w in zip(group, inner, strict=True))
            for i in range(len(rows))
        ]
        blocks.append([group[0][0].center(total).rstrip().ljust(total), head, *lines])
    room = width - sum(len(block[0]) + 2 for block in blocks)
    names = [shorten(row.behavior, max(room, 8)) for row in rows]
    first = max(len("behavior"), *map(len, names))
    left = ["".ljust(first), "behavior".ljust(first), *(name.ljust(first) for name in names)]
    body = ["  ".join(parts).rstrip() for parts in zip(left, *blocks, strict=True)]
    body.insert(2, "-" * max(map(len, body)))
    return "\n".join(body)
