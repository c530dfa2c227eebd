"""Reference log-probs: computed once per data set and model, kept on disk, checked when reused.

A cache file is named by a digest of what decides the numbers and of nothing else: the weights, the
precision, and every pair's token ids (which hold tokenizer, template, truncation and EOS rule). The
batch plan, the device, the number of threads and the learning rate are not in it, nor what
`flip_behaviors` exchanges: a run with it finds the file of one without.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastpref import dist
from fastpref.base import cache_root
from fastpref.data.pack import Packer, fed_tokens, pack_pairs, plan_microbatches
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel
from fastpref.reference import sequence_logp
from fastpref.reffile import (
    prepare_folder,
    read_logp,
    read_partials,
    remove_leftovers,
    write_logp,
    write_partial,
)

log = logging.getLogger(__name__)

FORMAT = 2  # of the file and of the key; raise it when either changes
# Packed tokens per forward. A constant, and the plan a function of the data alone, so that a cache
# made again holds the same bits; it is not the run's max_tokens_per_microbatch.
PLAN_TOKENS = 8192
# Largest difference in nats per scored token between a cached and a recomputed log-prob. Another
# plan changes the last bits only; other weights, templates or truncations change far more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Seconds between two savings of an unfinished pass: what a killed process loses at most.
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Found:
    """Pairs with their reference log-probs, and where these came from."""

    pairs: list[TokenPair]
    given: int  # pairs that brought their own
    path: Path | None  # the cache file of the others; its stem is the key
    computed: bool  # now, because the file was not there

    def __str__(self) -> str:
        own = f", {self.given} of them from the data" if self.given else ""
        lines = [f"{len(self.pairs)} pairs have their reference log-probs{own}"]
        if self.path:
            lines.append(
                "computed now" if self.computed else "found in the cache, nothing computed"
            )
            lines += [f"key  {self.path.stem}", f"file {self.path}"]
        return "\n".join(lines)


def cache_key(model: PairModel, pairs: Sequence[TokenPair], ld_alpha: float | None = None) -> str:
    """Digest (16 hex digits) of everything that decides the log-probs of ``pairs`` and whose they
    are: 0.8 s for 161 000 pairs."""
    weighted = "" if ld_alpha is None else f" ld_alpha {ld_alpha!r}"
    digest = hashlib.sha256(f"{FORMAT} {model.identity} {model.dtype}{weighted}\n".encode())
    for pair in sorted(pairs, key=lambda p: p.pair_id):
        sizes = (pair.pair_id, len(pair.prompt), len(pair.chosen), len(pair.rejected))
        digest.update(np.array(sizes, "<i8").tobytes())
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(np.asarray(ids, "<i4").tobytes())
    return digest.hexdigest()[:16]


def reference_key(
    model: PairModel, pairs: Sequence[TokenPair], ld_alpha: float | None = None
) -> str:
    """The cache file's name: `cache_key`, whatever `flip_behaviors` exchanged."""
    return cache_key(model, unflipped(pairs), ld_alpha)


def with_reference(model: PairModel, pairs: Sequence[TokenPair], **options: Any) -> list[TokenPair]:
    """``pairs`` with ``ref_chosen``, ``ref_rejected`` filled in; options as in `look_up`."""
    return look_up(model, pairs, **options).pairs


def look_up(
    model: PairModel,
    pairs: Sequence[TokenPair],
    *,
    cache_dir: str | None = None,
    check_pairs: int = 8,
    seed: int = 0,
    ld_alpha: float | None = None,
    progress: bool = True,
    pack: Packer = pack_pairs,
) -> Found:
    """Reference log-probs of ``pairs`` from the cache, which is made first where it is missing.

    A ``pack`` that brings the body's states along (`fastpref.features`) spares the pass of the body
    and gives the same bits.

    `model` must hold the reference weights. Values that the data brought (columns
    ``ref_chosen_logps``, ``ref_rejected_logps``) are kept; under ``ld_alpha`` they are refused,
    because sums cannot be weighted any more. Every rank calls this; rank 0 alone touches the files.
    Raises ValueError where a cache file is incomplete or disagrees with the model.
    """
    own = [p for p in pairs if p.ref_chosen is not None or p.ref_rejected is not None]
    if ld_alpha is not None and own:
        raise ValueError(
            f"pair {own[0].pair_id} brings reference log-probs, but ld_alpha weighs tokens, "
            "which sums do not have any more."
        )
    missing = [p for p in pairs if p.ref_chosen is None or p.ref_rejected is None]
    given = len(pairs) - len(missing)
    if given:
        log.info("reference log-probs: %d pairs bring their own", given)
    if not missing:
        return Found(list(pairs), given, None, computed=False)
    plain = unflipped(missing)
    folder = Path(cache_dir).expanduser() if cache_dir else cache_root() / "reference"
    path, ids = folder / f"{cache_key(model, plain, ld_alpha)}.parquet", _pair_ids(plain)
    cached = read_logp(path, ids) if dist.is_main() and path.exists() else None
    there = bool(_from_main(np.array([cached is not None], np.float64), model.device)[0])
    if there:
        values = np.zeros((len(plain), 2), _numpy_dtype(model)) if cached is None else cached
        values = _from_main(values, model.device)
        _spot_check(model, plain, values, check_pairs, seed, ld_alpha, path, pack)
    else:
        if dist.is_main():
            prepare_folder(path)
        values = reference_logp(
            *(model, plain), ld_alpha=ld_alpha, pack=pack, progress=progress, partial=path
        )
        if dist.is_main():
            write_logp(path, ids, values, _made_of(model))
            remove_leftovers(path)
    how = "from" if there else "computed, now in"
    log.info("reference log-probs: %d pairs %s %s", len(missing), how, path)
    flipped = [i for i, p in enumerate(missing) if p.flipped]
    values[flipped] = values[flipped][:, ::-1]
    found = {p.pair_id: own for p, own in zip(missing, values.tolist(), strict=True)}
    filled = [
        dataclasses.replace(p, ref_chosen=found[p.pair_id][0], ref_rejected=found[p.pair_id][1])
        if p.pair_id in found
        else p
        for p in pairs
    ]
    return Found(filled, given, path, computed=not there)


def unflipped(pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """``pairs`` as the data has them: which side is preferred changes no log-prob, and so must
    change no bit of it."""
    return [
        dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen, flipped=False)
        if p.flipped
        else p
        for p in pairs
    ]


def reference_logp(
    model: PairModel,
    pairs: Sequence[TokenPair],
    *,
    ld_alpha: float | None = None,
    pack: Packer = pack_pairs,
    progress: bool = False,
    partial: Path | None = None,
) -> np.ndarray:
    """(N, 2) summed log-probs in nats of chosen and rejected, in ``pairs``' order; float32, of a
    float64 model float64.

    Of the model as its own reference: before training, an adapter off where that is asked for. With
    ``partial``, the path that the result will have, the work is shared among the ranks, and kept
    from time to time beside it, so that a killed pass goes on where it stood. Raises ValueError for
    a number that is not finite.
    """
    out = np.full((len(pairs), 2), np.nan, _numpy_dtype(model))
    plan, ids = reference_plan(pairs), _pair_ids(pairs)
    if partial is not None:
        read_partials(partial, ids, out)
        plan = plan[dist.rank() :: dist.world_size()]
    todo = [own for own in plan if np.isnan(out[own]).any()]
    mine, saved = np.zeros(len(pairs), bool), time.monotonic()
    count = sum(map(len, plan))
    bar = tqdm(total=count, unit="pair", desc="reference", disable=not progress)
    with bar, model.as_reference():
        bar.update(count - sum(map(len, todo)))
        for own in todo:
            batch = pack([pairs[i] for i in own]).to(model.device)
            both = torch.stack(sequence_logp(model, batch, ld_alpha), dim=1)
            out[own], mine[own] = both.cpu().numpy(), True
            bar.update(len(own))
            if partial is not None and time.monotonic() - saved > SAVE_SECONDS:
                done = mine & np.isfinite(out).all(axis=1)
                write_partial(partial, ids[done], out[done], _made_of(model))
                saved = time.monotonic()
    if partial is not None and dist.world_size() > 1:
        own = np.concatenate([*plan, np.empty(0, np.int64)])
        shared_out = np.zeros_like(out)
        shared_out[own] = out[own]  # every pair is one rank's: a sum with zeros keeps its bits
        out = _summed(shared_out, model.device)
    _demand_finite(out, pairs, model)
    return out


def reference_plan(pairs: Sequence[TokenPair]) -> list[np.ndarray]:
    """Batches, as indices into ``pairs``, whose pair_ids and order do not depend on their order."""
    fed = fed_tokens(pairs)
    ranked = np.array(sorted(range(len(pairs)), key=lambda i: pairs[i].pair_id), np.int64)
    budget = max(PLAN_TOKENS, int(fed.max()))
    plan = plan_microbatches(fed[ranked], np.arange(len(pairs)), budget)
    return [ranked[places] for places in plan]


def _numpy_dtype(model: PairModel) -> type[np.floating]:
    return np.float64 if model.dtype is torch.float64 else np.float32


def _pair_ids(pairs: Sequence[TokenPair]) -> np.ndarray:
    return np.array([p.pair_id for p in pairs], np.int64)


def _made_of(model: PairModel) -> dict[str, Any]:
    return {"format": FORMAT, "model": model.identity, "dtype": str(model.dtype)}


def _demand_finite(logp: np.ndarray, pairs: Sequence[TokenPair], model: PairModel) -> None:
    odd = np.flatnonzero(~np.isfinite(logp).all(axis=1))
    if len(odd):
        raise ValueError(
            f"reference log-prob of pair_id {pairs[odd[0]].pair_id} is {logp[odd[0]].tolist()} "
            f"({len(odd)} of {len(pairs)} pairs): the model {model.identity} gives numbers that "
            "are not finite."
        )


def _from_main(values: np.ndarray, device: torch.device) -> np.ndarray:
    """Rank 0's ``values`` on every rank; the others' count for their shape only."""
    return _summed(values if dist.is_main() else np.zeros_like(values), device)


def _summed(values: np.ndarray, device: torch.device) -> np.ndarray:
    if dist.world_size() == 1:
        return values
    return dist.all_reduce_sum(torch.from_numpy(values).to(device)).cpu().numpy()


def _spot_check(
    model: PairModel,
    pairs: Sequence[TokenPair],
    cached: np.ndarray,
    count: int,
    seed: int,
    ld_alpha: float | None,
    path: Path,
    pack: Packer,
) -> None:
    """Compute a few random pairs again: a cache of other weights must not steer a run."""
    count = min(count, len(pairs))
    if not count:
        return
    drawn = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
    fresh = reference_logp(model, [pairs[i] for i in drawn], ld_alpha=ld_alpha, pack=pack)
    scored = np.array([(len(pairs[i].chosen), len(pairs[i].rejected)) for i in drawn])
    error = np.abs(fresh - cached[drawn]) / scored
    worst = int(error.max(axis=1).argmax())
    if not error.max() <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"reference cache {path}: pair_id {pairs[drawn[worst]].pair_id} is kept as "
            f"{cached[drawn[worst]].tolist()} nats (chosen, rejected), but the model gives "
            f"{fresh[worst].tolist()}: {error.max():.2g} nats per token apart, where another batch "
            f"explains {TOLERANCE[model.dtype]:g}. Remove the file, and it will be made again."
        )
