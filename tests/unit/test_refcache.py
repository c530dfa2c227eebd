"""The reference cache: which change makes a new one, which must not, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastpref_kernels import linear_logprob

from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel, load_model
from fastpref.refcache import cache_key, reference_logp, reference_plan, with_reference


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


def test_what_is_in_the_key(
    config: Config, model: PairModel, pairs: list[TokenPair], tiny_model_dir: Path, tmp_path: Path
) -> None:
    key = cache_key(model, pairs)

    def key_of(**changes: Any) -> str:
        changed = dataclasses.replace(config, **changes)
        other = load_model(changed)
        return cache_key(other, load_dataset(changed, other.tokenizer).train)

    for same in (
        {"learning_rate": 1.0},
        {"train_batch_size": 3, "max_tokens_per_microbatch": 999},
        {"beta": 0.7, "loss_type": "ipo"},
        {"shuffle": False, "stratify": True, "num_train_epochs": 3.0},
    ):
        assert key_of(**same) == key, same
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert cache_key(model, pairs[::-1]) == key
    torch.set_num_threads(threads)

    assert len({key, *(cache_key(model, pairs, alpha) for alpha in (0.0, 0.3, 1.0))}) == 4
    for differs in ({"append_eos": "false"}, {"dtype": "bfloat16"}, {"max_length": 30}):
        assert key_of(**differs) != key, differs
    other_weights = tmp_path / "other"
    model.module.save_pretrained(other_weights)  # type: ignore[operator]
    model.tokenizer.save_pretrained(other_weights)
    file = other_weights / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert key_of(model_name_or_path=str(other_weights)) != key
    assert cache_key(model, pairs[1:]) != key


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
