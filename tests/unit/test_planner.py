"""The planner beside measured peaks of steps on the CPU; what it chooses and refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.measure import peak_of
from fastpref.config import Config, unplanned
from fastpref.data.pack import fed_tokens, pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.loading import load_model, routes
from fastpref.losses import get_loss
from fastpref.memory import Memory, read_size
from fastpref.planner import made_pairs, make_plan, refusal
from fastpref.prepare import make_optimizer
from fastpref.rehearsal import rehearse
from fastpref.step import train_step

V, TOLERANCE = 700, 0.15
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def architectures() -> dict[str, Any]:
    from transformers import (
        Gemma3TextConfig,
        GPT2Config,
        LlamaConfig,
        MixtralConfig,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    experts = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}

    return {
        "gpt2": GPT2Config(
            vocab_size=V, n_embd=64, n_layer=2, n_head=4, n_positions=256,
            bos_token_id=0, eos_token_id=0,
        ),
        "llama": LlamaConfig(**SIZES),
        "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
        "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=32),
        "mixtral": MixtralConfig(**SIZES, **experts, num_local_experts=4),
        "qwen3_moe": Qwen3MoeConfig(
            **SIZES, **experts, num_experts=4, head_dim=16, moe_intermediate_size=48,
            output_router_logits=True,
        ),
        "tiny": LlamaConfig(**SIZES | {"num_hidden_layers": 1}),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoModelForCausalLM

    found = {}
    for name, config in architectures().items():
        found[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
    return found


def some_pairs(count: int) -> list[TokenPair]:
    rng = np.random.default_rng(0)

    def some(length: int) -> np.ndarray:
        return rng.integers(0, V, length).astype(np.int32)

    return [
        TokenPair(i, 0, "", some(30 + 2 * i), some(20), some(24), (), -5.0, -5.0)
        for i in range(count)
    ]


def measured(config: Config, micro_batches: int) -> tuple[int, int]:
    """Bytes of weights, masters and optimizer state; and what a step adds to them at its peak."""
    model = load_model(config, tokenizer="none is needed")
    optimizer, masters = make_optimizer(config, model)
    batches = [pack_pairs(some_pairs(8), whole=model.router is not None)] * micro_batches
    count = sum(batch.num_pairs for batch in batches)
    norms = "exact" if config.track == "head" else None

    def step() -> None:
        train_step(model, batches, get_loss("sigmoid"), config, count, optimizer, norms)

    step()
    for parameter in model.trained:
        parameter.grad = None
    kept = [*model.module.parameters(), *model.module.buffers()]
    kept += [*masters.tensors.values()] if masters else []
    kept += [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(storages.values()), peak_of(step, model.device)


BF16 = {"dtype": "bfloat16"}
NARROW = {**BF16, "weights_dtype": "bfloat16"}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {}, 1),
    ("llama", {}, 2),
    ("llama", {"trainable": "lora"}, 2),
    ("llama", {**NARROW, "optim": "adamw_8bit"}, 2),
    ("llama", {"gradient_checkpointing": "full"}, 2),
    ("llama", {"track": "head"}, 1),
    ("gpt2", {**NARROW, "gradient_checkpointing": "selective"}, 2),
    ("qwen3", {**BF16, "gradient_checkpointing": "full"}, 1),
    ("mixtral", {}, 1),
    ("mixtral", {"router_aux_loss_coef": 0.02, "gradient_checkpointing": "full"}, 2),
    ("qwen3_moe", {"router_aux_loss_coef": 0.02}, 2),
    ("gemma3", {"gradient_checkpointing": "selective", "trainable": "lora"}, 2),
]
MORE: list[tuple[str, dict[str, Any], int]] = [
    ("llama", BF16, 1),
    ("llama", {**NARROW, "trainable": "lora", "gradient_checkpointing": "full"}, 1),
    ("gpt2", {}, 1),
    ("qwen3", {"trainable": "lora", "optim": "adamw_8bit"}, 1),
    ("gemma3", NARROW, 1),
    ("llama", NARROW, 2),
    ("llama", {"gradient_checkpointing": "selective"}, 1),
]


@pytest.mark.parametrize(
    ("architecture", "changes", "micro_batches"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_a_plan_is_within_15_percent_of_the_measured_peak(
    folders: dict[str, Path], architecture: str, changes: dict[str, Any], micro_batches: int
) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "track": "none", "max_length": 128}
    config = Config(model_name_or_path=str(folders[architecture]), **settings | changes)
    kept, step = measured(config, micro_batches)
    batch = pack_pairs(some_pairs(8), whole=routes(config))
    planned = rehearse(config, batch, accumulates=micro_batches > 1, gpu=False).total
    assert planned == pytest.approx(kept + step, rel=TOLERANCE)
    assert planned - kept == pytest.approx(step, rel=TOLERANCE)  # without what stands still


def config_of(folder: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {"dtype": "float32", "max_length": 128, "train_batch_size": 64}
    return Config(model_name_or_path=str(folder), **settings | changes)


LEFT: dict[str, Any] = {"gradient_checkpointing": "auto", "max_tokens_per_microbatch": 0}


def planned(folder: Path, size: int, **changes: Any) -> Any:
    pairs = made_pairs(40, 24, 64)
    config = config_of(folder, **LEFT | changes)
    return make_plan(config, pairs, fed_tokens(pairs), Memory("a device", size, True))


@pytest.mark.slow
def test_what_is_left_to_the_planner_shrinks_with_the_memory(folders: dict[str, Path]) -> None:
    wide = planned(folders["llama"], 10**10)
    assert wide.config.gradient_checkpointing == "none" and wide.fits
    assert wide.config.max_tokens_per_microbatch >= wide.tokens == 64 * (40 + 23 + 23)
    assert not wide.several
    sizes = [wide.total * part // 100 for part in (90, 50, 25)]
    plans = [planned(folders["llama"], size) for size in sizes]
    modes = [plan.config.gradient_checkpointing for plan in plans]
    assert modes[0] == "selective" and modes[-1] == "full"
    for plan, size in zip(plans, sizes, strict=True):
        assert plan.fits and plan.total <= size
        assert plan.config.max_tokens_per_microbatch >= plan.tokens >= 40 + 23 + 23
    assert [plan.tokens for plan in plans] == sorted((p.tokens for p in plans), reverse=True)


def test_a_budget_is_never_below_the_longest_pair(folders: dict[str, Path]) -> None:
    pairs = [*made_pairs(10, 4, 40), *made_pairs(90, 30, 1)]
    config = config_of(folders["tiny"], **LEFT)
    plan = make_plan(config, pairs, fed_tokens(pairs), Memory("a device", 1, True))
    assert plan.config.max_tokens_per_microbatch >= 90 + 29 + 29
    assert not plan.fits


def test_what_cannot_fit_is_refused_with_numbers_and_settings_that_do(
    folders: dict[str, Path],
) -> None:
    pairs = made_pairs(40, 24, 64)
    config = config_of(folders["tiny"], dtype="bfloat16")
    sizes = fed_tokens(pairs)
    wide = make_plan(config, pairs, sizes, Memory("a device", 10**10, True))
    tight = Memory("a device", wide.total // 5, True)
    text = refusal(make_plan(config, pairs, sizes, tight), pairs, sizes)
    assert "does not fit" in text and "MiB at the peak" in text and "a device has" in text
    assert "gradient_checkpointing: full" in text
    hopeless = make_plan(config, pairs, sizes, Memory("a device", 10**5, True))
    assert "Nothing makes it fit" in refusal(hopeless, pairs, sizes)


def test_a_cpu_has_the_least_that_fits_too_and_refuses_nothing(folders: dict[str, Path]) -> None:
    pairs = made_pairs(40, 24, 64)
    config = config_of(folders["tiny"], **LEFT)

    def plan(size: int) -> Any:
        return make_plan(config, pairs, fed_tokens(pairs), Memory("this machine", size, False))

    wide = plan(10**10)
    assert wide.config.gradient_checkpointing == "none" and wide.fits
    tight = plan(wide.total // 2)
    assert tight.fits and tight.config.gradient_checkpointing != "none"
    none = plan(1)
    assert not none.fits and not none.refused


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_command_plans_mixtures_of_experts(
    folders: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastpref.cli import main

    options = ["--model_name_or_path", str(folders[name]), "--max_length", "128"]
    options += ["--router_aux_loss_coef", "0.1", "--memory", "8GB", "--train_batch_size", "4"]
    assert main(["plan", *options]) == 0
    # Prompt and both completions: every token is routed, also the last.
    assert "(4 pairs, 768 tokens" in capsys.readouterr().out
    assert main(["plan", *options, "--torch_compile"]) == 2
    assert "Set torch_compile: false, or router_aux_loss_coef: 0" in capsys.readouterr().err


def test_without_a_plan_there_are_defaults() -> None:
    config = unplanned(Config(**LEFT))
    assert config.gradient_checkpointing == "none"
    assert config.max_tokens_per_microbatch == 16384
    kept = Config(gradient_checkpointing="full", max_tokens_per_microbatch=77)
    assert unplanned(kept) == kept


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("1.5g", 1.5e9), ("500 MiB", 500 * 2**20)],
)
def test_sizes_as_people_write_them(text: str, size: float) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "80 apples", "-1GB", "0", "GB", "12iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 80GB"):
        read_size(text)


def test_the_command_prints_the_table_or_refuses(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from fastpref.cli import main

    options = ["--model_name_or_path", str(folders["tiny"]), "--max_length", "128"]
    assert main(["plan", *options, "--memory", "8GB"]) == 0
    shown = capsys.readouterr().out
    for line in ("weights ", "gradients ", "optimizer ", "activations", "head ", "total ", "GPU"):
        assert line in shown
    assert "dtype bfloat16" in shown  # what a GPU would compute in
    assert main(["plan", *options, "--memory", "1.1GB"]) == 2
    refused = capsys.readouterr().err
    assert "does not fit" in refused and "1.02 GiB" in refused
    assert main(["plan", *options, "--memory", "much"]) == 2
    assert "expected a size" in capsys.readouterr().err
    assert main(["plan", *options, "--prompt_tokens", "0"]) == 2
    assert "--prompt_tokens: expected 1 or more" in capsys.readouterr().err
    assert main(["plan", "--model_name_or_path", str(folders["tiny"].parent)]) == 2


def test_a_plan_reads_no_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    text = (folders["llama"] / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    own, bare = (planned(folder, 10**10) for folder in (folders["llama"], tmp_path))
    assert own.total == bare.total
    assert dataclasses.asdict(own.step) == dataclasses.asdict(bare.step)


def test_training_plans_before_it_loads_and_refuses(
    folders: dict[str, Path],
    tmp_path: Path,
    tiny_data: Path,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from fastpref import train as training

    folder = tmp_path / "model"
    folder.mkdir()
    tiny_tokenizer.save_pretrained(folder)
    text = (folders["llama"] / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text, encoding="utf-8")  # and no weights
    config = config_of(folder, dataset_name=(str(tiny_data),), output_dir=str(tmp_path / "run"))
    small = Memory("a small GPU (cuda:0)", 2 * 10**6, True)
    monkeypatch.setattr(Memory, "of", staticmethod(lambda device: small))
    with pytest.raises(ValueError, match=r"does not fit: .* a small GPU \(cuda:0\) has 1.91 MiB"):
        training.train(config, progress=False)
    assert not (tmp_path / "run").exists()
    little = Memory("memory of this machine", 2 * 10**6, False)
    monkeypatch.setattr(Memory, "of", staticmethod(lambda device: little))
    with caplog.at_level("INFO", "fastpref"):
        with pytest.raises(ValueError, match="cannot be loaded"):  # only now are weights missed
            training.train(config, progress=False)
    assert "it may swap, or be killed" in caplog.text
    assert "total at the peak" in caplog.text and "optimizer (moments, masters)" in caplog.text
