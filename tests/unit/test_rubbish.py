"""Rubbish for every reader: a ValueError or bad rows with a place, never anything else.

Never a wrong pair either: whatever comes out as a pair is what the sound rows of the file say.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastpref.data.formats import Pair, read_pairs

from .test_readers import FORMATS, as_csv, as_jsonl, as_parquet, save_arrow

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
SOUND: list[dict[str, Any]] = [
    {"prompt": "Two and two?", "chosen": " Four.", "rejected": " Five.", "id": "q1"},
    {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": "Five.", "tools": [{"name": "add"}]},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    {"chosen": CHAT, "rejected": [*CHAT[:1], {"role": "assistant", "content": "Five."}]},
    {"question": "q", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"},
    {"prompt": "p", "completion": " a", "label": True},
    {"instruction": "Add", "input": "2 2", "chosen": "4", "rejected": "5"},
]
COLUMNS = sorted({name for row in SOUND for name in row} | {
    "chat_template_kwargs", "ref_chosen_logps", "ref_rejected_logps", "images", "system",
    "messages", "history", "label", "ref_logps", "query"})  # fmt: skip
FILE_ENDINGS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".csv", ".csv.zst",
                ".parquet"]  # fmt: skip


def read(file: Path) -> list[Pair]:
    """What can be read of a file. Fails where anything but a ValueError with a place is raised."""
    for on_bad_rows in ("error", "drop"):
        try:
            pairs, bad = read_pairs([str(file)], on_bad_rows=on_bad_rows)
        except ValueError as error:
            assert type(error) is ValueError and file.name.split(".")[0] in str(error), error
            if "rows are bad" in str(error):
                assert re.search(rf"{re.escape(str(file))}(\[\w+\])?:\d+: ", str(error)), error
            pairs = []
        else:
            assert on_bad_rows == "drop" or not bad
            for row in bad:
                assert row.line > 0 and row.reason and row.value, row
    for pair in pairs:
        check(pair)
    return pairs


def check(pair: Pair) -> None:
    """What any pair must be, whatever it was read from."""
    sides = (pair.prompt, pair.chosen, pair.rejected)
    assert len({isinstance(side, str) for side in sides}) == 1
    assert pair.chosen != pair.rejected
    for side in sides:
        if isinstance(side, str):
            side.encode()
        else:
            assert side and all(isinstance(turn["content"], str) for turn in side)
            json.dumps(side, ensure_ascii=False, allow_nan=False).encode()
    for name in ("chosen", "rejected"):
        side = getattr(pair, name)
        assert side.strip() if isinstance(side, str) else side[0]["role"] == "assistant"


@SETTINGS
@given(data=st.binary(max_size=200), ending=st.sampled_from(FILE_ENDINGS))
@example(b"", ".parquet").via("empty")
@example(b"\xff\xfe\x00", ".csv").via("UTF-16")
def test_random_bytes(tmp_path: Path, data: bytes, ending: str) -> None:
    (tmp_path / f"rubbish{ending}").write_bytes(data)
    assert read(tmp_path / f"rubbish{ending}") == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "tool_calls", "from",
                                       "value", "name"]) | st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "bot", None, 7])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": VALUES | st.text(max_size=4)}), max_size=4
)
ROWS = st.dictionaries(st.sampled_from(COLUMNS), VALUES | MESSAGES, max_size=6)


@SETTINGS
@given(
    rows=st.lists(ROWS | VALUES, min_size=1, max_size=5), ending=st.sampled_from(FILE_ENDINGS[:5])
)
def test_random_json_values(tmp_path: Path, rows: list[Any], ending: str) -> None:
    import gzip

    import zstandard

    text = json.dumps(rows) if ".json" in ending and "jsonl" not in ending else "\n".join(
        map(json.dumps, rows))  # fmt: skip
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(ending.split(".")[-1], bytes)
    (tmp_path / f"rubbish{ending}").write_bytes(pack(text.encode()))
    read(tmp_path / f"rubbish{ending}")


@st.composite
def mutated(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Sound rows of one shape, of which one has one thing changed."""
    row = draw(st.sampled_from(SOUND))
    changed = json.loads(json.dumps(row))
    name = draw(st.sampled_from(sorted(changed)))
    what = draw(st.sampled_from(["drop", "null", "value", "inside", "add"]))
    if what == "drop":
        del changed[name]
    elif what == "null":
        changed[name] = None
    elif what == "add":
        changed[draw(st.sampled_from(COLUMNS))] = draw(VALUES)
    elif what == "inside" and isinstance(changed[name], list):
        turn = changed[name][draw(st.integers(0, len(changed[name]) - 1))]
        turn[draw(st.sampled_from(["role", "content", "tool_calls", "images"]))] = draw(VALUES)
    else:
        changed[name] = draw(VALUES)
    others = [{**row, "id": f"other {n}"} for n in range(2)]
    return [others[0], changed, others[1]]


@SETTINGS
@given(rows=mutated(), ending=st.sampled_from([".jsonl", ".json", ".csv"]))
def test_one_change_in_a_row_makes_no_other_pair_of_the_others(
    tmp_path: Path, rows: list[dict[str, Any]], ending: str
) -> None:
    file = tmp_path / f"rubbish{ending}"
    file.write_bytes(FORMATS[ending](rows[::2]))
    sound = {pair.id: (pair.prompt, pair.chosen, pair.rejected) for pair in read(file)}
    file.write_bytes(FORMATS[ending](rows))
    got = {pair.id: (pair.prompt, pair.chosen, pair.rejected) for pair in read(file)}
    if "completion" not in rows[0]:  # there a new partner makes a new pair
        for name, texts in sound.items():
            assert got.get(name, texts) == texts


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".csv.gz", ".json.zst", ".parquet"])
def test_every_cut_of_a_compressed_file_is_an_error(tmp_path: Path, ending: str) -> None:
    import gzip

    import zstandard

    rows = [{"prompt": f"{n}?", "chosen": " a", "rejected": " b"} for n in range(30)]
    plain = {"jsonl": as_jsonl, "csv": as_csv, "json": lambda r: json.dumps(r).encode(),
             "parquet": as_parquet}[ending.split(".")[1]](rows)  # fmt: skip
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(ending.split(".")[-1], bytes)
    whole = pack(plain)
    file = tmp_path / f"rubbish{ending}"
    for length in {*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1}:
        file.write_bytes(whole[:length])
        assert read(file) == [], length
    file.write_bytes(whole)
    assert len(read(file)) == 30


@SETTINGS
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_in_parquet(tmp_path: Path, place: float, value: int) -> None:
    data = bytearray(as_parquet(SOUND[:1] * 3))
    data[int(place * len(data))] = value
    (tmp_path / "rubbish.parquet").write_bytes(bytes(data))
    read(tmp_path / "rubbish.parquet")


@SETTINGS
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_in_an_arrow_data_set(tmp_path: Path, place: float, value: int) -> None:
    folder = tmp_path / "rubbish"
    if not folder.exists():
        save_arrow([SOUND[0], {**SOUND[0], "id": "q2"}], folder)
        for file in sorted(folder.iterdir()):
            (tmp_path / f"sound-{file.name}").write_bytes(file.read_bytes())
    files = sorted(folder.iterdir())
    sizes = [(tmp_path / f"sound-{file.name}").stat().st_size for file in files]
    at = int(place * sum(sizes))
    for file, size in zip(files, sizes, strict=True):
        data = bytearray((tmp_path / f"sound-{file.name}").read_bytes())
        if 0 <= at < size:
            data[at] = value
        at -= size
        file.unlink()  # the last example may still have it mapped into memory
        file.write_bytes(bytes(data))
    read(folder)
