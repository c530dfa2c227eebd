"""Which model a run's reference is, and the log-probs of all its pairs under that model."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastpref.config import Config
from fastpref.data.pack import Packer, pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.loading import load_reference
from fastpref.model import PairModel
from fastpref.refcache import Found, look_up
from fastpref.selfcheck import check_model

log = logging.getLogger(__name__)


def find_reference(
    config: Config,
    model: PairModel | None,
    tokenizer: Any,
    pairs: Sequence[TokenPair],
    progress: bool = True,
    pack: Packer = pack_pairs,
) -> tuple[Found, str]:
    """``pairs`` with their reference log-probs; and what names the reference's weights, which a
    resumed run must find the same.

    The reference is ``model``, which has not been trained yet, or the model that
    ``ref_model_name_or_path`` names: that one is in memory here and nowhere else, and ``model`` may
    be None. ``tokenizer`` is the one that made ``pairs``; ``pack`` may bring the states of
    ``model``, see `look_up`.
    """
    reference = model
    if config.ref_model_name_or_path:
        reference = load_reference(config)
        demand_same_tokens(config.ref_model_name_or_path, reference, tokenizer, pairs)
        try:
            worst = check_model(reference, pairs, config.max_tokens_per_microbatch)
        except ValueError as refusal:
            where = f"ref_model_name_or_path={config.ref_model_name_or_path!r}"
            raise ValueError(f"{where}: {refusal}") from None
        log.info("self-check of the reference: packed equals separate sequences to %.1e", worst)
    assert reference is not None, "without a reference of its own a run's model is the reference"
    found = look_up(
        reference,
        pairs,
        cache_dir=config.ref_cache_dir,
        check_pairs=config.ref_check_pairs,
        seed=config.seed,
        ld_alpha=config.ld_alpha,
        progress=progress,
        pack=pack if reference is model else pack_pairs,
    )
    name = reference.identity
    if reference is not model:
        device = reference.device
        del reference
        gc.collect()  # a module may point at itself, through its hooks
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found, name


def demand_same_tokens(
    name: str, reference: PairModel, tokenizer: Any, pairs: Sequence[TokenPair]
) -> None:
    """Raise ValueError unless every token id of ``pairs`` is the same token to both models."""
    where = f"ref_model_name_or_path={name!r}"
    vocabulary = len(reference.head.weight)
    highest = max(
        int(ids.max(initial=0)) for p in pairs for ids in (p.prompt, p.chosen, p.rejected)
    )
    if highest >= vocabulary:
        raise ValueError(
            f"{where}: the data holds token id {highest}, but this model has ids up to "
            f"{vocabulary - 1}: it has another tokenizer than model_name_or_path."
        )
    used = np.zeros(highest + 1, bool)
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            used[ids] = True
    numbers = np.flatnonzero(used).tolist()
    tokens = (t.convert_ids_to_tokens(numbers) for t in (tokenizer, reference.tokenizer))
    for number, own, other in zip(numbers, *tokens, strict=True):
        if own != other:
            raise ValueError(
                f"{where}: token id {number} of the data is {other!r} to this model and {own!r} to "
                "model_name_or_path. A reference needs the model's own tokenizer."
            )
