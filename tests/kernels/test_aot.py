"""Triton kernels compiled ahead of time: no spills, they fit, 16 bytes a load and store.

In a process of its own each: where tests run without a GPU, Triton is told to interpret.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastpref_kernels._aot import _widths

ROOT = Path(__file__).resolve().parents[2]


def python(tmp_path: Path, *arguments: str, first: str = "") -> str:
    """Output of Python with `arguments`; the folder `first` leads its path."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (first, str(ROOT), str(ROOT / "kernels"))))
    env |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def aot(tmp_path: Path, *arguments: str, first: str = "") -> str:
    return python(tmp_path, "-m", "bench", "aot", "--check", "--no_record", *arguments, first=first)


def test_widest_tile_for_an_h100(tmp_path: Path) -> None:
    out = aot(tmp_path, "--only", "exp_tile bf16 8192 training", "--arch", "90")
    assert json.loads(out.splitlines()[-1])["ok"]
    assert out.count("sm_90") == 4  # with and without a sketch; with all options or none
    # One pass within the kernel, too: 16 entries a thread are 4 loads of 16 bytes and 2 stores, the
    # bias 2 loads more. `bench roofline` sees a launch's arguments, not how often it reads them.
    wide = {
        line.split(", sm_90")[0]: re.findall(r"128x(\d+)", line)
        for line in out.splitlines()
        if "sm_90" in line
    }
    assert wide["exp_tile bf16 8192 training"] == ["4", "2"]
    assert wide["exp_tile bf16 8192 training, softcap, bias, statistics"] == ["6", "2"]


@pytest.mark.slow
def test_every_entry_of_the_tile_tables(tmp_path: Path) -> None:
    out = aot(tmp_path)
    for arch in ("sm_80", "sm_90", "sm_100"):
        assert arch in out


@pytest.mark.slow
@pytest.mark.skipif("FASTPREF_TRITON_36" not in os.environ, reason="FASTPREF_TRITON_36 is not set")
def test_every_entry_with_triton_3_6(tmp_path: Path) -> None:
    """FASTPREF_TRITON_36 names what `pip install --no-deps --target DIR triton==3.6.0` filled."""
    folder = os.environ["FASTPREF_TRITON_36"]
    version = python(tmp_path, "-c", "import triton; print(triton.__version__)", first=folder)
    assert version.startswith("3.6.")
    aot(tmp_path, first=folder)


BAD = """
from dataclasses import replace
from bench.aot import narrow
from fastpref_kernels._aot import compile_case
from fastpref_kernels.tile_cases import aot_cases
case = next(c for c in aot_cases() if c.name == "exp_tile bf16 8192 training")
print(compile_case(replace(case, warps=2), 90).spills > 0)
loose = compile_case(replace(case, divisible=()), 90)
print(narrow(loose.loads), narrow(loose.stores))
try:
    compile_case(replace(case, signature={}), 90)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_spills_and_narrow_loads_are_seen(tmp_path: Path) -> None:
    """Too few warps spill; without known alignment nothing moves 16 bytes."""
    spills, narrow, error = python(tmp_path, "-c", BAD).splitlines()
    assert (spills, narrow) == ("True", "True True")
    assert "must cover the kernel's arguments" in error and "'logits'" in error


def test_widths_are_read_off_the_listing() -> None:
    listing = """
        /*0070*/  LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/  LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0090*/  LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*00a0*/  LDG.E R4, desc[UR4][R2.64] ;
        /*00b0*/  LDG.E.64.CONSTANT R4, [R2.64] ;
        /*00c0*/  STG.E.128 desc[UR4][R2.64], R4 ;
    """
    assert _widths(listing, "LDG") == {16: 1, 32: 1, 64: 1, 128: 2}
    assert _widths(listing, "STG") == {128: 1}
