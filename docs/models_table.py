"""Write the tables of docs/models.md: `python docs/models_table.py` tries every causal LM.

A tiny random model of each architecture is built and put through the self-check that precedes
every run; takes two minutes.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.architectures import verdict  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
MARK = "<!-- made by docs/models_table.py; do not edit below -->\n"
NOT_TRIED = {
    "blt": "a second model groups its bytes; no token sequence of its own",
    "gemma3n": "needs timm for its eyes; its text part, `gemma3n_text`, is computed exactly",
    "gemma4_assistant": "a drafting head of another model",
    "gemma4_unified_assistant": "a drafting head of another model",
}


def tables() -> str:
    """Markdown: what is computed exactly, what is refused and why, what was not tried."""
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    exact, refused = [], defaultdict(list)
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if model_type in NOT_TRIED:
            continue
        accepted, message = verdict(model_type)
        if accepted:
            exact.append(f"`{model_type}`")
        else:
            refused[reason(message)].append(f"`{model_type}`")
    lines = [
        f"\ntransformers {__version__} has {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} causal "
        "language models, by `model_type` in config.json:",
        f"\n### Computed exactly ({len(exact)})\n",
        ", ".join(exact),
        f"\n### Refused by name ({sum(map(len, refused.values()))})\n",
        "| because | model_type |",
        "|---|---|",
    ]
    by_count = sorted(refused.items(), key=lambda item: (-len(item[1]), item[0]))
    lines += [f"| {why} | {', '.join(names)} |" for why, names in by_count]
    lines += [f"\n### Not tried ({len(NOT_TRIED)})\n", "| model_type | |", "|---|---|"]
    lines += [f"| `{model_type}` | {why} |" for model_type, why in sorted(NOT_TRIED.items())]
    return "\n".join(lines) + "\n"


def reason(message: str) -> str:
    """The part of a refusal that does not change from model to model, nor from run to run."""
    if "Cause: " in message:
        return message.split("Cause: ")[1].removesuffix(".")
    for pattern, why in (
        ("has layers of type .*?, (which .*?); packed pairs", "layers {}"),
        ("does not call transformers' AttentionInterface", "does not call `AttentionInterface`"),
        ("is an encoder-decoder", "is an encoder-decoder"),
        ("attends to later tokens too", "attends to later tokens too: an encoder"),
        ("passes (an attention mask) of its own", "attention with a mask of its own"),
        (r"(?:packed batch|compute) in torch\.float64: (.*)", "its code fails: {}"),
    ):
        found = re.search(pattern, message)
        if found:
            return why.format(*found.groups()).replace("|", "\\|")
    return message.replace("|", "\\|")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    page = PAGE.read_text(encoding="utf-8")
    assert MARK in page, f"{PAGE} has lost its mark {MARK!r}"
    PAGE.write_text(page.split(MARK)[0] + MARK + tables(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
