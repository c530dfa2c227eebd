from __future__ import annotations

import csv
import gzip
import io
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from fastpref.config import Config
from fastpref.data import columnar
from fastpref.data.dataset import load_dataset
from fastpref.data.formats import Pair, read_pairs

GOOD = {"prompt": "Two and two?", "chosen": " Four.", "rejected": " Five."}
CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]

Row = dict[str, Any]


def as_csv(rows: list[Row]) -> bytes:
    out = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names)
    writer.writeheader()
    for row in rows:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
        writer.writerow({k: "" if v == "null" else v for k, v in texts.items()})
    return out.getvalue().encode()


def as_parquet(rows: list[Row]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def as_jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FORMATS: dict[str, Callable[[list[Row]], bytes]] = {
    ".jsonl": as_jsonl,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": as_csv,
    ".csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    ".json.zst": lambda rows: zstandard.compress(json.dumps({"data": rows}).encode()),
    ".parquet": as_parquet,
}


def content(pairs: list[Pair]) -> list[tuple[Any, ...]]:
    """All that a pair has except where it stands."""
    return [
        (p.prompt, p.chosen, p.rejected, p.pair_id, p.id, p.behavior, p.label, p.tools,
         p.template_kwargs, p.ref_chosen, p.ref_rejected)
        for p in pairs
    ]  # fmt: skip


def save_arrow(rows: list[Row], folder: Path, split: str = "") -> str:
    from datasets import Dataset, DatasetDict

    data: Any = Dataset.from_list(rows)
    if split:
        data = DatasetDict({split: data, "other": data.select([0])})
    data.save_to_disk(str(folder))
    return str(folder)


# --------------------------------------------------------------- every format, the same pairs


def in_all_formats(rows: list[Row], folder: Path) -> dict[str, tuple[list[Pair], list[int]]]:
    """Pairs and lines of bad rows, of the rows written in every format under the name `set`."""
    names = {}
    for ending, write in FORMATS.items():
        (folder / ending[1:]).mkdir()
        file = folder / ending[1:] / f"set{ending}"
        file.write_bytes(write(rows))
        names[ending] = str(file)
    names["arrow"] = save_arrow(rows, folder / "arrow" / "set")
    names["arrow, split"] = save_arrow(rows, folder / "dict" / "set", "train")
    read = {}
    for kind, name in names.items():
        pairs, bad = read_pairs([name], on_bad_rows="drop")
        read[kind] = pairs, [row.line for row in bad]
    return read


def test_small_rows_are_the_same_pairs_in_every_format(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 2, "b": None}}}
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": 'Say "two", please,\nand two?'},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "name": "add"},
    ]
    answers = [[{"role": "assistant", "content": text}] for text in ("Four. 😀", "Five.")]
    more: Row = {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "chat_template_kwargs": {"enable_thinking": False},
        "ref_chosen_logps": -1.5,
        "ref_rejected_logps": -2.25,
        "id": "x7",
        "label": "hard",
    }
    rows = [
        {"prompt": turns, "chosen": answers[0], "rejected": answers[1], **more},
        {"prompt": turns[:2], "chosen": answers[1], "rejected": answers[0]},
        {"prompt": turns[1:2], "chosen": answers[1], "rejected": answers[0], "tools": []},
    ]
    read = in_all_formats(rows, tmp_path)
    pairs, bad = read[".jsonl"]
    assert len(pairs) == 3 and not bad
    kept = {"role": "assistant", "content": "", "tool_calls": [{"function": {
        "name": "add", "arguments": {"a": 2}}}]}  # fmt: skip
    assert pairs[0].prompt == (*turns[:2], kept, turns[3])
    assert pairs[0].tools == (more["tools"][0],)
    assert pairs[0].template_kwargs == {"enable_thinking": False}
    assert (pairs[0].ref_chosen, pairs[0].id, pairs[0].label) == (-1.5, "x7", "hard")
    assert pairs[1].prompt == tuple(turns[:2]) and pairs[1].tools is None
    assert pairs[2].tools == ()  # templates tell an empty list from none
    for kind, other in read.items():
        assert content(other[0]) == content(pairs), kind


def as_turns(dialogue: str) -> list[Row]:
    parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": text}
        for role, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def as_dialogue(turns: Any) -> str:
    roles = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{roles[turn['role']]}:{turn['content']}" for turn in turns)


def last_opening(dialogue: str) -> str:
    return dialogue[: dialogue.rindex("\n\nAssistant:")]


def test_hh_is_the_same_pairs_in_every_format_and_as_conversations(
    tmp_path: Path, hh_file: Path
) -> None:
    everything = [json.loads(line) for line in gzip.decompress(hh_file.read_bytes()).splitlines()]
    # Some, and all whose dialogues part in an earlier turn than the last.
    early = [row for row in everything if len(set(map(last_opening, row.values()))) > 1]
    assert len(early) == 5
    rows = everything[:300] + early
    (tmp_path / "texts").mkdir()
    (tmp_path / "turns").mkdir()
    texts = in_all_formats(rows, tmp_path / "texts")
    straight, dropped = texts[".jsonl"]
    assert dropped == [87]
    for kind, (pairs, bad) in texts.items():
        assert content(pairs) == content(straight), kind
        if "csv" not in kind:  # there lines are those of the file
            assert [p.line for p in pairs] == [p.line for p in straight], kind
            assert bad == dropped, kind

    turns = in_all_formats([{k: as_turns(v) for k, v in row.items()} for row in rows],
                           tmp_path / "turns")  # fmt: skip
    for kind, (pairs, bad) in turns.items():
        assert content(pairs) == content(turns[".jsonl"][0]), kind
        assert [as_dialogue(p.prompt) + "\n\nAssistant:" for p in pairs] == [
            p.prompt for p in straight
        ], kind
        for side in ("chosen", "rejected"):
            assert [as_dialogue(getattr(p, side)) for p in pairs] == [
                "\n\nAssistant:" + getattr(p, side) for p in straight
            ], kind
        assert len(bad) == 1


def test_persona_is_the_same_pairs_in_every_format(tmp_path: Path, persona_dir: Path) -> None:
    file = persona_dir / "openness.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    straight, _ = read_pairs([str(file)])
    for kind, (pairs, bad) in in_all_formats(rows, tmp_path).items():
        assert [(p.prompt, p.chosen, p.rejected, p.label) for p in pairs] == [
            (p.prompt, p.chosen, p.rejected, p.label) for p in straight
        ], kind
        assert not bad, kind


# ------------------------------------------------------------------------------- JSON and CSV


def test_json_holds_a_list_or_data_or_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    two = [GOOD, {**GOOD, "prompt": "q"}]
    pretty = json.dumps({"version": 1, "data": two}, indent=2)
    for text in (json.dumps(two), pretty, "\ufeff" + pretty, "\n".join(map(json.dumps, two))):
        file.write_text(text, encoding="utf-8")
        pairs, _ = read_pairs([str(file)])
        assert [(pair.prompt, pair.line) for pair in pairs] == [("Two and two?", 1), ("q", 2)]
    file.write_text(json.dumps(GOOD))
    assert len(read_pairs([str(file)])[0]) == 1
    file.write_text(json.dumps([GOOD, 7, GOOD]))
    _, (bad,) = read_pairs([str(file)], on_bad_rows="drop")
    assert (bad.line, bad.reason, bad.value) == (2, "the item is not a JSON object", "7")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "p", "chosen": ', "not JSON: Expecting value at line 1 column 27"),
        ('[{"a": 1, "a": 2}]', "same name twice"),
        ("7", "holds 7: expected a list of objects"),
        ("[]", "is empty"),
        (" \n", "is empty"),
        ('{"data": []}', "is empty"),
        ('{"train": [], "test": []}', "no row has a known shape"),
        ("[" * 10**5, "not JSON"),
        ("[" + "1" * 5000 + "]", "not JSON"),
    ],
)
def test_json_that_holds_no_rows(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs([str(file)], on_bad_rows="drop")


def test_csv_lines_quotes_and_long_cells(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    long = "x" * 300_000
    file.write_bytes(
        b"\xef\xbb\xbfprompt,chosen,rejected,id,ref_chosen_logps,ref_rejected_logps\r\n"
        b'"two\nlines, ""quoted""", a, b,,,\r\n'
        b"\r\n"
        b"p, c, d,q1,-1.5,-2\r\n" + f"{long},e,f,,,\r\n".encode() + b"too,few\r\n"
        b"p, g,,,,\r\n"
        b"p,\xff, b,,,\r\n"
        b"p, c, d,,one,2\n"
    )
    pairs, bad = read_pairs([str(file)], on_bad_rows="drop")
    assert [(p.prompt, p.chosen, p.line, p.id, p.ref_chosen) for p in pairs] == [
        ('two\nlines, "quoted"', " a", 2, "", None),
        ("p", " c", 5, "q1", -1.5),
        (long, "e", 6, "", None),
    ]
    assert [(row.line, row.reason) for row in bad] == [
        (7, "the row has not the 6 cells of the header"),
        (8, "column 'rejected' is null"),
        (9, "the row is not UTF-8"),
        (10, "column 'ref_chosen_logps' is not a finite number that float32 holds"),
    ]
    assert csv.field_size_limit() == 131072


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt,chosen,rejected\np,"c,d\n', "line 2: not CSV: unexpected end of data"),
        ('prompt,chosen,rejected\np,"c"d,e\n', "line 2: not CSV"),
        ("prompt,chosen,chosen\np,c,d\n", "names column 'chosen' more than once"),
        ("prompt;chosen;rejected\np;c;d\n", "expected commas"),
        ("a,b\n1,2\n", "has columns 'a', 'b'; no row has a known shape"),
        ("prompt, chosen,b\np,c,d\n", "has columns 'prompt', ' chosen', 'b'; no row has a known"),
        ("prompt,chosen,rejected\n", "is empty"),
        ("", "is empty"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs([str(file)], on_bad_rows="drop")


def test_python_lists_in_cells_are_refused_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(as_csv([{**GOOD, "chosen": str(CHAT[1:]), "rejected": str(CHAT[1:])}]))
    with pytest.raises(ValueError, match=r"a.csv:2: column 'chosen' is a list .*json.dumps"):
        read_pairs([str(file)])


def test_json_by_columns_is_refused_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({name: {"0": text, "1": text} for name, text in GOOD.items()}))
    with pytest.raises(ValueError, match=r"a.json holds columns, not rows.*orient='records'"):
        read_pairs([str(file)], on_bad_rows="drop")


def test_empty_lists_and_objects_in_cells_count_as_absent(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        as_csv([{**GOOD, "tools": "[]", "chat_template_kwargs": "{}", "images": "[]"}])
    )
    (pair,), _ = read_pairs([str(file)])
    assert pair.tools is None and pair.template_kwargs is None
    file.write_bytes(as_csv([{**GOOD, "tools": '[{"name": "f"}]'}]))
    with pytest.raises(ValueError, match="a.csv:2: columns 'tools' and .* are for conversations"):
        read_pairs([str(file)])


# ---------------------------------------------------------------------- Parquet, Arrow, the Hub


def test_parquet_reads_only_known_columns_and_names_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([{**GOOD, "score": 1.5, "embedding": [0.1] * 9}] * 2)
    pq.write_table(table, file)
    with caplog.at_level("INFO"):
        pairs, _ = read_pairs([str(file)])
    assert [pair.line for pair in pairs] == [1, 2]
    assert "preference: 1 source; columns not read: score, embedding" in caplog.text
    pq.write_table(table.select(["score"]), file)
    with pytest.raises(ValueError, match="has columns 'score'; no row has a known shape"):
        read_pairs([str(file)])
    pq.write_table(table.slice(0, 0), file)
    with pytest.raises(ValueError, match="a.parquet is empty"):
        read_pairs([str(file)])


def test_null_and_wrong_types_in_columns_are_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table(
        {
            "prompt": ["p", None, "q", "r"],
            "chosen": [" a", " b", None, " c"],
            "rejected": [" x", " y", " z", " w"],
            "ref_chosen_logps": [-1.0, -1.0, -1.0, float("nan")],
            "ref_rejected_logps": [-1.0, -1.0, -1.0, -1.0],
        }
    )
    pq.write_table(table, file)
    pairs, bad = read_pairs([str(file)], on_bad_rows="drop")
    assert [pair.line for pair in pairs] == [1]
    assert [(row.line, row.value) for row in bad] == [(2, "null"), (3, "null"), (4, "nan")]
    pq.write_table(table.set_column(1, "chosen", pa.array([1, 2, 3, 4])), file)
    with pytest.raises(ValueError, match="a.parquet:1: column 'chosen' is not a string.*int 1"):
        read_pairs([str(file)])
    pq.write_table(table.set_column(1, "chosen", pa.array([b"a", b"b", b"c", b"d"])), file)
    with pytest.raises(ValueError, match="column 'chosen' is not a string.*bytes b'a'"):
        read_pairs([str(file)])


def test_images_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "BATCH", 2)
    file = tmp_path / "a.parquet"
    images = [[{"bytes": b"\x89PNG", "path": None}], [], None]
    rows = [{**GOOD, "prompt": str(n), "images": value} for n, value in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    pairs, (bad,) = read_pairs([str(file)], on_bad_rows="drop")
    assert [pair.line for pair in pairs] == [2, 3]
    assert (bad.line, bad.value) == (1, "a value of its own")
    assert "'images' is not empty; fastpref reads text only" in bad.reason
    folder = save_arrow(rows, tmp_path / "set")
    assert [p.line for p in read_pairs([folder], on_bad_rows="drop")[0]] == [2, 3]


def test_splits_of_arrow_data_sets(tmp_path: Path) -> None:
    folder = save_arrow([GOOD, {**GOOD, "prompt": "q"}], tmp_path / "set", "train")
    pairs, _ = read_pairs([folder], eval_dataset_name=[folder], eval_dataset_split="other")
    assert [(p.source, p.line, p.origin) for p in pairs] == [
        (f"{folder}[train]", 1, 0),
        (f"{folder}[train]", 2, 0),
        (f"{folder}[other]", 1, 1),
    ]
    with pytest.raises(ValueError, match="no split 'trian'. Did you mean 'train'.*dataset_split"):
        read_pairs([folder], dataset_split="trian")


def test_held_out_pairs_are_those_of_the_evaluation_split(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    rows = [{**GOOD, "prompt": str(n)} for n in range(5)]
    folder = save_arrow(rows, tmp_path / "set", "train")  # `other` holds the first row once more
    held: Row = {"dataset_name": (folder,), "eval_dataset_name": (folder,), "append_eos": "false"}
    with pytest.raises(ValueError, match=r"set\[other\]:1: this held-out pair is also training"):
        load_dataset(Config(**held, eval_dataset_split="other"), tiny_tokenizer)
    (tmp_path / "more.jsonl").write_bytes(as_jsonl([{**GOOD, "prompt": "7"}] * 2))
    held["eval_dataset_name"] = (str(tmp_path / "more.jsonl"),)
    data = load_dataset(Config(**held), tiny_tokenizer)
    assert (len(data.train), len(data.held_out)) == (5, 2)
    files = [(row["file"], row["split"]) for row in data.index]
    assert files[:5] == [(f"{folder}[train]", "train")] * 5
    assert files[5:] == [(str(tmp_path / "more.jsonl"), "eval")] * 2


def test_json_features_of_datasets_are_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("datasets before 4.5 has no Json feature")
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}, {"function": {"name": "g"}}]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    rows = [{"prompt": CHAT[:1], "chosen": [turn, {"role": "tool", "content": "1"}, CHAT[1]],
             "rejected": CHAT[1:], "tools": [{"name": "f"}, {"type": "x"}]}]  # fmt: skip
    data = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    data.save_to_disk(str(tmp_path / "set"))
    data.to_parquet(str(tmp_path / "set.parquet"))
    (tmp_path / "set.jsonl").write_bytes(as_jsonl(rows))
    straight, _ = read_pairs([str(tmp_path / "set.jsonl")])
    for name in ("set", "set.parquet"):
        assert content(read_pairs([str(tmp_path / name)])[0]) == content(straight), name


def test_hub_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, split: str) -> Any:
        asked.append((path, name, split))
        return datasets.Dataset.from_list([GOOD if split == "train" else {**GOOD, "prompt": "q"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"):
        pairs, _ = read_pairs(
            ["user/pairs"], eval_dataset_name=["user/pairs"], dataset_config_name="en"
        )
    assert asked == [("user/pairs", "en", "train"), ("user/pairs", "en", "test")]
    assert [(p.prompt, p.source, p.behavior) for p in pairs] == [
        ("Two and two?", "user/pairs[train]", "pairs"),
        ("q", "user/pairs[test]", "pairs"),
    ]
    assert "user/pairs: no file or folder of this name. Read from the Hub" in caplog.text


def test_a_hub_name_that_cannot_be_loaded_says_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "date").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        read_pairs(["data/persona"], dataset_config_name="en")
    text = str(caught.value)
    assert text.startswith("data/persona: no file or folder of this name. Did you mean 'date'?")
    assert "The Hub's data set data/persona (split 'train', dataset_config_name 'en')" in text
    assert "Check the name, the connection, dataset_split" in text


# ------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("on_bad_rows", ["error", "drop"])
def test_files_cut_short_are_errors(tmp_path: Path, on_bad_rows: str) -> None:
    rows = [{**GOOD, "prompt": str(n)} for n in range(400)]
    for ending in (".csv.gz", ".json.zst", ".parquet", ".json"):
        whole = FORMATS[ending](rows)
        for damaged in (whole[: len(whole) // 2], whole[:-3], whole[: len(whole) // 20]):
            file = tmp_path / f"cut{ending}"
            file.write_bytes(damaged)
            with pytest.raises(
                ValueError, match=f"file .*cut{ending} (cannot be read|is not JSON)"
            ):
                read_pairs([str(file)], on_bad_rows=on_bad_rows)
    folder = Path(save_arrow(rows, tmp_path / "set"))
    (arrow,) = folder.glob("*.arrow")
    whole = arrow.read_bytes()
    for length in (len(whole) // 2, 100, 0):
        arrow.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="Arrow data set .*set cannot be read: .*write it"):
            read_pairs([str(folder)], on_bad_rows=on_bad_rows)


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    for name, data, message in (
        ("a.jsonl", gzip.compress(as_jsonl([GOOD])), "compressed with gzip.*add .gz"),
        ("a.csv", zstandard.compress(b"x"), "Zstandard.*add .zst"),
        ("a.json", as_parquet([GOOD]), "is Parquet.*ending .parquet"),
        ("a.csv", b"PK\x03\x04....", "ZIP archive.*save it as CSV"),
        ("a.csv", "prompt,chosen".encode("utf-16"), "UTF-16.*save it as UTF-8"),
        ("a.parquet", as_jsonl([GOOD]), "cannot be read as Parquet"),
        ("a.jsonl.gz", as_jsonl([GOOD]), "cannot be read beyond line 0"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_pairs([str(tmp_path / name)])
    (tmp_path / "list.jsonl").write_bytes(json.dumps([GOOD]).encode())
    with pytest.raises(ValueError, match="name a file of one JSON list .json"):
        read_pairs([str(tmp_path / "list.jsonl")])


def test_text_that_parquet_says_is_utf8_but_is_not(tmp_path: Path) -> None:
    bad = pa.array([b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({**{k: pa.array([v]) for k, v in GOOD.items()}, "prompt": bad}),
                   tmp_path / "a.parquet")  # fmt: skip
    with pytest.raises(ValueError, match="cannot be read as Parquet: UnicodeDecodeError"):
        read_pairs([str(tmp_path / "a.parquet")])


def test_offsets_of_an_arrow_file_that_point_outside_it(tmp_path: Path) -> None:
    folder = Path(save_arrow([GOOD, GOOD], tmp_path / "set"))
    (file,) = folder.glob("*.arrow")
    with pa.ipc.open_stream(file.read_bytes()) as stream:
        table = stream.read_all()
    offsets = pa.py_buffer(struct.pack("<3i", 0, 1 << 30, 4))  # the second one
    wild = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"text"))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.set_column(0, "prompt", wild))
    with pytest.raises(ValueError, match="set cannot be read: ArrowInvalid"):
        read_pairs([str(folder)])


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    folder = save_arrow([GOOD], tmp_path / "set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (folder, "user/name"):
        with pytest.raises(ValueError, match=r"pip install \"fastpref\[datasets\]\""):
            read_pairs([name])
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([GOOD]))
    assert len(read_pairs([str(tmp_path / "a.jsonl")])[0]) == 1  # JSONL needs none of them
