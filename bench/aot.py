"""`python -m bench aot --check`: every Triton kernel at every entry of its tile table, compiled.

Ahead of time, for GPUs that need not be there: registers, spills, shared memory and the widths of
global loads and stores, by the tools in the triton wheel. With another triton first on PYTHONPATH
(`pip install --no-deps --target DIR triton==3.6.0`) it compiles with that one. No time is measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from bench import measure, results

if TYPE_CHECKING:
    from fastpref_kernels._aot import AotCase, Compiled

HELP = "registers, spills and load widths of the Triton kernels, compiled ahead of time"
# Modules with `aot_cases() -> list[AotCase]`.
MODULES = (
    "fastpref_kernels.tile_cases",
    "fastpref_kernels.pair_kernels",
    "fastpref_kernels.gram_tile",
    "fastpref_kernels.gradient_tile",
    "fastpref_kernels.triton_pair_gram",
    "fastpref_kernels.triton_sketch",
    "fastpref_kernels.triton_column_sums",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's command line."""
    add = parser.add_argument
    add("--check", action="store_true", help="exit with 1 where a target is missed")
    add("--arch", type=int, nargs="+", help="only these, e.g. 90 for sm_90; default: every case's")
    add("--only", default="", metavar="TEXT", help="only cases whose name holds this text")
    add("--no_record", action="store_true", help="append nothing to bench/results")


def run(arguments: argparse.Namespace) -> int:
    """Compile, print, record; 1 where `--check` finds a target missed."""
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("bench aot: unset TRITON_INTERPRET; an interpreted kernel has no code.")
    found = compile_all(arguments.arch, arguments.only)
    if not found:
        raise SystemExit(f"bench aot: no case with {arguments.only!r} for {arguments.arch}")
    print(f"{'':66}{'registers':>9}{'spills':>7}{'shared':>7}  loads / stores, bits x count")
    for name, (_, compiled) in found.items():
        print(f"{name:66}{_row(compiled)}")
    values = {name: {"value": float(value)} for name, value in summary(found).items()}
    checks = results.verdicts("aot", {name: value["value"] for name, value in values.items()})
    version = measure.version_of("triton")
    setting = {"arch": arguments.arch, "only": arguments.only, "cases": len(found)}
    record = results.record_of(
        "aot",
        measure.surroundings(f"compiled by triton {_triton_version()}"),
        {**setting, "installed": version},
        {name: asdict(compiled) for name, (_, compiled) in found.items()},
        dict(values),
        checks,
    )
    print("\n".join(["", *results.ratio_lines(dict(values), checks)]))
    if not arguments.no_record:
        print(f"appended to {results.keep(record).relative_to(measure.ROOT)}")
    failed = not all(check.met for check in checks)
    print(json.dumps({"bench": "aot", "values": values, "ok": not failed}))
    return int(arguments.check and failed)


def compile_all(
    archs: list[int] | None = None, only: str = ""
) -> dict[str, tuple[AotCase, Compiled]]:
    """name and architecture -> (case, what it compiled to)."""
    from fastpref_kernels._aot import compile_case

    found: dict[str, tuple[AotCase, Compiled]] = {}
    for module in MODULES:
        for case in importlib.import_module(module).aot_cases():
            for arch in case.archs:
                if only in case.name and (archs is None or arch in archs):
                    name = f"{case.name}, sm_{arch}"
                    assert name not in found, f"two cases are called {name}"
                    found[name] = (case, compile_case(case, arch))
    return found


def summary(found: Mapping[str, tuple[AotCase, Compiled]]) -> dict[str, int]:
    """What targets.toml holds the compiled kernels to."""
    from fastpref_kernels._aot import SHARED_LIMIT

    shared = {name: SHARED_LIMIT[int(name.rsplit("_", 1)[1])] for name in found}
    return {
        "spilling": sum(compiled.spills > 0 for _, compiled in found.values()),
        "too_much_shared": sum(c.shared > shared[name] for name, (_, c) in found.items()),
        "narrow_loads": sum(case.wide_loads and narrow(c.loads) for case, c in found.values()),
        "narrow_stores": sum(case.wide_stores and narrow(c.stores) for case, c in found.values()),
        "most_registers": max(compiled.registers for _, compiled in found.values()),
    }


def narrow(widths: Mapping[int, int]) -> bool:
    """No 16-byte instruction, or, beside single numbers (one of them a half), others for a tile."""
    return 128 not in widths or 8 in widths or widths.get(16, 0) > 1 or widths.get(64, 0) > 1


def _row(compiled: Compiled) -> str:
    loads, stores = (
        " ".join(f"{bits}x{count}" for bits, count in widths.items()) or "-"
        for widths in (compiled.loads, compiled.stores)
    )
    return f"{compiled.registers:>9}{compiled.spills:>7}{compiled.shared:>7}  {loads:24} / {stores}"


def _triton_version() -> str:
    import triton  # the one that is imported, which PYTHONPATH may put before the installed one

    return str(triton.__version__)
