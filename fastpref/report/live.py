"""A run while it runs: what its files say so far, followed in bounded memory.

What was appended to metrics.jsonl and perf.jsonl since the last look is read, every part of the
per-behavior records once, and of the pairs nothing. So a look costs the run a few `stat` calls.
Without torch: it may run on another machine that sees the folder.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastpref.dynamics import schema
from fastpref.dynamics.parts import list_parts, read_part
from fastpref.report.tables import demand_run

MAX_POINTS = 512  # of a curve
_CHUNK = 1 << 20  # bytes of a file that are read at a time
_WINDOWS = 20  # lines of perf.jsonl that the time left is estimated from

# Metrics of a behavior, and the column of the `behaviors` table that means the same; a metric with
# the name of a column is that column.
_METRICS = {c.name: c.name for c in schema.TABLES["behaviors"].columns} | {
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "logps/chosen": "logp_chosen",
    "grad_norm": "head_gnorm_m",
    "update_rate": "rate_obs",
    "update_rate_predicted": "rate_pred_opt",
    "squeezing": "squeezing",  # of probes
}


class Series:
    """A curve: values by step, at most MAX_POINTS of them, the first and the newest among them.

    Once there are more, points closer to one another than a part of the curve's length go.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self._gap = 0.0  # steps that two points are apart at least, but for the newest

    def add(self, step: int, value: float) -> None:
        """Put a point in its place; a second value of a step replaces the first."""
        steps, values = self.steps, self.values
        at = bisect.bisect_left(steps, step)
        if at < len(steps) and steps[at] == step:
            values[at] = value
            return
        if at == len(steps) and at > 1 and steps[-1] - steps[-2] < self._gap:
            steps[-1], values[-1] = step, value
            return
        if 0 < at < len(steps) and min(step - steps[at - 1], steps[at] - step) < self._gap:
            return
        steps.insert(at, step)
        values.insert(at, value)
        if len(steps) > MAX_POINTS:
            self._thin()

    def _thin(self) -> None:
        points = list(zip(self.steps, self.values, strict=True))
        self._gap = 2 * (self.steps[-1] - self.steps[0]) / MAX_POINTS
        kept = points[:1]
        for point in points[1:-1]:
            if point[0] - kept[-1][0] >= self._gap:
                kept.append(point)
        kept.append(points[-1])
        self.steps, self.values = [s for s, _ in kept], [v for _, v in kept]

    @property
    def last(self) -> float | None:
        """The newest value, None where there is none."""
        return self.values[-1] if self.values else None


class Tail:
    """The JSON lines of a file that grows: each whole line once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None  # device and inode
        self._at = 0  # bytes read
        self._line = 0

    def restarted(self) -> bool:
        """Whether the file is another one than before, or was cut; reading then begins anew."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            again = self._file is not None
            self._file, self._at, self._line = None, 0, 0
            return again
        own = (found.st_dev, found.st_ino)
        again = self._file is not None and (own != self._file or found.st_size < self._at)
        if again:
            self._at = self._line = 0
        self._file = own
        return again

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines since the last call; ValueError for a whole line that is no JSON object."""
        if self._file is None:
            return
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._at)
            rest = b""
            while block := file.read(_CHUNK):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    self._at += len(line) + 1
                    self._line += 1
                    if line.strip():
                        yield self._parsed(line)

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{self.path}:{self._line}: not JSON ({error}): {line[:80]!r}; take the line out, "
                "or give the folder of another run"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(
                f"{self.path}:{self._line}: expected an object with a step, got {line[:80]!r}"
            )
        return row


Curves = dict[str, dict[str, Series]]  # [behavior][column]


@dataclass
class LiveRun:
    """What is known of a run. `look` brings it up to date.

    curves[split][behavior][column]: columns of the `behaviors` table, and reward_margin; squeezed:
    behaviors that the last line of probes tells of, and whether they are; train: the
    curves of metrics.jsonl's split of that name. Raises ValueError where ``path`` is no run, and,
    in `look`, where a file is not what it should be or another schema version wrote it.
    """

    path: Path
    config: dict[str, Any] = field(init=False, default_factory=dict)
    curves: dict[str, Curves] = field(init=False)
    squeezed: dict[str, bool] = field(init=False)
    train: dict[str, Series] = field(init=False)
    perf: dict[str, Any] = field(init=False)  # the last line about steps
    step: int = field(init=False)
    epoch: float = field(init=False)
    ended: bool = field(init=False)  # the run said that it came to its end
    _windows: deque[tuple[float, float]] = field(init=False)  # steps, seconds
    _read: dict[Path, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        demand_run(self.path)
        self._metrics = Tail(self.path / "metrics.jsonl")
        self._perf = Tail(self.path / "perf.jsonl")
        self._config_time = -1
        self._forget()

    def _forget(self) -> None:
        self.curves, self.squeezed, self.train, self.perf = {}, {}, {}, {}
        self.step, self.epoch, self.ended = 0, 0.0, False
        self._windows, self._read = deque(maxlen=_WINDOWS), {}

    def look(self) -> bool:
        """Read what is new; whether anything was."""
        self._read_config()
        again = [tail.restarted() for tail in (self._metrics, self._perf)]
        if any(again):  # resumed or begun anew: what came after the checkpoint does not count
            self._forget()
            self._metrics, self._perf = Tail(self._metrics.path), Tail(self._perf.path)
            for tail in (self._metrics, self._perf):
                tail.restarted()
        new = any(again)
        for row in self._metrics.read():
            self._take_metrics(row)
            new = True
        for row in self._perf.read():
            self._take_perf(row)
            new = True
        return self._take_records() or new

    def _read_config(self) -> None:
        path = self.path / "config.yaml"
        try:
            changed = os.stat(path).st_mtime_ns
            if changed != self._config_time:
                found = yaml.safe_load(path.read_text(encoding="utf-8"))
                self.config = found if isinstance(found, dict) else {}
                self._config_time = changed
        except FileNotFoundError:
            self.config = {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from None

    def _take_metrics(self, row: Mapping[str, Any]) -> None:
        step, split = row["step"], str(row.get("split"))
        if step >= self.step:
            self.step = step
            self.epoch = row.get("epoch") or self.epoch
        for key, value in row.items():
            if key in ("step", "epoch", "split") or not _is_number(value):
                continue
            if split == schema.TRAIN:
                self.train.setdefault(key, Series()).add(step, value)
            elif key.startswith("behavior/"):
                name, column = _split_metric(key)
                if split == schema.PROBES:
                    self.squeezed[name] = column == "squeezing" and value > 0
                elif column:
                    self._add(split, name, column, step, value)

    def _add(self, split: str, behavior: str, column: str, step: int, value: float) -> None:
        own = self.curves.setdefault(split, {}).setdefault(behavior, {})
        own.setdefault(column, Series()).add(step, value)

    def _take_perf(self, row: Mapping[str, Any]) -> None:
        self.ended = "train_runtime" in row
        if _is_number(row.get("steps")) and _is_number(row.get("seconds")):
            self.perf = dict(row)
            self._windows.append((row["steps"], row["seconds"] + (row["evaluation_seconds"] or 0)))

    def _take_records(self) -> bool:
        """Parts of `behaviors` that are new or were completed since."""
        wanted = [c.name for c in schema.TABLES["behaviors"].columns]
        new = False
        for part in list_parts(self.path, "behaviors"):
            try:
                found = os.stat(part)
                mark = (found.st_mtime_ns, found.st_size)
                if self._read.get(part) == mark:
                    continue
                table = read_part(part, "behaviors", wanted)
            except FileNotFoundError:  # a run that begins anew has just removed it
                continue
            for row in table.to_pylist():
                step, split, behavior = row.pop("step"), row.pop("split"), row.pop("behavior")
                for column, value in row.items():
                    if _is_number(value):
                        self._add(split, behavior, column, step, value)
                self.step = max(self.step, step)
            self._read[part] = mark
            new = True
        return new

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, None while that is not known."""
        if (self.config.get("max_steps") or 0) > 0:
            return int(self.config["max_steps"])
        epochs = self.config.get("num_train_epochs")
        if not epochs or not self.epoch or not self.step:
            return None
        # Steps per epoch is N / B rounded up; step / epoch lies between the two.
        return math.ceil(epochs * math.ceil(self.step / self.epoch - 1e-6))

    @property
    def seconds_per_step(self) -> float | None:
        """Over the last lines of perf.jsonl, evaluations included."""
        steps = sum(n for n, _ in self._windows)
        return sum(s for _, s in self._windows) / steps if steps else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the pace of the last lines; None where it is not known."""
        total, pace = self.total_steps, self.seconds_per_step
        if total is None or pace is None or self.finished:
            return None
        return max(total - self.step, 0) * pace

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.ended or any(self.path.glob("*.safetensors"))

    def state(self, now: float | None = None) -> str:
        """finished, starting, running, or for how long nothing was heard of it.

        A run leaves no mark when it is killed, so silence is told as what it is.
        """
        if self.finished:
            return "finished"
        news = [p.stat().st_mtime for p in (self._metrics.path, self._perf.path) if p.exists()]
        silent = (time.time() if now is None else now) - max(news, default=0.0)
        if not self._windows:
            begun = self.path / "config.yaml"
            silent = (time.time() if now is None else now) - max(
                [*news, *([begun.stat().st_mtime] if begun.exists() else [])], default=0.0
            )
            return "starting" if silent < _PATIENCE else f"starting, silent for {span(silent)}"
        usual = sum(s for _, s in self._windows) / len(self._windows)
        if silent < max(_PATIENCE / 10, 5 * usual):
            return "running"
        return f"silent for {span(silent)} (a line came every {span(usual)}): stopped, or busy"

    def behaviors(self) -> list[str]:
        """Names of all behaviors that were evaluated so far."""
        return sorted({name for own in self.curves.values() for name in own})

    def index_behaviors(self) -> list[str]:
        """Names of all behaviors of the data, from records/index; empty without it."""
        names: set[str] = set()
        for part in list_parts(self.path, "index"):
            column = read_part(part, "index", ["behavior"])["behavior"].combine_chunks()
            names.update(column.dictionary.to_pylist())
        return sorted(names)


def _split_metric(key: str) -> tuple[str, str | None]:
    """Behavior and column of ``behavior/<name>/<metric>``, either of which may hold a slash."""
    for parts in (2, 1):
        name, *metric = key.removeprefix("behavior/").rsplit("/", parts)
        column = _METRICS.get("/".join(metric))
        if column:
            return name, column
    return key, None


_PATIENCE = 300.0  # seconds of silence before the first step that need no explanation


def span(seconds: float) -> str:
    """A duration, short: 48 s, 3:07, 1:02:45, 2 d 3 h."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s" if seconds >= 1 or seconds == 0 else f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def last_values(curves: Mapping[str, Series], names: Iterable[str]) -> dict[str, float | None]:
    """The newest value of each column, None for those that are not there."""
    return {name: curves[name].last if name in curves else None for name in names}
