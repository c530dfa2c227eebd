"""`python -m bench gpu --part correctness|op|track|e2e`: what only a GPU shows, in 9 minutes each.

The most important cases come first, and every case is written down as soon as it is measured: what
was cut off by the clock is missing from the end, and said. It runs with what is installed, torch
2.11 with triton 3.6 as well as the newest, and says what was not there. Without a GPU `--dry_run`
goes the same way with tiny sizes on the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import measure, results

HELP = "correctness and speed on an NVIDIA GPU: kernels, tracking, whole models"
PARTS = ("correctness", "op", "track", "e2e")
PACKAGES = (
    *("torch", "triton", "transformers", "trl", "peft", "accelerate", "flash-attn"),
    *("liger-kernel", "quack-kernels", "cut-cross-entropy"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's command line."""
    add = parser.add_argument
    add("--part", choices=PARTS, required=True)
    add("--check", action="store_true", help="exit with 1 where a target is missed")
    add("--dry_run", action="store_true", help="every case with tiny sizes, on the CPU if need be")
    add("--budget", type=float, default=500.0, help="seconds after which no case is begun")
    add("--repeats", type=int, default=10, help="turns of every contender in a case")
    add("--only", nargs="+", metavar="NAME", help="op: contenders beside ours; e2e: cases")
    where = "JSON Lines, a line as each case ends; default: bench/results/gpu, or of a dry run and "
    add("--output", type=Path, help=f"{where}with --no_record a temporary folder")
    add("--no_record", action="store_true", help="append nothing to bench/results")


def run(arguments: argparse.Namespace) -> int:
    """Run one part; 1 where something is wrong, or `--check` finds a target missed."""
    import torch

    if arguments.repeats < 1:
        raise SystemExit(f"bench gpu: --repeats is at least 1, got {arguments.repeats}")
    if not torch.cuda.is_available() and not arguments.dry_run:
        raise SystemExit("bench gpu: no CUDA device. --dry_run goes through the cases on the CPU.")
    module = importlib.import_module(
        "bench.track" if arguments.part == "track" else f"bench.gpu_{arguments.part}"
    )
    session = Session.begin(arguments)
    values = module.run_on(session) if arguments.part == "track" else module.run(session)
    return _finish(arguments, session, values)


def _finish(
    arguments: argparse.Namespace,
    session: Session,
    values: Mapping[str, Mapping[str, float] | None],
) -> int:
    name = f"gpu_{arguments.part}"
    flat = {key: value["value"] if value else None for key, value in values.items()}
    # Targets are stated for one GPU and real sizes; a dry run meets none.
    checks = [] if session.dry else results.verdicts(name, flat)
    setting = {"budget": arguments.budget, "repeats": arguments.repeats, "only": arguments.only}
    record = results.record_of(name, session.where, setting, session.notes, values, checks)
    print("\n".join(results.ratio_lines(values, checks)))
    for missing, reason in session.missing.items():
        print(f"{missing} is missing: {reason}")
    for case in session.not_reached:
        print(f"not reached within {session.budget:g} s: {case}")
    print(f"cases in {session.output}")
    if not (arguments.no_record or session.dry):
        print(f"appended to {results.keep(record).relative_to(measure.ROOT)}")
    failed = bool(session.failed) or not all(check.met for check in checks)
    for text in session.failed:
        print(f"FAILED {text}")
    summary = {"missing": session.missing, "not_reached": session.not_reached, "ok": not failed}
    print(json.dumps({**record, **summary}))
    return int(bool(session.failed) or (arguments.check and failed))


@dataclass
class Session:
    """Where cases run and are written down, and what is to be said at the end."""

    device: Any  # torch.device
    dry: bool
    budget: float
    repeats: int
    only: tuple[str, ...] | None
    output: Path
    where: dict[str, Any]
    began: float = field(default_factory=time.perf_counter)
    missing: dict[str, str] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)  # of the record: contenders, ceilings

    @staticmethod
    def begin(arguments: argparse.Namespace) -> Session:
        """Opens the file of cases with a line of surroundings."""
        import torch

        cuda = torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu")
        label = torch.cuda.get_device_name() if cuda else f"{measure.cpu_name()} (dry run)"
        where = measure.surroundings(label)
        where["versions"] |= {name: measure.version_of(name) for name in PACKAGES}
        where["cuda"] = torch.version.cuda
        name = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")
        kept = not (arguments.dry_run or arguments.no_record)
        folder = results.RESULTS / "gpu" if kept else Path(tempfile.mkdtemp(prefix="fastpref-gpu-"))
        output = arguments.output or folder / f"{name}-{arguments.part}.jsonl"
        output.parent.mkdir(parents=True, exist_ok=True)
        only = None if arguments.only is None else tuple(arguments.only)
        session = Session(
            device, arguments.dry_run, arguments.budget, arguments.repeats, only, output, where
        )
        session.write({"part": arguments.part, **where})
        return session

    def write(self, line: Mapping[str, Any]) -> None:
        """A line, on disk when this returns."""
        with self.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()

    def elapsed(self) -> float:
        """Seconds since the part began."""
        return time.perf_counter() - self.began

    def has_time(self, case: str) -> bool:
        """Whether another case may begin; notes it where not."""
        if self.elapsed() < self.budget:
            return True
        self.not_reached.append(case)
        return False
