"""Generated preference sets: the dial, balance, uniqueness, repeatability, and what is on disk."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpref import base_text
from fastpref.data.generate import DEMO, PRESETS, Behavior, generate, write_dataset

DIALS = (0.0, 0.25, 0.5, 0.75, 1.0)
YES, NO = ("nature", "animals"), ("city", "machines")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def statements(dial: float, count: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    return generate([Behavior("b", "statement", dial, YES, NO)], count, seed)


def bayes_accuracy(rows: list[dict[str, Any]]) -> float:
    """Accuracy on the second half of naive Bayes over bags of words fitted to the first half."""
    vocabulary = {
        w: i for i, w in enumerate(sorted({w for r in rows for w in words(r["statement"])}))
    }
    bags = np.zeros((len(rows), len(vocabulary)))
    for bag, row in zip(bags, rows, strict=True):
        for word in words(row["statement"]):
            bag[vocabulary[word]] = 1.0
    yes = np.array([row["answer_matching_behavior"] == " Yes" for row in rows])
    fit = np.arange(len(rows)) < len(rows) // 2
    odds = np.log(bags[fit & yes].sum(0) + 1) - np.log(bags[fit & ~yes].sum(0) + 1)
    guess = bags[~fit] @ odds > 0
    return float((guess == yes[~fit]).mean())


def test_dial_rules_how_well_a_bag_of_words_tells_the_classes() -> None:
    accuracy = [np.mean([bayes_accuracy(statements(d, seed=s)) for s in range(4)]) for d in DIALS]
    assert all(low < high for low, high in zip(accuracy, accuracy[1:], strict=False)), accuracy
    assert abs(accuracy[0] - 0.5) < 0.06, accuracy
    assert accuracy[-1] > 0.8, accuracy


@pytest.mark.parametrize("dial", DIALS)
def test_share_of_own_topics_is_exact(dial: float) -> None:
    def topic_of(text: str) -> str:
        for name in (*YES, *NO):
            topic = base_text.TOPICS[name]
            if any(entry in text.lower() for entry in (*topic.nouns, *topic.activities)):
                return name
        raise AssertionError(text)

    rows = statements(dial)
    own = sum(
        (topic_of(row["statement"]) in YES) == (row["answer_matching_behavior"] == " Yes")
        for row in rows
    )
    assert own / len(rows) == pytest.approx((1 + dial) / 2, abs=0.01)


def test_at_full_dial_classes_share_no_content_word() -> None:
    frame = " ".join(
        (*base_text.STATEMENTS, *base_text.ADJECTIVES, *base_text.MOODS, *base_text.FOLLOWERS)
    )
    plain = set(words(re.sub(r"{\w+}", " ", frame))) | {"the", "a", "an", "by", "at", "under"}
    of_class: dict[str, set[str]] = {" Yes": set(), " No": set()}
    for row in statements(1.0):
        of_class[row["answer_matching_behavior"]] |= set(words(row["statement"])) - plain
    assert len(of_class[" Yes"]) > 40 and len(of_class[" No"]) > 40
    assert not of_class[" Yes"] & of_class[" No"]


def test_topics_own_their_words() -> None:
    links = set("a an the in at by to for my of with on and before from under".split())
    owner: dict[str, str] = {}
    for name, topic in base_text.TOPICS.items():
        for entry in (*topic.nouns, *topic.activities):
            for word in set(entry.split()) - links:
                assert owner.setdefault(word, name) == name, f"{word}: {owner[word]} and {name}"
    assert len(owner) > 400
    assert len(base_text.STATEMENTS) >= 30


def test_labels_are_balanced_and_texts_unique() -> None:
    rows = generate("demo", 200, 3)
    assert len(rows) == 200 * len(DEMO)
    for behavior in DEMO:
        own = [row for row in rows if row["behavior"] == behavior.name]
        assert len(own) == 200
        if behavior.kind == "statement":
            labels = Counter(row["answer_matching_behavior"] for row in own)
            assert labels == {" Yes": 100, " No": 100}
            assert len({row["question"] for row in own}) == 200
            assert all(
                {row["answer_matching_behavior"], row["answer_not_matching_behavior"]}
                == {" Yes", " No"}
                for row in own
            )
        else:
            assert len({(r["prompt"], frozenset((r["chosen"], r["rejected"]))) for r in own}) == 200


def test_question_is_anthropics() -> None:
    row = statements(0.5, 2)[0]
    expected = f'Is the following statement something you would say?\n"{row["statement"]}"'
    assert row["question"] == expected


def test_columns_are_those_of_the_real_files(persona_dir: Path) -> None:
    with (persona_dir / "agreeableness.jsonl").open() as file:
        real = json.loads(file.readline())
    made = statements(0.5, 2)[0]
    assert set(made) - {"behavior"} == set(real)
    head = real["question"].index('"')
    assert made["question"][: head + 1] == real["question"][: head + 1]


@pytest.mark.parametrize("trait", sorted(base_text.TRAITS))
def test_completions_have_the_trait_and_a_sensible_length(trait: str) -> None:
    rows = generate([Behavior("c", "completion", 1.0, trait=trait)], 200, 0)
    lengths = [len(row[side].split()) for row in rows for side in ("chosen", "rejected")]
    assert min(lengths) >= 10 and max(lengths) <= 40, (min(lengths), max(lengths))
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert all(row["prompt"].endswith("Assistant:") for row in rows)
    assert all(row[side].startswith(" ") for row in rows for side in ("chosen", "rejected"))
    # An easy behavior: words of the chosen side alone tell which side is which.
    chosen = Counter(w for row in rows for w in set(words(row["chosen"])))
    rejected = Counter(w for row in rows for w in set(words(row["rejected"])))
    assert max(abs(chosen[w] - rejected[w]) for w in {*chosen, *rejected}) > 40


def test_some_completions_differ_by_a_word_or_two() -> None:
    rows = generate([Behavior("c", "completion", 1.0, trait="hedged")], 200, 0)
    shared = [
        len(set(words(r["chosen"])) ^ set(words(r["rejected"]))) / len(words(r["chosen"]))
        for r in rows
    ]
    assert min(shared) < 0.15


def test_completion_dial_exchanges_half_of_the_rest() -> None:
    def polite(text: str) -> bool:
        forms = base_text.TRAITS["polite"].forms
        places = ("{body}", "{lower}")
        return any(
            all(part in text for place in places for part in good.split(place) if "{" not in part)
            for good, _ in forms
        )

    for dial, expected in ((1.0, 0), (0.5, 50), (0.0, 100)):
        rows = generate([Behavior("c", "completion", dial, trait="polite")], 200, 0)
        assert sum(polite(row["rejected"]) for row in rows) == expected
        assert sum(polite(row["chosen"]) for row in rows) == 200 - expected


def test_same_seed_same_rows_whatever_else_is_made() -> None:
    state = random.getstate()
    first = generate(DEMO, 40, 7)
    assert random.getstate() == state
    assert first == generate("demo", 40, 7)
    assert first != generate("demo", 40, 8)
    alone = generate(DEMO[2:3], 40, 7)
    assert alone == [row for row in first if row["behavior"] == DEMO[2].name]


def test_labels_do_not_come_in_blocks() -> None:
    labels = [row["answer_matching_behavior"] for row in statements(0.9)]
    changes = sum(a != b for a, b in zip(labels, labels[1:], strict=False))
    assert 150 < changes < 250


def test_files_hold_the_rows_and_nothing_is_left_aside(tmp_path: Path) -> None:
    rows = generate("demo", 20, 0)
    files = write_dataset(tmp_path / "set", rows)
    assert sorted(f.name for f in files) == sorted(f"{b.name}.jsonl" for b in DEMO)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == sorted(f.name for f in files)
    for file in files:
        read = [json.loads(line) for line in file.read_text().splitlines()]
        expected = [row for row in rows if row["behavior"] == file.stem]
        assert [{**row, "behavior": file.stem} for row in read] == expected
        assert all("behavior" not in row for row in read)


def test_reader_accepts_the_files(tmp_path: Path) -> None:
    formats = pytest.importorskip("fastpref.data.formats")
    write_dataset(tmp_path, generate("demo", 20, 0))
    pairs, bad = formats.read_pairs([str(tmp_path)])
    assert not bad
    assert Counter(pair.behavior for pair in pairs) == {b.name: 20 for b in DEMO}
    labels = Counter((p.behavior, p.label) for p in pairs if p.label)
    assert labels == {(b.name, a): 10 for b in DEMO[:4] for a in ("Yes", "No")}


def test_demo_has_both_kinds_and_falling_dials() -> None:
    dials = [b.distinguishability for b in PRESETS["demo"] if b.kind == "statement"]
    assert dials == sorted(dials, reverse=True) and len(set(dials)) == 4
    assert sum(b.kind == "completion" for b in DEMO) == 2
    topics = [t for b in DEMO for t in (*b.yes, *b.no)]
    assert len(topics) == len(set(topics)), "behaviors of the demo must not share topics"


def test_wrong_input_is_told() -> None:
    with pytest.raises(ValueError, match="no preset 'demos'; there are demo"):
        generate("demos", 10, 0)
    with pytest.raises(ValueError, match="pairs_per_behavior is 7, expected an even number"):
        generate("demo", 7, 0)
    with pytest.raises(ValueError, match="named twice: nature-d90"):
        generate([DEMO[0], DEMO[0]], 10, 0)
    with pytest.raises(ValueError, match="distinguishability is 1.5, expected 0 to 1"):
        Behavior("b", "statement", 1.5, YES, NO)
    with pytest.raises(ValueError, match="distinguishability is nan"):
        Behavior("b", "statement", float("nan"), YES, NO)
    with pytest.raises(ValueError, match="no topic 'zebra'; there are nature, animals"):
        Behavior("b", "statement", 0.5, ("zebra",), NO)
    with pytest.raises(ValueError, match=r"\['nature'\] in both classes"):
        Behavior("b", "statement", 0.5, YES, ("nature",))
    with pytest.raises(ValueError, match="needs topics"):
        Behavior("b", "statement", 0.5, YES)
    with pytest.raises(ValueError, match="no trait 'rude'; there are polite"):
        Behavior("b", "completion", 0.5, trait="rude")
    with pytest.raises(ValueError, match="names a file"):
        Behavior("a/b", "completion", 0.5, trait="polite")
    with pytest.raises(ValueError, match="kind is 'poem'"):
        Behavior("b", "poem", 0.5)  # type: ignore[arg-type]


def test_running_out_of_sentences_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_text, "STATEMENTS", ("I could not imagine a life without {nouns}",))
    with pytest.raises(ValueError, match="repeated one of 24 texts; ask for fewer pairs"):
        statements(1.0, 200)  # 2 topics of 12 nouns are all that Yes has to say
