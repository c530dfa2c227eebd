"""Writes the numbers and the picture of docs/example-personas.md from what its commands left.

    python docs/example_personas.py RUN THEORY PROFILE

RUN: a run whose records hold update rates; THEORY, PROFILE: what `fastpref theory` and `fastpref
profile` wrote on the same pairs. Tables go between the marks of docs/example-personas.md, the
picture to docs/example-personas.png.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.dynamics.groups import MARGIN_THRESHOLD, time_to_threshold
from fastpref.dynamics.inequality import atkinson, gini, restricted_times
from fastpref.dynamics.recorder import read_records
from fastpref.dynamics.schema import HELD_OUT, RATE_SAMPLE, TRAIN, TRAIN_SAMPLE
from fastpref.report.pictures import INK, SOFT, picture_style
from fastpref.report.tables import shorten

PAGE = Path(__file__).with_name("example-personas.md")
BEGIN, END = "<!-- numbers: begin (generated) -->", "<!-- numbers: end -->"
NUMBERS = ("n", "margin", "margin_std", "share", "rate_obs", "rate_pred_opt")  # of `behaviors`
EARLY = 100  # steps: while most margins are below the threshold
Columns = dict[str, np.ndarray]  # (K,) each, in the order of `names`


def read_curves(run: Path, names: list[str]) -> dict[tuple[str, str], np.ndarray]:
    """(split, column) -> (K, E) of the table `behaviors`, `step` being (E,); null is nan."""
    rows = read_records(run, "behaviors").to_pylist()
    found = {}
    for split in (TRAIN_SAMPLE, HELD_OUT, RATE_SAMPLE):
        own = [[r for r in rows if (r["split"], r["behavior"]) == (split, name)] for name in names]
        found[split, "step"] = np.array([r["step"] for r in own[0]])
        for column in NUMBERS:
            values = [[np.nan if r[column] is None else r[column] for r in mine] for mine in own]
            found[split, column] = np.array(values, np.float64)
    return found


def read_new(run: Path, names: list[str], last: int) -> tuple[np.ndarray, np.ndarray]:
    """(K,) mean margins of the pairs of the steps up to ``last``, each before its step, and their
    standard errors. In the first epoch the model has not seen them before."""
    table = read_records(run, "pairs", ["step", "split", "behavior", "margin"])
    split, behavior = (table[c].cast("string").to_numpy() for c in ("split", "behavior"))
    step, margin = table["step"].to_numpy(), table["margin"].to_numpy().astype(np.float64)
    kept = (split == TRAIN) & (step <= last)
    own = [margin[kept & (behavior == name)] for name in names]
    error = [values.std(ddof=1) / np.sqrt(len(values)) for values in own]
    return np.array([values.mean() for values in own]), np.array(error)


def read_gram(run: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(K, K) mean <M_k, G_l> over the measured steps, and its standard error over them; a step
    without pairs of l adds 0."""
    rows = read_records(run, "gram").to_pylist()
    steps = sorted({r["step"] for r in rows})
    place = {name: k for k, name in enumerate(names)}
    dots = np.zeros((len(steps), len(names), len(names)))
    for r in rows:
        dots[steps.index(r["step"]), place[r["behavior"]], place[r["other"]]] = r["dot"]
    return dots.mean(0), dots.std(0, ddof=1) / np.sqrt(len(steps))


def read_profile(folder: Path, names: list[str]) -> tuple[Columns, Columns]:
    """(K,) columns and (K, K) matrices of profile.json, in the order of ``names``."""
    found = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    place = [[row["behavior"] for row in found["behaviors"]].index(name) for name in names]
    keys = ("share", "share_error", "rate", "rate_error", "coherence", "gnorm_m")
    columns = {key: np.array([found["behaviors"][k][key] for k in place]) for key in keys}
    matrices = {key: np.array(v)[np.ix_(place, place)] for key, v in found["gamma"].items()}
    return columns, matrices


def ranks(values: np.ndarray) -> np.ndarray:
    """(K,) ranks from 0, ties at their mean."""
    return np.array([((values < v).sum() + (values <= v).sum() - 1) / 2 for v in values])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Spearman's coefficient and its 95 % interval (Bonett and Wright 2000, Psychometrika 65)."""
    r = float(np.corrcoef(ranks(a), ranks(b))[0, 1])
    half = 1.96 * np.sqrt((1 + r**2 / 2) / (len(a) - 3))
    middle = np.arctanh(np.clip(r, -0.999999, 0.999999))
    return r, float(np.tanh(middle - half)), float(np.tanh(middle + half))


def measure(run: Path, theory: Path, profile: Path) -> tuple[list[str], Columns, Columns]:
    """Names in the predicted order, (K,) columns, and what is not one number per behavior."""
    with (theory / "behaviors.csv").open() as file:
        predicted = list(csv.DictReader(file))  # by predicted rate in the mixture
    names = [row["behavior"] for row in predicted]
    keys = ("delta", "level", "share", "pairs")
    own = {key: np.array([float(row[key]) for row in predicted]) for key in keys}
    before, gamma = read_profile(profile, names)
    own |= {f"profile_{key}": values for key, values in before.items()}
    curve = read_curves(run, names)
    last = int(curve[TRAIN_SAMPLE, "step"][-1])
    for name, until in (("early", EARLY), ("epoch", last)):
        own[f"new_{name}"], own[f"new_{name}_error"] = read_new(run, names, until)
    for split in (TRAIN_SAMPLE, HELD_OUT):
        margin, count = curve[split, "margin"], curve[split, "n"][:, -1]
        own[f"{split}_margin"] = margin[:, -1]
        own[f"{split}_margin_error"] = curve[split, "margin_std"][:, -1] / np.sqrt(count)
        times = [time_to_threshold(curve[split, "step"], m, MARGIN_THRESHOLD) for m in margin]
        own[f"{split}_time"] = np.array([np.nan if t is None else t for t in times])
    share = curve[RATE_SAMPLE, "share"]
    own["run_share"] = share.mean(axis=1)
    own["run_share_error"] = share.std(axis=1, ddof=1) / np.sqrt(share.shape[1])
    dot, dot_error = read_gram(run, names)
    more = {f"gamma_{key}": values for key, values in gamma.items()}
    more |= {"dot": dot, "dot_error": dot_error, "last": np.array(last)}
    more |= {"step": curve[TRAIN_SAMPLE, "step"], "margin": curve[TRAIN_SAMPLE, "margin"]}
    more |= {key: curve[RATE_SAMPLE, key] for key in ("rate_obs", "rate_pred_opt")}
    return names, own, more


EXPLAINED = {
    "new_early": f"new pairs, first {EARLY} steps",
    "new_epoch": "new pairs, whole epoch",
    "train_sample_margin": "at the end, training sample",
    "eval_margin": "at the end, held-out",
}
EXPLAINING = {
    "delta": "delta of the features (theory)",
    "level": "alignment dbar.d_k/\\|dbar\\|, the head alone (theory, E15)",
    "profile_rate": "alignment <M_k, G>, all weights (profile)",
    "profile_coherence": "coherence of grad m, all weights (profile)",
    "profile_gnorm_m": "mean \\|grad m\\|, all weights (profile)",
    "run_share": "share of the steps' gradients, mean over the run",
}


def tables(names: list[str], own: Columns, more: Columns) -> str:
    """The generated part of the page."""

    def pm(key: str, k: int, digits: int = 2) -> str:
        return f"{own[key][k]:.{digits}f} ± {own[f'{key}_error'][k]:.{digits}f}"

    lines = [
        f"| | behavior | delta | share, predicted | share before training | new pairs, first "
        f"{EARLY} steps | new pairs, whole epoch | at the end, held-out | steps to 1 nat |",
        "|---" * 9 + "|",
    ]
    for k, name in enumerate(names):
        time = own["train_sample_time"][k]
        cells = [
            str(k + 1),
            shorten(name, 40),
            f"{own['delta'][k]:.2f}",
            f"{own['share'][k]:.3f}",
            pm("profile_share", k, 3),
            pm("new_early", k),
            pm("new_epoch", k),
            pm("eval_margin", k),
            "never" if np.isnan(time) else f"{time:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| rank correlation of | " + " | ".join(EXPLAINED.values()) + " |"]
    lines.append("|---" * (len(EXPLAINED) + 1) + "|")
    for key, words in EXPLAINING.items():
        found = [rank_correlation(own[key], own[target]) for target in EXPLAINED]
        cells = [f"{r:.2f} [{low:.2f}, {high:.2f}]" for r, low, high in found]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *facts(names, own, more)])


def facts(names: list[str], own: Columns, more: Columns) -> list[str]:
    """Sentences of numbers below the tables."""
    last = int(more["last"])
    times = own["train_sample_time"]
    off = ~np.eye(len(names), dtype=bool)
    cos, error = more["gamma_cos"], more["gamma_cos_error"]
    sure = (np.abs(cos) > 2 * error) & off
    dot, sem = more["dot"], more["dot_error"]
    seen = (np.abs(dot) > 2 * sem) & off
    rate, expected = more["rate_obs"].ravel(), more["rate_pred_opt"].ravel()
    known = np.isfinite(rate) & np.isfinite(expected)
    fit = np.corrcoef(rate[known], expected[known])[0, 1]
    slope = (rate[known] @ expected[known]) / (expected[known] @ expected[known])
    both = rank_correlation(own["level"], own["profile_rate"])
    r = np.corrcoef(own["share"], own["profile_share"])[0, 1]
    pairs = own["pairs"].astype(int)
    return [
        f"- Training pairs per behavior: {pairs.min()} to {pairs.max()}.",
        f"- Behaviors that come to {MARGIN_THRESHOLD:g} nat within {last} steps (training sample, "
        f"evaluated every 50): {np.isfinite(times).sum()} of {len(names)}. Gini index of the times "
        f"{gini(restricted_times(times, last)):.3f}; of the margins of new pairs over the epoch "
        f"{gini(own['new_epoch']):.3f}, at the end {gini(own['train_sample_margin']):.3f} "
        f"(Atkinson, epsilon 0.5: {atkinson(own['train_sample_margin']):.3f}) and held-out "
        f"{gini(own['eval_margin']):.3f}.",
        f"- The head's predicted shares against those of all weights before training (profile): "
        f"correlation {r:.2f}; ranks {both[0]:.2f} [{both[1]:.2f}, {both[2]:.2f}].",
        f"- Rates in the run, {known.sum()} (24 behaviors, measured steps): observed = {slope:.3f} "
        f"x optimizer-true (least squares), correlation {fit:.3f}.",
        f"- Shares in a step sum to one; their means over the run to {own['run_share'].sum():.4f}. "
        f"Their standard errors over the measured steps are {own['run_share_error'].min():.3f} to "
        f"{own['run_share_error'].max():.3f}.",
        f"- Interaction before training (profile): of {off.sum()} cosines of M_k and G_l, k not l, "
        f"{(sure & (cos > 0)).sum()} are above 0 by more than two standard errors and "
        f"{(sure & (cos < 0)).sum()} below; by chance {0.0228 * off.sum():.0f} each. In the "
        f"run, means over the measured steps: {(seen & (dot > 0)).sum()} above and "
        f"{(seen & (dot < 0)).sum()} below.",
    ]


def draw(names: list[str], own: Columns, more: Columns, folder: Path) -> None:
    """example-personas.png."""
    with picture_style() as plt:
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 8.2))
        figure.subplots_adjust(0.07, 0.07, 0.97, 0.96, wspace=0.26, hspace=0.32)
        shades = plt.get_cmap("viridis")(own["delta"] / own["delta"].max())
        curves, rates, shares, heat = axes.flat
        for line, shade in zip(more["margin"], shades, strict=True):
            curves.plot(more["step"], line, color=shade, linewidth=1.2)
        curves.axhline(MARGIN_THRESHOLD, color=SOFT, linewidth=0.8)
        curves.set(
            title="Margins of the training sample, coloured by delta",
            xlabel="optimizer step",
            ylabel="mean margin, nats",
        )
        _scatter(rates, own, "delta", "new_epoch", shades)
        rates.set(
            title="Margin of new pairs, mean over the epoch",
            xlabel="delta before training",
            ylabel="nats",
        )
        _scatter(shares, own, "share", "profile_share", shades)
        ends = np.array([min(0, own["share"].min()), own["share"].max()])
        shares.plot(ends, ends, color=SOFT, linestyle=":")
        shares.set(
            title="Share of the gradient before training",
            xlabel="predicted for the head alone (E17)",
            ylabel="all weights (profile)",
        )
        image = heat.imshow(more["gamma_cos"], cmap="RdBu", vmin=-1, vmax=1)
        heat.grid(False)
        ticks = np.arange(0, len(names), 2)
        heat.set_xticks(ticks, ticks + 1, fontsize=6.5)
        heat.set_yticks(ticks, ticks + 1, fontsize=6.5)
        heat.set(
            title="Who teaches whom: cosine of M_k and G_l before training",
            xlabel="l, which teaches",
            ylabel="k, which learns",
        )
        bar = figure.colorbar(image, ax=heat, shrink=0.8)
        bar.ax.tick_params(labelsize=6.5, labelcolor=INK)
        figure.savefig(folder / f"{PAGE.stem}.png", dpi=100)


def _scatter(axes: Any, own: Columns, x: str, y: str, shades: np.ndarray) -> None:
    look = {"fmt": "none", "ecolor": SOFT, "elinewidth": 0.8}
    axes.errorbar(own[x], own[y], own[f"{y}_error"], **look)
    axes.scatter(own[x], own[y], c=shades, s=26, zorder=3)
    for k, place in enumerate(zip(own[x], own[y], strict=True)):
        axes.annotate(str(k + 1), place, (3, 3), textcoords="offset points", fontsize=6.5)


def main() -> None:
    """Fill the page."""
    names, own, more = measure(*map(Path, sys.argv[1:]))
    draw(names, own, more, PAGE.parent)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    filled = tables(names, own, more)
    PAGE.write_text(f"{before}{BEGIN}\n{filled}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
