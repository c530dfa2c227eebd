"""What `bench train` trains: two models, two kinds of pairs, and how long a case may take.

The 30M model has random weights: what a step costs does not depend on them.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import measure

SHAPE_30M = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
# Of HH-RLHF's harmless-base: mean and standard deviation of the logarithm of lengths in characters.
HH_PROMPT, HH_CHOSEN, HH_REJECTED = (5.71, 1.05), (4.69, 0.98), (4.90, 1.02)


@dataclass(frozen=True)
class Case:
    """A model, a kind of pairs, and how much is measured. ``gate``: steps that must agree."""

    model: str
    data: str
    pairs: int  # a step
    repeats: int
    steps: int  # timed in a turn
    gate: int
    memory: tuple[int, int] | None  # steps before and while peak memory is measured; None: too long
    own: bool = False  # model or pairs are what someone brought along

    @property
    def name(self) -> str:
        """Of its targets and records."""
        return "train_own" if self.own else f"train_{self.model}_{self.data}"


CASES = (
    Case("5m", "persona", 32, 8, 3, 3, (2, 4)),
    Case("30m", "persona", 32, 8, 1, 2, (1, 1)),
    Case("5m", "hh", 32, 4, 1, 2, (1, 1)),
    Case("30m", "hh", 16, 3, 1, 2, None),
)
MODELS = tuple(dict.fromkeys(case.model for case in CASES))
DATA = tuple(dict.fromkeys(case.data for case in CASES))
# What someone brings along has no targets.
OWN = Case("5m", "persona", 32, 8, 3, 3, (2, 4), own=True)


def model_dir(name: str, scratch: Path) -> str:
    """The folder of a model: "5m", "30m", or whatever else names one."""
    from fastpref import base

    if name == "30m":
        return str(random_llama(scratch / "30m"))
    return str(base.base_dir()) if name == "5m" or base.is_base_name(name) else name


def random_llama(folder: Path) -> Path:
    """A Llama of 30M random weights with fastpref-tiny's tokenizer, made where it is not there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastpref.base import load_base_tokenizer

    if not folder.is_dir():
        tokenizer = load_base_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SHAPE_30M,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def find_pairs(data: str, scratch: Path, seed: int) -> tuple[list[Any], str]:
    """Pairs of a kind, real ones where they are to be had, and where they are from."""
    from fastpref.data.formats import read_pairs
    from fastpref.data.generate import generate, write_dataset

    root = Path(os.environ.get("FASTPREF_DATA", measure.ROOT.parent / "shared" / "data"))
    folder = root / {"persona": "persona", "hh": "hh-rlhf"}[data]
    if folder.is_dir():
        found, _ = read_pairs([str(folder)], on_bad_rows="drop")
        return found, {"persona": "Anthropic persona files", "hh": "HH-RLHF harmless-base"}[data]
    print(f"no {folder.name} data (FASTPREF_DATA names the folder above it): made-up pairs instead")
    if data == "hh":
        (scratch / "hh.jsonl").write_text("".join(hh_lookalikes(2000, seed)), encoding="utf-8")
        found, _ = read_pairs([str(scratch / "hh.jsonl")], on_bad_rows="drop")
        return found, "made-up dialogues of HH-RLHF's lengths"
    write_dataset(scratch / "data", generate("demo", 400, seed))
    found, _ = read_pairs([str(scratch / "data")], on_bad_rows="drop")
    return found, "generated pairs (preset demo)"


def hh_lookalikes(count: int, seed: int) -> Iterator[str]:
    """JSON Lines: pairs of HH-RLHF's lengths, of the sentences that fastpref-tiny knows."""
    from fastpref.base_text import documents

    rng, stream = np.random.default_rng(seed), documents(seed)

    def text(mean: float, deviation: float) -> str:
        length = int(np.clip(np.exp(rng.normal(mean, deviation)), 8, 6000))
        made = ""
        while len(made) < length:
            made += " ".join(next(stream)) + " "
        return made[:length].rstrip()

    for _ in range(count):
        row = {
            "prompt": f"\n\nHuman: {text(*HH_PROMPT)}\n\nAssistant:",
            "chosen": f" {text(*HH_CHOSEN)}",
            "rejected": f" {text(*HH_REJECTED)}",
        }
        yield json.dumps(row) + "\n"


def shuffled(pairs: Sequence[Any], seed: int) -> list[Any]:
    """In another order: a file holds one behavior, or dialogues of like length."""
    found = list(pairs)
    random.Random(seed).shuffle(found)
    return found


def fitting(pairs: Sequence[Any], model: str, max_length: int) -> list[Any]:
    """Those whose prompt leaves room for a completion; TRL and fastpref say the others' names."""
    from transformers import AutoTokenizer

    from fastpref.data.tokenize import tokenize_pairs

    tokenizer = AutoTokenizer.from_pretrained(model)
    kept = tokenize_pairs(pairs, tokenizer, max_length=max_length, on_bad_rows="drop").sources
    return [pairs[i] for i in kept]
