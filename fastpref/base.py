"""`fastpref-tiny`: a 5M-parameter Llama that is made here, once, so that no model need be downloaded.

`model_name_or_path: fastpref-tiny` names it. The first use makes a byte-level BPE tokenizer from
`base_text`, fits a small Llama to that text by its next token, and keeps both as an ordinary Hugging
Face folder in the user's cache; later uses read the folder. The number of steps is fixed and the
fit has its own random state: on one machine every fit gives the same bits, and the caller's random
numbers are what they would have been without it.

The model writes plausible sentences, answers framed statements " Yes" or " No" with equal
probability, and prefers nothing: a place to start preference training from (docs/base.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastpref.base_text import ANSWERS, documents, themes

BASE_NAME = "fastpref-tiny"
VERSION = 1  # raise it when code below changes what a fit gives: it is part of the cache's key
EOS, BOS, PAD = "</s>", "<s>", "<pad>"
NOTES_FILE = "fastpref_base.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the model, besides the text, the code and the arithmetic of the machine.

    Sizes of the model, then of the fit: `steps` AdamW steps of `tokens_per_step` tokens (whole
    documents of similar length), the learning rate rising for `warmup` steps and then falling along a
    cosine to a tenth; `tokenizer_documents` and `validation_documents` are numbers of texts.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 688
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    max_positions: int = 2048
    tokenizer_documents: int = 6000
    validation_documents: int = 256
    steps: int = 120
    tokens_per_step: int = 2048
    learning_rate: float = 3e-3
    warmup: int = 10
    weight_decay: float = 0.01
    seed: int = 0


RECIPE = Recipe()


def is_base_name(name: str) -> bool:
    """Whether `name`, a `model_name_or_path`, asks for the model made here."""
    return name == BASE_NAME


def cache_root() -> Path:
    """The user's cache folder: $FASTPREF_CACHE, else $XDG_CACHE_HOME/fastpref, else ~/.cache/fastpref."""
    if own := os.environ.get("FASTPREF_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "fastpref"
    return Path("~/.cache/fastpref").expanduser()


def digest(recipe: Recipe = RECIPE) -> str:
    """16 hex digits of the recipe and of the text it is fitted to; versions of libraries play no part."""
    key = hashlib.sha256(json.dumps([VERSION, dataclasses.asdict(recipe)], sort_keys=True).encode())
    for file in ("base_text.py", "base_words.txt"):
        key.update(resources.files("fastpref").joinpath(file).read_bytes())
    return key.hexdigest()[:16]


def base_dir(log: bool = True, recipe: Recipe = RECIPE) -> Path:
    """Folder of the model and tokenizer, in Hugging Face's layout; made on first use.

    `log`: show a progress bar with the loss while it is made. The folder is written aside and renamed
    when complete: an interrupted fit leaves nothing behind that would be taken for a model, and of two
    processes that fit at once the first to finish is kept.
    Raises OSError if the cache folder cannot be written (set $FASTPREF_CACHE to one that can).
    """
    folder = cache_root() / f"base-{digest(recipe)}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"{folder.parent}: cannot keep {BASE_NAME} there ({error}); "
            "set FASTPREF_CACHE to a folder that can be written"
        ) from error
    try:
        build_base(aside, recipe, log)
        aside.chmod(0o755)  # mkdtemp's folders are the owner's alone
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def load_base_tokenizer() -> Any:
    """The tokenizer of `fastpref-tiny` (a `PreTrainedTokenizerFast`); makes the model if it is missing."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(base_dir())


def build_base(folder: Path, recipe: Recipe = RECIPE, log: bool = True) -> None:
    """Make tokenizer and model and save them, with notes on the fit, in the existing `folder`."""
    tokenizer = build_tokenizer(recipe)
    for answer in ANSWERS:
        pieces = tokenizer.tokenize(answer)
        assert len(pieces) == 1, f"{answer!r} is {len(pieces)} tokens, {pieces}; it must be one"
    with _own_random_state(recipe.seed):
        model = _new_model(recipe, tokenizer)
        train_loss, validation_loss = _fit(model, tokenizer, recipe, log)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    notes = {
        "name": BASE_NAME,
        "version": VERSION,
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": round(train_loss, 4),
        "validation_loss": round(validation_loss, 4),
    }
    (folder / NOTES_FILE).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
    if log:
        logger.info("%s: validation loss %.3f nats per token", BASE_NAME, validation_loss)


def build_tokenizer(recipe: Recipe = RECIPE) -> Any:
    """Byte-level BPE fitted to the documents and the broad vocabulary of `base_text`.

    Adds no BOS by itself: a prompt's tokens are then the same whether it stands alone or is followed by
    a completion, as preference data wants it, and position 0 is never scored. `<s>`, `</s>` and
    `<pad>` are three tokens of their own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[EOS, BOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_tokenizer_text(recipe), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        bos_token=BOS,
        pad_token=PAD,
        model_max_length=recipe.max_positions,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_text(recipe: Recipe) -> Iterator[str]:
    yield from itertools.islice(documents(recipe.seed), recipe.tokenizer_documents)
    # Every word of the vocabulary as it stands within a sentence, and the common ones as they begin one.
    for theme, words in themes().items():
        for word in words:
            yield f" {word} {word} {word} {word}s"
            if theme in ("common", "people"):
                yield from (word.capitalize(), f" {word.capitalize()}")


@contextlib.contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seeded random numbers inside, the caller's untouched after: cold and warm caches train alike."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        yield


def _new_model(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


def _fit(model: Any, tokenizer: Any, recipe: Recipe, log: bool) -> tuple[float, float]:
    """Fit `model` in place; returns the loss of the last steps and of unseen documents, nats per token."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    encoded = _encode(tokenizer, documents(recipe.seed))
    batches = _batches(encoded, recipe.tokens_per_step, recipe.seed)
    recent: list[float] = []
    bar = tqdm(range(recipe.steps), desc=f"making {BASE_NAME} (once)", unit="step", disable=not log)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        loss = _loss(model, next(batches), tokenizer.pad_token_id, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-9:], loss.item()]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
    validation = _validation_loss(model, tokenizer, recipe, device)
    model.to("cpu").eval()
    return sum(recent) / max(len(recent), 1), validation


def _schedule(step: int, recipe: Recipe) -> float:
    rise = min(1.0, (step + 1) / max(recipe.warmup, 1))
    return rise * (0.55 + 0.45 * math.cos(math.pi * step / recipe.steps))


@torch.no_grad()
def _validation_loss(model: Any, tokenizer: Any, recipe: Recipe, device: torch.device) -> float:
    """Mean over the tokens of `validation_documents` texts drawn with a seed that the fit does not use."""
    unseen = itertools.islice(documents(recipe.seed + 1), recipe.validation_documents)
    total, count = 0.0, 0
    model.eval()
    for ids in _encode(tokenizer, unseen):
        total += _loss(model, [ids], tokenizer.pad_token_id, device).item() * (len(ids) - 1)
        count += len(ids) - 1
    return total / max(count, 1)


def _encode(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    for text in texts:
        yield [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def _batches(encoded: Iterator[list[int]], tokens: int, seed: int) -> Iterator[list[list[int]]]:
    """Groups of documents of similar length, each of about `tokens` tokens when padded.

    Each document keeps a line of its own and starts at position 0, as a prompt does in use; sorting a
    window of 16 batches by length keeps the padding to a few per cent.
    """
    order = random.Random(seed)
    while True:
        window: list[list[int]] = []
        while sum(map(len, window)) < 16 * tokens:
            window.append(next(encoded))
        window.sort(key=len)
        groups: list[list[list[int]]] = [[]]
        for ids in window:
            if (len(groups[-1]) + 1) * len(ids) > tokens and groups[-1]:
                groups.append([])
            groups[-1].append(ids)
        order.shuffle(groups)
        yield from groups


def _loss(model: Any, lines: Sequence[list[int]], pad: int, device: torch.device) -> torch.Tensor:
    """Mean next-token loss of `lines`, padded on the right: causal attention never sees the padding."""
    width = max(map(len, lines))
    ids = torch.full((len(lines), width), pad)
    for row, line in zip(ids, lines, strict=True):
        row[: len(line)] = torch.tensor(line)
    ids = ids.to(device)
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad
    )
