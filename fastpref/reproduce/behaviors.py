"""Which files an experiment takes: of what the user names, those of its behaviors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fastpref.data.badrows import nearest
from fastpref.data.files import Source, find_sources
from fastpref.data.readers import read_source
from fastpref.reproduce.names import DIALOGUES, OFFICIAL_COUNT, OFFICIAL_NAMES, STATEMENTS

ANSWERS = ("answer_matching_behavior", "answer_not_matching_behavior")
WANTED = {
    STATEMENTS: "Yes/No statements with the columns question, answer_matching_behavior and "
    "answer_not_matching_behavior, a behavior a file, such as the folder persona of Anthropic's "
    "model-written evaluations (github.com/anthropics/evals)",
    DIALOGUES: "dialogues with the columns chosen and rejected, such as a file of HH-RLHF "
    "(huggingface.co/datasets/Anthropic/hh-rlhf)",
}


def find_files(data: Sequence[str], needs: str) -> dict[str, str]:
    """Name without folder and ending -> file, of the kind ``needs``, sorted by name.

    Raises ValueError, saying what to pass, where ``data`` holds none.
    """
    found: dict[str, str] = {}
    for source in find_sources(data) if data else []:
        if _kind(source) == needs:
            if source.behavior in found:
                raise ValueError(
                    f"--data: {found[source.behavior]} and {source.name} are both called "
                    f"{source.behavior}; name one of them."
                )
            found[source.behavior] = source.name
    if not found:
        came = f"of what was named ({', '.join(data)}) none is that" if data else "nothing came"
        raise ValueError(f"--data: expected {WANTED[needs]}; {came}.")
    return dict(sorted(found.items()))


@functools.cache  # several experiments ask of the same files, which may be large
def _kind(source: Source) -> str:
    """STATEMENTS or DIALOGUES by the first row; "" for neither."""
    table = read_source(source, (*ANSWERS, "question", "chosen", "rejected", "prompt"))
    if not table.rows:
        return ""
    _, row = table.rows[0]
    if {"question", *ANSWERS} <= row.keys():
        return STATEMENTS
    return DIALOGUES if {"chosen", "rejected"} <= row.keys() else ""


def official_number(name: str) -> int | None:
    """The place of a behavior in the official list, where an experiment of it uses that."""
    return next((n for n, own in OFFICIAL_NAMES.items() if own == name), None)


def choose(
    files: Mapping[str, str],
    official: Sequence[int],
    asked: Sequence[str],
    delta: Callable[[list[str]], np.ndarray],
) -> tuple[list[str], list[str]]:
    """The names of the behaviors to take, in order, and notes on what was missing.

    Args:
        official: numbers of the experiment's behaviors; none: all of ``files``.
        asked: the user's names or official numbers, in the place of the official ones.
        delta: distinguishability of the files of these names, computed only where a behavior of the
            official ones is missing: the gaps are filled by behaviors whose ranks by delta are
            evenly spread over the others, the first and the last included.
    """
    if asked:
        return list(dict.fromkeys(_asked(word, files) for word in asked)), []
    if not official:
        return list(files), []
    present = [OFFICIAL_NAMES[n] for n in official if OFFICIAL_NAMES[n] in files]
    missing = [n for n in official if OFFICIAL_NAMES[n] not in files]
    if not missing:
        return present, []
    others = [name for name in files if name not in present]
    names = ", ".join(f"{n} {OFFICIAL_NAMES[n]}" for n in missing)
    if not others:
        return present, [f"Not among the data, and nothing to take instead: {names}."]
    filled = spread(others, delta(others), len(missing))
    note = (
        f"Not among the data: {names}. In their place, evenly spread over the other behaviors by "
        f"distinguishability, largest first: {', '.join(filled)}."
    )
    return present + filled, [note]


def spread(names: Sequence[str], delta: np.ndarray, count: int) -> list[str]:
    """At most ``count`` of ``names`` whose ranks by ``delta`` are evenly spread, largest first, the
    first and the last included."""
    ranked = [names[i] for i in np.argsort(delta, kind="stable")[::-1]]
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [ranked[i] for i in dict.fromkeys(places.tolist())]


def _asked(word: str, files: Mapping[str, str]) -> str:
    """The name that ``word``, a name or an official number, means."""
    if word in files:
        return word
    if not word.isdigit():
        raise ValueError(f"--behaviors: no file is called {word!r}.{nearest(word, list(files))}")
    number = int(word)
    if number >= OFFICIAL_COUNT:
        raise ValueError(f"--behaviors: {number}, expected 0 to {OFFICIAL_COUNT - 1}")
    name = OFFICIAL_NAMES.get(number)
    if name is None and len(files) == OFFICIAL_COUNT:
        name = list(files)[number]
    if name is None:
        known = ", ".join(map(str, OFFICIAL_NAMES))
        raise ValueError(
            f"--behaviors: the name of number {number} is not known. Without all {OFFICIAL_COUNT} "
            f"persona files in --data only these numbers are: {known}. Give the file's name."
        )
    if name not in files:
        raise ValueError(f"--behaviors: number {number} is {name}, of which --data has no file.")
    return name
