"""Models as they lie on disks and on the Hub: loaded as they are, or refused with a remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config
from fastpref.loading import load_model, load_tokenizer
from fastpref.model import PairModel
from fastpref.weights import Source
from tests.architectures import PAIRS, V


def load(folder: Path, **changes: Any) -> PairModel:
    return load_model(Config(model_name_or_path=str(folder), max_length=64, **changes))


def logits(model: PairModel) -> torch.Tensor:
    with torch.no_grad(), model.plain_attention():
        return model.module(input_ids=torch.arange(20)[None]).logits


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> PairModel:
    return load(tiny_model_dir)


def test_shards(plain: PairModel, tmp_path: Path) -> None:
    plain.module.save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]
    plain.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    sharded = load(tmp_path)
    assert torch.equal(logits(sharded), logits(plain))
    assert sharded.identity.startswith("sha256:") and sharded.identity == load(tmp_path).identity
    next(tmp_path.glob("model-00002*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be loaded.*model-00002"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_disk(
    dtype: torch.dtype, tiny_model_dir: Path, plain: PairModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype).save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    half = load(tmp_path)
    assert {p.dtype for p in half.module.parameters()} == {torch.float32}
    wide = [p.to(dtype).float() for p in plain.module.parameters()]
    for own, other in zip(half.module.parameters(), wide, strict=True):
        assert torch.equal(own, other)
    assert {p.dtype for p in load(tmp_path, dtype="float64").module.parameters()} == {torch.float64}


def test_a_vocabulary_padded_beyond_the_tokenizer(
    tiny_model_dir: Path, plain: PairModel, tmp_path: Path
) -> None:
    from fastpref.selfcheck import check_model

    module = load(tiny_model_dir).module
    more = len(plain.tokenizer) + 37
    module.resize_token_embeddings(more)  # type: ignore[operator]
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    plain.tokenizer.save_pretrained(tmp_path)
    padded = load(tmp_path)
    assert len(padded.head.weight) == more > len(padded.tokenizer)
    assert max(int(p.prompt.max()) for p in PAIRS) < V < len(plain.tokenizer)
    assert check_model(padded, PAIRS) < 1e-4


def test_no_padding_token_is_needed(tiny_model_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    from fastpref.data.dataset import load_dataset

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            settings.pop("pad_token", None)
            settings.pop("pad_token_id", None)
            (folder / name).write_text(json.dumps(settings))
    config = Config(model_name_or_path=str(folder), dataset_name=(str(tiny_data),), max_length=96)
    tokenizer = load_tokenizer(config)
    assert tokenizer.pad_token is None
    with_padding = load_tokenizer(Config(model_name_or_path=str(tiny_model_dir)))
    ours, theirs = (load_dataset(config, t).train for t in (tokenizer, with_padding))
    assert [p.chosen.tolist() for p in ours] == [p.chosen.tolist() for p in theirs]
    load_model(config, tokenizer)


def test_odd_generation_settings_do_not_stop_a_run_at_its_first_checkpoint(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    load(folder).module.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    settings.write_text(json.dumps({"max_new_tokens": -3}))
    with pytest.raises(ValueError, match="cannot be loaded: `max_new_tokens` must be greater"):
        load(folder)


@pytest.fixture
def hub(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache of the Hub with two commits of org/tiny, main being the second."""
    from huggingface_hub import constants

    commits = ["a" * 40, "b" * 40]
    root = tmp_path / "models--org--tiny"
    for commit in commits:
        shutil.copytree(tiny_model_dir, root / "snapshots" / commit)
    file = root / "snapshots" / commits[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commits[1])
    (root / "refs" / "old").write_text(commits[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return commits


def test_a_revision_on_the_hub(hub: list[str], plain: PairModel) -> None:
    newest = load_model(Config(model_name_or_path="org/tiny", max_length=64))
    assert newest.identity == f"org/tiny@{hub[1]}"
    for revision in ("old", hub[0]):
        old = load_model(
            Config(model_name_or_path="org/tiny", model_revision=revision, max_length=64)
        )
        assert old.identity == f"org/tiny@{hub[0]}"
        assert not torch.equal(logits(old), logits(newest))
    assert torch.equal(logits(newest), logits(plain))
    with pytest.raises(ValueError, match="'org/tiny' cannot be loaded"):
        load_model(Config(model_name_or_path="org/tiny", model_revision="none", max_length=64))


def test_what_has_no_revisions(tiny_model_dir: Path) -> None:
    for name, why in ((str(tiny_model_dir), "is a folder"), ("fastpref-tiny", "is made here")):
        with pytest.raises(ValueError, match=f"{why} and has no revisions, but 'v2'"):
            load_tokenizer(Config(model_name_or_path=name, model_revision="v2"))
    with pytest.raises(ValueError, match="ref_model_name_or_path, which is not set"):
        Config(ref_model_revision="main")


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "llama").mkdir()
    name, options = Source("model_name_or_path", "~/llama").locate()
    assert name == str(tmp_path / "llama") and "revision" not in options


def test_the_digest_is_of_contents(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_dir, copy)
    assert load(copy).identity == load(tiny_model_dir).identity
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert load(copy).identity != load(tiny_model_dir).identity
