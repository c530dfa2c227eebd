"""The reference cache: which change makes a new one, which must not, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastpref_kernels import linear_logprob

from fastpref import refcache
from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TRUNCATION_MODES, TokenPair
from fastpref.loading import load_model
from fastpref.model import PairModel
from fastpref.refcache import (
    cache_key,
    look_up,
    reference_key,
    reference_logp,
    reference_plan,
    with_reference,
)
from fastpref.reffile import COLUMNS, read_logp, remove_leftovers, write_logp


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path, tiny_data: Path) -> Config:
    return Config(
        model_name_or_path=str(tiny_model_dir), dataset_name=(str(tiny_data),), max_length=96
    )


@pytest.fixture(scope="module")
def model(config: Config) -> PairModel:
    return load_model(config)


@pytest.fixture(scope="module")
def pairs(config: Config, model: PairModel) -> list[TokenPair]:
    return load_dataset(config, model.tokenizer).train


def values(pairs: list[TokenPair]) -> list[tuple[Any, Any]]:
    return [(p.ref_chosen, p.ref_rejected) for p in pairs]


def test_values_are_the_models(model: PairModel, pairs: list[TokenPair], tmp_path: Path) -> None:
    cached = with_reference(model, pairs, cache_dir=str(tmp_path))
    with torch.no_grad():
        for pair in cached[::7]:
            shared, chosen, rejected = model.logp(pack_pairs([pair])).logp
            assert pair.ref_chosen == pytest.approx((shared + chosen).item(), rel=1e-5)
            assert pair.ref_rejected == pytest.approx((shared + rejected).item(), rel=1e-5)


def test_weighted_values_are_the_weighted_sums(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path
) -> None:
    """Under ld_alpha; row by row, and in a file of their own."""
    plain = with_reference(model, pairs, cache_dir=str(tmp_path))
    weighted = with_reference(model, pairs, cache_dir=str(tmp_path), ld_alpha=0.25)
    again = with_reference(model, pairs, cache_dir=str(tmp_path), ld_alpha=0.25)
    assert values(again) == values(weighted) and len(list(tmp_path.iterdir())) == 2
    differ = 0
    for before, pair in zip(plain[::7], weighted[::7], strict=True):
        batch = pack_pairs([pair])
        with torch.no_grad():
            hidden = model.hidden(batch).index_select(0, batch.rows)
            rows = linear_logprob(hidden, model.head.weight, batch.target).logp
        shorter = min(len(pair.chosen), len(pair.rejected))
        for own, value in ((1, pair.ref_chosen), (2, pair.ref_rejected)):
            mine = rows[(batch.segment_id == 0) | (batch.segment_id == own)]
            expected = (mine[:shorter].sum() + 0.25 * mine[shorter:].sum()).item()
            assert value == pytest.approx(expected, rel=1e-5)
        differ += values([before]) != values([pair])
    assert differ
    with pytest.raises(ValueError, match="brings reference log-probs.*ld_alpha weighs"):
        with_reference(model, plain, cache_dir=str(tmp_path), ld_alpha=0.25)


def test_warm_equals_cold_bit_for_bit_in_any_order(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path
) -> None:
    cold = with_reference(model, pairs, cache_dir=str(tmp_path / "a"))
    warm = with_reference(model, pairs, cache_dir=str(tmp_path / "a"))
    shuffled = with_reference(model, pairs[::-1], cache_dir=str(tmp_path / "b"))
    assert values(cold) == values(warm) == values(shuffled[::-1])
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_the_plan_does_not_depend_on_the_order(pairs: list[TokenPair]) -> None:
    backwards = pairs[::-1]
    plans = [
        [[given[i].pair_id for i in own] for own in reference_plan(given)]
        for given in (pairs, backwards)
    ]
    assert plans[0] == plans[1]
    assert sorted(i for own in plans[0] for i in own) == sorted(p.pair_id for p in pairs)


KEPT: list[dict[str, Any]] = [
    {"learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "cosine", "weight_decay": 0.1},
    {"train_batch_size": 3, "max_tokens_per_microbatch": 999},
    {"beta": 0.7, "loss_type": "ipo"},
    {"shuffle": False, "stratify": True, "num_train_epochs": 3.0},
    {"eval_fraction": 0.5, "seed": 7},
    {"flip_behaviors": ("agrees",)},
    {"output_dir": "elsewhere", "track": "none", "record": False, "logging_steps": 1},
    {"device": "cpu"},
]
CHANGED: list[dict[str, Any]] = [
    {"append_eos": "false"},
    {"dtype": "bfloat16"},
    {"dtype": "float64"},
    {"max_length": 30},
    {"ld_alpha": 0.3},
    {"ld_alpha": 1.0},
]


def key_of(config: Config, **changes: Any) -> str:
    changed = dataclasses.replace(config, **changes)
    model = load_model(changed)
    dataset = load_dataset(changed, model.tokenizer)
    return reference_key(model, dataset.train + dataset.held_out, changed.ld_alpha)


@pytest.fixture(scope="module")
def key(config: Config) -> str:
    return key_of(config)


@pytest.mark.parametrize("same", KEPT, ids=lambda change: "-".join(change))
def test_what_is_not_in_the_key(config: Config, key: str, same: dict[str, Any]) -> None:
    assert key_of(config, **same) == key


@pytest.mark.parametrize("change", CHANGED, ids=str)
def test_what_is_in_the_key(config: Config, key: str, change: dict[str, Any]) -> None:
    assert key_of(config, **change) != key


def test_neither_threads_nor_order_nor_folder_are_in_the_key(
    config: Config, key: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert key_of(config, model_name_or_path=str(tmp_path / "copy")) == key
    torch.set_num_threads(threads)
    model = load_model(config)
    dataset = load_dataset(config, model.tokenizer)
    assert reference_key(model, (dataset.held_out + dataset.train)[::-1]) == key


def test_weights_and_tokenizer_are_in_the_key(
    config: Config, key: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "weights")
    file = tmp_path / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert key_of(config, model_name_or_path=str(tmp_path / "weights")) != key

    shutil.copytree(tiny_model_dir, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    rules = json.loads(file.read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:50]
    file.write_text(json.dumps(rules))
    assert key_of(config, model_name_or_path=str(tmp_path / "tokenizer")) != key


def test_the_chat_template_is_in_the_key(config: Config, tmp_path: Path) -> None:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": turn("user", f"Do you like music ({n})?"),
            "chosen": turn("assistant", " Yes"),
            "rejected": turn("assistant", " No"),
        }
        for n in range(6)
    ]
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }} {% endfor %}"
    talks = dataclasses.replace(config, dataset_name=(str(file),), chat_template=template)
    key = key_of(talks)
    (tmp_path / "template.jinja").write_text(template)
    assert key_of(talks, chat_template=str(tmp_path / "template.jinja")) == key
    assert key_of(talks, chat_template=template.replace(":", ": ")) != key


def test_how_is_cut_is_in_the_key(config: Config) -> None:
    """And a way to cut that cuts nothing is not."""
    assert key_of(config, truncation_mode="keep_completion") == key_of(config)
    cut = [key_of(config, max_length=30, truncation_mode=mode) for mode in TRUNCATION_MODES]
    assert len(set(cut)) == len(cut)


def test_a_changed_text_or_pair_id_is_in_the_key(model: PairModel, pairs: list[TokenPair]) -> None:
    key = reference_key(model, pairs)
    first = pairs[0]
    ids = first.prompt.copy()
    ids[0] += 1
    for other in (
        dataclasses.replace(first, prompt=ids),
        dataclasses.replace(first, pair_id=1),
        dataclasses.replace(first, prompt=first.prompt[:-1], chosen=np.r_[ids[-1:], first.chosen]),
    ):
        assert reference_key(model, [other, *pairs[1:]]) != key
    assert reference_key(model, pairs[1:]) != key
    same = dataclasses.replace(first, behavior=9, label="other", truncated=True)
    assert reference_key(model, [same, *pairs[1:]]) == key
    exchanged = dataclasses.replace(first, chosen=first.rejected, rejected=first.chosen)
    assert reference_key(model, [exchanged, *pairs[1:]]) != key
    flipped = dataclasses.replace(exchanged, flipped=True)
    assert reference_key(model, [flipped, *pairs[1:]]) == key


def test_incomplete_or_unreadable_is_refused(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path
) -> None:
    with_reference(model, pairs, cache_dir=str(tmp_path))
    (file,) = tmp_path.iterdir()
    whole = pq.read_table(file)
    pq.write_table(whole.slice(1), file)
    lost = whole["pair_id"][0].as_py()
    with pytest.raises(ValueError, match=f"lacks 1 of {len(pairs)} pairs.*{lost}"):
        with_reference(model, pairs, cache_dir=str(tmp_path))
    pq.write_table(whole.slice(0, 0), file)
    with pytest.raises(ValueError, match=f"lacks {len(pairs)} of"):
        with_reference(model, pairs, cache_dir=str(tmp_path))
    infinite = pa.array([-np.inf] + [-1.0] * (len(pairs) - 1), pa.float32())
    pq.write_table(whole.set_column(1, "ref_chosen", infinite), file)
    with pytest.raises(ValueError, match="not finite"):
        with_reference(model, pairs, cache_dir=str(tmp_path), check_pairs=0)
    pq.write_table(whole, file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        with_reference(model, pairs, cache_dir=str(tmp_path))
    pq.write_table(whole.drop_columns(["ref_chosen"]), file)
    with pytest.raises(ValueError, match="cannot be read.*ref_chosen"):
        with_reference(model, pairs, cache_dir=str(tmp_path))
    for place, kind in ((0, pa.string()), (1, pa.string())):  # as other programs may write them
        changed = whole.set_column(place, COLUMNS[place], whole[COLUMNS[place]].cast(kind))
        pq.write_table(changed, file)
        with pytest.raises(ValueError, match="cannot be read.*string.*not an int64 and two floats"):
            with_reference(model, pairs, cache_dir=str(tmp_path))
        partial = file.with_name(f".{file.stem}.partial-1-7.parquet")
        file.rename(partial)
        assert look_up(model, pairs, cache_dir=str(tmp_path)).computed and not partial.exists()


def test_a_changed_bit_is_seen(tmp_path: Path) -> None:
    """Also where the number stays a finite one, which the spot check would rarely meet."""
    path, ids = tmp_path / "x.parquet", np.arange(50)
    logp = -np.arange(1.0, 101.0, dtype=np.float32).reshape(50, 2)
    write_logp(path, ids, logp, {})
    whole = path.read_bytes()
    wrong = 0
    for place in range(4, len(whole) - 8, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            wrong += not np.array_equal(read_logp(path, ids), logp)
        except ValueError as error:
            assert "Remove the file" in str(error)
    assert wrong == 0


def test_processes_of_one_number_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers have the same process ids: what one writes aside is not the other's."""
    path, ids, logp = tmp_path / "x.parquet", np.arange(3), np.full((3, 2), -1.0, np.float32)
    write, inside = pq.write_table, [False, True]

    def meanwhile(*given: Any, **named: Any) -> None:
        write(*given, **named)
        if inside.pop():
            write_logp(path, ids, logp, {})

    monkeypatch.setattr(pq, "write_table", meanwhile)
    write_logp(path, ids, logp, {})
    assert not inside and list(tmp_path.iterdir()) == [path]
    assert np.array_equal(read_logp(path, ids), logp)


def test_values_of_another_model_are_refused(
    config: Config, model: PairModel, pairs: list[TokenPair], tmp_path: Path
) -> None:
    with_reference(model, pairs, cache_dir=str(tmp_path))
    other = load_model(config)
    with torch.no_grad():
        other.head.weight.mul_(1.05)
    with pytest.raises(ValueError, match="but the model gives"):
        with_reference(other, pairs, cache_dir=str(tmp_path), check_pairs=4)
    unchecked = with_reference(other, pairs, cache_dir=str(tmp_path), check_pairs=0)
    assert np.isfinite(values(unchecked)).all()


def test_values_that_the_data_brings_are_kept(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path
) -> None:
    own = [dataclasses.replace(p, ref_chosen=-1.0, ref_rejected=-2.0) for p in pairs[:3]]
    assert values(with_reference(model, own, cache_dir=str(tmp_path))) == [(-1.0, -2.0)] * 3
    assert not list(tmp_path.iterdir())
    mixed = with_reference(model, own + pairs[3:], cache_dir=str(tmp_path))
    assert values(mixed[:3]) == [(-1.0, -2.0)] * 3
    expected = reference_logp(model, pairs[3:])
    assert np.array_equal(np.array(values(mixed[3:]), np.float32), expected)


def test_flipped_pairs_find_the_same_values_on_the_other_side(
    config: Config, model: PairModel, pairs: list[TokenPair], tmp_path: Path
) -> None:
    """Bit for bit, whichever of the two runs was first; and no pass of its own for the second."""
    changed = dataclasses.replace(config, flip_behaviors=("agrees",))
    flipped = load_dataset(changed, model.tokenizer).train
    assert cache_key(model, flipped) != cache_key(model, pairs)
    for first, second, folder in ((pairs, flipped, "a"), (flipped, pairs, "b")):
        look_up(model, first, cache_dir=str(tmp_path / folder))
        assert not look_up(model, second, cache_dir=str(tmp_path / folder)).computed
    mine = {p.pair_id: p for p in with_reference(model, pairs, cache_dir=str(tmp_path / "a"))}
    theirs = with_reference(model, flipped, cache_dir=str(tmp_path / "b"))
    exchanged = 0
    for pair in theirs:
        twin = mine[pair.pair_id]
        both = (twin.ref_chosen, twin.ref_rejected)
        if not np.array_equal(twin.chosen, pair.chosen):
            both, exchanged = both[::-1], exchanged + 1
        assert (pair.ref_chosen, pair.ref_rejected) == both
    assert 0 < exchanged < len(theirs)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of every forward."""
    seen: list[int] = []
    hidden = PairModel.hidden

    def counted(self: PairModel, batch: PairBatch, **asked: bool) -> torch.Tensor:
        seen.append(batch.num_pairs)
        return hidden(self, batch, **asked)

    monkeypatch.setattr(PairModel, "hidden", counted)
    return seen


def test_a_second_run_computes_nothing_but_the_spot_check(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path, forwards: list[int]
) -> None:
    first = look_up(model, pairs, cache_dir=str(tmp_path))
    assert first.computed and sum(forwards) == len(pairs)
    forwards.clear()
    second = look_up(model, pairs[::-1], cache_dir=str(tmp_path), check_pairs=5)
    assert not second.computed and sum(forwards) == 5
    forwards.clear()
    look_up(model, pairs, cache_dir=str(tmp_path), check_pairs=0)
    assert not forwards
    assert "computed now" in str(first) and "nothing computed" in str(second)
    assert str(first.path) in str(second) and first.path and first.path.stem in str(second)


def test_a_killed_pass_goes_on_where_it_stood(
    model: PairModel,
    pairs: list[TokenPair],
    tmp_path: Path,
    forwards: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refcache, "PLAN_TOKENS", 200)
    whole = with_reference(model, pairs, cache_dir=str(tmp_path / "whole"))
    batches, logp = len(forwards), PairModel.logp
    assert batches > 8
    forwards.clear()
    monkeypatch.setattr(refcache, "SAVE_SECONDS", 0.0)

    def killed(self: PairModel, batch: PairBatch, *given: Any) -> Any:
        if len(forwards) == 5:
            raise KeyboardInterrupt
        return logp(self, batch, *given)

    monkeypatch.setattr(PairModel, "logp", killed)
    with pytest.raises(KeyboardInterrupt):
        with_reference(model, pairs, cache_dir=str(tmp_path / "cut"))
    (partial,) = (tmp_path / "cut").iterdir()
    (tmp_path / "cut" / partial.name.replace("partial-0-", "partial-1-")).write_bytes(b"half")
    monkeypatch.setattr(PairModel, "logp", logp)
    forwards.clear()
    again = look_up(model, pairs, cache_dir=str(tmp_path / "cut"))
    assert again.computed and len(forwards) == batches - 5
    assert values(again.pairs) == values(whole)
    assert list((tmp_path / "cut").iterdir()) == [again.path]


def test_ranks_share_the_pass(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank computes its own batches, together all of them, and not a bit changes."""
    monkeypatch.setattr(refcache, "PLAN_TOKENS", 200)
    whole = reference_logp(model, pairs)
    shares: list[np.ndarray] = []
    monkeypatch.setattr(refcache, "_summed", lambda values, device: shares.append(values) or values)
    monkeypatch.setattr(refcache, "_demand_finite", lambda *_: None)
    monkeypatch.setattr(refcache.dist, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(refcache.dist, "rank", lambda rank=rank: rank)
        reference_logp(model, pairs, partial=tmp_path / "x.parquet")
    assert np.array_equal(sum(shares), whole)
    assert [0 < (share != 0).any(axis=1).sum() < len(pairs) for share in shares] == [True] * 3


def test_killed_while_writing_leaves_nothing_that_counts(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        os.link(source, str(source) + "9")  # as if the process had not tidied up
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        with_reference(model, pairs, cache_dir=str(tmp_path))
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(os, "replace", replace)
    found = look_up(model, pairs, cache_dir=str(tmp_path))
    assert found.computed and left.exists()  # another process may still be writing it
    os.utime(left, (0, 0))
    remove_leftovers(found.path or tmp_path)
    assert list(tmp_path.iterdir()) == [found.path]


def test_two_processes_at_once(model: PairModel, pairs: list[TokenPair], tmp_path: Path) -> None:
    """Both compute, both write the same file, neither sees half of the other's."""
    folders = [str(tmp_path / str(n)) for n in range(5)]
    started = [os.fork(), 0]
    if started[0]:
        started[1] = os.fork()
    if all(started):
        assert [os.waitpid(child, 0)[1] for child in started] == [0, 0]
        for folder in folders:
            found = look_up(model, pairs, cache_dir=folder)
            assert not found.computed and list(Path(folder).iterdir()) == [found.path]
        return
    code = 1
    try:
        torch.set_num_threads(1)  # a fork has none of its parent's other threads
        for folder in folders:
            look_up(model, pairs, cache_dir=folder, progress=False)
        code = 0
    finally:
        os._exit(code)


def test_a_folder_that_cannot_be_written_is_found_before_the_pass(
    model: PairModel, pairs: list[TokenPair], tmp_path: Path, forwards: list[int]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be kept in .*Set ref_cache_dir"):
        with_reference(model, pairs, cache_dir=str(tmp_path / "file"))
    assert not forwards


def test_numbers_that_are_not_finite_are_not_kept(
    config: Config, pairs: list[TokenPair], tmp_path: Path
) -> None:
    other = load_model(config)
    with torch.no_grad():
        other.head.weight[0] = torch.inf
    with pytest.raises(ValueError, match=f"of {len(pairs)} pairs.*not finite"):
        with_reference(other, pairs, cache_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


# Of training alone, which plans.
LEFT = ("--max_tokens_per_microbatch", "0", "--gradient_checkpointing", "auto")


def test_the_command(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], forwards: list[int]
) -> None:
    from fastpref.cli import main

    words = ["refcache", "--model_name_or_path", config.model_name_or_path]
    words += ["--dataset_name", *config.dataset_name, "--max_length", "96"]
    words += ["--ref_cache_dir", str(tmp_path)]
    assert main(words) == 0
    first = capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    for said in ("80 pairs have", "computed now", f"key  {file.stem}", f"file {file}"):
        assert said in first
    assert main([*words, "--learning_rate", "1", "--ref_check_pairs", "0", *LEFT]) == 0
    assert capsys.readouterr().out == first.replace(
        "computed now", "found in the cache, nothing computed"
    )
