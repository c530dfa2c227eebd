"""Another model as the reference: its numbers, the same tokens, and nothing of it left behind."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import loading, runfolder
from fastpref.config import Config
from fastpref.data.dataset import load_dataset
from fastpref.data.tokenize import TokenPair
from fastpref.loading import load_model
from fastpref.model import PairModel
from fastpref.refcache import with_reference
from fastpref.refmodel import find_reference
from fastpref.train import train


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Other weights and another architecture, the same tokenizer."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("other")
    own = json.loads((tiny_model_dir / "config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = hf.GPT2Config(
            vocab_size=own["vocab_size"], n_embd=32, n_layer=1, n_head=4, n_positions=256,
            bos_token_id=None, eos_token_id=own["eos_token_id"], initializer_range=0.2,
        )  # fmt: skip
        hf.GPT2LMHeadModel(config).save_pretrained(folder)
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def config(tiny_model_dir: Path, other_dir: Path, tiny_data: Path, tmp_path: Path) -> Config:
    return Config(
        model_name_or_path=str(tiny_model_dir),
        ref_model_name_or_path=str(other_dir),
        dataset_name=(str(tiny_data),),
        output_dir=str(tmp_path / "run"),
        ref_cache_dir=str(tmp_path / "cache"),
        max_length=96,
        train_batch_size=8,
        learning_rate=1e-3,
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        logging_steps=1,
    )


@pytest.fixture
def model(config: Config) -> PairModel:
    return load_model(config)


@pytest.fixture
def pairs(config: Config, model: PairModel) -> list[TokenPair]:
    return load_dataset(config, model.tokenizer).train


def values(pairs: list[TokenPair]) -> list[tuple[Any, Any]]:
    return [(p.ref_chosen, p.ref_rejected) for p in pairs]


def test_the_values_are_the_other_models_and_it_is_freed(
    config: Config,
    model: PairModel,
    pairs: list[TokenPair],
    other_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[Any] = []
    load = loading._load

    def noted(*given: Any) -> PairModel:
        loaded = load(*given)
        loaded.module.__dict__["itself"] = [loaded.module]  # as hooks do
        alive.append(weakref.ref(loaded.module))
        return loaded

    monkeypatch.setattr(loading, "_load", noted)
    gc.disable()
    try:
        found, name = find_reference(config, model, model.tokenizer, pairs, progress=False)
        assert [own() for own in alive] == [None]
    finally:
        gc.enable()
    other = load_model(dataclasses.replace(config, model_name_or_path=str(other_dir)))
    assert values(found.pairs) == values(
        with_reference(other, pairs, cache_dir=config.ref_cache_dir)
    )
    assert other.identity in name and model.identity not in name
    plain = dataclasses.replace(config, ref_model_name_or_path=None)
    own, own_name = find_reference(plain, model, model.tokenizer, pairs, progress=False)
    assert values(own.pairs) != values(found.pairs) and own_name == model.identity


def test_a_run_begins_away_from_its_reference_and_goes_on_with_the_same_one(
    config: Config, other_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(other_dir, other)
    config = dataclasses.replace(config, ref_model_name_or_path=str(other))
    run = train(dataclasses.replace(config, max_steps=2), progress=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0]["rewards/margins"]) > 1e-3 and lines[0]["step"] == 0
    file = other / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\0")
    with pytest.raises(
        ValueError, match="the reference or the model that training began from changed"
    ):
        train(config, progress=False)
    file.write_bytes(whole)
    train(config, progress=False)
    straight = dataclasses.replace(config, output_dir=str(tmp_path / "straight"))
    once = train(straight, progress=False)
    assert (once / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_another_tokenizer_is_refused(
    config: Config, model: PairModel, pairs: list[TokenPair], other_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(other_dir, folder)
    changed = dataclasses.replace(config, ref_model_name_or_path=str(folder))
    file = folder / "tokenizer.json"
    rules = json.loads(file.read_text())
    words = rules["model"]["vocab"]
    used = model.tokenizer.convert_ids_to_tokens(int(pairs[0].prompt[0]))
    free = next(w for w in words if w not in ("<|end|>", used))
    words[used], words[free] = words[free], words[used]
    file.write_text(json.dumps(rules))
    with pytest.raises(ValueError, match=f"token id .* of the data is .* and {used!r} to model_na"):
        find_reference(changed, model, model.tokenizer, pairs)


def test_a_smaller_vocabulary_is_refused(
    config: Config, model: PairModel, pairs: list[TokenPair], other_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    other = load_model(dataclasses.replace(config, model_name_or_path=str(other_dir)))
    other.module.resize_token_embeddings(90)  # type: ignore[operator]
    other.module.save_pretrained(folder)  # type: ignore[operator]
    other.tokenizer.save_pretrained(folder)
    changed = dataclasses.replace(config, ref_model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="this model has ids up to 89: it has another tokenizer"):
        find_reference(changed, model, model.tokenizer, pairs)


def test_a_reference_that_packing_would_get_wrong_is_refused(
    config: Config, model: PairModel, pairs: list[TokenPair], tiny_model_dir: Path, tmp_path: Path
) -> None:
    import transformers as hf

    folder = tmp_path / "other"
    bloom = hf.BloomConfig(vocab_size=600, hidden_size=32, n_layer=1, n_head=4)
    hf.BloomForCausalLM(bloom).save_pretrained(folder)
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    changed = dataclasses.replace(config, ref_model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="^ref_model_name_or_path=.*: BloomForCausalLM .bloom. "):
        find_reference(changed, model, model.tokenizer, pairs)
    short = hf.LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=40,
    )  # fmt: skip
    hf.LlamaForCausalLM(short).save_pretrained(folder)
    with pytest.raises(ValueError, match="^ref_model_name_or_path=.*: max_length=96 is more than"):
        find_reference(changed, model, model.tokenizer, pairs)
    short.max_position_embeddings = 256
    own = hf.LlamaForCausalLM(short)
    own.lm_head.weight.data[7] = torch.nan
    own.save_pretrained(folder)
    with pytest.raises(ValueError, match="^ref_model_name_or_path=.*not finite"):
        find_reference(changed, model, model.tokenizer, pairs)
    missing = dataclasses.replace(config, ref_model_name_or_path=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="ref_model_name_or_path='.*none' cannot be loaded"):
        find_reference(missing, model, model.tokenizer, pairs)


def test_a_reference_among_the_files_of_the_run_is_refused(config: Config) -> None:
    inside = f"{config.output_dir}/checkpoint-3"
    with pytest.raises(ValueError, match="among the files of a run.*the reference that it starts"):
        runfolder.check(dataclasses.replace(config, ref_model_name_or_path=inside))


def test_the_command_does_not_load_a_model_that_is_not_the_reference(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastpref.cli import main

    def unwanted(*_: Any) -> None:
        raise AssertionError("the policy is not needed")

    monkeypatch.setattr(loading, "load_model", unwanted)
    names = ("model_name_or_path", "ref_model_name_or_path", "ref_cache_dir", "max_length")
    words = [word for name in names for word in (f"--{name}", str(getattr(config, name)))]
    assert main(["refcache", *words, "--dataset_name", *config.dataset_name]) == 0
    assert "computed now" in capsys.readouterr().out
