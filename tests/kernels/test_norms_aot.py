"""The kernels of norms, compiled ahead of time; `test_aot` has all of them in its long test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kernels.test_aot import aot


def test_gram_of_a_bfloat16_model_on_an_h100(tmp_path: Path) -> None:
    out = aot(tmp_path, "--only", "pair_gram bf16 128x64 g1 outputs3", "--arch", "90")
    assert json.loads(out.splitlines()[-1])["ok"]


@pytest.mark.slow
def test_projection_on_every_chip(tmp_path: Path) -> None:
    out = aot(tmp_path, "--only", "project bf16 128x32")
    assert json.loads(out.splitlines()[-1])["ok"]
    assert all(arch in out for arch in ("sm_80", "sm_90", "sm_100"))
