"""Figures of the probes of a run: what becomes of each response type, and where it squeezes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastpref.dynamics.parts import list_parts
from fastpref.dynamics.recorder import read_records
from fastpref.probe_types import CHOSEN, PROBE_TYPES, REJECTED
from fastpref.report.svg import MUTED, TEXT, Figure, finish, style
from fastpref.report.tables import shorten

_WIDTH, _COLUMNS, _MAX_PANELS = 9.6, 4, 24
# Of middle lightness: they are read on a light and on a dark page alike.
_COLORS = ("#1f8fcf", "#e0662a", "#16a077", "#c06ba0", "#c99316", "#7f8fd6", "#b0466f", "#8a8f96")
_ARGMAX = "argmax"


@dataclass(frozen=True)
class ProbeCurves:
    """Means over probes at E evaluations. Keys of the curves: response type, or type and behavior;
    of the type argmax, the likeliest tokens' log-prob at the chosen responses' positions."""

    step: np.ndarray  # (E,)
    by_type: Mapping[str, np.ndarray]  # (E,) mean log-prob, nats
    by_behavior: Mapping[str, Mapping[str, np.ndarray]]  # behavior -> chosen, rejected, argmax
    certainty: Mapping[str, np.ndarray]  # response type -> (E,) mean log(1 - p_max)
    alarms: Mapping[str, Sequence[int]]  # behavior -> steps at which it was squeezed


def probe_figures(run: Path) -> list[Figure]:
    """The figures that the records of the run folder ``run`` allow: none without probes."""
    curves = read_curves(run)
    if curves is None:
        return []
    figures = [_types(curves)]
    if curves.by_behavior:
        figures.append(_behaviors(curves))
    return figures


def read_curves(run: Path) -> ProbeCurves | None:
    """The curves of a run folder; None where no probe is recorded (yet)."""
    if not list_parts(run, "probes"):
        return None
    names = ["step", "behavior", "response_type", "logp", "argmax_logp", "log1m_pmax"]
    table = read_records(run, "probes", names)
    step = table["step"].to_numpy()
    kind = np.array(table["response_type"].to_pylist())
    behavior = np.array([name or "" for name in table["behavior"].to_pylist()])
    values = {n: table[n].cast(pa.float64()).to_numpy() for n in names[3:]}
    steps = np.unique(step)

    def mean(column: str, chosen: np.ndarray) -> np.ndarray:
        return np.array([values[column][chosen & (step == at)].mean() for at in steps])

    types = [t for t in PROBE_TYPES if (kind == t).any()]
    types += sorted(set(kind.tolist()) - set(types))
    by_type = {t: mean("logp", kind == t) for t in types}
    if CHOSEN in by_type:
        by_type[_ARGMAX] = mean("argmax_logp", kind == CHOSEN)
    by_behavior = {}
    for name in sorted(set(behavior.tolist()) - {""}):
        own = {t: (behavior == name) & (kind == t) for t in (CHOSEN, REJECTED)}
        if all(members.any() for members in own.values()):
            by_behavior[name] = {t: mean("logp", members) for t, members in own.items()}
            by_behavior[name][_ARGMAX] = mean("argmax_logp", own[CHOSEN])
    certainty = {t: mean("log1m_pmax", kind == t) for t in types}
    return ProbeCurves(steps, by_type, by_behavior, certainty, _alarms(run))


def _alarms(run: Path) -> dict[str, list[int]]:
    if not list_parts(run, "squeezing"):
        return {}
    found: dict[str, list[int]] = {}
    for row in read_records(run, "squeezing", ["step", "behavior", "alarm"]).to_pylist():
        if row["alarm"]:
            found.setdefault(row["behavior"], []).append(row["step"])
    return found


def _look(kind: str, types: Sequence[str]) -> dict[str, Any]:
    if kind == _ARGMAX:
        return {"color": TEXT, "dashes": (3.5, 2.0), "linewidth": 1.2}
    place = types.index(kind)
    # More types than colours: the same once more, dotted.
    style_ = "-" if place < len(_COLORS) else ":"
    return {"color": _COLORS[place % len(_COLORS)], "linestyle": style_, "linewidth": 1.5}


def _types(curves: ProbeCurves) -> Figure:
    types = [kind for kind in curves.by_type if kind != _ARGMAX]
    with style() as plt:
        lines = -(-len(curves.by_type) // 3)
        height = 3.2 + 0.18 * lines
        figure, axes = plt.subplots(1, 2, figsize=(_WIDTH, height), sharex=True)
        bottom = (0.62 + 0.18 * lines) / height
        figure.subplots_adjust(0.075, bottom, 0.985, 1 - 0.1 / height, wspace=0.2)
        for kind, logp in curves.by_type.items():
            name = "likeliest tokens, at the chosen's positions" if kind == _ARGMAX else kind
            axes[0].plot(curves.step, logp - logp[0], label=name, **_look(kind, types))
        for kind, certainty in curves.certainty.items():
            axes[1].plot(curves.step, certainty, **_look(kind, types))
        axes[0].axhline(0, color=MUTED, linewidth=0.8, zorder=1)
        axes[0].set(ylabel="change of mean log-prob, nats", xlabel="optimizer step")
        axes[1].set(ylabel="mean log(1 − largest probability), nats", xlabel="optimizer step")
        for panel in axes:
            panel.margins(x=0.02)
        figure.legend(
            loc="lower left", bbox_to_anchor=(0.06, 0.0), ncols=3, frameon=False, fontsize=8,
            labelcolor=TEXT, handlelength=2.4,
        )  # fmt: skip
        caption = (
            "Left: change of the mean log-probability of the probes of each response type since "
            "step 0; where all of them fall and the likeliest tokens rise, the model is squeezed "
            "(docs/probes.md). Right: how sure the model is at their positions, lower is surer. "
            "From records/probes."
        )
        return finish(figure, "probes", "Probes by response type", caption)


def _behaviors(curves: ProbeCurves) -> Figure:
    squeezed = sorted(curves.by_behavior, key=lambda name: -len(curves.alarms.get(name, ())))
    names = sorted(squeezed[:_MAX_PANELS])
    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    kinds = (CHOSEN, REJECTED)
    with style() as plt:
        height = 1.7 * lines + 0.8
        figure, grid = plt.subplots(
            lines, columns, figsize=(_WIDTH, height), sharex=True, squeeze=False
        )
        figure.subplots_adjust(
            0.075, 0.72 / height, 0.985, 1 - 0.28 / height, wspace=0.25, hspace=0.32
        )
        for panel in list(grid.flat)[len(names) :]:
            panel.set_visible(False)
        for panel, name in zip(grid.flat, names, strict=False):
            for kind, logp in curves.by_behavior[name].items():
                panel.plot(curves.step, logp - logp[0], **_look(kind, kinds))
            for at in curves.alarms.get(name, ()):
                panel.axvline(at, color=_COLORS[6], linewidth=2.2, alpha=0.35, zorder=0)
            panel.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
            panel.set_title(shorten(name, 120 // columns), fontsize=8, pad=3)
            panel.tick_params(labelsize=7)
            panel.margins(x=0.02)
        looks = {CHOSEN: "chosen", REJECTED: "rejected", _ARGMAX: "likeliest tokens"}
        handles = [plt.Line2D([], [], label=v, **_look(k, kinds)) for k, v in looks.items()]
        handles.append(
            plt.Line2D([], [], color=_COLORS[6], linewidth=2.2, alpha=0.5, label="squeezing alarm")
        )
        figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0.06, 0.0), ncols=4, frameon=False,
            fontsize=8, labelcolor=TEXT, handlelength=2.4,
        )  # fmt: skip
        figure.supxlabel("optimizer step", fontsize=8.5, y=0.32 / height)
        figure.supylabel("change, nats", x=0.0, fontsize=8.5)
        caption = (
            "Change since step 0 of each behavior's mean log-probabilities: of its chosen and "
            "rejected responses, and of the likeliest tokens at the chosen's positions"
        )
        if len(names) < len(curves.by_behavior):
            caption += f"; shown: {len(names)} of {len(curves.by_behavior)}, most alarms first"
        return finish(
            figure,
            "probe-behaviors",
            "Probes by behavior",
            f"{caption}. From records/probes and records/squeezing.",
        )
