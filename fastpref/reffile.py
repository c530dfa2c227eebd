"""The file of reference log-probs on disk: whole under its name or not there, and what a killed
pass left of one.

Parquet, rows by ascending pair_id. `ref_chosen` is that of the completion which the data prefers,
whatever `flip_behaviors` makes of it.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpref import dist

COLUMNS = ("pair_id", "ref_chosen", "ref_rejected")
ABANDONED_SECONDS = 3600.0  # after which a file that was never renamed belongs to a dead process


def prepare_folder(path: Path) -> None:
    """Make the folder of ``path``; ValueError, before any work, where nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _aside(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"reference log-probs cannot be kept in {path.parent}: {error}. Set ref_cache_dir to a "
            "folder that you may write to."
        ) from error


def write_logp(path: Path, pair_ids: np.ndarray, logp: np.ndarray, made_of: dict[str, Any]) -> None:
    """Keep ``logp`` (N, 2) of ``pair_ids`` (N,) under ``path``; ``made_of`` goes along, as JSON.

    Atomic: written aside, brought to the disk and renamed.
    """
    order = np.argsort(pair_ids, kind="stable")
    columns = (pair_ids[order], logp[order, 0], logp[order, 1])
    table = pa.table(dict(zip(COLUMNS, columns, strict=True)))
    table = table.replace_schema_metadata({"fastpref.reference": json.dumps(made_of)})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        with aside.open("wb") as file:
            pq.write_table(table, file, write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_logp(path: Path, pair_ids: np.ndarray) -> np.ndarray:
    """(N, 2) in the order of ``pair_ids``; ValueError unless all are there and finite."""
    remedy = "Remove the file, and it will be made again."
    try:
        ids, logp = _columns(path)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"reference cache {path} cannot be read: {error}. {remedy}") from error
    at, there = _places(ids, pair_ids)
    if not there.all():
        raise ValueError(
            f"reference cache {path} lacks {int((~there).sum())} of {len(pair_ids)} pairs, the "
            f"first being pair_id {int(pair_ids[~there][0])}. {remedy}"
        )
    if not np.isfinite(logp[at]).all():
        raise ValueError(f"reference cache {path} holds numbers that are not finite. {remedy}")
    return logp[at]


def write_partial(
    path: Path, pair_ids: np.ndarray, logp: np.ndarray, made_of: dict[str, Any]
) -> None:
    """Keep what this process has done so far of the file that ``path`` will be."""
    own = path.with_name(f".{path.stem}.partial-{dist.rank()}-{os.getpid()}.parquet")
    write_logp(own, pair_ids, logp, made_of)


def read_partials(path: Path, pair_ids: np.ndarray, out: np.ndarray) -> None:
    """Fill ``out`` (N, 2) with what killed passes had done; a damaged file is no loss."""
    for file in _partials(path):
        try:
            ids, logp = _columns(file)
        except (OSError, KeyError, pa.ArrowException):
            continue
        at, there = _places(ids, pair_ids)
        out[there] = logp[at[there]]


def remove_leftovers(path: Path) -> None:
    """Parts of ``path``, now that it is whole, and whatever else a process left in its folder that
    was killed while it wrote."""
    for file in _partials(path):
        file.unlink(missing_ok=True)
    for file in path.parent.glob(".*.parquet.*"):
        try:
            if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                file.unlink()
        except FileNotFoundError:  # another process was faster
            pass


def _aside(path: Path) -> Path:
    """Where ``path`` is written first. No process id: containers and machines that share the folder
    have the same ones."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _partials(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f".{path.stem}.partial-*.parquet"))


def _columns(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ascending pair_ids (M,) and their log-probs (M, 2)."""
    table = pq.read_table(path, columns=list(COLUMNS), page_checksum_verification=True)
    kinds = [table.schema.field(name).type for name in COLUMNS]
    if not (pa.types.is_int64(kinds[0]) and all(map(pa.types.is_floating, kinds[1:]))):
        told = ", ".join(f"{name} {kind}" for name, kind in zip(COLUMNS, kinds, strict=True))
        raise pa.ArrowInvalid(f"its columns are {told}, not an int64 and two floats")
    ids, *both = (table[name].to_numpy() for name in COLUMNS)
    return ids, np.stack(both, axis=1)


def _places(ids: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of ``wanted`` stands in the ascending ``ids``, and whether it is there."""
    if not len(ids):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return at, ids[at] == wanted
