"""The kernels of norms and sketches, compiled ahead of time: none spills, all fit the chip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
MODULES = ("triton_pair_gram", "triton_sketch", "triton_column_sums")
# A process of its own: this one has TRITON_INTERPRET, and an interpreted kernel cannot be compiled.
PROGRAM = """
import importlib, json, sys
from fastpref_kernels._aot import SHARED_LIMIT, compile_case
only = sys.argv[2:]
for case in importlib.import_module(f"fastpref_kernels.{sys.argv[1]}").aot_cases():
    for arch in case.archs:
        if not only or (case.name in only and arch == 90):
            made = compile_case(case, arch)
            print(json.dumps([case.name, arch, made.spills, made.shared, SHARED_LIMIT[arch],
                              max(made.loads)]))
"""


def compiled(module: str, *names: str) -> list[tuple[str, int, int, int, int, int]]:
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{root / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *names],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[tuple[str, int, int, int, int, int]]) -> None:
    assert found
    for name, arch, spills, shared, limit, widest in found:
        assert spills == 0, f"{name} on sm_{arch} spills {spills} bytes"
        assert shared <= limit, f"{name} on sm_{arch} needs {shared} bytes of shared memory"
        assert widest == 128 or "segment_rows" in name, f"{name} on sm_{arch} loads {widest} bits"


def test_those_of_a_bfloat16_model() -> None:
    check(compiled("triton_pair_gram", "pair_gram bf16 128x64 g1 outputs3"))


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_all(module: str) -> None:
    check(compiled(module))
