"""Names in `dataset_name` -> the sources they stand for: files, Arrow data sets, Hub data sets."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastpref.data.badrows import listed, nearest

DATA_FILE = re.compile(r"\.(?:(jsonl|json|csv)(?:\.gz|\.zst)?|(parquet))$")
ENDINGS = ".jsonl, .json or .csv (each also .gz, .zst) or .parquet"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PREFIX = "hf://datasets/"  # says that a name is the Hub's, whatever stands on this disk


@dataclass(frozen=True, slots=True)
class Source:
    """One file or data set of rows."""

    name: str  # as the user named it; a split is added in brackets: `folder[train]`
    kind: str  # jsonl, json, csv, parquet; arrow: a folder of save_to_disk; hub
    path: str  # of the file, or of the folder of a split; of a Hub data set its name there
    behavior: str  # of its pairs where no column names one: the name without folder and ending
    split: str = ""  # "" where there are no splits
    config_name: str | None = None  # of a Hub data set
    origin: int = 0  # index of the name in dataset_name and, after them, eval_dataset_name


def find_sources(
    dataset_name: Sequence[str],
    eval_dataset_name: Sequence[str] = (),
    *,
    dataset_split: str = "train",
    eval_dataset_split: str = "test",
    dataset_config_name: str | None = None,
) -> list[Source]:
    """The sources that files, folders, patterns and Hub names stand for; each may come up once.

    ``dataset_split`` and ``eval_dataset_split`` count for sources that have splits (Hub data sets
    and folders of a DatasetDict), ``dataset_config_name`` for Hub data sets.

    Raises ValueError for a name that stands for nothing, and for a source that comes up twice.
    """
    if isinstance(dataset_name, str) or isinstance(eval_dataset_name, str):
        one = dataset_name if isinstance(dataset_name, str) else eval_dataset_name
        raise ValueError(f"dataset_name is a list of names, got the string {one!r}")
    if not dataset_name:
        raise ValueError("dataset_name is empty: name at least one file, folder or glob pattern")
    found: dict[tuple[str, str], tuple[Source, str]] = {}
    for origin, name in enumerate((*dataset_name, *eval_dataset_name)):
        held_out = origin >= len(dataset_name)
        split = eval_dataset_split if held_out else dataset_split
        for source in _expand(name, split, dataset_config_name):
            hub = source.kind == "hub"
            path = source.path if hub else str(Path(source.path).expanduser().resolve())
            key = (path, source.split if hub else "")
            if key in found:
                other, by = found[key]
                raise ValueError(
                    f"{_what(source)} {source.name} comes up twice, from {by!r} (as {other.name}) "
                    f"and from {name!r}: "
                    + (
                        "its rows would be trained on and held out. Name it in one of dataset_name "
                        "and eval_dataset_name, or give them different splits."
                        if held_out and other.origin < len(dataset_name)
                        else "its rows would count double. Name it once."
                    )
                )
            found[key] = (replace(source, origin=origin), name)
    return [source for source, _ in found.values()]


def is_arrow_folder(path: Path) -> bool:
    """Whether ``path`` is a folder that `datasets` wrote with save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def hub_doubt(name: str) -> str:
    """What to say of a Hub name that could as well be a mistyped path: "" if nothing is near."""
    return nearest(name.split("/")[0], sorted(os.listdir()))


def _expand(name: str, split: str, config_name: str | None) -> list[Source]:
    path = Path(name).expanduser()
    if name.startswith(HUB_PREFIX):
        return [_hub(name, split, config_name)]
    if path.is_dir():
        return _folder(name, path, split)
    if path.is_file():
        if not DATA_FILE.search(name):
            inside = is_arrow_folder(path.parent)
            raise ValueError(
                f"file {name}: expected a name that ends in {ENDINGS}"
                + (f"; for the Arrow data set that it is part of, name {path.parent}" * inside)
            )
        return [_file(name)]
    if glob.has_magic(name):
        matches = sorted(glob.glob(str(path), recursive=True))
        usable = [m for m in matches if _is_data(Path(m))]
        if not usable:
            raise ValueError(
                f"pattern {name!r} matches no data file ({ENDINGS}) and no Arrow data set "
                f"({len(matches)} other matches)"
            )
        _refuse_copies(usable, name)
        return [_arrow(m, split) if Path(m).is_dir() else _file(m) for m in usable]
    if HUB_NAME.fullmatch(name) and not DATA_FILE.search(name) and not path.parent.is_dir():
        return [_hub(name, split, config_name)]
    raise ValueError(_nothing(name, path))


def _folder(name: str, path: Path, split: str) -> list[Source]:
    if is_arrow_folder(path):
        return [_arrow(name, split)]
    inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    usable = [str(Path(name) / p.name) for p in inside if _is_data(p)]
    if not usable:
        below = [p.name for p in inside if p.is_dir() and any(map(_is_data, p.iterdir()))]
        hint = f" Its subfolders {listed(below)} do: name them." if below else ""
        raise ValueError(f"folder {name} holds no data file ({ENDINGS}).{hint}")
    _refuse_copies(usable, name)
    return [_arrow(u, split) if Path(u).expanduser().is_dir() else _file(u) for u in usable]


def _is_data(path: Path) -> bool:
    if path.is_dir():
        return is_arrow_folder(path) and not is_arrow_folder(path.parent)
    return bool(DATA_FILE.search(path.name)) and path.is_file() and not is_arrow_folder(path.parent)


def _refuse_copies(usable: list[str], name: str) -> None:
    """a.jsonl beside a.parquet: most likely the same rows, which would count double."""
    seen: dict[str, str] = {}
    for file in usable:
        stem = DATA_FILE.sub("", file)
        if stem in seen:
            raise ValueError(
                f"{name!r} holds {seen[stem]} and {file}, which differ only in their endings: if "
                "one is a copy, its rows would count double. Name the files that you mean."
            )
        seen[stem] = file


def _file(name: str) -> Source:
    base = Path(name).name
    match = DATA_FILE.search(base)
    assert match, name
    return Source(name, match[1] or match[2], name, DATA_FILE.sub("", base))


def _arrow(name: str, split: str) -> Source:
    path = Path(name).expanduser()
    behavior = path.resolve().name
    if not (path / "dataset_dict.json").is_file():
        return Source(name, "arrow", name, behavior)
    return Source(f"{name}[{split}]", "arrow", str(Path(name) / split), behavior, split)


def _hub(name: str, split: str, config_name: str | None) -> Source:
    path = name.removeprefix(HUB_PREFIX)
    return Source(f"{name}[{split}]", "hub", path, path.split("/")[-1], split, config_name)


def _what(source: Source) -> str:
    return {"arrow": "data set", "hub": "Hub data set"}.get(source.kind, "file")


def _nothing(name: str, path: Path) -> str:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    text = f"{name}: no such file, folder or pattern.{nearest(path.name, beside)}"
    if HUB_NAME.fullmatch(name) and not DATA_FILE.search(name):
        text += (
            f" A folder {path.parent} stands here, so the Hub was not asked; if you mean the "
            f"Hub's data set of this name, write {HUB_PREFIX}{name}."
        )
    elif "/" not in name and not DATA_FILE.search(name):
        text += f" (A data set of the Hub has a name of the form user/name, or {HUB_PREFIX}{name}.)"
    return text
