"""Reference log-probs: computed once per data set and model, kept on disk, checked when reused.

A cache file is named by a digest of what decides the numbers and of nothing else: the weights, the
precision, and every pair's token ids (which hold tokenizer, template, truncation and EOS rule). The
batch plan, the device, the number of threads and the learning rate are not in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from fastpref import dist
from fastpref.base import cache_root
from fastpref.data.pack import fed_tokens, pack_pairs, plan_microbatches
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel
from fastpref.reference import sequence_logp

log = logging.getLogger(__name__)

FORMAT = 1  # of the file and of the key; raise it when either changes
# Packed tokens per forward. A constant, and the plan a function of the data alone, so that a cache
# made again holds the same bits; it is not the run's max_tokens_per_microbatch.
PLAN_TOKENS = 8192
# Largest difference in nats per scored token between a cached and a recomputed log-prob. Another
# plan changes the last bits only; other weights, templates or truncations change far more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def cache_key(model: PairModel, pairs: Sequence[TokenPair], ld_alpha: float | None = None) -> str:
    """Digest (16 hex digits) of everything that decides the log-probs of ``pairs``."""
    weighted = "" if ld_alpha is None else f" ld_alpha {ld_alpha!r}"
    digest = hashlib.sha256(f"{FORMAT} {model.identity} {model.dtype}{weighted}\n".encode())
    for pair in sorted(pairs, key=lambda p: p.pair_id):
        sizes = (pair.pair_id, len(pair.prompt), len(pair.chosen), len(pair.rejected))
        digest.update(np.array(sizes, "<i8").tobytes())
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(np.asarray(ids, "<i4").tobytes())
    return digest.hexdigest()[:16]


def with_reference(
    model: PairModel,
    pairs: Sequence[TokenPair],
    *,
    cache_dir: str | None = None,
    check_pairs: int = 8,
    seed: int = 0,
    ld_alpha: float | None = None,
    progress: bool = True,
) -> list[TokenPair]:
    """``pairs`` with ``ref_chosen``, ``ref_rejected`` filled in from the cache, which is made first
    where it is missing. `model` must hold the reference weights.

    Values that the data brought (columns ``ref_chosen_logps``, ``ref_rejected_logps``) are kept;
    under ``ld_alpha`` they are refused, because sums cannot be weighted any more. Raises ValueError
    where a cache file is incomplete or disagrees with the model.
    """
    given = [p for p in pairs if p.ref_chosen is not None or p.ref_rejected is not None]
    if ld_alpha is not None and given:
        raise ValueError(
            f"pair {given[0].pair_id} brings reference log-probs, but ld_alpha weighs tokens, "
            "which sums do not have any more."
        )
    missing = [p for p in pairs if p.ref_chosen is None or p.ref_rejected is None]
    if not missing:
        return list(pairs)
    folder = Path(cache_dir).expanduser() if cache_dir else cache_root() / "reference"
    path = folder / f"{cache_key(model, missing, ld_alpha)}.parquet"
    if dist.is_main() and not path.exists():
        _write(
            path,
            missing,
            reference_logp(model, missing, ld_alpha=ld_alpha, progress=progress),
            model,
        )
    dist.barrier()
    cached = _read(path, missing)
    log.info("reference log-probs: %d pairs from %s", len(missing), path)
    _spot_check(model, missing, cached, check_pairs, seed, ld_alpha, path)
    found = {p.pair_id: values for p, values in zip(missing, cached.tolist(), strict=True)}
    return [
        dataclasses.replace(p, ref_chosen=found[p.pair_id][0], ref_rejected=found[p.pair_id][1])
        if p.pair_id in found
        else p
        for p in pairs
    ]


def reference_logp(
    model: PairModel,
    pairs: Sequence[TokenPair],
    *,
    ld_alpha: float | None = None,
    progress: bool = False,
) -> np.ndarray:
    """(N, 2) float32: summed log-probs in nats of chosen and rejected, in ``pairs``' order.

    Of the model as its own reference: before training, an adapter off where that is asked for.
    """
    out = np.empty((len(pairs), 2), np.float32)
    bar = tqdm(total=len(pairs), unit="pair", desc="reference", disable=not progress)
    with bar, model.as_reference():
        for own in reference_plan(pairs):
            batch = pack_pairs([pairs[i] for i in own]).to(model.device)
            both = torch.stack(sequence_logp(model, batch, ld_alpha), dim=1)
            out[own] = both.float().cpu().numpy()
            bar.update(len(own))
    return out


def reference_plan(pairs: Sequence[TokenPair]) -> list[np.ndarray]:
    """Batches, as indices into ``pairs``, whose pair_ids and order do not depend on their order."""
    fed = fed_tokens(pairs)
    ranked = np.array(sorted(range(len(pairs)), key=lambda i: pairs[i].pair_id), np.int64)
    budget = max(PLAN_TOKENS, int(fed.max()))
    plan = plan_microbatches(fed[ranked], np.arange(len(pairs)), budget)
    return [ranked[places] for places in plan]


def _write(path: Path, pairs: Sequence[TokenPair], logp: np.ndarray, model: PairModel) -> None:
    """Atomic: a file under its own name is always whole."""
    if not np.isfinite(logp).all():
        odd = int(np.flatnonzero(~np.isfinite(logp).all(axis=1))[0])
        raise ValueError(
            f"reference log-prob of pair_id {pairs[odd].pair_id} is {logp[odd].tolist()}: "
            f"the model {model.identity} gives numbers that are not finite."
        )
    order = np.argsort([p.pair_id for p in pairs], kind="stable")
    made_of = {"format": FORMAT, "model": model.identity, "dtype": str(model.dtype)}
    table = pa.table(
        {
            "pair_id": pa.array([pairs[i].pair_id for i in order], pa.int64()),
            "ref_chosen": pa.array(logp[order, 0]),
            "ref_rejected": pa.array(logp[order, 1]),
        }
    ).replace_schema_metadata({"fastpref.reference": json.dumps(made_of)})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _read(path: Path, pairs: Sequence[TokenPair]) -> np.ndarray:
    """(N, 2) float32 in the order of ``pairs``; ValueError unless every pair is there."""
    remedy = "Remove the file, and it will be made again."
    try:
        table = pq.read_table(path, columns=["pair_id", "ref_chosen", "ref_rejected"])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"reference cache {path} cannot be read: {error}. {remedy}") from error
    ids = table["pair_id"].to_numpy()
    wanted = np.array([p.pair_id for p in pairs], np.int64)
    at = np.minimum(np.searchsorted(ids, wanted), max(len(ids) - 1, 0))
    there = ids[at] == wanted if len(ids) else np.zeros(len(wanted), bool)
    if not there.all():
        raise ValueError(
            f"reference cache {path} lacks {int((~there).sum())} of {len(wanted)} pairs, the first "
            f"being pair_id {int(wanted[~there][0])}. {remedy}"
        )
    both = [table[name].to_numpy()[at] for name in ("ref_chosen", "ref_rejected")]
    logp = np.stack(both, axis=1).astype(np.float32)
    if not np.isfinite(logp).all():
        raise ValueError(f"reference cache {path} holds numbers that are not finite. {remedy}")
    return logp


def _spot_check(
    model: PairModel,
    pairs: Sequence[TokenPair],
    cached: np.ndarray,
    count: int,
    seed: int,
    ld_alpha: float | None,
    path: Path,
) -> None:
    """Compute a few random pairs again: a cache of other weights must not steer a run."""
    count = min(count, len(pairs))
    if not count:
        return
    drawn = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
    fresh = reference_logp(model, [pairs[i] for i in drawn], ld_alpha=ld_alpha)
    scored = np.array([(len(pairs[i].chosen), len(pairs[i].rejected)) for i in drawn])
    error = np.abs(fresh - cached[drawn]) / scored
    worst = int(error.max(axis=1).argmax())
    if not error.max() <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"reference cache {path}: pair_id {pairs[drawn[worst]].pair_id} is kept as "
            f"{cached[drawn[worst]].tolist()} nats (chosen, rejected), but the model gives "
            f"{fresh[worst].tolist()}. Remove the file, and it will be made again."
        )
