"""The frozen body's hidden states: computed once per data set and body, kept on disk, mapped.

`trainable: head` trains the output head alone, so what the body gives for a pair never changes. The
states of all scored positions, after the final norm, are computed by one packed pass over training
and held-out pairs; a step then reads the rows of its pairs and costs the head alone.

The file is a plain .npy, (N, D) float32 (float64 models: float64), named by a digest of the body's
weights, the precision and the pairs' token ids, and of nothing else. As with the reference cache
the plan of the pass depends on the data alone, so a cache made again holds the same bits; it is
whole under its name or refused; and a few random pairs are computed again at every start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from fastpref import dist
from fastpref.base import cache_root
from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.data.dataset import Dataset
from fastpref.data.pack import pack_pairs
from fastpref.data.rows import RowIndex
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel
from fastpref.refcache import reference_key, reference_plan, unflipped

log = logging.getLogger(__name__)

FORMAT = 1  # of the file and of the key; raise it when either changes
# What a configuration may say without changing a hidden state.
NOT_THE_BODY = {
    "architectures",
    "dtype",
    "tie_word_embeddings",
    "transformers_version",
    "_name_or_path",
}
# Largest root-mean-square difference, relative to the states' own, between a kept and a recomputed
# pair. Another plan changes the last bits only; another body, template or token far more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Features:
    """The states of a run's pairs, and batches that carry them."""

    index: RowIndex
    table: np.ndarray  # (N, D), mapped from the file

    def pack(self, pairs: Sequence[TokenPair]) -> PairBatch:
        """A batch of ``pairs`` with its hidden states in the place of tokens, on the CPU."""
        return self.index.pack(pairs, self.table)


def feature_key(model: PairModel, pairs: Sequence[TokenPair]) -> str:
    """Digest (16 hex digits) of everything that decides the hidden states of ``pairs``."""
    body = f"features {FORMAT} {body_identity(model)}"
    return reference_key(dataclasses.replace(model, identity=body), pairs)


def body_identity(model: PairModel) -> str:
    """Names the very body: its class, configuration and tensors. The head is not in it, so a
    model whose head alone was trained shares the states of the model that it began as."""
    body: Any = model.module.base_model
    config = body.config.to_dict()
    config = {k: v for k, v in config.items() if k not in NOT_THE_BODY}
    digest = hashlib.sha256(type(body).__name__.encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(body.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def with_states(config: Config, model: PairModel, dataset: Dataset, progress: bool) -> Dataset:
    """``dataset`` whose batches bring the body's states along, as `trainable: head` has them."""
    features = with_features(
        model,
        dataset.train + dataset.held_out,
        cache_dir=config.feature_cache_dir,
        check_pairs=config.ref_check_pairs,
        seed=config.seed,
        progress=progress,
    )
    return dataclasses.replace(dataset, pack=features.pack)


def with_features(
    model: PairModel,
    pairs: Sequence[TokenPair],
    *,
    cache_dir: str | None = None,
    check_pairs: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Features:
    """The hidden states of ``pairs`` from the cache, which is made first where it is missing.

    Raises ValueError where the file is not whole or disagrees with the model, where states are not
    finite, and, before anything is computed, where the disk has no room for it.
    """
    folder = Path(cache_dir).expanduser() if cache_dir else cache_root() / "features"
    path = folder / f"{feature_key(model, pairs)}.npy"
    # In the order of the pass: the file is then written from its start to its end.
    # And of the pairs as the data has them: `flip_behaviors` changes no state.
    plain = unflipped(pairs)
    plan = reference_plan(plain)
    index = RowIndex([plain[i] for own in plan for i in own])
    wanted = np.dtype(np.float64 if model.dtype is torch.float64 else np.float32)
    shape = (index.num_states, model.head.weight.shape[1])
    if dist.is_main() and not path.exists():
        planned = [[plain[i] for i in own] for own in plan]
        try:
            _write(path, model, planned, index, shape, wanted, progress)
        except OSError as error:
            raise ValueError(
                f"hidden states {path} cannot be written: {error}. Set feature_cache_dir to a "
                "folder that can hold them."
            ) from error
    dist.barrier()
    features = Features(index, _read(path, shape, wanted))
    log.info(
        "hidden states: %d of %d pairs from %s (%s)",
        *(shape[0], len(pairs), path, _size(path.stat().st_size)),
    )
    _spot_check(model, plain, features, check_pairs, seed, path)
    return features


@torch.no_grad()
def body_states(
    model: PairModel, pairs: Sequence[TokenPair], index: RowIndex, dtype: np.dtype
) -> np.ndarray:
    """(states of ``pairs``, D) one after another, by one packed pass of the body.

    Raises ValueError naming a pair whose states are not finite.
    """
    batch = pack_pairs(pairs)
    hidden = model.hidden(batch.to(model.device), scored_only=True).to(_torch_dtype(dtype))
    own = [index.number[pair.pair_id] for pair in pairs]
    fed, first = index.lengths[own].sum(axis=1), index.first[own]
    within = np.arange(int(fed.sum())) - np.repeat(np.cumsum(fed) - fed, fed)
    states = within >= np.repeat(first, fed)
    found = hidden[torch.from_numpy(states).to(model.device)]
    finite = torch.isfinite(found).all(dim=1)
    if not bool(finite.all()):
        odd = int((~finite).nonzero()[0])
        pair = pairs[int(batch.pair_of_token.numpy()[states][odd])]
        raise ValueError(
            f"the hidden states of pair_id {pair.pair_id} are not finite in {model.dtype}: the "
            "model's weights are damaged, or the precision is too low (set dtype: float32)."
        )
    return found.cpu().numpy()


def _write(
    path: Path,
    model: PairModel,
    planned: Sequence[Sequence[TokenPair]],
    index: RowIndex,
    shape: tuple[int, int],
    dtype: np.dtype,
    progress: bool,
) -> None:
    """Atomic: a file under its own name is always whole."""
    size = shape[0] * shape[1] * dtype.itemsize
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("hidden states: writing %d x %d %s, %s, to %s", *shape, dtype, _size(size), path)
    with _held(path.with_name(f".{path.name}.partial")) as file:
        if path.exists():
            return  # another process made it while this one waited
        file.truncate(0)  # what a killed process left
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise ValueError(
                f"the hidden states of the pairs take {_size(size)} ({shape[0]} scored positions "
                f"of {shape[1]} numbers), but {path.parent} has {_size(free)} free. Set "
                "feature_cache_dir to a folder on a larger disk, lower max_length, take fewer "
                "pairs, or set trainable: all, which keeps no states."
            )
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
        count = sum(map(len, planned))
        with tqdm(total=count, unit="pair", desc="hidden states", disable=not progress) as bar:
            for pairs in planned:
                file.write(body_states(model, pairs, index, dtype).tobytes())
                bar.update(len(pairs))
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[BinaryIO]:
    """``path`` open for writing by this process alone, and gone afterwards unless it was renamed. A
    second process waits; the lock of a killed one ends with it."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held it may have renamed or removed what was opened here.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)
            return


def _read(path: Path, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    remedy = "Remove the file, and it will be made again."
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy's parser of a damaged header raises whatever Python's can
        raise ValueError(f"hidden states {path} cannot be read: {error}. {remedy}") from error
    if table.shape != shape or table.dtype != dtype or not table.flags.c_contiguous:
        order = "" if table.flags.c_contiguous else " column by column"
        raise ValueError(
            f"hidden states {path}: expected {shape} {dtype}, got {table.shape} {table.dtype}"
            f"{order}. {remedy}"
        )
    size, wanted = path.stat().st_size, table.offset + table.nbytes
    if size != wanted:
        raise ValueError(f"hidden states {path}: expected {wanted} bytes, got {size}. {remedy}")
    return table


def _spot_check(
    model: PairModel,
    pairs: Sequence[TokenPair],
    features: Features,
    count: int,
    seed: int,
    path: Path,
) -> None:
    """Compute a few random pairs again: states of another body must not steer a run."""
    drawn = np.random.default_rng(seed).choice(len(pairs), min(count, len(pairs)), replace=False)
    for pair in (pairs[i] for i in drawn):
        fresh = body_states(model, [pair], features.index, features.table.dtype)
        hidden = features.pack([pair]).hidden
        assert hidden is not None
        kept = hidden.numpy().astype(np.float64)
        error = np.sqrt(np.mean((kept - fresh) ** 2) / np.mean(np.square(fresh, dtype=np.float64)))
        if not error <= TOLERANCE[model.dtype]:
            raise ValueError(
                f"hidden states {path}: those of pair_id {pair.pair_id} differ from the model's by "
                f"{error:.2g} of their size, where rounding explains "
                f"{TOLERANCE[model.dtype]:g}. Remove the file, and it will be made again."
            )


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.float64 if dtype == np.float64 else torch.float32


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
