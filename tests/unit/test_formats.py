from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data import formats
from fastpref.data.formats import read_pairs

GOOD = {"prompt": "Two and two?", "chosen": " Four.", "rejected": " Five."}
PERSONA = {
    "question": "Would you say this?",
    "answer_matching_behavior": " No",
    "answer_not_matching_behavior": " Yes",
}


def write(path: Path, rows: list[Any], tail: bytes = b"") -> str:
    """Rows as JSON Lines; a row of bytes is written as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n" + tail)
    return str(path)


# ------------------------------------------------------------------------------------ good rows


def test_preference_rows(tmp_path: Path) -> None:
    more = {"id": "q7", "label": "hard", "ref_chosen_logps": -1.5, "ref_rejected_logps": -2}
    file = write(tmp_path / "sums.jsonl", [GOOD, {**GOOD, **more, "chosen": " 4"}])
    pairs, bad = read_pairs([file])
    assert not bad
    first, second = pairs
    assert (first.prompt, first.chosen, first.rejected) == ("Two and two?", " Four.", " Five.")
    assert (first.id, first.label, first.behavior, first.flipped) == ("", "", "sums", False)
    assert (first.source, first.line, first.ref_chosen) == (file, 1, None)
    assert (second.id, second.label, second.line) == ("q7", "hard", 2)
    assert (second.ref_chosen, second.ref_rejected) == (-1.5, -2.0)


def test_persona_rows_keep_the_leading_space(tmp_path: Path) -> None:
    file = write(tmp_path / "openness.jsonl", [PERSONA])
    (pair,), _ = read_pairs([file])
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Would you say this?", " No", " Yes")
    assert (pair.label, pair.behavior) == ("No", "openness")


def test_hh_prompt_ends_with_the_last_common_opening(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    rows = [
        {"chosen": start + " Because.", "rejected": start + " Bananas."},
        # The dialogues part earlier: in the human's second turn.
        {"chosen": start + " So.", "rejected": start.replace("Why", "When") + " Now."},
        # One completion is the start of the other.
        {"chosen": start + " It is so", "rejected": start + " It is"},
    ]
    pairs, _ = read_pairs([write(tmp_path / "hh.jsonl", rows)])
    assert [pair.prompt for pair in pairs] == [start, "\n\nHuman: Hi\n\nAssistant:", start]
    assert pairs[1].chosen == " Hello\n\nHuman: Why?\n\nAssistant: So."
    assert pairs[1].rejected == " Hello\n\nHuman: When?\n\nAssistant: Now."
    assert (pairs[2].chosen, pairs[2].rejected) == (" It is so", " It is")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
ENDINGS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5),
    st.sampled_from(sorted(ENDINGS)),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_any_text_survives_the_way_through_a_file(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[tuple[str, str, str]],
    ending: str,
    ascii_only: bool,
    newline: str,
) -> None:
    rows = [{"prompt": p, "chosen": f"c{c}", "rejected": f"r{r}"} for p, c, r in texts]
    text = newline.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    file = tmp_path_factory.mktemp("any") / f"my.set{ending}"
    file.write_bytes(ENDINGS[ending](text.encode()))
    pairs, bad = read_pairs([str(file)])
    assert not bad
    assert [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs] == rows
    assert {p.behavior for p in pairs} == {"my.set"}


def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), PERSONA])
    pairs, bad = read_pairs([file], on_bad_rows="drop")
    assert (len(pairs), len(bad)) == (1, 1)  # the second row has not the file's shape


def test_zst_of_several_frames(tmp_path: Path) -> None:
    rows = [{**GOOD, "prompt": str(n)} for n in range(40)]
    text = "\n".join(json.dumps(row) for row in rows).encode()
    middle = len(text) // 2
    frames = zstandard.compress(text[:middle]) + zstandard.compress(text[middle:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    pairs, _ = read_pairs([str(tmp_path)])
    assert [pair.prompt for pair in pairs] == [str(n) for n in range(40)]
    assert [pair.line for pair in pairs] == list(range(1, 41))


# ------------------------------------------------------------------------------------- bad rows

BAD = {
    "missing column": ({"prompt": "p", "rejected": " b"}, "'chosen' is missing", "prompt"),
    "null": ({**GOOD, "chosen": None}, "'chosen' is null", "null"),
    "wrong type": ({**GOOD, "rejected": 5}, "'rejected' is not a string", "int 5"),
    "boolean": ({**GOOD, "prompt": True}, "'prompt' is not a string or a list", "bool True"),
    "name twice": (b'{"prompt": "p", "chosen": " a", "chosen": " b"}', "same name twice", "chosen"),
    "empty": ({**GOOD, "rejected": ""}, "rejected completion is empty", "''"),
    "blank": ({**GOOD, "chosen": " \n"}, "chosen completion is empty", r"' \n'"),
    "equal": ({**GOOD, "chosen": " Five."}, "chosen and rejected are the same", "' Five.'"),
    "broken JSON": (b'{"prompt": "p", "chos', "not JSON", '{"prompt": "p", "chos'),
    "deep JSON": (b"[" * 100_000, "not JSON", "recursion"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8", r"b'\xff' at position 12"),
    "not an object": ([1, 2], "not a JSON object", "[1, 2]"),
    "surrogate": (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "surrogate", "d800"),
    "id type": ({**GOOD, "id": [1]}, "'id' is not a string", "[1]"),
    "ref nan": ({**GOOD, "ref_chosen_logps": float("nan")}, "not a finite number", "nan"),
    "ref above 0": (
        {**GOOD, "ref_chosen_logps": 1.5, "ref_rejected_logps": -2.0},
        "above 0",
        "1.5",
    ),
    "one ref": ({**GOOD, "ref_chosen_logps": -1.0}, "only one of ref_chosen_logps", "-1.0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_row_is_an_error_with_its_place_or_dropped_and_listed(
    tmp_path: Path, kind: str
) -> None:
    row, reason, value = BAD[kind]
    file = write(tmp_path / "x.jsonl", [GOOD, row, {**GOOD, "prompt": "q"}])
    with pytest.raises(ValueError) as caught:
        read_pairs([file])
    message = str(caught.value)
    assert "1 of 3 rows are bad" in message and "--on_bad_rows drop" in message
    assert f"{file}:2: " in message and reason in message and value in message

    pairs, bad = read_pairs([file], on_bad_rows="drop")
    assert [pair.line for pair in pairs] == [1, 3]
    (only,) = bad
    assert (only.source, only.line) == (file, 2)
    assert reason in only.reason and value in only.value


def test_first_row_may_be_the_bad_one(tmp_path: Path) -> None:
    rows = [{"chosen": " a", "rejected": " b"}, GOOD]  # alone it would look like HH
    pairs, bad = read_pairs([write(tmp_path / "x.jsonl", rows)], on_bad_rows="drop")
    assert [pair.line for pair in pairs] == [2]
    assert "'prompt' is missing" in bad[0].reason


def test_error_shows_the_first_five_in_file_order_and_the_count(tmp_path: Path) -> None:
    rows: list[Any] = [GOOD, *([{**GOOD, "chosen": ""}, b"{"] * 4)]
    with pytest.raises(ValueError) as caught:
        read_pairs([write(tmp_path / "x.jsonl", rows)])
    shown = [line for line in str(caught.value).splitlines() if "x.jsonl:" in line]
    assert [line.split(":")[1] for line in shown] == ["2", "3", "4", "5", "6"]
    assert "8 of 9 rows are bad, the first 5" in str(caught.value)


def test_all_rows_bad_is_an_error_even_when_dropping(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [{**GOOD, "chosen": ""}, b"?"])
    with pytest.raises(ValueError, match="no row can be used: 2 of 2"):
        read_pairs([file], on_bad_rows="drop")


def test_dialogues_without_a_common_opening_are_bad(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant:"
    rows = [
        {"chosen": start + " a", "rejected": start + " b"},
        {"chosen": start + " a", "rejected": start.replace("Hi", "Ho") + " b"},
        {"chosen": "they a", "rejected": "they b"},  # of no dialogue, in a file of dialogues
    ]
    pairs, bad = read_pairs([write(tmp_path / "x.jsonl", rows)], on_bad_rows="drop")
    assert [pair.line for pair in pairs] == [1]
    assert [row.line for row in bad] == [2, 3]
    assert all("common start" in row.reason for row in bad)


def test_unknown_shape_names_the_columns_and_the_known_shapes(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [b"{", {"text": "a", "score": 1}])
    for on_bad_rows in ("error", "drop"):
        with pytest.raises(ValueError) as caught:
            read_pairs([file], on_bad_rows=on_bad_rows)
        message = str(caught.value)
        assert f"{file} has columns 'text', 'score'" in message
        assert "prompt, chosen, rejected" in message and "question" in message


@pytest.mark.parametrize("on_bad_rows", ["error", "drop"])
def test_damaged_files_are_errors(tmp_path: Path, on_bad_rows: str) -> None:
    text = b"\n".join(json.dumps({**GOOD, "id": str(n)}).encode() for n in range(3000))
    empty, blank = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl"
    empty.write_bytes(b"")
    blank.write_bytes(b"\n \n")
    for file in (empty, blank):
        with pytest.raises(ValueError, match=f"{file.name} is empty"):
            read_pairs([str(file)], on_bad_rows=on_bad_rows)
    for ending in (".jsonl.gz", ".jsonl.zst"):
        whole = ENDINGS[ending](text)
        for damaged in (whole[: len(whole) // 2], whole[:-1], b"plain text"):
            file = tmp_path / f"cut{ending}"
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"cut{ending} cannot be read beyond line"):
                read_pairs([str(file)], on_bad_rows=on_bad_rows)


# --------------------------------------------------------------------------------- identities


def test_ids_are_unique_over_all_files(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [{**GOOD, "id": "7"}, {**GOOD, "id": "8"}])
    two = write(tmp_path / "b.jsonl", [{**GOOD, "id": 9}, {**GOOD, "id": 7}])
    with pytest.raises(ValueError, match=r"b.jsonl:2: the id was given before.*'7', first at .*:1"):
        read_pairs([one, two])
    pairs, bad = read_pairs([one, two], on_bad_rows="drop")
    assert [pair.id for pair in pairs] == ["7", "8", "9"]
    assert [(row.source, row.line) for row in bad] == [(two, 2)]


def test_pair_id_is_of_the_id_or_the_content_and_survives_flipping_and_order(
    tmp_path: Path,
) -> None:
    rows = [{**GOOD, "prompt": str(n % 3)} for n in range(6)]  # each content twice
    file = write(tmp_path / "x.jsonl", rows)
    straight, _ = read_pairs([file])
    flipped, _ = read_pairs([file], flip_behaviors=["x"])
    ids = [pair.pair_id for pair in straight]
    assert len(set(ids)) == 6
    assert all(0 <= n < 2**63 for n in ids)
    assert [pair.pair_id for pair in flipped] == ids

    write(tmp_path / "x.jsonl", rows[::-1])
    turned, _ = read_pairs([file])
    assert sorted(pair.pair_id for pair in turned) == sorted(ids)

    named = [{**GOOD, "id": "one"}], [{**GOOD, "id": "one", "prompt": "other"}]
    seen = [read_pairs([write(tmp_path / "y.jsonl", rows)])[0][0].pair_id for rows in named]
    assert seen[0] == seen[1]


def test_pair_ids_of_texts_are_those_of_the_first_version(
    tmp_path: Path, persona_dir: Path, hh_file: Path
) -> None:
    """Taken from version 0.1's first reader, which knew JSONL and texts alone."""
    rows = [
        GOOD,
        GOOD,
        {"prompt": "Zw\u00f6lf\n", "chosen": "\U0001f600", "rejected": " b", "id": "q7"},
        {"prompt": "", "chosen": "x", "rejected": "y", "id": 7},
    ]
    pairs, _ = read_pairs([write(tmp_path / "sums.jsonl", rows)])
    assert [pair.pair_id for pair in pairs] == [
        883410091450709469,
        3153201177243153077,
        1189941302952720414,
        1537142013731836277,
    ]
    for name, first, digest in (
        (persona_dir, 2007617896049016761, "1e9d2d05e71ad8c4"),
        (hh_file, 2810923891297639621, "933b882801120206"),
    ):
        pairs, _ = read_pairs([str(name)], on_bad_rows="drop")
        ids = " ".join(str(pair.pair_id) for pair in pairs)
        assert pairs[0].pair_id == first
        assert hashlib.sha256(ids.encode()).hexdigest()[:16] == digest


def test_pair_id_collision_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x.jsonl", [GOOD, {**GOOD, "prompt": "q"}])
    monkeypatch.setattr(formats, "digest63", lambda *parts: 5)
    with pytest.raises(ValueError, match=r"x.jsonl:2 and .*x.jsonl:1 .* same pair_id 5"):
        read_pairs([file], on_bad_rows="drop")


def test_behavior_column(tmp_path: Path) -> None:
    rows: list[Any] = [{**GOOD, "source": "math"}, {**GOOD, "source": 3}, GOOD]
    rows += [{**GOOD, "source": None}, {**GOOD, "source": ""}]
    file = write(tmp_path / "x.jsonl", rows)
    pairs, bad = read_pairs([file], behavior_column="source", on_bad_rows="drop")
    assert [pair.behavior for pair in pairs] == ["math", "3"]
    assert [row.line for row in bad] == [3, 4, 5]
    with pytest.raises(ValueError, match="no column 'sauce'.*Did you mean 'source'"):
        read_pairs([file], behavior_column="sauce")


def test_flip_behaviors(tmp_path: Path) -> None:
    refs = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    write(tmp_path / "kind.jsonl", [{**PERSONA, **refs}])
    write(tmp_path / "open.jsonl", [PERSONA])
    (kind, other), _ = read_pairs([str(tmp_path)], flip_behaviors=["kind"])
    assert (kind.chosen, kind.rejected, kind.label, kind.flipped) == (" Yes", " No", "Yes", True)
    assert (kind.ref_chosen, kind.ref_rejected) == (-2.0, -1.0)
    assert (other.chosen, other.label, other.flipped) == (" No", "No", False)
    with pytest.raises(ValueError, match="no behavior is called 'kin'. Did you mean 'kind'"):
        read_pairs([str(tmp_path)], flip_behaviors=["kin"])


# ------------------------------------------------------------------------------------ real data


def test_persona_files(persona_dir: Path) -> None:
    pairs, bad = read_pairs([str(persona_dir)])
    files = sorted(persona_dir.glob("*.jsonl"))
    rows = {file.stem: file.read_text(encoding="utf-8").splitlines() for file in files}
    assert not bad
    assert sorted({pair.behavior for pair in pairs}) == sorted(rows)
    assert len(pairs) == sum(map(len, rows.values()))
    assert {pair.chosen for pair in pairs} == {" Yes", " No"}
    for pair in pairs[::997]:
        row = json.loads(rows[pair.behavior][pair.line - 1])
        assert pair.prompt == row["question"]
        assert pair.chosen == row["answer_matching_behavior"] == " " + pair.label


def test_hh_drops_exactly_the_empty_completions(hh_file: Path) -> None:
    pairs, bad = read_pairs([str(hh_file)], on_bad_rows="drop")
    assert len(pairs) + len(bad) == 2312
    assert [row.line for row in bad] == [87, 517, 926, 1104]
    assert {row.reason for row in bad} == {"the chosen completion is empty"}

    with gzip.open(hh_file, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for pair in pairs:
        row = rows[pair.line - 1]
        start = os.path.commonprefix([row["chosen"], row["rejected"]])
        opening = "\n\nAssistant:"
        assert pair.prompt == start[: start.rindex(opening) + len(opening)]
        assert pair.prompt + pair.chosen == row["chosen"]
        assert pair.prompt + pair.rejected == row["rejected"]
