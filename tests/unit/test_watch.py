"""The live view of a run: what it reads, what it shows, how it is left."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len

from fastpref import cli
from fastpref.commands.watch import split_keys
from fastpref.dynamics import parts, schema
from fastpref.dynamics.parts import write_part
from fastpref.dynamics.recorder import MetricsLog, Recorder, read_jsonl
from fastpref.report import live
from fastpref.report.characters import Canvas, axis_range, sparkline
from fastpref.report.live import MAX_POINTS, LiveRun, Series, Tail, span
from fastpref.report.live_table import SORT_KEYS, View, demand_behaviors, fit, fit_apart, splits_of
from fastpref.report.live_view import screen

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "slow",
    "evil\x1b[2J\nname",
    "日本語の振る舞い" * 4,
    "a-name-that-is-too-long-" * 3,
    "x/margin",
]
EVERY, SAVE = 4, 8


def write_run(
    folder: Path,
    steps: int,
    *,
    names: list[str] = NAMES,
    records: bool = True,
    rates: bool = False,
    end: bool = False,
    total: int = 40,
) -> Path:
    """A run up to ``steps`` as `train` writes it; behavior k has the margin 0.1 (k+1) step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        "model_name_or_path: fastpref-tiny\nloss_type: [sigmoid]\nbeta: 0.1\n"
        f"learning_rate: 0.0003\nnum_train_epochs: 2.0\nmax_steps: {total}\neval_steps: {EVERY}\n"
    )
    recorder = Recorder(folder, 0, names, SAVE) if records else None
    if recorder:
        recorder.index(
            {"pair_id": k, "id": "", "behavior": name, "split": "train"}
            for k, name in enumerate(names)
        )
    metrics, perf = MetricsLog(folder / "metrics.jsonl"), MetricsLog(folder / "perf.jsonl")

    def evaluate(step: int) -> None:
        for split in ("train_sample", "eval"):
            half = 1.0 if split == "train_sample" else 0.5
            rows = [
                {
                    "behavior": name,
                    "n": 6 + k,
                    "margin": half * 0.1 * (k + 1) * step,
                    "reward_accuracy": 0.1 * (k + 1),
                    "output_accuracy": 0.05 * (k + 1),
                    "logp_chosen": -10.0 - (step if k == 0 else 0),
                    "head_gnorm_m": 2.0 + k,
                }
                for k, name in enumerate(names)
            ]
            complete = recorder.behaviors(step, split, rows) if recorder else rows
            line: dict[str, object] = {"step": step, "epoch": step / 20, "split": split}
            for row in complete:
                for metric in ("margin", "reward_accuracy", "output_accuracy", "logp_chosen"):
                    name = {"reward_accuracy": "rewards/accuracies", "logp_chosen": "logps/chosen"}
                    line[f"behavior/{row['behavior']}/{name.get(metric, metric)}"] = row[metric]
                line[f"behavior/{row['behavior']}/grad_norm"] = row["head_gnorm_m"]
                line[f"behavior/{row['behavior']}/update_rate"] = row.get("rate_obs")
            metrics.append(line)

    evaluate(0)
    for step in range(1, steps + 1):
        if recorder:
            recorder.pairs(step, "train", pair_id=np.arange(2), behavior=np.zeros(2, np.int64))
            recorder.step(step, loss=0.7)
            if rates:
                recorder.behaviors(
                    step,
                    "rate_sample",
                    [
                        {
                            "behavior": name,
                            "n": 4,
                            "margin": 0.1 * (k + 1) * step,
                            "rate_pred_opt": 0.09 * (k + 1),
                            "rate_pred_opt_error": 0.01,
                            "share": [0.5, -0.25, 0.25, 0.3, 0.2][k],
                            "gnorm_m": 30.0 + k,
                        }
                        for k, name in enumerate(names)
                    ],
                )
        if step % EVERY == 0:
            evaluate(step)
            train = {"loss": 0.7 - 0.01 * step, "rewards/accuracies": 0.5, "grad_norm": 1.0}
            metrics.append({"step": step, "epoch": step / 20, "split": "train", **train})
            clocks = {"steps": EVERY, "seconds": 8.0, "evaluation_seconds": 2.0}
            perf.append({"step": step, **clocks, "pairs_per_second": 64.0})
        if recorder:
            recorder.flush(step)
    if end:
        perf.append({"split": "train", "step": steps, "train_runtime": 1.0})
        if recorder:
            recorder.close(steps)
    if recorder:
        recorder._writer.join()  # parts are written in a thread of their own
    metrics.flush()
    perf.flush()
    return folder


def text(run: LiveRun, view: View | None = None, width: int = 80, height: int | None = None) -> str:
    run.look()
    return "\n".join(line.plain for line in screen(run, view or View(), width, height, True))


def body(shown: str, names: int = len(NAMES)) -> list[str]:
    """The lines of the table's rows."""
    lines = shown.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("  behavior")) + 1
    return lines[first : first + names]


# What is read


def test_series_is_bounded_sorted_and_keeps_its_ends() -> None:
    series = Series()
    rng = np.random.default_rng(0)
    for step in rng.permutation(5000).tolist():
        series.add(step, 2.0 * step)
    assert len(series.steps) <= MAX_POINTS
    assert series.steps == sorted(set(series.steps))
    assert series.values == [2.0 * step for step in series.steps]
    ordered = Series()
    for step in range(10000):
        ordered.add(step, float(step))
    assert ordered.steps[0] == 0 and ordered.steps[-1] == 9999 and ordered.last == 9999.0
    assert max(np.diff(ordered.steps)) <= 10000 / MAX_POINTS * 4
    ordered.add(9999, 1.0)
    assert ordered.last == 1.0 and ordered.steps.count(9999) == 1


def test_tail_gives_every_line_once_however_the_file_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_CHUNK", 7)
    rows = [{"step": k, "text": "é" * (k % 5)} for k in range(60)]
    path, source = tmp_path / "grows.jsonl", MetricsLog(tmp_path / "all.jsonl")
    for row in rows:
        source.append(row)
    source.flush()
    content = (tmp_path / "all.jsonl").read_bytes()
    tail, found, at = Tail(path), [], 0
    rng = np.random.default_rng(1)
    while at < len(content):
        assert not tail.restarted()
        found += list(tail.read())
        piece = int(rng.integers(0, 40))
        with path.open("ab") as file:
            file.write(content[at : at + piece])
        at += piece
    assert not tail.restarted()
    found += list(tail.read())
    assert found == rows and list(tail.read()) == []
    path.write_bytes(content[:30])
    assert tail.restarted() and list(tail.read()) == rows[:1]


def test_a_run_that_grows_gives_what_a_whole_read_gives(tmp_path: Path) -> None:
    watched = None
    for steps in (0, 3, 4, 17, 30, 40):
        folder = write_run(tmp_path / "run", steps, end=steps == 40)  # each anew: other files
        watched = watched or LiveRun(folder)
        watched.look()
        fresh = LiveRun(folder)
        fresh.look()
        for split in ("train_sample", "eval"):
            assert watched.curves[split].keys() == fresh.curves[split].keys() == set(NAMES)
            for name in NAMES:
                for column, series in fresh.curves[split][name].items():
                    other = watched.curves[split][name][column]
                    assert (other.steps, other.values) == (series.steps, series.values)
        assert watched.step == steps // EVERY * EVERY or steps == 40
        assert not watched.look()
    margins = watched.curves["eval"]["slow"]["margin"]
    assert margins.steps == list(range(0, 41, EVERY))
    assert margins.values == pytest.approx([0.05 * step for step in margins.steps])


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    run = LiveRun(write_run(tmp_path / "run", 20, records=False))
    run.look()
    own = run.curves["train_sample"]["x/margin"]
    assert own["margin"].last == pytest.approx(0.1 * 5 * 20)
    assert own["head_gnorm_m"].last == 6.0 and own["reward_accuracy"].last == 0.5
    assert len(body(text(run))) == len(NAMES)


def test_lines_of_probes_are_no_split_of_the_table(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 20, records=False)
    log = MetricsLog(tmp_path / "run/metrics.jsonl", resume_step=10**6)
    log.append({"step": 10, "split": schema.PROBES, "chosen/logp": -1.0, "behavior/b/squeezing": 1})
    log.flush()
    run = LiveRun(tmp_path / "run")
    run.look()
    assert run.curves and schema.PROBES not in run.curves


def test_pairs_are_not_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    for part in parts.list_parts(folder, "pairs"):
        part.write_bytes(b"nothing")
    text(LiveRun(folder))


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 23)
    watched = LiveRun(folder)
    watched.look()
    assert watched.step == 20
    MetricsLog(folder / "metrics.jsonl", resume_step=16).flush()
    Recorder(folder, 0, NAMES, SAVE, resume_step=16)
    watched.look()
    assert watched.step == 16
    assert watched.curves["eval"]["slow"]["margin"].steps == [0, 4, 8, 12, 16]


# States


def test_states(tmp_path: Path) -> None:
    starting = tmp_path / "starting"
    starting.mkdir()
    (starting / "config.yaml").write_text("max_steps: 10\neval_steps: 5\n")
    shown = text(LiveRun(starting))
    assert "starting" in shown and "no evaluation yet" in shown
    (starting / "config.yaml").write_text("eval_steps: 0\n")
    assert "eval_steps is 0" in text(LiveRun(starting))
    os.utime(starting / "config.yaml", (1, 1))
    assert "starting, silent for" in text(LiveRun(starting))

    going = LiveRun(write_run(tmp_path / "going", 20))
    shown = text(going)
    assert "running" in shown and "step 20 of 40 (50%)" in shown and "64 pairs/s" in shown
    assert "left 50 s" in shown  # 20 steps, each 2.5 s with its part of the evaluations
    for name in ("metrics.jsonl", "perf.jsonl"):
        os.utime(going.path / name, (time.time() - 7300, time.time() - 7300))
    assert "silent for 2:01:40 (a line came every 10 s): stopped, or busy" in text(going, width=140)

    ended = LiveRun(write_run(tmp_path / "ended", 40, end=True))
    shown = text(ended)
    assert "finished" in shown and "left" not in shown


def test_steps_of_the_run_from_its_epochs(tmp_path: Path) -> None:
    run = LiveRun(write_run(tmp_path / "run", 4, total=-1))
    run.look()
    assert run.total_steps == 40
    for pairs, batch in ((100, 32), (96, 32), (1, 8), (1001, 10)):
        per_epoch = -(-pairs // batch)
        for step in range(1, 3 * per_epoch + 1):
            epoch, within = divmod(step - 1, per_epoch)
            run.step, run.epoch = step, epoch + min((within + 1) * batch / pairs, 1.0)
            assert run.total_steps == 2 * per_epoch, (pairs, batch, step)


# What is shown


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 160, 300])
@pytest.mark.parametrize("height", [None, 8, 24, 60])
def test_every_size(tmp_path: Path, width: int, height: int | None) -> None:
    run = LiveRun(write_run(tmp_path / "run", 40, rates=True))
    lines = text(run, width=width, height=height).split("\n")
    assert max(map(cell_len, lines)) <= width
    assert height is None or len(lines) <= height
    assert "\x1b" not in "".join(lines)
    for line in screen(run, View(), width, height, unicode=False):
        assert line.plain.isascii() and cell_len(line.plain) <= width


def test_eighty_columns_hold_what_matters(tmp_path: Path) -> None:
    shown = text(LiveRun(write_run(tmp_path / "run", 40, rates=True)))
    heads = shown[: shown.index("  behavior")].splitlines()[-1]
    assert heads.split() == "margin rew out rate rate share grad margin".split()
    rows = {line[2:10].strip(): line for line in body(shown)}
    cells = rows["slow"].split()
    # margin, accuracies, rate seen (of the evaluations), predicted, share, norm, curve
    assert cells[2:-1] == ["4.00", "10%", "5%", "100", "90.0±10.0", "50%", "30.0"]
    assert cells[-1] == "▁▂▃▄▅▆▇█"


def test_no_error_of_an_older_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40, rates=True)
    assert "±" in text(LiveRun(folder))
    log = MetricsLog(folder / "metrics.jsonl", resume_step=40)
    line = {"behavior/slow/update_rate": 0.2, "behavior/slow/update_rate_predicted": 0.25}
    log.append({"step": 41, "epoch": 2.0, "split": "rate_sample", **line})
    log.flush()
    rows = [row for row in body(text(LiveRun(folder))) if "slow" in row]
    assert "250" in rows[0] and "200" in rows[0] and "±" not in rows[0]


def test_order_and_choice(tmp_path: Path) -> None:
    run = LiveRun(write_run(tmp_path / "run", 40, rates=True))

    def order(view: View, count: int = len(NAMES)) -> list[str]:
        return [line[2:6].strip() for line in body(text(run, view), count)]

    by_margin = order(View("margin"))
    assert by_margin[0] == "x/ma" and by_margin[-1] == "slow"
    assert order(View("margin", reverse=True)) == by_margin[::-1]
    assert order(View("share"))[0] == "slow" and order(View("share"))[-1] == "evil"
    assert order(View("name")) == [fit(n, 20)[:4].strip() for n in sorted(NAMES)]
    assert "by delta (not known here)" in text(run, View("delta"))
    assert order(View(behaviors=("slow",)), 1) == ["slow"]
    assert "eval after step 40" in text(run, View(split="eval"))
    known = ["name", "margin", "share"]
    assert View("margin").next_sort(1, known).sort == "share"
    assert View("margin").next_sort(-1, known).sort == "name"
    assert View("share").next_sort(1, known).sort == "name"


def test_rows_scroll(tmp_path: Path) -> None:
    names = [f"behavior-{k:02d}" for k in range(30)]
    run = LiveRun(write_run(tmp_path / "run", 8, names=names))
    shown = text(run, View("name"), height=24)
    assert "rows 1-7 of 30 by name" in shown and "q quit" in shown
    assert [line.split()[1] for line in body(shown, 7)] == names[:7]
    moved = text(run, View("name", offset=1000), height=24)
    assert [line.split()[-9] for line in body(moved, 7)] == names[-7:]
    whole = text(run, View("name"))
    assert all(name in whole for name in names)


def test_alarms(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40, names=["slow", "fast"])
    shown = text(LiveRun(folder))
    assert "! logp chosen fell by more than the margin rose: 1 of 2 (slow)" in shown
    assert "margin falls" not in shown
    log = MetricsLog(folder / "metrics.jsonl", resume_step=40)
    for k, step in enumerate((44, 48)):
        line = {"behavior/fast/margin": 1.0 - k, "behavior/slow/margin": 9.0 + k}
        log.append({"step": step, "epoch": 2.0, "split": "train_sample", **line})
    log.flush()
    shown = text(LiveRun(folder))
    assert "! margin falls, three evaluations in a row: 1 of 2 (fast)" in shown
    assert "squeezing" not in shown
    for step, alarm in ((52, 1), (56, 0)):
        log.append({"step": step, "split": schema.PROBES, "behavior/fast/squeezing": alarm})
        log.flush()
        run = LiveRun(folder)
        shown = text(run, width=120)
        assert ("the argmax rises: 1 of 2 (fast)" in shown) == bool(alarm)
        assert splits_of(run) == ["train_sample", "eval"]


def test_canvas_and_sparkline() -> None:
    assert sparkline([0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0], 8, True) == "▁▃▆█"
    assert sparkline([0, 70], [1.0, 1.0], 8, True) == "▅▅" and sparkline([], [], 8, True) == ""
    assert len(sparkline(list(range(100)), [float(k) for k in range(100)], 8, True)) == 8
    canvas = Canvas(10, 4, (0.0, 9.0), (0.0, 1.0), True)
    canvas.curve(0, [0, 9], [0.0, 1.0])
    rows = canvas.rows("ab")
    assert rows[3][0] == ("⡠", 0) and rows[0][9] == ("⠊", 0)
    assert all(any(mark != " " for mark, _ in row) for row in rows)
    assert rows[0][0] == (" ", -1)
    assert axis_range([2.0, 2.0]) == (1.0, 3.0) and axis_range([]) == (-0.5, 0.5)


def test_small_texts() -> None:
    assert [span(s) for s in (0, 0.4, 59, 187, 3765, 3600 * 51)] == [
        "0 s",
        "0.4 s",
        "59 s",
        "3:07",
        "1:02:45",
        "2 d 3 h",
    ]
    assert fit("abcdefghij", 6) == "abc…ij" and fit("ab", 4) == "ab  "
    assert fit("日本語の振る舞い", 7) == "日…舞い"[:4] + " " * (7 - cell_len("日…舞い"))
    twins = ["subscribes-to-utilitarianism", "openness", "subscribes-to-average-utilitarianism"]
    cut = fit_apart(twins, 18)
    assert len(set(cut)) == 3 and {cell_len(text) for text in cut} == {18}
    assert cut == ["subscribes-to-u…sm", "openness".ljust(18), "subscribes-to-a…sm"]
    assert fit_apart(["same", "same"], 3) == ["s…e"] * 2
    assert fit("a\x1b[31mb\nc", 20, unicode=False).strip() == "a?[31mb c"
    assert split_keys("s\x1b[A\x1b[6~\x1bOBq") == ["s", "\x1b[A", "\x1b[6~", "\x1b[B", "q"]
    assert split_keys("\x1b") == ["\x1b"] and split_keys("\x1b[") == ["\x1b["]


# Bad input


def complaint(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["watch", *args]) == 2
    out = capsys.readouterr()
    assert not out.out
    return out.err


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_run(tmp_path / "run", 8))
    assert "is not the folder of a run" in complaint(capsys, str(tmp_path))
    assert "is not the folder of a run" in complaint(capsys, str(tmp_path / "nowhere"))
    said = complaint(capsys, folder, "--sort", "margni")
    assert said == "error: sort 'margni': did you mean margin?\n"
    assert all(key in complaint(capsys, folder, "--sort", "q!") for key in SORT_KEYS[:10])
    said = complaint(capsys, folder, "--behaviors", "slw")
    assert said == "error: no behavior 'slw' in this run; did you mean slow?\n"
    assert "did you mean train_sample" in complaint(capsys, folder, "--split", "train_smple")
    assert "expected seconds above 0" in complaint(capsys, folder, "--interval", "0")
    assert "expected seconds above 0" in complaint(capsys, folder, "--interval", "nan")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write("{broken}\n")
    lines = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert f"metrics.jsonl:{lines}: not JSON" in complaint(capsys, folder)


def test_parts_of_names_choose_behaviors() -> None:
    assert demand_behaviors(["a"], ["a", "ab", "b"]) == ("a",)
    assert demand_behaviors(["B", "ab"], ["a", "ab", "b"]) == ("ab", "b")
    with pytest.raises(ValueError, match="expected one of a, ab, b"):
        demand_behaviors(["xyz"], ["a", "ab", "b"])
    with pytest.raises(ValueError, match="no behavior ''"):
        demand_behaviors([""], ["a", "ab", "b"])


def test_another_schema_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", 8)
    (part,) = parts.list_parts(folder, "behaviors")
    table = parts.read_part(part, "behaviors")
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 99)
    write_part(table, part, 8)
    monkeypatch.undo()
    said = complaint(capsys, str(folder))
    assert f"schema version 99, this fastpref reads version {schema.SCHEMA_VERSION}" in said


def test_unfinished_last_line_is_left_for_later(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 8)
    run = LiveRun(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "split": "train", "lo')
        file.flush()
        run.look()
        assert run.step == 8
        file.write('ss": 0.25}\n')
        file.flush()
    run.look()
    assert run.step == 12 and run.train["loss"].last == 0.25
    assert read_jsonl(folder / "metrics.jsonl")[-1]["loss"] == 0.25


# The command


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "fastpref", "watch", *args]


def environment(**more: str) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return keep | {"PYTHONPATH": path, "TERM": "xterm-256color", "LANG": "C.UTF-8"} | more


def test_a_pipe_gets_one_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    for more in ({}, {"COLUMNS": "120"}):
        ended = subprocess.run(
            command(str(folder)),
            env=environment(**more),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0 and not ended.stderr
        assert "\x1b" not in ended.stdout and "q quit" not in ended.stdout
        expected = text(LiveRun(folder), width=int(more.get("COLUMNS", 80)))
        assert [s.rstrip() for s in ended.stdout.splitlines()] == [
            s.rstrip() for s in expected.splitlines()
        ]


def test_neither_torch_nor_matplotlib_is_imported(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 8)
    code = (
        "import sys; from fastpref import cli; "
        f"assert cli.main(['watch', {str(folder)!r}]) == 0; "
        "print({'torch', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.splitlines()[-1] == "set()", ended.stderr


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, folder: Path, *args: str, **more: str) -> None:
        self.control, self.other = pty.openpty()
        self.size(24, 80)
        self.before = termios.tcgetattr(self.other)
        self.process = subprocess.Popen(
            command(str(folder), "--interval", "0.2", *args),
            stdin=self.other,
            stdout=self.other,
            stderr=self.other,
            env=environment(**more),
            start_new_session=True,
        )
        self.seen = ""

    def size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.control, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self.control, keys.encode())

    def until(self, holds: Callable[[str], object], since: int = 0) -> None:
        """Read until ``holds`` of what came after ``since``."""
        end = time.monotonic() + 60
        while not holds(self.seen[since:]):
            assert time.monotonic() < end, self.seen[since:]
            if select.select([self.control], [], [], 0.1)[0]:
                self.seen += os.read(self.control, 65536).decode(errors="replace")

    def left(self) -> int:
        """The exit code, once the process has ended; the terminal must be as it was."""
        end = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < end, self.seen
            if select.select([self.control], [], [], 0.05)[0]:
                self.seen += os.read(self.control, 65536).decode(errors="replace")
        while select.select([self.control], [], [], 0.2)[0]:
            self.seen += os.read(self.control, 65536).decode(errors="replace")
        assert termios.tcgetattr(self.other) == self.before
        os.close(self.control)
        os.close(self.other)
        return self.process.returncode


def test_keys_and_leaving(tmp_path: Path) -> None:
    terminal = Terminal(write_run(tmp_path / "run", 20))
    terminal.until(lambda seen: "by rate" in seen and "q quit" in seen)
    assert "\x1b[?1049h" in terminal.seen and "\x1b[3" in terminal.seen  # its own screen; colours
    at = len(terminal.seen)
    terminal.type("s")
    terminal.until(lambda seen: re.search(r"behaviors by (?!rate)", seen), at)
    at = len(terminal.seen)
    terminal.type("t")
    terminal.until(lambda seen: "eval after step 20" in seen, at)
    write_run(tmp_path / "run", 24)
    terminal.until(lambda seen: "step 24 of 40" in seen, at)
    terminal.type("q")
    assert terminal.left() == 0
    assert terminal.seen.rstrip().endswith("\x1b[?25h") or "\x1b[?1049l" in terminal.seen
    assert "Traceback" not in terminal.seen


def test_interrupt_resize_and_no_color(tmp_path: Path) -> None:
    terminal = Terminal(write_run(tmp_path / "run", 20), NO_COLOR="1")
    terminal.until(lambda seen: "q quit" in seen)
    assert not re.search(r"\x1b\[(\d+;)*3[0-7]m", terminal.seen)
    at = len(terminal.seen)
    terminal.size(50, 150)
    terminal.process.send_signal(signal.SIGWINCH)  # which a terminal sends its foreground process
    terminal.until(lambda seen: max(map(len, seen.splitlines()), default=0) > 100, at)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.left() == 0 and "Traceback" not in terminal.seen


def test_terminated(tmp_path: Path) -> None:
    terminal = Terminal(write_run(tmp_path / "run", 20))
    terminal.until(lambda seen: "q quit" in seen)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.left() == 143 and "\x1b[?1049l" in terminal.seen


def test_an_error_on_the_way_leaves_the_terminal_whole(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    terminal = Terminal(folder)
    terminal.until(lambda seen: "q quit" in seen)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("[]\n")
    assert terminal.left() == 2
    assert "error: " in terminal.seen and "expected an object with a step" in terminal.seen
