"""Token ids on disk: made once for the same texts, tokenizer and template, by whatever run.

A file is named by a digest of the `Coder` and of the rows, and of nothing else: not their order,
nor how often each comes, nor max_length. It holds every row's digest with its ids, and is written
aside and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.data.coder import DIGEST_BYTES, Coder, Ids

log = logging.getLogger(__name__)

FORMAT = 1  # of the file, of rows and of the key; raise it when one of them changes
CHECKED = 16  # rows of a file that are tokenised again and compared


def default_folder() -> Path:
    """Where token ids are kept unless `token_cache_dir` says otherwise: in the user's cache."""
    from fastpref.base import cache_root

    return cache_root() / "tokens"


def cache_folder(token_cache_dir: str | None) -> Path:
    """The folder that the option names."""
    return Path(token_cache_dir).expanduser() if token_cache_dir else default_folder()


def cache_key(coder: Coder, digests: Sequence[bytes]) -> str:
    """Digest (16 hex digits) of everything that decides the ids of the rows."""
    digest = hashlib.sha256(f"{FORMAT} {coder.digest()}\n".encode())
    for row in sorted(set(digests)):
        digest.update(row)
    return digest.hexdigest()[:16]


def cached_ids(
    folder: Path,
    coder: Coder,
    digests: Sequence[bytes],
    rows: Sequence[str],
    make: Callable[[], Ids],
) -> tuple[Ids, np.ndarray]:
    """Ids of ``rows``, which differ from each other, from the cache or by ``make``, which the cache
    then keeps; and where in them each row is, (N,). ``digests``: `row_digest` of each.

    A file that is damaged, incomplete or disagrees with the tokenizer is made again, and the log
    says so; a folder that cannot be written makes no difference but the time.
    """
    path = folder / f"{cache_key(coder, digests)}.parquet"
    if path.exists():
        try:
            kept, place = _read(path, digests)
            _spot_check(coder, rows, kept, place)
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            log.warning("token cache %s is not used (%s); it is made again", path, error)
        else:
            log.info("token ids of %d pairs from %s", len(rows), path)
            return kept, place
    ids = make()
    try:
        _write(path, digests, ids)
    except OSError as error:
        log.warning("token ids are not kept for another run: %s", error)
    return ids, np.arange(len(rows))


def _write(path: Path, digests: Sequence[bytes], ids: Ids) -> None:
    """Atomic: a file under its own name is always whole."""
    faults = [json.dumps(ids.faults[n]) if n in ids.faults else None for n in range(len(digests))]
    table = pa.table(
        {
            "row": pa.array(digests, pa.binary(DIGEST_BYTES)),
            "prompt": ids.lengths[:, 0].astype(np.int32),
            "first": ids.lengths[:, 1].astype(np.int32),
            "alone": ids.alone.astype(np.int32),
            "ids": pa.LargeListArray.from_arrays(np.r_[0, ids.ends()], ids.values),
            "fault": pa.array(faults, pa.string()),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process id: containers and machines that share the folder have the same ones.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("wb") as file:
            pq.write_table(
                table, file, compression="zstd", use_dictionary=False, write_page_checksum=True
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read(path: Path, digests: Sequence[bytes]) -> tuple[Ids, np.ndarray]:
    """The file's rows and where each of ``digests`` is; ValueError unless it holds just these."""
    table = pq.read_table(path, page_checksum_verification=True)
    there = {digest: n for n, digest in enumerate(table["row"].to_pylist())}
    if there.keys() != set(digests) or len(there) != table.num_rows:
        raise ValueError(f"it holds {table.num_rows} rows, not the {len(digests)} expected ones")
    place = np.array([there[digest] for digest in digests], np.int64)
    ids = table["ids"].combine_chunks()
    totals = np.diff(ids.offsets.to_numpy())
    prompt, first, alone = (
        table[name].to_numpy().astype(np.int64) for name in ("prompt", "first", "alone")
    )
    lengths = np.stack([prompt, first, totals - prompt - first], axis=1)
    if (lengths < 0).any():
        raise ValueError("its lengths contradict each other")
    faults = {
        n: (why[0], why[1])
        for n, text in enumerate(table["fault"].to_pylist())
        if text is not None
        for why in [json.loads(text)]
    }
    return Ids(ids.flatten().to_numpy(), lengths, alone, faults), place


def _spot_check(coder: Coder, rows: Sequence[str], kept: Ids, place: np.ndarray) -> None:
    """Tokenise a few rows again: another version of a library may give other ids."""
    drawn = np.unique(np.linspace(0, len(rows) - 1, min(CHECKED, len(rows))).astype(np.int64))
    fresh = coder.ids([rows[i] for i in drawn])
    for n, at in enumerate(place[drawn].tolist()):
        same = all(map(np.array_equal, fresh.row(n), kept.row(at)))
        if not same or fresh.faults.get(n) != kept.faults.get(at):
            raise ValueError("the tokenizer gives other ids now")
