"""docs/scale.md's table against the planner that makes it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("scale_table", ROOT / "docs" / "scale_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale_table"] = module
    spec.loader.exec_module(module)
    return module


def test_a_row_of_the_page_is_what_the_planner_says(script: Any) -> None:
    setting = "LoRA, bfloat16 weights"
    row = script.planned("1B", setting, script.SETTINGS[setting], "full")
    page = script.PAGE.read_text(encoding="utf-8")
    assert row.line() in page, "docs/scale.md is out of date; run: python docs/scale_table.py"
    for model in script.SHAPES:
        for setting in script.SETTINGS:
            assert page.count(f"| {model} | {setting} |") == 2


@pytest.mark.slow
def test_bytes_are_a_line_in_the_number_of_layers(script: Any) -> None:
    for setting in ("full, bfloat16 weights and masters", "full, bfloat16 alone"):
        for mode in ("none", "full"):
            chosen = script.SETTINGS[setting]
            whole = script.row_of("1B", setting, script.plan("1B", 16, chosen, mode))
            line = script.planned("1B", setting, chosen, mode)
            assert line.total == pytest.approx(whole.total, rel=0.01)


@pytest.mark.slow
def test_the_page_is_up_to_date(script: Any) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    for model in script.SHAPES:
        for row in script.rows(model):
            assert row.line() in page, "run: python docs/scale_table.py"
