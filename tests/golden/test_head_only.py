"""`trainable: head`: the run that a frozen body gives, and the one that the theory foretells."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from fastpref.cli import main
from fastpref.config import Config
from fastpref.data.dataset import Dataset, load_dataset
from fastpref.data.tokenize import TokenPair
from fastpref.dynamics.recorder import read_records
from fastpref.features import with_features
from fastpref.loading import load_model, load_tokenizer
from fastpref.train import train

ONE_TOKEN = {  # Im & Li's setting: one-token answers, plain SGD
    "append_eos": "false",
    "dtype": "float64",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "logging_steps": 1,
    "eval_steps": 0,
}


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    caches = tmp_path_factory.mktemp("caches")
    return Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=(str(tiny_data),),
        trainable="head",
        ref_cache_dir=str(caches / "reference"),
        feature_cache_dir=str(caches / "features"),
        max_length=44,
        train_batch_size=8,
        max_steps=14,
        learning_rate=3e-3,
        logging_steps=3,
        eval_steps=4,
        eval_sample_size=6,
        save_steps=5,
    )


@pytest.fixture(scope="module")
def straight(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("straight") / "run")


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def trained_rows(folder: Path) -> list[dict[str, Any]]:
    rows = read_records(folder, "pairs").to_pylist()
    return [r for r in rows if r["split"] == "train"]


def steps(folder: Path) -> dict[str, list[Any]]:
    return read_records(folder, "steps").to_pydict()


def test_the_head_alone_moves_and_the_records_say_so(straight: Path, base: Config) -> None:
    start = load_file(Path(base.model_name_or_path) / "model.safetensors")
    moved = [n for n, w in weights(straight).items() if not torch.equal(w, start[n])]
    assert moved == ["lm_head.weight"]
    loss = steps(straight)["loss"]
    assert loss[0] == pytest.approx(np.log(2), abs=1e-6) and np.mean(loss[-3:]) < 0.66
    assert set(steps(straight)["tokens"]) == {0} and min(steps(straight)["rows"]) > 0

    # The head's norms are all there is; ||W - W0|| as often as metrics are logged.
    for r in trained_rows(straight):
        for name in ("gnorm_m", "gnorm_chosen", "gnorm_rejected", "dot_chosen_rejected"):
            assert r[name] == r[f"head_{name}"] != 0
        assert r["norm_method"] == "gram"
    updates = dict(zip(*(steps(straight)[n] for n in ("step", "head_update_norm")), strict=True))
    assert [s for s, norm in updates.items() if norm is not None] == [3, 6, 9, 12]


@pytest.mark.parametrize(
    "changes", [{"record": False}, {"track": "none"}, {"eval_steps": 0}, {"logging_steps": 1}]
)
def test_watching_changes_no_bit(
    base: Config, straight: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert same_bits(straight, run(base, tmp_path / "run", **changes))


def test_caches_made_ahead_are_those_that_a_run_uses(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: Path
) -> None:
    folders = {f"{name}_cache_dir": str(tmp_path / name) for name in ("ref", "feature")}
    own = dataclasses.replace(base, **folders)
    (tmp_path / "run.yaml").write_text(own.to_yaml())
    assert main(["refcache", str(tmp_path / "run.yaml")]) == 0
    monkeypatch.setattr("fastpref.features._write", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr("fastpref.refcache.write_logp", lambda *_: pytest.fail("computed again"))
    assert same_bits(straight, run(own, tmp_path / "run"))


def test_micro_batches_are_invisible(base: Config, straight: Path, tmp_path: Path) -> None:
    cut = run(base, tmp_path / "run", max_tokens_per_microbatch=36)  # rows
    assert min(steps(cut)["micro_batches"]) >= 2 and max(steps(straight)["micro_batches"]) == 1
    ours, theirs = np.array(steps(cut)["loss"]), np.array(steps(straight)["loss"])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    start = load_file(Path(base.model_name_or_path) / "model.safetensors")["lm_head.weight"]
    one, other = (weights(folder)["lm_head.weight"] for folder in (straight, cut))
    assert (one - other).norm() < 1e-3 * (one - start).norm()


def test_resumed_equals_straight(base: Config, straight: Path, tmp_path: Path) -> None:
    folder = run(base, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-14")
    (folder / "model.safetensors").unlink()
    caches = {"feature_cache_dir": str(tmp_path / "cold")}  # may change, and gives the same bits
    resumed = run(base, folder, **caches)
    assert same_bits(straight, resumed)
    for table in ("pairs", "steps", "behaviors", "index"):
        assert read_records(resumed, table).equals(read_records(straight, table)), table
    assert (resumed / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_two_ranks_equal_one(base: Config, straight: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(base, output_dir=str(tmp_path / "two"))
    (tmp_path / "two.yaml").write_text(config.to_yaml())
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    done = subprocess.run(
        [sys.executable, *launch, "fastpref", "train", str(tmp_path / "two.yaml")],
        env={**os.environ, "PYTHONPATH": ".:kernels", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    two = steps(tmp_path / "two")
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(two[name], steps(straight)[name], rtol=1e-4)
    start = load_file(Path(base.model_name_or_path) / "model.safetensors")["lm_head.weight"]
    one, other = (weights(folder)["lm_head.weight"] for folder in (straight, tmp_path / "two"))
    assert (one - other).norm() < 1e-3 * (one - start).norm()


def gpt2(folder: Path, tokenizer: Any) -> Path:
    """Tied, and in float64 throughout: Llama's norms compute in float32 whatever the weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 128}
    config = GPT2Config(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **ids)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_logp(module: Any, pair: TokenPair) -> Tensor:
    """(2,) of chosen and rejected, by transformers' own forward of each sequence."""
    found = []
    for completion in (pair.chosen, pair.rejected):
        ids = torch.from_numpy(np.concatenate([pair.prompt, completion]).astype(np.int64))
        logits = module(input_ids=ids[None]).logits[0, len(pair.prompt) - 1 : -1]
        target = torch.from_numpy(completion.astype(np.int64))
        found.append(-F.cross_entropy(logits, target, reduction="sum"))
    return torch.stack(found)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_every_step_is_that_of_the_whole_model_with_its_body_frozen(
    base: Config, tmp_path: Path, tiny_tokenizer: Any, optim: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = gpt2(tmp_path / "gpt2", tiny_tokenizer)
    ours = run(
        base,
        tmp_path / "run",
        model_name_or_path=str(folder),
        optim=optim,
        dtype="float64",
        learning_rate=0.3 if optim == "sgd" else 3e-3,
        max_grad_norm=0.5,
        max_steps=6,
        save_steps=1,
    )
    pairs = {p.pair_id: p for p in load_dataset(base, tiny_tokenizer).train}

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    head = torch.nn.Linear(24, len(tiny_tokenizer), bias=False, dtype=torch.float64)
    head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    module.requires_grad_(False)
    module.lm_head = head
    with torch.no_grad():
        reference = {n: plain_logp(module, p) for n, p in pairs.items()}
    plain = torch.optim.SGD if optim == "sgd" else torch.optim.AdamW
    optimizer = plain(head.parameters(), lr=0.0, weight_decay=0.0)
    records, rows = steps(ours), trained_rows(ours)
    for step in range(1, 7):
        optimizer.param_groups[0]["lr"] = records["lr"][step - 1]
        seen = [r for r in rows if r["step"] == step]
        ratios = torch.stack(
            [plain_logp(module, pairs[r["pair_id"]]) - reference[r["pair_id"]] for r in seen]
        )
        margin = ratios[:, 0] - ratios[:, 1]
        loss = -F.logsigmoid(base.beta * margin).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimizer.step()
        assert records["loss"][step - 1] == pytest.approx(loss.item(), rel=1e-12)
        np.testing.assert_allclose([r["margin"] for r in seen], margin.detach(), atol=1e-6)
        saved = weights(ours / f"checkpoint-{step}")["lm_head.weight"]
        assert (saved - head.weight).norm() < 1e-12 * head.weight.norm()
    assert records["lr"][1] > 0


def dual_recursion(
    states: np.ndarray,  # (N, D) the frozen state that both answers of a pair are read off
    answers: np.ndarray,  # (N, 2) token ids of chosen and rejected
    batches: list[np.ndarray],  # indices of every step's pairs
    rate: float,
    beta: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Margins before every step (T, N), and ||W - W0|| after it (T,), without a head.

    The normaliser cancels in one-token margins, so with e_i = e_chosen - e_rejected

        grad m_i = e_i g_i^T,   W - W0 = sum_j a_j e_j g_j^T,   K_ij = <e_i, e_j> <g_i, g_j>
        m = K a,   ||W - W0||^2 = a^T K a,   a_i += rate beta sigma(-beta m_i) / |batch|
    """
    same = (answers[:, None, :, None] == answers[None, :, None, :]).astype(np.float64)
    signs = np.array([[1.0, -1.0], [-1.0, 1.0]])
    kernel = (same * signs).sum(axis=(2, 3)) * (states @ states.T)
    a = np.zeros(len(states))
    margins, norms = [], []
    for batch in batches:
        m = kernel @ a
        margins.append(m)
        a[batch] += rate * beta / (1 + np.exp(beta * m[batch])) / len(batch)
        norms.append(np.sqrt(a @ kernel @ a))
    return np.array(margins), np.array(norms)


def one_token(base: Config, tiny_data: Path, **changes: Any) -> Config:
    data = (str(tiny_data / "agrees.jsonl"),)
    settings = {**ONE_TOKEN, "dataset_name": data, "beta": 0.3, "learning_rate": 2.0, **changes}
    return dataclasses.replace(base, **settings)


def foretold(config: Config, folder: Path) -> tuple[dict[int, int], np.ndarray, np.ndarray]:
    """pair_id -> row, and the recursion's margins and norms for the run's own batches."""
    model = load_model(config)
    dataset = load_dataset(config, load_tokenizer(config))
    everyone = dataset.train + dataset.held_out
    features = with_features(model, everyone, cache_dir=config.feature_cache_dir, progress=False)
    batch = features.pack(dataset.train)
    assert batch.hidden is not None and len(batch.hidden) == len(dataset.train)
    number = {p.pair_id: i for i, p in enumerate(dataset.train)}
    answers = np.array([(p.chosen.item(), p.rejected.item()) for p in dataset.train])
    rows = trained_rows(folder)
    batches = [
        np.array([number[r["pair_id"]] for r in rows if r["step"] == step])
        for step in range(1, config.max_steps + 1)
    ]
    states = batch.hidden.double().numpy()
    return number, *dual_recursion(states, answers, batches, config.learning_rate, config.beta)


@pytest.mark.parametrize(
    ("dtype", "batch", "tolerance"),
    [("float64", 7, 1e-6), ("float64", 1000, 1e-6), ("float32", 7, 1e-2)],
)
def test_one_token_runs_are_the_dual_recursion(
    base: Config, tiny_data: Path, tmp_path: Path, dtype: str, batch: int, tolerance: float
) -> None:
    config = one_token(base, tiny_data, dtype=dtype, train_batch_size=batch, max_steps=50)
    folder = run(config, tmp_path / "run")
    number, margins, norms = foretold(config, folder)
    assert np.abs(margins[-1]).max() > 5  # far from where it is linear
    for r in trained_rows(folder):
        expected = margins[r["step"] - 1, number[r["pair_id"]]]
        assert r["margin"] == pytest.approx(expected, rel=tolerance, abs=tolerance), r["step"]
    np.testing.assert_allclose(steps(folder)["head_update_norm"], norms, rtol=tolerance)
    # All of the gradient is in the two answers' rows.
    start = load_file(Path(config.model_name_or_path) / "model.safetensors")["lm_head.weight"]
    moved = (weights(folder)["lm_head.weight"] - start).norm(dim=1)
    assert (moved > 1e-5 * moved.max()).sum() == 2


def test_the_example_runs(base: Config, tiny_data: Path, tmp_path: Path) -> None:
    from fastpref.config import load_config

    example = Path(__file__).parents[2] / "examples" / "last-layer.yaml"
    own = ("model_name_or_path", "ref_cache_dir", "feature_cache_dir")
    changes: dict[str, Any] = {name: getattr(base, name) for name in own}
    data = str(tiny_data / "agrees.jsonl")
    config = load_config(example, {**changes, "dataset_name": data, "max_steps": 3})
    assert {name: getattr(config, name) for name in ONE_TOKEN} == {**ONE_TOKEN, "eval_steps": 10}
    folder = run(config, tmp_path / "run")
    assert {r["chosen_len"] for r in trained_rows(folder)} == {1}
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sync_ref_model": True, "ref_model_sync_steps": 3},
        {"loss_type": ("aot", "sft"), "ld_alpha": 0.5, "max_tokens_per_microbatch": 150},
        {"loss_type": "simpo", "use_weighting": False},
    ],
)
def test_cached_states_are_the_only_difference_from_a_body_in_every_step(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def body(config: Config, model: Any, dataset: Dataset, progress: bool) -> Dataset:
        return dataset

    states = run(base, tmp_path / "states", **changes)
    monkeypatch.setattr("fastpref.train.with_states", body)
    tokens = run(base, tmp_path / "tokens", **changes)
    assert min(steps(tokens)["tokens"]) > 0 and set(steps(states)["tokens"]) == {0}
    np.testing.assert_allclose(steps(tokens)["loss"], steps(states)["loss"], rtol=1e-5)
    margins = [[r["margin"] for r in trained_rows(folder)] for folder in (states, tokens)]
    np.testing.assert_allclose(*(np.sort(m) for m in margins), atol=1e-4)
