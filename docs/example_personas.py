"""Writes the numbers and the picture of docs/example-personas.md from a run and a theory folder.

    python docs/example_personas.py RUN THEORY

RUN: a run folder whose records hold update rates; THEORY: what `fastpref theory` wrote on the same
pairs. Tables go between the marks of docs/example-personas.md, the picture to example-personas.png.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

from fastpref.dynamics.groups import MARGIN_THRESHOLD, time_to_threshold
from fastpref.dynamics.inequality import atkinson, gini, restricted_times
from fastpref.dynamics.recorder import read_records
from fastpref.dynamics.schema import HELD_OUT, RATE_SAMPLE, TRAIN, TRAIN_SAMPLE
from fastpref.report.pictures import INK, SOFT, picture_style, write_picture
from fastpref.report.tables import shorten

PAGE = Path(__file__).with_name("example-personas.md")
BEGIN, END = "<!-- numbers: begin (generated) -->", "<!-- numbers: end -->"
NUMBERS = (  # columns of `behaviors`
    *("n", "margin", "margin_std", "output_accuracy", "gnorm_m", "share", "coherence"),
    *("coherence_error", "rate_obs", "rate_pred_opt"),
)
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


def read_fresh(run: Path, names: list[str], last: int) -> tuple[np.ndarray, np.ndarray]:
    """(K,) mean margins of the pairs of the steps up to ``last``, each before its step, and their
    standard errors. In the first epoch the model has not seen them before."""
    table = read_records(run, "pairs", ["step", "split", "behavior", "margin"])
    split, behavior = (table[c].cast("string").to_numpy() for c in ("split", "behavior"))
    step, margin = table["step"].to_numpy(), table["margin"].to_numpy().astype(np.float64)
    kept = (split == TRAIN) & (step <= last)
    own = [margin[kept & (behavior == name)] for name in names]
    error = [values.std(ddof=1) / np.sqrt(len(values)) for values in own]
    return np.array([values.mean() for values in own]), np.array(error)


def read_gram(run: Path, names: list[str], last: int) -> tuple[np.ndarray, np.ndarray]:
    """(K, K) mean <M_k, G_l> over the measured steps up to ``last``, and its standard error over
    them; a step without pairs of l adds 0."""
    rows = read_records(run, "gram").to_pylist()
    steps = sorted({r["step"] for r in rows if r["step"] <= last})
    place = {name: k for k, name in enumerate(names)}
    dots = np.zeros((len(steps), len(names), len(names)))
    for r in rows:
        if r["step"] <= last:
            at = steps.index(r["step"]), place[r["behavior"]], place[r["other"]]
            dots[at] = r["dot"]
    return dots.mean(0), dots.std(0, ddof=1) / np.sqrt(len(steps))


def ranks(values: np.ndarray) -> np.ndarray:
    """(K,) ranks from 0, ties at their mean."""
    return np.array([((values < v).sum() + (values <= v).sum() - 1) / 2 for v in values])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Spearman's coefficient and its 95 % interval (Bonett and Wright 2000, Psychometrika 65)."""
    r = float(np.corrcoef(ranks(a), ranks(b))[0, 1])
    half = 1.96 * np.sqrt((1 + r**2 / 2) / (len(a) - 3))
    middle = np.arctanh(np.clip(r, -0.999999, 0.999999))
    return r, float(np.tanh(middle - half)), float(np.tanh(middle + half))


def measure(run: Path, theory: Path) -> tuple[list[str], Columns, dict[str, np.ndarray]]:
    """Names in the predicted order; (K,) columns; and what the picture needs besides."""
    with (theory / "behaviors.csv").open() as file:
        predicted = list(csv.DictReader(file))  # by predicted rate in the mixture
    names = [row["behavior"] for row in predicted]
    own: Columns = {
        key: np.array([float(row[key]) for row in predicted])
        for key in ("delta", "level", "share", "mixture_rate", "pairs", "coherence")
    }
    curve = read_curves(run, names)
    steps = curve[RATE_SAMPLE, "step"]
    early = steps <= EARLY
    start = curve[RATE_SAMPLE, "step"] == steps[0]

    def mean(column: str, where: np.ndarray) -> np.ndarray:
        return np.nanmean(curve[RATE_SAMPLE, column][:, where], axis=1)

    def error(column: str, where: np.ndarray) -> np.ndarray:
        values = curve[RATE_SAMPLE, column][:, where]
        return np.nanstd(values, axis=1, ddof=1) / np.sqrt((~np.isnan(values)).sum(axis=1))

    everywhere = np.ones(len(steps), bool)
    for name, where in (("early", early), ("all", everywhere)):
        for column in ("rate_obs", "rate_pred_opt", "share"):
            own[f"{column}_{name}"] = mean(column, where)
            own[f"{column}_{name}_error"] = error(column, where)
    own["coherence_start"] = mean("coherence", start)
    own["coherence_start_error"] = mean("coherence_error", start)
    own["gnorm_start"] = mean("gnorm_m", start)
    for split in (TRAIN_SAMPLE, HELD_OUT):
        at = curve[split, "step"]
        margin = curve[split, "margin"]
        own[f"{split}_margin"] = margin[:, -1]
        spread = curve[split, "margin_std"][:, -1] / np.sqrt(curve[split, "n"][:, -1])
        own[f"{split}_margin_error"] = spread
        times = [time_to_threshold(at, line, MARGIN_THRESHOLD) for line in margin]
        own[f"{split}_time"] = np.array([np.nan if t is None else t for t in times])
        own[f"{split}_accuracy"] = curve[split, "output_accuracy"][:, -1]
    for name, last in (("early", EARLY), ("epoch", int(curve[TRAIN_SAMPLE, "step"][-1]))):
        own[f"fresh_{name}"], own[f"fresh_{name}_error"] = read_fresh(run, names, last)
    own["horizon"] = np.full(len(names), float(curve[TRAIN_SAMPLE, "step"][-1]))
    dot, dot_error = read_gram(run, names, EARLY)
    own["taught"] = dot.sum(axis=1)  # <M_k, G>
    more = {"dot": dot, "dot_error": dot_error}
    more |= {"step": curve[TRAIN_SAMPLE, "step"], "margin": curve[TRAIN_SAMPLE, "margin"]}
    return names, own, more


EXPLAINED = {
    "fresh_early": f"mean margin of new pairs, first {EARLY} steps",
    "fresh_epoch": "mean margin of new pairs, whole epoch",
    "train_sample_margin": "margin at the end, training sample",
    "eval_margin": "margin at the end, held-out",
}
EXPLAINING = {
    "delta": "delta, head's features before training",
    "level": "<dbar, d_k>/|dbar|, predicted priority (E15)",
    "coherence_start": "coherence of grad m, whole network, step 1",
    "gnorm_start": "mean |grad m|, whole network, step 1",
    "taught": f"<M_k, G>, whole network, mean of the first {EARLY} steps",
}


def tables(names: list[str], own: Columns, more: dict[str, np.ndarray]) -> str:
    """The generated part of the page."""
    head = (
        f"| | behavior | delta | predicted share | observed share | new pairs, first {EARLY} steps "
        "| new pairs, whole epoch | at the end, held-out | steps to 1 nat | coherence |\n"
        + "|---" * 10
        + "|\n"
    )
    lines = []
    for k, name in enumerate(names):
        time = own["train_sample_time"][k]
        lines.append(
            f"| {k + 1} | {shorten(name, 40)} | {own['delta'][k]:.2f} | {own['share'][k]:.3f} "
            f"| {own['share_early'][k]:.3f} ± {own['share_early_error'][k]:.3f} "
            f"| {own['fresh_early'][k]:.2f} ± {own['fresh_early_error'][k]:.2f} "
            f"| {own['fresh_epoch'][k]:.2f} ± {own['fresh_epoch_error'][k]:.2f} "
            f"| {own['eval_margin'][k]:.2f} ± {own['eval_margin_error'][k]:.2f} "
            f"| {'never' if np.isnan(time) else int(time)} "
            f"| {own['coherence_start'][k]:.3f} ± {own['coherence_start_error'][k]:.3f} |"
        )
    correlations = ["| rank correlation with | " + " | ".join(EXPLAINED.values()) + " |"]
    correlations.append("|---" * (len(EXPLAINED) + 1) + "|")
    for key, words in EXPLAINING.items():
        cells = []
        for target in EXPLAINED:
            r, low, high = rank_correlation(own[key], own[target])
            cells.append(f"{r:.2f} [{low:.2f}, {high:.2f}]")
        correlations.append(f"| {words} | " + " | ".join(cells) + " |")
    horizon = own["horizon"][0]
    times = restricted_times(own["train_sample_time"], horizon)
    ratio = own["rate_pred_opt_all"] / own["rate_obs_all"]
    off = ~np.eye(len(names), dtype=bool)
    dot, error = more["dot"], more["dot_error"]
    sure = np.abs(dot) > 2 * error
    own_part = np.diag(dot) / own["taught"]
    facts = [
        f"- Behaviors that come to {MARGIN_THRESHOLD:g} nat within {horizon:.0f} steps (training "
        f"sample): {np.isfinite(own['train_sample_time']).sum()} of {len(names)}; Gini index of "
        f"the times {gini(times):.3f}, of the margins at the end "
        f"{gini(own['train_sample_margin']):.3f} (Atkinson, epsilon 0.5: "
        f"{atkinson(own['train_sample_margin']):.3f}), held-out {gini(own['eval_margin']):.3f}.",
        f"- Mean shares sum to {own['share_all'].sum():.6f}; below 0 in the first {EARLY} steps: "
        f"{(own['share_early'] < 0).sum()} behaviors.",
        f"- Optimizer-true over observed rate, means over all measured steps: median "
        f"{np.median(ratio):.3f}, from {ratio.min():.2f} to {ratio.max():.2f}.",
        f"- Interaction in the first {EARLY} steps: {(dot[off] > 0).mean():.0%} of the "
        f"{off.sum()} entries off the diagonal are positive, {(sure & off & (dot > 0)).sum()} by "
        f"more than two standard errors; {(sure & off & (dot < 0)).sum()} are negative by as much. "
        f"Of a behavior's <M_k, G> its own pairs give {np.median(own_part):.0%} (median).",
    ]
    return "\n".join([head + "\n".join(lines), "", *correlations, "", *facts])


def draw(names: list[str], own: Columns, more: dict[str, np.ndarray], folder: Path) -> None:
    """example-personas.png."""
    with picture_style() as plt:
        figure, axes = plt.subplots(2, 2, figsize=(9.6, 8.2))
        figure.subplots_adjust(0.07, 0.07, 0.97, 0.96, wspace=0.26, hspace=0.32)
        shades = plt.get_cmap("viridis")
        depth = own["delta"] / own["delta"].max()
        curves, rates, shares, heat = axes.flat
        for line, shade in zip(more["margin"], depth, strict=True):
            curves.plot(more["step"], line, color=shades(shade), linewidth=1.2)
        curves.axhline(MARGIN_THRESHOLD, color=SOFT, linewidth=0.8)
        curves.set(
            title="Margins of the training sample, coloured by delta",
            xlabel="optimizer step",
            ylabel="mean margin, nats",
        )
        rates.errorbar(
            own["delta"],
            own["fresh_epoch"],
            own["fresh_epoch_error"],
            fmt="none",
            ecolor=SOFT,
            elinewidth=0.8,
        )
        rates.scatter(own["delta"], own["fresh_epoch"], c=shades(depth), s=26, zorder=3)
        for k in range(len(names)):
            place = own["delta"][k], own["fresh_epoch"][k]
            rates.annotate(str(k + 1), place, (3, 3), textcoords="offset points", fontsize=6.5)
        rates.set(
            title="Margin of new pairs, mean over the epoch",
            xlabel="delta before training",
            ylabel="nats",
        )
        shares.errorbar(
            own["share"], own["share_early"], own["share_early_error"], fmt="none",
            ecolor=SOFT, elinewidth=0.8,
        )  # fmt: skip
        shares.scatter(own["share"], own["share_early"], c=shades(depth), s=26, zorder=3)
        ends = np.array([min(0, own["share"].min()), own["share"].max()])
        shares.plot(ends, ends, color=SOFT, linestyle=":")
        shares.set(
            title=f"Share of the step's gradient, first {EARLY} steps",
            xlabel="predicted, head alone (E17)",
            ylabel="observed, all weights",
        )
        top = np.quantile(np.abs(more["dot"]), 0.98)
        image = heat.imshow(more["dot"], cmap="RdBu", vmin=-top, vmax=top)
        heat.grid(False)
        ticks = np.arange(0, len(names), 2)
        heat.set_xticks(ticks, ticks + 1, fontsize=6.5)
        heat.set_yticks(ticks, ticks + 1, fontsize=6.5)
        heat.set(
            title=f"Who teaches whom: <M_k, G_l>, first {EARLY} steps",
            xlabel="l, which teaches",
            ylabel="k, which learns",
        )
        bar = figure.colorbar(image, ax=heat, shrink=0.8)
        bar.ax.tick_params(labelsize=6.5, labelcolor=INK)
        for path in write_picture(figure, folder, PAGE.stem):
            if path.suffix == ".svg":
                path.unlink()


def main() -> None:
    """Fill the page."""
    run, theory = map(Path, sys.argv[1:])
    names, own, more = measure(run, theory)
    draw(names, own, more, PAGE.parent)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    filled = tables(names, own, more)
    PAGE.write_text(f"{before}{BEGIN}\n{filled}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
