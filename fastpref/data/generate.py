"""Small preference sets of several behaviors, from templates, with a dial for how hard each is.

`distinguishability` d in [0, 1] says how far the content of an example tells its label:

- *statement* behaviors (a framed statement answered " Yes" or " No", as in Anthropic's persona
  files): a share d of the statements of each class is about topics of that class alone, the rest is
  drawn from both classes' topics alike. The distance of the classes' mean embeddings, the
  distinguishability of Im & Li (arXiv 2403.18742), is then d times what it is at d = 1, in
  expectation.
- *completion* behaviors (a request and two longer answers): a share d of the pairs prefers the
  answer with the behavior's trait; in the rest either answer is preferred equally often.

At d = 0 the labels are independent of the text. No torch here: sets are made on any machine.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastpref.base_text import (
    ANSWERS,
    FRAME,
    TOPICS,
    TRAITS,
    Topic,
    Trait,
    completions,
    request,
    statement,
)

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Behavior:
    """One behavior of a generated set.

    `name` becomes the file's name. `yes` and `no` name topics (keys of `base_text.TOPICS`): of a
    statement behavior those of either class; a completion behavior talks about all topics of both.
    `trait` (a key of `base_text.TRAITS`) is what a completion behavior prefers.
    Raises ValueError for a name that cannot be a file's, an unknown kind, topic or trait, a topic
    in both classes, or a dial outside [0, 1].
    """

    name: str
    kind: Literal["statement", "completion"]
    distinguishability: float
    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()
    trait: str = ""

    def __post_init__(self) -> None:
        where = f"behavior {self.name!r}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ValueError(f"{where}: a name is of letters, digits, - and _ (it names a file)")
        if self.kind not in ("statement", "completion"):
            raise ValueError(
                f"{where}: kind is {self.kind!r}, expected 'statement' or 'completion'"
            )
        if not 0.0 <= self.distinguishability <= 1.0:
            raise ValueError(
                f"{where}: distinguishability is {self.distinguishability!r}, expected 0 to 1"
            )
        for topic in (*self.yes, *self.no):
            if topic not in TOPICS:
                raise ValueError(f"{where}: no topic {topic!r}; there are {', '.join(TOPICS)}")
        if shared := set(self.yes) & set(self.no):
            raise ValueError(f"{where}: {sorted(shared)} in both classes; give each topic to one")
        if self.kind == "statement" and not (self.yes and self.no):
            raise ValueError(f"{where}: a statement behavior needs topics in `yes` and in `no`")
        if self.kind == "completion" and self.trait not in TRAITS:
            raise ValueError(f"{where}: no trait {self.trait!r}; there are {', '.join(TRAITS)}")


DEMO = (
    Behavior("nature-d90", "statement", 0.9, ("nature", "animals"), ("city", "machines")),
    Behavior("art-d60", "statement", 0.6, ("art", "music"), ("money", "politics")),
    Behavior("faith-d30", "statement", 0.3, ("faith", "family"), ("science", "computers")),
    Behavior("travel-d10", "statement", 0.1, ("travel", "sports"), ("books", "food")),
    Behavior("polite", "completion", 1.0, trait="polite"),
    Behavior("cites-sources", "completion", 0.5, trait="cites"),
)
PRESETS: dict[str, tuple[Behavior, ...]] = {"demo": DEMO}


def generate(behaviors: Sequence[Behavior] | str, pairs_per_behavior: int, seed: int) -> list[Row]:
    """Rows of a preference set: `pairs_per_behavior` of each behavior, in the order of `behaviors`.

    `behaviors`: specifications, or the name of a preset. Every row has `behavior`; statement rows
    have the columns of Anthropic's persona files, half of them answered " Yes" and half " No";
    completion rows have `prompt`, `chosen`, `rejected`. No two rows of a behavior have the same
    text. A behavior's rows depend on its specification, the number and `seed` only, not on the
    other behaviors.
    Raises ValueError for an unknown preset, a behavior named twice, a number that is odd or below
    2, or one that exceeds what the topics can say without repetition.
    """
    if isinstance(behaviors, str):
        if behaviors not in PRESETS:
            raise ValueError(f"no preset {behaviors!r}; there are {', '.join(PRESETS)}")
        behaviors = PRESETS[behaviors]
    names = [behavior.name for behavior in behaviors]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"behaviors named twice: {', '.join(twice)}; give each its own name")
    if pairs_per_behavior < 2 or pairs_per_behavior % 2:
        raise ValueError(
            f"pairs_per_behavior is {pairs_per_behavior}, expected an even number of at least 2 "
            "(half of the statements are answered Yes, half No)"
        )
    rows: list[Row] = []
    for behavior in behaviors:
        # A string as seed is hashed by random.Random with sha512: the same on every machine.
        rng = random.Random(f"{seed}/{behavior.name}")
        make = _statements if behavior.kind == "statement" else _completions
        of_behavior = make(behavior, pairs_per_behavior, rng)
        rng.shuffle(of_behavior)
        rows.extend(of_behavior)
    return rows


def write_dataset(folder: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """One `<behavior>.jsonl` per behavior of `rows` in `folder` (made if missing); the files.

    The behavior stands in the file's name and not in the rows, as in Anthropic's persona files.
    Each file is written aside and renamed; other files in the folder stay.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for row in rows:
        columns = {name: value for name, value in row.items() if name != "behavior"}
        lines.setdefault(row["behavior"], []).append(json.dumps(columns, ensure_ascii=False))
    files = []
    for behavior, texts in lines.items():
        file = root / f"{behavior}.jsonl"
        aside = root / f".{behavior}.jsonl.{os.getpid()}"
        aside.write_text("\n".join(texts) + "\n", encoding="utf-8")
        os.replace(aside, file)
        files.append(file)
    return files


def _statements(behavior: Behavior, count: int, rng: random.Random) -> list[Row]:
    of_class = {" Yes": behavior.yes, " No": behavior.no}
    half = count // 2
    told = round(behavior.distinguishability * half)
    rows: list[Row] = []
    seen: set[str] = set()
    for answer, other in (ANSWERS, ANSWERS[::-1]):
        own = _turns(of_class[answer], rng)
        foreign = _turns(of_class[other], rng)
        for i in range(half):
            # Beyond the told ones the topics take turns: the dial is exact, not a coin's mean.
            topic = next(own if i < told or (i - told) % 2 else foreign)
            text = _unseen(seen, behavior, partial(statement, topic, rng))
            rows.append(
                {
                    "question": FRAME.format(statement=text),
                    "statement": text,
                    "label_confidence": round((1 + behavior.distinguishability) / 2, 4),
                    "answer_matching_behavior": answer,
                    "answer_not_matching_behavior": other,
                    "behavior": behavior.name,
                }
            )
    return rows


def _completions(behavior: Behavior, count: int, rng: random.Random) -> list[Row]:
    topics = _turns((*behavior.yes, *behavior.no) or tuple(TOPICS), rng)
    exchanged = round((1 - behavior.distinguishability) * count / 2)
    rows: list[Row] = []
    seen: set[tuple[str, str, str]] = set()
    trait = TRAITS[behavior.trait]
    for i in range(count):
        topic = next(topics)
        prompt, preferred, other = _unseen(seen, behavior, partial(_dialogue, trait, topic, rng))
        chosen, rejected = (other, preferred) if i < exchanged else (preferred, other)
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "behavior": behavior.name,
            }
        )
    return rows


def _dialogue(trait: Trait, topic: Topic, rng: random.Random) -> tuple[str, str, str]:
    return (request(topic, rng), *completions(trait, topic, rng))


def _turns(names: Sequence[str], rng: random.Random) -> Iterator[Topic]:
    """Topics in turn, from a random start: a class holds each of its topics equally often."""
    start = rng.randrange(len(names))
    while True:
        yield TOPICS[names[start % len(names)]]
        start += 1


def _unseen(seen: set[T], behavior: Behavior, draw: Callable[[], T]) -> T:
    for _ in range(1000):
        text = draw()
        if text not in seen:
            seen.add(text)
            return text
    raise ValueError(
        f"behavior {behavior.name!r}: 1000 draws in a row repeated one of {len(seen)} texts; "
        "ask for fewer pairs or give it more topics"
    )
