"""Write the tables of docs/losses.md from the code: `python docs/loss_table.py`.

What a loss is comes from the docstring of its function, what holds of it from the registry.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastpref.loss_table import TABLE  # noqa: E402
from fastpref.losses import LOSSES  # noqa: E402

PAGE = ROOT / "docs" / "losses.md"
BEGIN = "<!-- made by docs/loss_table.py; do not edit below -->\n"
END = "<!-- end of what docs/loss_table.py made -->\n"


def tables() -> str:
    """Markdown: what holds of every loss, then its equation and source."""
    lines = [
        "| loss | reference | margin only | of the step | smoothing | f-divergence | weighting "
        "| at equality |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, facts in TABLE.items():
        smoothing = 0.001 if name == "exo_pair" else 0.0
        equal = f"{facts.at_equal(0.1, smoothing):.4g}" if facts.at_equal else "–"
        marks = (
            facts.needs_reference,
            facts.margin_only,
            facts.batch_coupled or "–",
            facts.smoothing,
            facts.f_divergence and facts.needs_reference,
            facts.weighting,
        )
        cells = [mark if isinstance(mark, str) else "yes" if mark else "–" for mark in marks]
        lines.append(f"| [`{name}`](#{name}) | {' | '.join(cells)} | {equal} |")
    for name, loss in LOSSES.items():
        text, equation, source = _parts(inspect.getdoc(loss.fn) or "")
        lines += ["", f"### {name}", "", text, "", equation, "", source]
    return "\n".join(lines) + "\n"


def _parts(doc: str) -> tuple[str, str, str]:
    """Summary, equations (indented, a code block as they stand) and the rest of a docstring."""
    paragraphs = doc.split("\n\n")
    at = next(i for i, text in enumerate(paragraphs) if text.startswith("    "))
    return paragraphs[0], paragraphs[at], "\n\n".join(paragraphs[at + 1 :])


if __name__ == "__main__":
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, tail = rest.split(END)
    PAGE.write_text(head + BEGIN + tables() + END + tail, encoding="utf-8")
