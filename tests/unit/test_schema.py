"""The record schema: what must hold of every table, and that the documentation is the schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from fastpref.dynamics import schema

DOCUMENT = Path(__file__).parents[2] / "docs" / "records.md"


def test_document_holds_the_schema() -> None:
    text = DOCUMENT.read_text()
    assert schema.fill_document(text) == text, "run: python -m fastpref.dynamics.schema " + str(
        DOCUMENT.name
    )


def test_document_names_every_split_and_column() -> None:
    text = DOCUMENT.read_text()
    for split in schema.SPLITS:
        assert f"| `{split}` |" in text
    for table in schema.TABLES.values():
        section = text.split(f"### {table.name}\n")[1].split("\n### ")[0]
        lines = [line for line in section.splitlines() if line.startswith(("| `", "| **`"))]
        assert [line.split("`")[1] for line in lines] == [c.name for c in table.columns]


@pytest.mark.parametrize("table", schema.TABLES)
def test_tables_are_well_formed(table: str) -> None:
    columns = schema.TABLES[table].columns
    names = [column.name for column in columns]
    assert len(set(names)) == len(names)
    assert any(column.required for column in columns)
    assert all(column.meaning and column.unit for column in columns)
    arrow = schema.arrow_schema(table)
    assert arrow.names == names
    assert arrow.metadata[schema.VERSION_KEY] == str(schema.SCHEMA_VERSION).encode()
    assert [f.name for f in arrow if not f.nullable] == [c.name for c in columns if c.required]


def test_no_clocks_in_the_records() -> None:
    for table in schema.TABLES.values():
        for column in table.columns:
            words = set(column.name.split("_"))
            assert not words & {"time", "seconds", "wall", "clock", "overhead", "ms"}
            assert not pa.types.is_temporal(column.type)


def test_head_columns_mirror_the_whole_network() -> None:
    names = {column.name for column in schema.TABLES["pairs"].columns}
    for name in ("gnorm_m", "gnorm_chosen", "gnorm_rejected", "dot_chosen_rejected"):
        assert {name, f"head_{name}"} <= names


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'sample'.*pairs, steps"):
        schema.arrow_schema("sample")
    with pytest.raises(ValueError, match="'steps' has no column 'wall'"):
        schema.TABLES["steps"].column("wall")
    with pytest.raises(ValueError, match="needs the marks"):
        schema.fill_document("no marks here")


def test_reading_records_imports_no_torch() -> None:
    code = (
        "import sys, fastpref.dynamics.recorder, fastpref.dynamics.groups, fastpref.report.html\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=DOCUMENT.parents[1]).returncode == 0
