"""How things are measured here, whatever they are: order, quantiles, memory, surroundings."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "numpy")
QUIET = 0.5  # load average above which a machine is not idle
T = TypeVar("T")


@dataclass(frozen=True)
class Quantiles:
    """20, 50 and 80 % quantiles of ``count`` values."""

    q20: float
    q50: float
    q80: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Quantiles:
        """Quantiles of ``values``, linear between neighbours."""
        if not len(values):
            raise ValueError("quantiles of no values")
        low, middle, high = map(float, np.quantile(np.asarray(values), (0.2, 0.5, 0.8)))
        return Quantiles(low, middle, high, len(values))


def interleaved(contenders: Sequence[T], repeats: int) -> Iterator[tuple[int, T]]:
    """(repeat, contender): every contender once in each repeat, another one first each time.

    What disturbs the machine for a while then disturbs all of them, and none always runs after the
    same other one.
    """
    for repeat in range(repeats):
        turn = repeat % max(len(contenders), 1)
        for contender in (*contenders[turn:], *contenders[:turn]):
            yield repeat, contender


def peak_memory(build: Callable[[], Callable[[], object]]) -> dict[str, int]:
    """Bytes of this process: ``baseline`` before ``build()``, ``peak`` in what it returns.

    Linux only: the kernel's high-water mark of resident memory is reset in between, so that the
    peak is that of the measured call and not of building. Freed memory that the allocator still
    holds is given back first: it would count for whoever comes next.
    """
    _give_back()
    baseline = _status_bytes("VmRSS")
    measured = build()
    _give_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    measured()
    peak = _status_bytes("VmHWM")
    return {"baseline": baseline, "peak": peak, "used": peak - baseline}


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors held at the peak of ``call``, beyond those before it. What is freed of those
    before does not count on the CPU, where torch reports each allocation to its profiler."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        call()
    with tempfile.TemporaryDirectory(prefix="fastpref-bench-") as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    moments = [
        (event["ts"], event["args"]["Addr"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    # A free counts where its allocation was seen: torch's table of sizes also has addresses of
    # profiles before, whose memory has long been someone else's.
    held = peak = 0
    live: dict[int, int] = {}
    for _, address, size in sorted(moments, key=lambda moment: moment[0]):
        if size > 0:
            live[address] = size
            held += size
            peak = max(peak, held)
        else:
            held -= live.pop(address, 0)
    return peak


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if not found:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found.group(1)) * 1024


def surroundings(device: str) -> dict[str, Any]:
    """What a number means nothing without: machine, load, versions, commit."""
    import torch

    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        **commit(),
    }


def version_of(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The checkout's commit, and whether it was changed since, benchmarks' results apart."""
    # What a benchmark writes itself must not make the next one's commit look changed.
    own = (":(exclude)bench/results", ":(exclude)bench/RESULTS.md")
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", *own)
    return {"commit": head, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's model, as the system calls it."""
    if sys.platform == "linux":
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def warn_if_busy() -> str | None:
    """A warning where other work takes part of the machine; None where it is idle."""
    load = os.getloadavg()[0]
    if load <= QUIET:
        return None
    return f"load average {load:.2f} before the start: other work disturbs the times below"
