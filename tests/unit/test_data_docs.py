"""Every example of docs/data.md is read, and shown as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastpref.data.formats import read_pairs
from fastpref.data.shapes import SHAPES
from fastpref.data.show import pair_lines

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+) (.+)\n([\s\S]*?)^```$", re.MULTILINE)


def test_every_example_is_read_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written: set[str] = set()
    for kind, what, text in BLOCK.findall(PAGE):
        if kind == "python":
            before = {path.name for path in tmp_path.iterdir()}
            exec(text, {})
            written |= {path.name for path in tmp_path.iterdir()} - before
        elif kind == "text":
            names = what.removeprefix("read ").split()
            assert set(names) <= written, names
            written -= set(names)
            pairs, bad = read_pairs(names)
            shown = "\n".join(line for pair in pairs for line in pair_lines(pair))
            assert not bad and shown + "\n" == text, what
        else:
            (tmp_path / what).write_text(text, encoding="utf-8")
            written.add(what)
    assert len(BLOCK.findall(PAGE)) == PAGE.count("\n```") // 2 > 20
    assert not written, "examples that nothing is said of"


def test_every_shape_stands_on_the_page() -> None:
    for shape in SHAPES:
        for column in shape.columns:
            assert f"`{column}`" in PAGE, (shape.name, column)
