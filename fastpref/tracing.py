"""A trace of some steps by torch's profiler, and the names that stand in it.

The file is a Chrome trace: https://ui.perfetto.dev opens it, and so does chrome://tracing. The
ranges are data, forward (of the body), head, backward, optimizer and record; on CUDA each stands
over the kernels that it launched too.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

FOLDER = "profile"  # in the run folder
RANGES = ("data", "forward", "head", "backward", "optimizer", "record")


def named(name: str) -> AbstractContextManager[Any]:
    """A range of the trace, where one is being taken."""
    assert name in RANGES, name
    if not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(name)


class Tracer:
    """Traces ``steps`` steps after the first ``skip`` ones into a file under ``folder``.

    Nothing that is computed changes. Where the steps end early, so does the trace.
    """

    def __init__(self, folder: Path, skip: int, steps: int) -> None:
        self.folder, self.skip, self.steps = folder, skip, steps
        self._profiler: Any = None
        self._first = self._last = 0  # steps of the run

    def begin(self, done: int, step: int) -> None:
        """Before ``step``, of which this process has done ``done`` others."""
        if self.steps and done == self.skip:
            self._first = self._last = step
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def end(self, done: int, step: int) -> None:
        """After ``step``, the ``done``-th of this process."""
        self._last = step
        if self._profiler and done >= self.skip + self.steps:
            self.close()

    def close(self) -> None:
        """Write what was traced."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()  # waits for the device
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"steps-{self._first}-{self._last}.json.gz"
        profiler.export_chrome_trace(str(path))
        log.info("trace of steps: %s (open it at ui.perfetto.dev)", path)
