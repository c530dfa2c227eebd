"""Write the table of docs/scale.md by the planner of `fastpref plan`: `python docs/scale_table.py`.

Layers are alike, so bytes of every kind are a line in their number: a model's are taken from plans
of the same model with eight and with ten layers, which takes seconds where its own takes minutes.
Names of models (`1B 8B`) compute those rows alone and print them.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastpref.config import Config  # noqa: E402
from fastpref.data.pack import fed_tokens  # noqa: E402
from fastpref.memory import Memory  # noqa: E402
from fastpref.planner import Plan, made_pairs, make_plan  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
MARK = "<!-- made by docs/scale_table.py; do not edit below -->\n"
H200 = int(139 * 2**30)
TOKENS, PROMPT, COMPLETION = 8192, 512, 256
FEW_LAYERS = (8, 10)
# hidden, inner, layers, heads, key heads, whether the head is the embedding
SHAPES = {
    "1B": (2048, 8192, 16, 32, 8, True),
    "8B": (4096, 14336, 32, 32, 8, False),
    "70B": (8192, 28672, 80, 64, 8, False),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "full, float32 weights": {},
    "full, bfloat16 weights and masters": {"weights_dtype": "bfloat16"},
    "full, bfloat16 weights, 8-bit AdamW": {"weights_dtype": "bfloat16", "optim": "adamw_8bit"},
    "full, bfloat16 alone": {"weights_dtype": "bfloat16", "master_weights": False},
    "LoRA, bfloat16 weights": {"weights_dtype": "bfloat16", "trainable": "lora"},
    "QLoRA": {"weights_dtype": "bfloat16", "trainable": "lora", "load_in_4bit": True},
}


@dataclass(frozen=True)
class Row:
    """Bytes at the peak, in parts."""

    model: str
    setting: str
    checkpointing: str
    weights: float
    gradients: float
    optimizer: float
    activations: float  # head, allocator and context with them

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def line(self) -> str:
        """Of the table, in GB."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.total)
        numbers = " | ".join(f"{size / 1e9:.1f}" for size in parts)
        fits = "yes" if self.total <= H200 else "no"
        return f"| {self.model} | {self.setting} | `{self.checkpointing}` | {numbers} | {fits} |"


def config_of(model: str, layers: int) -> Any:
    """A Llama 3 of that width, as transformers has it."""
    from transformers import LlamaConfig

    hidden, inner, _, heads, key_heads, tied = SHAPES[model]
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )


def rows(model: str) -> Iterator[Row]:
    """Those of a model, each as soon as it is known."""
    for setting, chosen in SETTINGS.items():
        for mode in ("none", "full"):
            yield planned(model, setting, chosen, mode)


def planned(model: str, setting: str, chosen: dict[str, Any], mode: str) -> Row:
    """A row, from two plans of fewer layers: every phase of the step is a line, and the peak is
    that of the largest."""
    few, more = (plan(model, layers, chosen, mode) for layers in FEW_LAYERS)
    steps = (SHAPES[model][2] - FEW_LAYERS[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])
    phases = {
        phase: {
            kind: round(size + steps * (more.step.phases[phase].get(kind, 0) - size))
            for kind, size in ({kind: 0 for kind in more.step.phases[phase]} | own).items()
        }
        for phase, own in few.step.phases.items()
    }
    whole = dataclasses.replace(more, step=dataclasses.replace(more.step, phases=phases))
    return row_of(model, setting, whole)


def row_of(model: str, setting: str, made: Plan) -> Row:
    """A plan's row."""
    rest = made.parts
    own = [float(rest.pop(kind, 0)) for kind in ("weights", "gradients", "optimizer")]
    mode = made.config.gradient_checkpointing
    return Row(model, setting, mode, *own, float(sum(rest.values())))


def plan(model: str, layers: int, chosen: dict[str, Any], mode: str) -> Plan:
    """Of the model with so many layers."""
    with tempfile.TemporaryDirectory(prefix="fastpref-scale-") as folder:
        config_of(model, layers).save_pretrained(folder)
        config = Config(
            model_name_or_path=folder,
            dataset_name=("scale",),
            dtype="bfloat16",
            train_batch_size=64,
            max_tokens_per_microbatch=TOKENS,
            gradient_checkpointing=mode,
            **chosen,
        )
        pairs = made_pairs(PROMPT, COMPLETION, config.train_batch_size)
        return make_plan(config, pairs, fed_tokens(pairs), Memory.of_gpu(H200))


HEAD = (
    "| model | setting | `gradient_checkpointing` | weights | gradients | optimizer | "
    "activations and the rest | total, GB | in 139 GiB |\n|---|---|---|---|---|---|---|---|---|\n"
)


def main() -> None:
    """The page's table, or on the screen the rows of the models that are named."""
    named = sys.argv[1:] or list(SHAPES)
    lines = []
    for model in named:
        for row in rows(model):
            lines.append(row.line())
            print(lines[-1], flush=True)
    if len(sys.argv) == 1:
        text = PAGE.read_text(encoding="utf-8")
        kept = text[: text.index(MARK) + len(MARK)]
        PAGE.write_text(kept + "\n" + HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
