"""What the model answers to prompts by greedy decoding, for probes of type ``initial``."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpref import dist
from fastpref.config import Config
from fastpref.data.branches import Probe
from fastpref.data.dataset import Dataset
from fastpref.data.probes import probe_of, probe_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics.parts import list_parts, read_records
from fastpref.model import PairModel
from fastpref.probe_types import INITIAL

log = logging.getLogger(__name__)


def initial_probes(config: Config, model: PairModel, dataset: Dataset) -> list[Probe]:
    """Probes of type ``initial``: ``model``, as training begins, answers the probed prompts.

    An answer has at most as many tokens as the pair's longer completion. A run that goes on has the
    answers of its records, where there are any: another device might decode another way.
    """
    if INITIAL not in config.probe_types:
        return []
    sampled = probe_pairs(dataset.train, config.probe_prompts, config.seed)
    pairs = [pair for pair in sampled if len(pair.prompt)]
    text = "[]"
    if dist.is_main() and pairs:
        answers = _recorded(config, pairs)
        if answers is None:
            log.info("probes: %d prompts are answered by the model as it is", len(pairs))
            limits = [max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
            prompts = [pair.prompt for pair in pairs]
            answers = greedy(model, prompts, limits, config.max_tokens_per_microbatch)
        text = json.dumps([ids.tolist() for ids in answers])
    given = json.loads(dist.broadcast_text(text, model.device))
    return [
        probe_of(pair, INITIAL, np.array(ids, np.int32))
        for pair, ids in zip(pairs, given, strict=True)
    ]


def _recorded(config: Config, pairs: Sequence[TokenPair]) -> list[np.ndarray] | None:
    """Of the run that a checkpoint in `output_dir` goes on with; None where they are not there."""
    run = Path(config.output_dir)
    if config.overwrite_output_dir or not any(run.glob("checkpoint-*")):
        return None
    if not list_parts(run, "probe_index"):
        return None
    table = read_records(run, "probe_index", ["probe_id", "response"])
    known = dict(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    wanted = [probe_of(pair, INITIAL, pair.chosen).probe_id for pair in pairs]
    if not known.keys() >= set(wanted):
        return None
    return [np.array(known[probe_id], np.int32) for probe_id in wanted]


@torch.no_grad()
def greedy(
    model: PairModel,
    prompts: Sequence[np.ndarray],  # token ids, at least one each
    limits: Sequence[int],  # most tokens of each answer
    max_tokens: int,  # of a batch, padding and answers included
) -> list[np.ndarray]:  # int32
    """The likeliest next token again and again, up to and with an EOS, by transformers' own code.

    Raises ValueError where the model cannot generate.
    """
    from transformers import GenerationConfig

    module: Any = model.module
    given = getattr(module.generation_config, "eos_token_id", None)
    ends = set(given if isinstance(given, list) else [given]) - {None}
    ends |= {model.tokenizer.eos_token_id} - {None}
    answers: dict[int, np.ndarray] = {}
    # A model's own generation settings (penalties, sampling) would give another answer.
    kept, module.generation_config = module.generation_config, GenerationConfig()
    try:
        with model.plain_attention(), model.autocast():
            for own in _batches(prompts, limits, max_tokens):
                longest = max(len(prompts[i]) for i in own)
                ids = torch.zeros(len(own), longest, dtype=torch.int64)
                held = torch.zeros_like(ids)
                for row, i in enumerate(own):
                    ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                    held[row, longest - len(prompts[i]) :] = 1
                settings = GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(limits[i] for i in own),
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=min(ends, default=0),
                )
                found = module.generate(
                    ids.to(model.device),
                    attention_mask=held.to(model.device),
                    generation_config=settings,
                )
                for i, answer in zip(own, found[:, longest:].cpu().numpy(), strict=True):
                    answers[i] = _ended(answer[: limits[i]], ends)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot answer the probed prompts: {error}. Leave {INITIAL} "
            "out of probe_types."
        ) from error
    finally:
        module.generation_config = kept
    return [answers[i] for i in range(len(prompts))]


def _batches(
    prompts: Sequence[np.ndarray], limits: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Indices of prompts by length; one that is too large is a batch by itself."""
    batches: list[list[int]] = []
    longest = limit = 0
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        longest, limit = max(longest, len(prompts[i])), max(limit, limits[i])
        if not batches or (len(batches[-1]) + 1) * (longest + limit) > max_tokens:
            batches.append([])
            longest, limit = len(prompts[i]), limits[i]
        batches[-1].append(i)
    return batches


def _ended(answer: np.ndarray, ends: set[int]) -> np.ndarray:
    """Without what stands behind the first EOS."""
    at = np.flatnonzero(np.isin(answer, sorted(ends)))
    return answer[: at[0] + 1 if len(at) else len(answer)].astype(np.int32)
