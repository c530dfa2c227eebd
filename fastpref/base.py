"""`fastpref-tiny`: a 5M-parameter Llama that is made here, once; no model need be downloaded.

`model_name_or_path: fastpref-tiny` names it. The first use makes a byte-level BPE tokenizer from
`base_text`, fits a small Llama to that text by its next token, and keeps both as an ordinary
Hugging Face folder in the user's cache; later uses read the folder. The number of steps is fixed
and the fit has its own random state: on one machine every fit gives the same bits, and the
caller's random numbers are what they would have been without it.

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

from fastpref.base_text import ANSWERS, TOPICS, documents, themes

BASE_NAME = "fastpref-tiny"
VERSION = 1  # raise it when code below changes what a fit gives: it is part of the cache's key
EOS, BOS, PAD = "</s>", "<s>", "<pad>"
NOTES_FILE = "fastpref_base.json"

Line = tuple[list[int], list[int]]  # token ids: context, answer with EOS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the model, besides the text, the code and the arithmetic of the machine.

    Sizes of the model; the start (`topic_scale`, `topic_mixing`: see `_start_as_topic_model`); the
    fit: `steps` AdamW steps of `tokens_per_step` tokens (whole documents of similar length), the
    learning rate rising for `warmup` steps and falling along a cosine to `final_rate` of itself,
    `embedding_rate` times as high for the embedding; a context's tokens weigh `context_weight` in
    the loss, an answer's 1. `tokenizer_documents`, `validation_documents`: numbers of texts.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 688
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    max_positions: int = 2048
    topic_scale: float = 0.3
    topic_mixing: float = 0.4
    tokenizer_documents: int = 6000
    validation_documents: int = 256
    steps: int = 110
    tokens_per_step: int = 1024
    context_weight: float = 0.2
    learning_rate: float = 3e-3
    embedding_rate: float = 3.0
    final_rate: float = 0.02
    warmup: int = 10
    weight_decay: float = 0.01
    seed: int = 0


RECIPE = Recipe()


def is_base_name(name: str) -> bool:
    """Whether `name`, a `model_name_or_path`, asks for the model made here."""
    return name == BASE_NAME


def cache_root() -> Path:
    """The user's cache: $FASTPREF_CACHE, else $XDG_CACHE_HOME/fastpref, else ~/.cache/fastpref."""
    if own := os.environ.get("FASTPREF_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "fastpref"
    return Path("~/.cache/fastpref").expanduser()


def digest(recipe: Recipe = RECIPE) -> str:
    """16 hex digits of the recipe and of the text it is fitted to, not of libraries' versions."""
    settings = json.dumps([VERSION, dataclasses.asdict(recipe)], sort_keys=True)
    key = hashlib.sha256(settings.encode())
    for file in ("base_text.py", "base_words.txt"):
        key.update(resources.files("fastpref").joinpath(file).read_bytes())
    return key.hexdigest()[:16]


def base_dir(log: bool = True, recipe: Recipe = RECIPE) -> Path:
    """Folder of the model and tokenizer, in Hugging Face's layout; made on first use.

    `log`: show a progress bar with the loss while it is made. The folder is written aside and
    renamed when complete: an interrupted fit leaves nothing behind that would be taken for a model,
    and of two processes that fit at once the first to finish is kept.
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
    """The `PreTrainedTokenizerFast` of `fastpref-tiny`; makes the model if it is missing."""
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
        _start_as_topic_model(model, tokenizer, recipe)
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

    Adds neither BOS nor EOS by itself: texts can then be joined and cut without special cases, and
    no row is spent on a token that carries nothing (a first prompt token is never scored anyway).
    `<s>`, `</s>` and `<pad>` are three tokens of their own.
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
    for context, answer in itertools.islice(documents(recipe.seed), recipe.tokenizer_documents):
        yield context + answer
    # Every word as it stands within a sentence, the common ones also as they begin one.
    for theme, words in themes().items():
        for word in words:
            yield f" {word} {word} {word} {word}s"
            if theme in ("common", "people"):
                yield from (word.capitalize(), f" {word.capitalize()}")


@contextlib.contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seeded random numbers inside, the caller's untouched: cold and warm caches train alike."""
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


@torch.no_grad()
def _start_as_topic_model(model: Any, tokenizer: Any, recipe: Recipe) -> None:
    """Put into fresh weights what a short fit has no time to find: which words belong together.

    Every subject (topic or theme of `base_text`) gets a random direction, all orthogonal. A token's
    rows of the embedding and of the head get, besides their noise, the directions of the subjects
    whose words it occurs in, by frequency, times `topic_scale`. In the first layer the value
    projection of every head reads these directions and the output projection writes them back,
    times `topic_mixing`: while attention is still uniform, each position holds the mean subject of
    all words up to it. The fit keeps this because naming words of a topic needs it.
    """
    close = [[w for e in (*t.nouns, *t.activities) for w in e.split()] for t in TOPICS.values()]
    subjects = close + list(themes().values())
    counts = torch.zeros(recipe.vocab_size, len(subjects))
    for subject, words in enumerate(subjects):
        # Generated sets consist of topics, so a word is its topic's first and a theme's second.
        weight = 4.0 if subject < len(close) else 1.0
        for word in words:
            ids = tokenizer.encode(f" {word}", add_special_tokens=False)
            for token in ids:
                counts[token, subject] += weight / len(ids)
    share = counts / counts.sum(1, keepdim=True).clamp_min(1e-9)
    for word in themes()["common"]:
        share[tokenizer.encode(f" {word}", add_special_tokens=False)] = 0.0
    directions = torch.linalg.qr(torch.randn(recipe.hidden_size, len(subjects)))[0]
    rows = recipe.topic_scale * share @ directions.T
    model.model.embed_tokens.weight += rows
    model.lm_head.weight += rows
    attention, width = model.model.layers[0].self_attn, recipe.hidden_size // recipe.heads
    assert width >= len(subjects), f"{len(subjects)} subjects do not fit a head of width {width}"
    for start in range(0, recipe.kv_heads * width, width):
        attention.v_proj.weight[start : start + len(subjects)] = directions.T
    for start in range(0, recipe.heads * width, width):
        columns = slice(start, start + len(subjects))
        attention.o_proj.weight[:, columns] = recipe.topic_mixing * directions


def _fit(model: Any, tokenizer: Any, recipe: Recipe, log: bool) -> tuple[float, float]:
    """Fit `model` in place; returns the weighted loss of the last 10 steps and validation loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    embedding = model.model.embed_tokens.weight
    others = [p for p in model.parameters() if p is not embedding]
    optimizer = torch.optim.AdamW(
        [
            {"params": [embedding], "rate": recipe.learning_rate * recipe.embedding_rate},
            {"params": others, "rate": recipe.learning_rate},
        ],
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
            group["lr"] = group["rate"] * _schedule(step, recipe)
        loss = _loss(model, next(batches), recipe.context_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-9:], loss.item()]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
    validation = _validation_loss(model, tokenizer, recipe)
    model.to("cpu").eval()
    return sum(recent) / max(len(recent), 1), validation


def _schedule(step: int, recipe: Recipe) -> float:
    rise = min(1.0, (step + 1) / max(recipe.warmup, 1))
    fall = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
    return rise * (recipe.final_rate + (1 - recipe.final_rate) * fall)


@torch.no_grad()
def _validation_loss(model: Any, tokenizer: Any, recipe: Recipe) -> float:
    """Mean loss, nats per token, all tokens alike, of texts of a seed that the fit does not use."""
    unseen = itertools.islice(documents(recipe.seed + 1), recipe.validation_documents)
    lines = sorted(_encode(tokenizer, unseen), key=_length)
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(lines), 32):
        batch = lines[start : start + 32]
        scored = sum(_length(line) - 1 for line in batch)
        total += _loss(model, batch, 1.0).item() * scored
        count += scored
    return total / max(count, 1)


def _length(line: Line) -> int:
    return len(line[0]) + len(line[1])


def _encode(tokenizer: Any, texts: Iterable[tuple[str, str]]) -> Iterator[Line]:
    for context, answer in texts:
        # An answer begins with a space: its tokens are those it has when joined to its context.
        first = tokenizer.encode(context, add_special_tokens=False)
        second = tokenizer.encode(answer, add_special_tokens=False)
        yield first, [*second, tokenizer.eos_token_id]


def _batches(encoded: Iterator[Line], tokens: int, seed: int) -> Iterator[list[Line]]:
    """Groups of documents of similar length, each of about `tokens` tokens when padded.

    Each document keeps a line of its own and starts at position 0, as a prompt does in use;
    sorting a window of 16 batches by length keeps the padding to a few per cent.
    """
    order = random.Random(seed)
    while True:
        window: list[Line] = []
        while sum(map(_length, window)) < 16 * tokens:
            window.append(next(encoded))
        window.sort(key=_length)
        groups: list[list[Line]] = [[]]
        for line in window:
            if groups[-1] and (len(groups[-1]) + 1) * _length(line) > tokens:
                groups.append([])
            groups[-1].append(line)
        order.shuffle(groups)
        yield from groups


def _loss(model: Any, lines: Sequence[Line], context_weight: float) -> torch.Tensor:
    """Weighted mean next-token loss; weight 0 hides what is beyond the end of a shorter line."""
    width = max(map(_length, lines))
    ids = torch.zeros((len(lines), width), dtype=torch.long)
    weight = torch.zeros((len(lines), width))
    for i, (context, answer) in enumerate(lines):
        end = len(context) + len(answer)
        ids[i, :end] = torch.tensor([*context, *answer])
        weight[i, : len(context)] = context_weight
        weight[i, len(context) : end] = 1.0
    ids, weight = ids.to(model.device), weight[:, 1:].to(model.device)
    logits = model(ids[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return loss @ weight.flatten() / weight.sum()
