"""Services that show metrics: TensorBoard, Weights & Biases, trackio. Rank 0 alone speaks to them.

What they are told is what metrics.jsonl and perf.jsonl hold, step by step, under the names that
transformers' integrations use. `loggers.json` in the run folder says up to which step each has been
told, so that a resumed run tells no step twice and leaves none out.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fastpref.config import Config
from fastpref.dynamics.parts import replace_file
from fastpref.dynamics.schema import HELD_OUT, TRAIN

STATE_FILE = "loggers.json"
TENSORBOARD_FOLDER = "tensorboard"
# What has to be importable, and how to get it.
PACKAGES = {
    "tensorboard": ("torch.utils.tensorboard", "pip install tensorboard"),
    "wandb": ("wandb", "pip install wandb"),
    "trackio": ("trackio", "pip install trackio"),
}


class Logger(Protocol):
    """One service. `rewinds`: whether it can forget steps that a resumed run repeats."""

    rewinds: bool

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All values of one step; steps come in order."""

    def finish(self, step: int, values: Mapping[str, float]) -> None:
        """Single values about the whole run."""

    def flush(self) -> None:
        """Wait until what was logged outlives this process, as far as the service can."""

    def close(self, failed: bool) -> None:
        """Say goodbye; ``failed``: the run did not come to its end."""

    def identity(self) -> str | None:
        """By what the service knows the run again."""


class Loggers:
    """All services of ``config.report_to`` at once; without any, nothing happens."""

    def __init__(
        self, config: Config, resume_step: int, history: Iterable[Mapping[str, Any]]
    ) -> None:
        """``history``: the lines that a resumed run keeps; a service is told what it lacks."""
        self.path = Path(config.output_dir) / STATE_FILE
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.loggers: dict[str, Logger] = {}
        self.told: dict[str, int] = {}
        for name in config.report_to:
            before = known.get(name, {"step": -1, "identity": None})
            kind = LOGGERS[name]
            # What follows the checkpoint is told again where it can be, because it may be another:
            # a larger max_steps changes the learning rates.
            limit = (resume_step or -1) if kind.rewinds else before["step"]
            self.told[name] = min(before["step"], limit)
            try:
                self.loggers[name] = kind(config, self.told[name], before["identity"])
            except Exception as error:  # of any kind: no login, no network, a folder not writable
                raise ValueError(
                    f"report_to: {name} could not begin a run ({type(error).__name__}: {error}); "
                    f"mend that, or take {name} out of report_to"
                ) from error
        self.send(history)

    def send(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Tell every service of the lines' steps that it has not been told of.

        A step's lines must come together: what comes later is taken for a repetition.
        """
        steps: dict[int, dict[str, float]] = {}
        for line in lines:
            steps.setdefault(line["step"], {}).update(logged_values(line))
        if not self.loggers or not steps:
            return
        for name, logger in self.loggers.items():
            for step in sorted(step for step in steps if step > self.told[name]):
                logger.log(step, steps[step])
                self.told[name] = step
            logger.flush()
        self._remember()

    def finish(self, step: int, values: Mapping[str, float]) -> None:
        """Tell single values about the whole run, at its end."""
        for logger in self.loggers.values():
            logger.finish(step, values)

    def close(self, failed: bool = False) -> None:
        """Close every service."""
        for logger in self.loggers.values():
            logger.close(failed)

    def _remember(self) -> None:
        state = {
            name: {"step": self.told[name], "identity": logger.identity()}
            for name, logger in self.loggers.items()
        }
        text = json.dumps(state, indent=1) + "\n"
        replace_file(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def demand_packages(config: Config) -> None:
    """Raise ValueError where ``report_to`` names a service whose package is missing."""
    for name in config.report_to:
        module, remedy = PACKAGES[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"report_to: {name} needs a package that cannot be imported ({error}); {remedy}, "
                f"or take {name} out of report_to"
            ) from None


def logged_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a line of metrics.jsonl or perf.jsonl under the names that services show.

    train/loss, eval/loss, train_sample/loss, eval/<name>_loss of a named set; behavior/<name>/...
    of the held-out pairs as it is; eval/runtime for eval_runtime; perf/tokens_per_second. The epoch
    is always train/epoch.
    """
    split = line.get("split")
    values = {}
    for key, value in line.items():
        if key == "step" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if key == "epoch":
            name = f"{TRAIN}/epoch"
        elif split is None:
            name = f"perf/{key}"
        elif split == HELD_OUT and key.startswith("behavior/"):
            name = key
        elif split == TRAIN:
            name = f"{TRAIN}/{key}"
        elif split.startswith(f"{HELD_OUT}_"):
            name = f"{HELD_OUT}/{split.removeprefix(f'{HELD_OUT}_')}_{key}"
        else:
            name = f"{split}/{key.removeprefix(f'{split}_')}"
        values[name] = value
    return values


class TensorBoard:
    """Event files in ``logging_dir``. Steps after ``told`` that stand in them are hidden."""

    rewinds = True

    def __init__(self, config: Config, told: int, identity: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        default = Path(config.output_dir) / TENSORBOARD_FOLDER
        folder = config.logging_dir or os.environ.get("TENSORBOARD_LOGGING_DIR") or default
        self.writer = SummaryWriter(Path(folder).expanduser(), purge_step=told + 1)
        indented = "".join(f"    {line}\n" for line in config.to_yaml().splitlines())
        self.writer.add_text("args", indented, max(told, 0))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, step: int, values: Mapping[str, float]) -> None:
        self.log(step, {f"{TRAIN}/{name}": value for name, value in values.items()})

    def flush(self) -> None:
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()

    def identity(self) -> str | None:
        return None


class Wandb:
    """A run of Weights & Biases, found again by its id."""

    rewinds = False

    def __init__(self, config: Config, told: int, identity: str | None) -> None:
        import wandb

        self.run = wandb.init(
            project=config.project or os.environ.get("WANDB_PROJECT", "fastpref"),
            name=_run_name(config),
            config=_settings(config),
            id=identity,
            resume="allow" if identity else None,
        )
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "train/global_step": step}, step=step)

    def finish(self, step: int, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def flush(self) -> None:
        pass  # wandb's own process sends, and outlives this one

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))

    def identity(self) -> str | None:
        return str(self.run.id)


class Trackio:
    """A run of trackio, found again by its name."""

    rewinds = False

    def __init__(self, config: Config, told: int, identity: str | None) -> None:
        import trackio

        self.name = identity or _run_name(config)
        self.run = trackio.init(
            project=config.project or os.environ.get("TRACKIO_PROJECT", "fastpref"),
            name=self.name,
            config=_settings(config),
            resume="allow" if identity else "never",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "train/global_step": step}, step=step)

    def finish(self, step: int, values: Mapping[str, float]) -> None:
        pass  # trackio has no summary; transformers leaves these out too

    def flush(self) -> None:
        pass  # it sends in the background

    def close(self, failed: bool) -> None:
        self.run.finish()

    def identity(self) -> str | None:
        return self.name


LOGGERS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def _run_name(config: Config) -> str:
    return config.run_name or Path(config.output_dir).resolve().name


def _settings(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)
