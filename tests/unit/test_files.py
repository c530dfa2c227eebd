from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpref.data.files import find_sources

GOOD = {"prompt": "Two and two?", "chosen": " Four.", "rejected": " Five."}


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(GOOD))
    return folder


def names(*given: str, **options: str) -> list[str]:
    return [source.name for source in find_sources(given, **options)]  # type: ignore[arg-type]


def test_a_folder_stands_for_its_own_data_files_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b.jsonl", "a.jsonl.gz", "c.json.zst", "d.csv", "e.parquet", "f.json")
    touch(tmp_path, "notes.txt", ".hidden.jsonl", "below/g.jsonl", "h.tsv", "i.parquet.gz")
    inside = ["a.jsonl.gz", "b.jsonl", "c.json.zst", "d.csv", "e.parquet", "f.json"]
    paths = [str(tmp_path / name) for name in inside]
    assert names(str(tmp_path)) == paths
    assert names(str(tmp_path / "*")) == paths
    assert names(paths[2], str(tmp_path / "[ab]*")) == [paths[2], *paths[:2]]
    assert names(str(tmp_path / "**/*.jsonl")) == [paths[1], str(tmp_path / "below/g.jsonl")]
    sources = find_sources([str(tmp_path)])
    assert [source.kind for source in sources] == "jsonl jsonl json csv parquet json".split()
    assert [source.behavior for source in sources] == list("abcdef")


def test_origin_counts_the_names_of_both_lists(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.jsonl", "one/b.jsonl", "c.jsonl", "held/d.jsonl", "held/e.csv")
    one, c, held = (str(tmp_path / name) for name in ("one", "c.jsonl", "held"))
    sources = find_sources([one, c], [held])
    assert [source.origin for source in sources] == [0, 0, 1, 2, 2]


def arrow_folder(folder: Path, splits: tuple[str, ...] = ()) -> Path:
    for name in splits or ("",):
        touch(folder, f"{name or '.'}/state.json", f"{name or '.'}/dataset_info.json")
    if splits:
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return folder


def test_arrow_folders_count_as_one_source_and_their_inside_as_none(tmp_path: Path) -> None:
    plain = arrow_folder(tmp_path / "plain")
    both = arrow_folder(tmp_path / "both", ("train", "test"))
    touch(tmp_path, "a.jsonl")
    file = str(tmp_path / "a.jsonl")
    wanted = [file, f"{both}[test]", str(plain)]
    assert names(str(tmp_path), dataset_split="test") == wanted
    assert names(str(tmp_path / "*"), dataset_split="test") == wanted
    assert names(str(tmp_path / "**"), dataset_split="test") == wanted
    assert names(str(both)) == [f"{both}[train]"]
    train, test = find_sources([str(both)], [str(both)])
    assert (train.split, test.split, train.origin, test.origin) == ("train", "test", 0, 1)
    assert train.behavior == test.behavior == "both"
    assert find_sources([str(plain)])[0].kind == "arrow"
    with pytest.raises(ValueError, match="different splits"):
        find_sources([str(both)], [str(both)], eval_dataset_split="train")
    with pytest.raises(ValueError, match="comes up twice"):
        find_sources([str(both), str(both / "train")])


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "sums.jsonl", "notes.txt", "deep/data/x.parquet")
    (tmp_path / "empty").mkdir()
    arrow = arrow_folder(tmp_path / "set")
    touch(arrow, "data-00000-of-00001.arrow")
    for name, message in (
        ("sum.jsonl", "no such file.*Did you mean 'sums.jsonl'"),
        ("empty", "holds no data file"),
        ("deep", "holds no data file.*subfolders 'data' do"),
        ("*.gz", "matches no data file.*0 other matches"),
        ("*.txt", "matches no data file.*1 other matches"),
        ("notes.txt", "expected a name that ends in .jsonl, .json or .csv"),
        ("set/data-00000-of-00001.arrow", f"Arrow data set that it is part of, name {arrow}"),
    ):
        with pytest.raises(ValueError, match=message):
            find_sources([str(tmp_path / name)])
    with pytest.raises(ValueError, match="dataset_name is empty"):
        find_sources([])
    with pytest.raises(ValueError, match="list of names"):
        find_sources("sums.jsonl")


def test_what_would_count_double_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "b.jsonl")
    file = str(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="comes up twice.*count double. Name it once"):
        find_sources([file, str(tmp_path / "*.jsonl")])
    with pytest.raises(ValueError, match="trained on and held out"):
        find_sources([file], [str(tmp_path)])
    touch(tmp_path, "a.parquet")
    for name in (str(tmp_path), str(tmp_path / "*")):
        with pytest.raises(ValueError, match="a.jsonl and .*a.parquet, which differ only in"):
            find_sources([name])
    assert names(file, str(tmp_path / "a.parquet"))  # named one by one, both are meant


def test_a_name_goes_to_the_hub_only_if_it_is_no_path_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(touch(tmp_path, "data/persona/a.jsonl"))
    (hub,) = find_sources(["user/some-set.v1"], dataset_split="train[:10]")
    assert (hub.kind, hub.name) == ("hub", "user/some-set.v1[train[:10]]")
    assert (hub.path, hub.behavior, hub.split) == ("user/some-set.v1", "some-set.v1", "train[:10]")
    (named,) = find_sources(["hf://datasets/data/persona"], dataset_config_name="en")
    assert (named.kind, named.path, named.config_name) == ("hub", "data/persona", "en")
    assert find_sources(["data/persona"])[0].kind == "jsonl"
    with pytest.raises(ValueError) as caught:
        find_sources(["data/persna"])  # the folder data is here: mistyped, most likely
    text = str(caught.value)
    assert "Did you mean 'persona'?" in text and "hf://datasets/data/persna" in text
    for name in ("persona", "./user/set", "/user/set", "user/set.jsonl", "a/b/c", "~/user"):
        with pytest.raises(ValueError, match="no such file, folder or pattern"):
            find_sources([name])
    with pytest.raises(ValueError, match="twice"):
        find_sources(["user/set", "hf://datasets/user/set"])
    splits = find_sources(["user/set"], ["user/set"])
    assert [source.split for source in splits] == ["train", "test"]
