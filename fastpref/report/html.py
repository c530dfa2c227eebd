"""The report page: one HTML file that needs nothing else, no network, no script, no other file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.dynamics import groups, schema
from fastpref.report.plots import all_figures
from fastpref.report.probe_plots import probe_figures
from fastpref.report.svg import Figure, palette
from fastpref.report.tables import (
    SPLITS,
    RunFiles,
    Summary,
    columns_of,
    overall,
    read_run,
    summarize,
)

_SPLIT_NAMES = {schema.TRAIN_SAMPLE: "train", schema.HELD_OUT: "held-out"}

# What the head of the page shows; all other fields stand in the fold below it.
_MAIN_CONFIG = (
    "model_name_or_path",
    "dataset_name",
    "trainable",
    "loss_type",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "train_batch_size",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "dtype",
    "device",
    "seed",
)

CSS = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif;
  --page: #f6f7f9; --card: #fff; --text: #1c2127; --soft: #5c6670; --line: #dfe3e8;
  --faint: #e6e9ed; --muted: #9aa1a9; --bar: #d5e5f2; }
@media (prefers-color-scheme: dark) { :root { --page: #101316; --card: #181c20; --text: #e4e7eb;
  --soft: #9aa4ae; --line: #2c3238; --faint: #2a3036; --muted: #737c86; --bar: #1f3a50; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 var(--font); }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 16px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 16px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }
.tile b { display: block; font-size: 20px; font-weight: 600; line-height: 1.4;
  white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 4px 8px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 180px;
  overflow-wrap: anywhere; }
thead tr:first-child th { text-align: center; border-bottom: none; padding-bottom: 0; }
tbody tr:last-child td { border-bottom: none; }
td.bar { background: linear-gradient(to left, var(--bar) var(--w), transparent var(--w)); }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 2px 24px;
  margin: 0; font-size: 13px; }
dl div { display: flex; justify-content: space-between; gap: 12px;
  border-bottom: 1px solid var(--line); padding: 3px 0; }
dt { color: var(--soft); white-space: nowrap; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; margin-bottom: 8px; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 8px; }
svg { display: block; width: 100%; height: auto; color: var(--text); }
footer { color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } }
"""


def write_report(run: RunFiles | str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run and return its path, by default report.html in the run folder.

    An older page is replaced at once or not at all. Raises ValueError if `run` is no run folder.
    """
    files = run if isinstance(run, RunFiles) else read_run(run)
    path = files.path / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(page(files), encoding="utf-8")
    os.replace(temporary, path)
    return path


def page(run: RunFiles) -> str:
    """The page as text; it depends on the run's files alone."""
    rows = summarize(run)
    figures = [*all_figures(run, rows), *probe_figures(run.path)]
    title = escape(run.path.resolve().name)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}: fastpref report</title>",
        f"<style>{CSS}{_series_css(len(set(run.pairs) | {row.behavior for row in rows}))}</style>",
        "</head><body><main>",
        f"<header><h1>{title}</h1><p>{escape(_state(run, rows))}</p></header>",
        _tiles(run, rows),
        _configuration(run.config),
        _behaviors(run, rows),
        *map(_figure, figures),
        "<footer>Written by fastpref from the files of the run folder.</footer>",
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _series_css(count: int) -> str:
    """CSS variables --s0, --s1, ... of the behaviors' colours; at least one, for single curves."""

    def variables(dark: bool) -> str:
        colors = palette(max(count, 1), dark)
        return "".join(f"--s{i}:{color};" for i, color in enumerate(colors))

    return (
        f":root{{{variables(False)}}}\n"
        f"@media (prefers-color-scheme: dark){{:root{{{variables(True)}}}}}\n"
    )


def _state(run: RunFiles, rows: Sequence[Summary]) -> str:
    kind = "finished" if run.finished else "no final model yet: still running, or stopped"
    behaviors = f"{len(rows)} behavior{'' if len(rows) == 1 else 's'}" if rows else "no evaluation"
    return f"Preference training, {behaviors}, recorded up to step {run.last_step:,} ({kind})."


def _tiles(run: RunFiles, rows: Sequence[Summary]) -> str:
    tiles: list[tuple[str, str]] = []
    for split in reversed(SPLITS):
        means = overall(rows, split)
        if means:
            name = _SPLIT_NAMES[split]
            tiles += [
                (f"{100 * means['accuracy']:.1f} %", f"{name} accuracy"),
                (f"{means['margin']:#.3g} nats", f"{name} margin"),
                (f"{means['loss']:.4f}", f"{name} loss"),
            ]
    tiles.append((f"{run.last_step:,}", "optimizer steps"))
    for column, name in (("pairs", "pairs trained on"), ("tokens", "packed tokens")):
        total = np.nansum(run.steps.get(column, np.zeros(0)))
        if total:
            tiles.append((f"{total:,.0f}", name))
    tiles += _throughput(run.perf)
    return "".join(
        ['<section class="tiles">']
        + [f'<div class="tile"><b>{v}</b><span>{escape(n)}</span></div>' for v, n in tiles]
        + ["</section>"]
    )


def _throughput(perf: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Of the run's steady state, where it came to its end; else medians of the quantities per
    second that it logged of its training."""
    ended = [row for row in perf if row.get("seconds_per_step")]
    if ended:
        return _steady(ended[-1])
    perf = [row for row in perf if "split" not in row]  # those are of evaluations, or of all
    names = sorted({key for row in perf for key in row if key.endswith("_per_second")})
    tiles = []
    for name in names:
        values = [row[name] for row in perf if isinstance(row.get(name), (int, float))]
        if values:
            what = name.removesuffix("_per_second").replace("_", " ")
            tiles.append((f"{np.median(values):,.0f}", f"{what} / s, median"))
    return tiles


def _steady(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """From the last line of perf.jsonl."""
    warm = line.get("warm_up_steps") or 0
    rest = f", without the first {warm} steps" if line.get("steady_steps") else ""
    tiles = [(f"{line['seconds_per_step']:.3g} s", f"a step{rest}")]
    for name, what in (("pairs_per_second", "pairs / s"), ("tokens_per_second", "tokens / s")):
        if line.get(name):
            tiles.append((f"{line[name]:,.0f}", what))
    if line.get("tflops_per_second"):
        tiles.append((f"{line['tflops_per_second']:.3g}", "useful TFLOP / s"))
    for name, what in (
        ("mfu", "model FLOPs utilisation"),
        ("data_wait", "data wait"),
        ("record_overhead", "recording"),
    ):
        if line.get(name) is not None:
            tiles.append((f"{100 * line[name]:.1f} %", what))
    return tiles


def _configuration(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    main = {name: config[name] for name in _MAIN_CONFIG if name in config}
    rest = {name: value for name, value in config.items() if name not in main}
    fold = (
        f"<details><summary>all other settings ({len(rest)})</summary>{_pairs(rest)}</details>"
        if rest
        else ""
    )
    return f'<section class="card"><h2>Configuration</h2>{_pairs(main)}{fold}</section>'


def _pairs(values: Mapping[str, Any]) -> str:
    entries = []
    for name, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        shown = escape(text) if text else "&ndash;"
        entries.append(f"<div><dt>{escape(str(name))}</dt><dd>{shown}</dd></div>")
    return f"<dl>{''.join(entries)}</dl>"


def _behaviors(run: RunFiles, rows: Sequence[Summary]) -> str:
    if not rows:
        return (
            '<section class="card"><h2>Behaviors</h2><p>No evaluation is recorded (yet): there is '
            "nothing to show per behavior. Evaluations are recorded with record: true, at step 0 "
            "and every eval_steps.</p></section>"
        )
    columns = columns_of(rows)
    splits = list(dict.fromkeys(split for _, split, _ in columns))
    titles = list(dict.fromkeys(title for title, _, _ in columns))
    top = "".join(f'<th colspan="{len(splits)}">{escape(title)}</th>' for title in titles)
    second = "".join(f"<th>{_SPLIT_NAMES[split]}</th>" for _, split, _ in columns)
    rates = [abs(r) for row in rows for r in row.rate.values() if r is not None]
    largest = max(rates, default=0.0) or 1.0
    body = []
    for i, row in enumerate(rows):
        cells = []
        for title, split, texts in columns:
            text = "–" if texts[i] == "-" else texts[i].replace("-", "−")
            rate = row.rate.get(split) or 0.0
            bar = f' class="bar" style="--w:{100 * rate / largest:.1f}%"'
            cells.append(f"<td{bar if title.startswith('rate') and rate > 0 else ''}>{text}</td>")
        name = f'<span class="dot" style="background:var(--s{i})"></span>{escape(row.behavior)}'
        body.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    return (
        '<section class="card"><h2>Behaviors</h2>'
        "<p>At the last evaluation, highest update rate first. Accuracy: fraction of pairs with "
        "margin above 0. Rate: change of the mean margin per optimizer step, first to last "
        f"evaluation. Steps to: first evaluated step with a mean margin above "
        f"{groups.MARGIN_THRESHOLD:g} nat, with an accuracy above {groups.ACCURACY_THRESHOLD:g}; "
        "– = not reached. From records/behaviors.</p>"
        '<div class="scroll"><table><thead>'
        f"<tr><th></th>{top}</tr><tr><th>behavior</th>{second}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _figure(figure: Figure) -> str:
    return (
        f'<section class="card"><h2>{escape(figure.title)}</h2><figure>{figure.svg}'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure></section>"
    )
