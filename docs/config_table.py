"""Write the tables of docs/config.md from the fields of `Config`: `python docs/config_table.py`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastpref.config import GROUPS, Config, field_types  # noqa: E402
from fastpref.config_names import ELSEWHERE, ELSEWHERE_PREFIXES  # noqa: E402
from fastpref.config_values import RANGES, Options  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
MARK = "<!-- made by docs/config_table.py; do not edit below -->\n"


def tables() -> str:
    """Markdown tables of every field by group, and of TRL's and transformers' other names."""
    lines: list[str] = []
    for group, about in GROUPS.items():
        lines += [f"\n### {group}: {about}\n", "| name | values | default | |", "|---|---|---|---|"]
        for spec in dataclasses.fields(Config):
            if spec.metadata["group"] == group:
                cells = (_code(spec.name), _values(spec), _default(spec), spec.metadata["help"])
                lines.append(f"| {' | '.join(cells)} |")
    lines += ["\n## Names you may know from TRL or transformers\n", "| name | here |", "|---|---|"]
    lines += [f"| {_code(name)} | {text} |" for name, text in sorted(ELSEWHERE.items())]
    lines += [f"| {_code(name + '...')} | {text} |" for name, text in ELSEWHERE_PREFIXES.items()]
    return "\n".join(lines) + "\n"


def _code(text: object) -> str:
    return f"`{text}`"


def _values(spec: dataclasses.Field[object]) -> str:
    kind = field_types()[spec.name]
    if spec.metadata["choices"]:
        return ", ".join(map(_code, spec.metadata["choices"]))
    if kind is bool:
        return "`true`, `false`"
    words = {str: "text", int: "whole number", float: "number", tuple[str, ...]: "list of text"}
    words |= {tuple[int, ...]: "list of whole numbers"}
    words |= {int | None: "whole number or `null`", str | None: "text or `null`"}
    words |= {float | None: "number or `null`", bool | None: "`true`, `false` or `null`"}
    words |= {tuple[float, ...]: "list of numbers", Options: "mapping, JSON or `key=value,...`"}
    within = spec.metadata["within"]
    return words[kind] + (f", {RANGES[within][0]}" if within else "")


def _default(spec: dataclasses.Field[object]) -> str:
    default = spec.default
    if default is None:
        return "`null`"
    if default == ():
        return "empty"
    if isinstance(default, tuple):
        return _code(", ".join(map(str, default)))
    return _code(str(default).lower() if isinstance(default, bool) else default)


if __name__ == "__main__":
    written, _ = PAGE.read_text(encoding="utf-8").split(MARK)
    PAGE.write_text(written + MARK + tables(), encoding="utf-8")
