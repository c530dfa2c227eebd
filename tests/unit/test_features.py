"""The cached states: which change makes new ones, which must not, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpref import features as under_test
from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.features import Features, body_identity, feature_key, with_features
from fastpref.head import freeze_body
from fastpref.loading import load_model
from fastpref.model import PairModel
from fastpref.refcache import reference_logp, reference_plan, with_reference


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path, tiny_data: Path) -> Config:
    return Config(
        model_name_or_path=str(tiny_model_dir), dataset_name=(str(tiny_data),), max_length=96
    )


@pytest.fixture(scope="module")
def model(config: Config) -> PairModel:
    return freeze_body(load_model(config))


@pytest.fixture(scope="module")
def pairs(config: Config, model: PairModel) -> list[TokenPair]:
    return load_dataset(config, model.tokenizer).train


def make(model: PairModel, pairs: list[TokenPair], folder: Path, **options: Any) -> Features:
    return with_features(model, pairs, cache_dir=str(folder), progress=False, **options)


def the_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    assert file.suffix == ".npy"
    return file


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_states_and_reference_are_the_bits_of_a_pass_of_the_body(
    config: Config, pairs: list[TokenPair], tmp_path: Path, dtype: str
) -> None:
    model = load_model(dataclasses.replace(config, dtype=dtype))
    features = make(model, pairs, tmp_path)
    assert isinstance(features.table, np.memmap) and features.table.dtype == dtype
    with torch.no_grad():
        for own in reference_plan(pairs):
            batch = pack_pairs([pairs[i] for i in own])
            ours = features.pack([pairs[i] for i in own])
            assert ours.hidden is not None
            assert torch.equal(ours.hidden[ours.rows], model.hidden(batch)[batch.rows])
    # One contract of the reference cache, whoever made it.
    by_body = reference_logp(model, pairs)
    assert by_body.dtype == dtype
    assert np.array_equal(by_body, reference_logp(model, pairs, pack=features.pack))
    one, other = (
        with_reference(model, pairs, cache_dir=str(tmp_path / name), pack=pack)
        for name, pack in (("body", pack_pairs), ("states", features.pack))
    )
    files = [next((tmp_path / name).iterdir()) for name in ("body", "states")]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()
    assert [p.ref_chosen for p in one] == [p.ref_chosen for p in other]


def test_warm_equals_cold_bit_for_bit_in_any_order(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = make(model, pairs, tmp_path / "a")
    make(model, pairs[::-1], tmp_path / "b")
    one, other = the_file(tmp_path / "a"), the_file(tmp_path / "b")
    assert one.name == other.name and one.read_bytes() == other.read_bytes()
    monkeypatch.setattr(under_test, "_write", lambda *_: pytest.fail("computed again"))
    warm = make(model, pairs[::-1], tmp_path / "a")
    some = pairs[3:9]
    a, b = cold.pack(some).hidden, warm.pack(some).hidden
    assert a is not None and b is not None and torch.equal(a, b)


def test_what_is_in_the_key(
    config: Config, model: PairModel, pairs: list[TokenPair], tmp_path: Path
) -> None:
    key = feature_key(model, pairs)

    def key_of(**changes: Any) -> str:
        changed = dataclasses.replace(config, **changes)
        other = load_model(changed)
        return feature_key(other, load_dataset(changed, other.tokenizer).train)

    for same in (
        {"learning_rate": 1.0, "optim": "sgd"},
        {"train_batch_size": 3, "max_tokens_per_microbatch": 999, "trainable": "head"},
        {"beta": 0.7, "loss_type": "ipo", "stratify": True, "num_train_epochs": 3.0},
    ):
        assert key_of(**same) == key, same
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert feature_key(model, pairs[::-1]) == key
    torch.set_num_threads(threads)
    for differs in ({"append_eos": "false"}, {"dtype": "bfloat16"}, {"max_length": 30}):
        assert key_of(**differs) != key, differs
    assert feature_key(model, pairs[1:]) != key

    def key_of_weights(name: str) -> str:
        loaded = load_model(config)
        with torch.no_grad():
            loaded.module.get_parameter(name)[0, 0] += 1e-3
        folder = tmp_path / name
        loaded.module.save_pretrained(folder)  # type: ignore[operator]
        loaded.tokenizer.save_pretrained(folder)
        return key_of(model_name_or_path=str(folder))

    assert key_of_weights("lm_head.weight") == key  # another head over the same body
    assert key_of_weights("model.layers.1.mlp.up_proj.weight") != key
    folder = tmp_path / "rope"
    shutil.copytree(config.model_name_or_path, folder)
    text = (folder / "config.json").read_text()
    assert text.count('"rms_norm_eps": 1e-06') == 1
    (folder / "config.json").write_text(
        text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1')
    )
    assert key_of(model_name_or_path=str(folder)) != key


def test_an_untied_head_keeps_the_body_s_name(tiny_model_dir: Path, config: Config) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=True)
    tied = dataclasses.replace(load_model(config), module=LlamaForCausalLM(llama))
    before = body_identity(tied)
    assert body_identity(freeze_body(tied)) == before


def test_what_is_not_whole_is_refused(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path
) -> None:
    features = make(model, pairs, tmp_path)
    file, shape = the_file(tmp_path), features.table.shape
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"not an array" * 20):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read: .*Remove the file"):
            make(model, pairs, tmp_path)
    np.save(file, np.zeros((shape[0] - 1, shape[1]), np.float32))
    with pytest.raises(
        ValueError, match=rf"expected \({shape[0]}, 32\) float32, got \({shape[0] - 1}"
    ):
        make(model, pairs, tmp_path)
    np.save(file, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        make(model, pairs, tmp_path)
    # Headers that NumPy's parser and mmap meet with errors of many kinds; other kinds of files.
    broken = [whole.replace(b"'shape': (", own, 1) for own in (b"'shape': ((", b"'shape': (0")]
    for damaged in (*broken, whole.replace(b"(", b"{", 1), b"PK\x03\x04" + whole):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read: .*Remove the file"):
            make(model, pairs, tmp_path)
    file.write_bytes(whole + b"0")
    with pytest.raises(ValueError, match=rf"expected {len(whole)} bytes, got {len(whole) + 1}\."):
        make(model, pairs, tmp_path)
    np.save(file, np.asfortranarray(np.load(file)))
    with pytest.raises(ValueError, match="column by column"):
        make(model, pairs, tmp_path)


def test_states_of_another_body_are_refused(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path
) -> None:
    table = make(model, pairs, tmp_path).table
    file = the_file(tmp_path)
    np.save(file, np.asarray(table) * np.float32(1.01))
    with pytest.raises(ValueError, match=r"pair_id \d+ differ from the model's by 0.01"):
        make(model, pairs, tmp_path)
    np.save(file, np.full_like(table, np.nan))
    with pytest.raises(ValueError, match="differ from the model's by nan"):
        make(model, pairs, tmp_path)
    make(model, pairs, tmp_path, check_pairs=0)


def test_a_disk_without_room_is_told_before_anything_is_computed(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(under_test.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(under_test, "body_states", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"take [\d.]+ KiB .*has 1e\+03 B free|has 1000 B free"):
        make(model, pairs, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: .*Set feature_cache_dir"):
        make(model, pairs, tmp_path / "file" / "folder")


def test_states_that_are_not_finite_name_the_pair(
    config: Config, pairs: list[TokenPair], tmp_path: Path
) -> None:
    model = load_model(config)
    token = int(pairs[5].prompt[3])
    users = {p.pair_id for p in pairs if token in (*p.prompt, *p.chosen[:-1], *p.rejected[:-1])}
    with torch.no_grad():
        model.module.get_input_embeddings().weight[token] = torch.inf  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"pair_id (\d+) are not finite") as refused:
        make(model, pairs, tmp_path)
    assert int(str(refused.value).split("pair_id ")[1].split()[0]) in users
    assert not list(tmp_path.iterdir())


def in_a_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; its pid. It must not compute with torch."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_while_writing_leaves_nothing_that_counts(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(model, pairs, tmp_path / "whole")
    folder, key = tmp_path / "killed", feature_key(model, pairs)
    partial = folder / f".{key}.npy.partial"

    def hang() -> None:
        def wrong(*_: Any) -> Any:
            yield np.full(20000, 7.0, np.float32)
            time.sleep(60)

        batches = wrong()
        monkeypatch.setattr(under_test, "body_states", lambda *_: next(batches))
        monkeypatch.setattr(under_test, "reference_plan", two_batches)
        make(model, pairs, folder)

    child = in_a_child(hang)
    wait_for(partial)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert [f.name for f in folder.iterdir()] == [partial.name]
    make(model, pairs, folder)
    assert the_file(folder).read_bytes() == the_file(tmp_path / "whole").read_bytes()


def two_batches(pairs: list[TokenPair]) -> list[np.ndarray]:
    return np.array_split(np.concatenate(reference_plan(pairs)), 2)


def test_a_second_process_waits_and_takes_what_the_first_made(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(model, pairs, tmp_path / "whole")
    states, folder, began = np.array(whole.table), tmp_path / "shared", tmp_path / "began"

    def slow() -> None:
        def body_states(*_: Any) -> np.ndarray:
            began.write_text("holding the lock")
            time.sleep(0.5)
            return states

        monkeypatch.setattr(under_test, "body_states", body_states)
        make(model, pairs, folder, check_pairs=0)
        os._exit(0)

    child = in_a_child(slow)
    wait_for(began)
    monkeypatch.setattr(under_test, "body_states", lambda *_: pytest.fail("computed again"))
    ours = make(model, pairs, folder, check_pairs=0)
    assert os.waitpid(child, 0)[1] == 0
    assert [f.suffix for f in folder.iterdir()] == [".npy"]
    assert np.array_equal(ours.table, states)
