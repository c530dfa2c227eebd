"""Cases of `bench gpu --part e2e`: models, lengths, recipes, and what of them fits on one GPU.

Memory of Llama-3-8B (8.03e9 weights), the same for every contender of a case, which share module,
optimizer and its states:

    full    bfloat16 weights 16.1 GB + gradients 16.1 + AdamW's two moments, bfloat16 too, 32.1 =
            64.2 GB. No masters: they would be 32.1 more, float32 moments another 32.1, and 128.5
            of 149.6 GB leave no room for activations. No 8-bit moments: they want bitsandbytes.
    LoRA    weights 16.2 GB with adapters of r = 16 on all linear layers, 0.5 GB of their gradients
            and moments
    activations without checkpointing, by `fastpref plan`: 6.8 MB a token in full, 7.2 with LoRA.
            fastpref's micro-batch of 8192 tokens: 56 GB and 59 GB. TRL's rows of 768: 8 of them (4
            pairs) 42 GB in full, 16 of them 88 GB with LoRA. So at most 128 GB of 149.6
    default 3B (3.21e9), float32: 12.9 GB x (weights 1 + gradients 1 + moments 2 + reference 1) =
            64.3 GB, and 46 GB of activations and casts of weights for 8192 tokens: 115 GB

None of it has been measured on a GPU. A contender that runs out of memory all the same is tried
again with half of its micro-batch, and that is written down.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.track_cases import HH, LLAMA_8B, Lengths, Size
from fastpref.data.tokenize import TokenPair

MAX_LENGTH = 1024
MAX_TOKENS = 8192  # of a micro-batch of fastpref's
LORA_RANK = 16
SIZES = {
    "1b": Size("1b", 2048, 8192, 16, 32, 8, 128256),  # Llama-3.2-1B
    "3b": Size("3b", 3072, 8192, 28, 24, 8, 128256),  # Llama-3.2-3B
    "8b": LLAMA_8B,
}
TIED = ("1b", "3b")  # whose output head is the embedding
DRY_SIZES = {name: Size(name, 64, 96, 2, 4, 2, 300) for name in SIZES}


def _fixed(prompt: int, completion: int) -> Lengths:
    p, c = float(np.log(prompt)), float(np.log(completion))
    return Lengths(f"{prompt}_{completion}", (p, 0.0), (c, 0.0), (c, 0.0))


@dataclass(frozen=True)
class Data:
    """Lengths of pairs, pairs in a step, and TRL's in a forward when tuned (8 by its default)."""

    lengths: Lengths
    pairs: int
    trl_micro: int


# Persona statements as a tokenizer of 128k words has them: the answer a token and an end.
DATA = {
    "512_256": Data(_fixed(512, 256), 8, 8),
    "128_512": Data(_fixed(128, 512), 8, 8),
    "hh": Data(HH, 32, 8),
    "persona": Data(Lengths("persona", (3.40, 0.31), (0.69, 0.0), (0.69, 0.0)), 128, 64),
}
DRY_DATA = {
    "512_256": Data(_fixed(16, 8), 4, 2),
    "128_512": Data(_fixed(4, 16), 4, 2),
    "hh": Data(Lengths("hh", (2.0, 0.5), (1.5, 0.5), (1.5, 0.5)), 4, 2),
    "persona": Data(Lengths("persona", (2.0, 0.3), (0.69, 0.0), (0.69, 0.0)), 4, 2),
}


@dataclass(frozen=True)
class Case:
    """``recipe``: "tuned", bfloat16 weights, reference known, nothing recomputed; or "default",
    what TRL does unless told otherwise: float32 weights under autocast, which fastpref then has
    too, layers computed again, a reference model in every step."""

    size: str
    data: str
    trainable: str = "all"  # or "lora"
    recipe: str = "tuned"

    @property
    def name(self) -> str:
        """As it is called in records."""
        kind = "full" if self.trainable == "all" else self.trainable
        return f"{self.size}_{kind}_{self.data}_{self.recipe}"

    @property
    def model(self) -> tuple[str, str, str]:
        """What cases must have in common to share a model."""
        return self.size, self.trainable, self.recipe

    @property
    def tracked(self) -> bool:
        """Whether tracking by sketches is timed too."""
        return self.data == "512_256" and self.recipe == "tuned"

    def trl_micro(self, data: Data) -> int:
        """Pairs in a forward of TRL's."""
        if self.recipe == "default":
            return min(8, data.pairs)
        short = self.size == "8b" and self.trainable == "all" and data.lengths.name != "persona"
        return min(4, data.trl_micro) if short else data.trl_micro


def cases() -> list[Case]:
    """The most important first: those with targets, then one of every kind, then the others."""
    first = [
        Case("8b", "512_256"),
        Case("3b", "512_256", recipe="default"),
        Case("8b", "512_256", "lora"),
    ]
    kinds = [Case("8b", d, t) for t in ("lora", "all") for d in ("hh", "128_512", "persona")]
    kinds += [Case("3b", d, recipe="default") for d in ("hh", "128_512", "persona")]
    others = [
        Case(s, d, t, r)
        for s in ("1b", "3b")
        for r in ("tuned", "default")
        for t in ("all", "lora")
        for d in DATA
    ]
    return list(dict.fromkeys([*first, *kinds, *others]))


def make_module(case: Case, device: Any, seed: int, dry: bool = False) -> Any:
    """A Llama of random weights, all from a seed, in the precision of the recipe."""
    import torch
    from transformers import LlamaForCausalLM

    config = (DRY_SIZES if dry else SIZES)[case.size].config()
    config.tie_word_embeddings = case.size in TIED
    dtype = torch.bfloat16 if case.recipe == "tuned" else torch.float32
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def make_pairs(case: Case, batches: int, dry: bool = False) -> list[list[TokenPair]]:
    """The pairs of each step."""
    data = (DRY_DATA if dry else DATA)[case.data]
    vocab = (DRY_SIZES if dry else SIZES)[case.size].vocab
    pairs = [_cut(p) for p in data.lengths.pairs(batches * data.pairs, vocab, seed=1)]
    return [pairs[i : i + data.pairs] for i in range(0, len(pairs), data.pairs)]


def _cut(pair: TokenPair) -> TokenPair:
    """At most MAX_LENGTH tokens of prompt and completion."""
    room = MAX_LENGTH - len(pair.prompt)
    return dataclasses.replace(pair, chosen=pair.chosen[:room], rejected=pair.rejected[:room])
