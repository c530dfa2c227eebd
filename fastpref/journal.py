"""What a run tells of itself while it runs: metrics.jsonl, perf.jsonl, and the loggers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpref import dist
from fastpref.config import Config
from fastpref.dynamics.recorder import MetricsLog
from fastpref.dynamics.schema import TRAIN
from fastpref.loggers import Loggers


class Journal:
    """Rank 0's lines; on the other ranks every call does nothing.

    metrics.jsonl holds what the same seed gives again, perf.jsonl what clocks say. The loggers are
    told the lines once these are on the disk, so that they are never ahead of metrics.jsonl.
    """

    def __init__(self, config: Config, resume_step: int) -> None:
        self.main = dist.is_main()
        self.history: list[dict[str, Any]] = []  # of metrics.jsonl, all of it
        if not self.main:
            return
        run = Path(config.output_dir)
        self._metrics = MetricsLog(run / "metrics.jsonl", resume_step)
        self._perf = MetricsLog(run / "perf.jsonl", resume_step, truncate=False)
        self.history += self._metrics.kept
        perf = [line for line in self._perf.kept if line["step"] <= resume_step]
        self._loggers = Loggers(config, resume_step, [*perf, *self._metrics.kept])

    def metrics(self, line: Mapping[str, object]) -> None:
        """A line of metrics.jsonl: step, epoch, split, and names of docs/metrics.md."""
        if self.main:
            self._metrics.append(line)

    def perf(self, line: Mapping[str, object]) -> None:
        """A line of perf.jsonl: step, and what clocks say."""
        if self.main:
            self._perf.append(line)

    def flush(self) -> None:
        """Bring the lines to the disk and to the loggers; once per step, when its lines are all
        there."""
        if self.main:
            lines = self._metrics.flush()
            self.history += lines
            self._loggers.send([*self._perf.flush(), *lines])

    def finish(self, line: Mapping[str, Any]) -> None:
        """The last line of perf.jsonl: single values about the whole run."""
        if self.main:
            self._perf.append({"split": TRAIN, **line})
            self._perf.flush()
            known = {k: v for k, v in line.items() if k != "step" and v is not None}
            self._loggers.finish(line["step"], known)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the loggers; what was not flushed is not told."""
        if self.main:
            self._loggers.close(failed=kind is not None)

    def log_history(self) -> list[dict[str, Any]]:
        """The lines so far as transformers' trainer_state.json has them: eval_loss, not split.

        Behaviors' metrics, which would be most of it, are left to metrics.jsonl.
        """
        return [_history_entry(line) for line in self.history]


def _history_entry(line: Mapping[str, Any]) -> dict[str, Any]:
    entry = {}
    for key, value in line.items():
        if key == "split" or key.startswith("behavior/"):
            continue
        own = key in ("step", "epoch") or line["split"] == TRAIN
        entry[key if own else f"{line['split']}_{key}"] = value
    return entry
