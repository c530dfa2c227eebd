"""The report: the numbers of its table against plain loops, and a page that stands on its own."""

from __future__ import annotations

import argparse
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fastpref.commands import report as command
from fastpref.dynamics.groups import behavior_rows
from fastpref.dynamics.recorder import MetricsLog, Recorder, read_records
from fastpref.report.html import page, write_report
from fastpref.report.plots import spread
from fastpref.report.svg import FEW, palette
from fastpref.report.tables import (
    behavior_table,
    decimals,
    overall,
    read_run,
    shorten,
    summarize,
)

STEPS, EVERY = 20, 4
NASTY = '<b>$x_1$ & "co"</b> \n'


def make_run(folder: Path, names: list[str], *, held_out: bool = True) -> Path:
    """A run with noisy margins that grow by 0.1 (k+1)/K nats a step for behavior k."""
    rng = np.random.default_rng(3)
    count = len(names)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "model_name_or_path: fastpref-tiny\nbeta: 0.1\ndataset_name: [a.jsonl, b.jsonl]\n"
        "output_dir: <script>alert(1)</script>\n"
    )
    recorder = Recorder(folder, 0, names, 8)
    metrics, perf = MetricsLog(folder / "metrics.jsonl"), MetricsLog(folder / "perf.jsonl")

    def margins(behavior: np.ndarray, step: int) -> np.ndarray:
        return 0.1 * step * (behavior + 1) / count + 0.05 * step * rng.normal(size=behavior.size)

    def evaluate(step: int) -> None:
        for split in ["train_sample", *(["eval"] if held_out else [])]:
            behavior = np.repeat(np.arange(count), 6)
            margin = margins(behavior, step)
            rows = behavior_rows(
                names,
                behavior,
                margin=margin,
                loss=np.log1p(np.exp(-0.1 * margin)),
                logp_chosen=margin - 1,
                logp_rejected=-margin,
            )
            recorder.behaviors(step, split, rows)

    evaluate(0)
    for step in range(1, STEPS + 1):
        behavior = rng.integers(0, count, 5)
        recorder.pairs(
            step,
            "train",
            pair_id=rng.integers(0, 1 << 60, 5),
            behavior=behavior,
            margin=margins(behavior, step),
            head_gnorm_m=rng.gamma(9.0, size=5),
        )
        recorder.step(step, loss=0.7 - 0.01 * step, lr=1e-3, grad_norm=1.0, pairs=5, tokens=100)
        if step % EVERY == 0:
            evaluate(step)
            metrics.append({"step": step, "split": "train", "loss": 0.5})
            perf.append({"step": step, "pairs_per_second": 100.0 + step})
        recorder.flush(step)
    recorder.close(STEPS)
    metrics.close()
    perf.close()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ["slow", NASTY, "a-behavior-with-a-name-that-is-much-too-long-for-a-terminal-column"]
    return make_run(tmp_path_factory.mktemp("report") / "run", names)


def test_summaries_are_those_of_a_plain_loop(run: Path) -> None:
    rows = {row.behavior: row for row in summarize(read_run(run))}
    records = read_records(run, "behaviors").to_pylist()
    assert set(rows) == {record["behavior"] for record in records}
    for name, row in rows.items():
        for split in ("train_sample", "eval"):
            mine = [r for r in records if r["behavior"] == name and r["split"] == split]
            mine.sort(key=lambda r: r["step"])
            assert row.margin[split] == mine[-1]["margin"]
            assert row.accuracy[split] == mine[-1]["reward_accuracy"]
            assert row.output_accuracy[split] == mine[-1]["output_accuracy"]
            rise = mine[-1]["margin"] - mine[0]["margin"]
            assert row.rate[split] == pytest.approx(rise / STEPS, rel=1e-12)
            # The rates of the intervals add up to it.
            total = sum(r["rate_obs"] * EVERY for r in mine[1:])
            assert row.rate[split] == pytest.approx(total / STEPS, rel=1e-9)
            reached = [r["step"] for r in mine if r["margin"] > 1.0]
            assert row.to_margin[split] == (reached[0] if reached else None)
            right = [r["step"] for r in mine if r["reward_accuracy"] > 0.9]
            assert row.to_accuracy[split] == (right[0] if right else None)
    assert any(row.to_margin["eval"] is None for row in rows.values())
    assert any(row.to_margin["eval"] is not None for row in rows.values())


def test_summaries_go_from_fast_to_slow(run: Path) -> None:
    rates = [row.rate["train_sample"] for row in summarize(read_run(run))]
    assert rates == sorted(rates, key=lambda rate: -(rate or 0.0))
    assert summarize(read_run(run))[-1].behavior == "slow"


def test_overall_weighs_by_pairs(run: Path) -> None:
    rows = summarize(read_run(run))
    total = sum(row.n["eval"] for row in rows)
    expected = sum(row.margin["eval"] * row.n["eval"] for row in rows) / total
    assert overall(rows, "eval")["margin"] == pytest.approx(expected, rel=1e-12)
    assert overall(rows, "nothing") == {}


def test_terminal_table(run: Path) -> None:
    rows = summarize(read_run(run))
    lines = behavior_table(run).splitlines()
    assert max(map(len, lines)) <= 110
    assert len(lines) == 3 + len(rows)
    assert lines[1].startswith("behavior") and lines[1].count("held") == 5
    for line, row in zip(lines[3:], rows, strict=True):
        cells = line.split()[-10:]
        assert float(cells[0]) == pytest.approx(row.margin["train_sample"], abs=0.006)
        assert float(cells[3]) == pytest.approx(row.accuracy["eval"], abs=0.0006)
        assert cells[7] == ("-" if row.to_margin["eval"] is None else str(row.to_margin["eval"]))
    # Right-aligned columns: every line that is full ends where the others end.
    assert len({len(line) for line in lines[2:]}) == 1
    assert "…" in behavior_table(run) and "<b>$x_1$" in behavior_table(run)
    assert max(map(len, behavior_table(run, width=90).splitlines())) <= 90


def test_small_texts() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcde…hijk"
    assert shorten(" two\n lines ", 20) == "two lines"
    assert [decimals([v]) for v in (123.0, 12.0, 1.2, 0.12, 0.0012, 0.0)] == [0, 1, 2, 3, 5, 2]
    assert decimals([None, float("nan"), 0.5]) == 3


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_labels_are_spread_and_stay_near(count: int) -> None:
    wanted = np.sort(np.random.default_rng(count).random(count))
    gap = 0.8 / count
    places = spread(wanted, gap)
    assert places.min() >= -1e-12 and places.max() <= 1 + 1e-12
    assert np.all(np.diff(places) >= gap - 1e-9)
    # No other spacing that a search finds is nearer to what was wanted.
    cost = np.sum((places - wanted) ** 2)
    rng = np.random.default_rng(0)
    for _ in range(300):
        other = places + rng.normal(scale=rng.choice([1e-3, 1e-2]), size=count)
        if other.min() >= 0 and other.max() <= 1 and np.all(np.diff(other) >= gap):
            assert np.sum((other - wanted) ** 2) >= cost - 1e-9


class Checker(HTMLParser):
    """Collects ids, references, tags and their balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "xlink:href", "data", "action"):
                self.references.append(str(value))
            self.references += re.findall(r"url\(([^)]*)\)", str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_stands_on_its_own(run: Path) -> None:
    text = page(read_run(run))
    checked = Checker(text)
    assert checked.open == []
    assert len(set(checked.ids)) == len(checked.ids)
    assert checked.references and all(r.startswith("#") for r in checked.references)
    assert {r[1:] for r in checked.references} <= set(checked.ids)
    assert not {"script", "link", "img", "iframe", "b$x"} & set(checked.tags)
    assert "url(" not in text.split("</style>")[0]
    # One plot per quantity, head norms, histograms, optimizer steps.
    assert checked.tags.count("svg") == checked.tags.count("figcaption") == 7
    for word in ("held-out accuracy", "fastpref-tiny", "a.jsonl, b.jsonl", "pairs / s"):
        assert word in text


def test_names_are_escaped_and_not_typeset(run: Path) -> None:
    text = page(read_run(run))
    assert "<b>$x_1$" not in text and "<script>" not in text
    # In the table; in the figures matplotlib writes the quotes as they are.
    assert text.count("&lt;b&gt;$x_1$ &amp; ") >= 5


def test_colours_follow_the_page(run: Path) -> None:
    text = page(read_run(run))
    used = {int(n) for n in re.findall(r"var\(--s(\d+)\)", text)}
    light, dark = text.split("@media (prefers-color-scheme: dark){:root{")[:2]
    for k in used:
        assert f"--s{k}:#" in light and f"--s{k}:#" in dark
    assert used == {0, 1, 2}
    assert not re.search(r"#(0102|fe00)", text), "a stand-in colour was left in the page"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("count", [1, FEW, FEW + 1, 135])
def test_colours_differ_from_each_other_and_from_the_page(count: int, dark: bool) -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    colors = palette(count, dark)
    assert len(set(colors)) == count or count > 100
    background = luminance("#181c20" if dark else "#ffffff")
    for color in colors:
        low, high = sorted((background, luminance(color)))
        assert (high + 0.05) / (low + 0.05) >= 2.0  # WCAG contrast; lines and bold marks


def test_the_page_is_the_same_every_time(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert page(read_run(run)) == page(read_run(tmp_path / "run"))


def test_many_behaviors_have_panels(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "many", [f"behavior-{k:02d}" for k in range(45)])
    text = page(read_run(folder))
    checked = Checker(text)
    assert len(set(checked.ids)) == len(checked.ids)
    assert checked.tags.count("svg") == 8
    assert "shown: the 15 fastest and 15 slowest of 45 behaviors" in text
    assert "named: the 20 fastest and 20 slowest of 45 behaviors" in text
    assert "--s44:#" in text


def test_a_run_that_was_just_killed_or_begun(run: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("beta: 0.1\n")
    (begun / "metrics.jsonl").write_text('{"step": 7, "loss": 0.6}\n{"step": 8, "lo')
    text = page(read_run(begun))
    assert "recorded up to step 7" in text and "No evaluation is recorded" in text
    with pytest.raises(ValueError, match="no evaluation is recorded"):
        behavior_table(begun)

    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    for path in (killed / "records").rglob("part-0000001*"):
        path.unlink()
    (killed / "records" / "steps" / "part-00000017-0000.parquet.partial").write_bytes(b"half")
    (killed / "perf.jsonl").unlink()
    assert "still running, or stopped" in page(read_run(killed))
    (killed / "model.safetensors").touch()
    assert "(finished)" in page(read_run(killed))


def test_without_held_out_pairs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "train-only", ["a", "b"], held_out=False)
    table = behavior_table(folder)
    assert "held" not in table and table.splitlines()[1].count("train") == 5
    assert "held-out accuracy" not in page(read_run(folder))


def test_command_writes_and_prints(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "new" / "page.html"
    assert command.run(parser.parse_args([str(run), "--out", str(out)])) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(behavior_table(run)) and f"report: {out}" in printed
    assert out.read_text(encoding="utf-8") == page(read_run(run))
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert write_report(run) == run / "report.html"
    (run / "report.html").unlink()
    with pytest.raises(ValueError, match="nothing is not the folder of a run"):
        command.run(parser.parse_args([str(tmp_path / "nothing")]))
