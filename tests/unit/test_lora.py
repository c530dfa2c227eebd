"""Adapters in a model: gradients equal peft's own on separate sequences; off, saved, loaded."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastpref_kernels import torch_tiles
from torch import Tensor

from fastpref import lora
from fastpref.config import Config
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.loading import load_model
from fastpref.losses import LOSSES
from fastpref.model import PairModel
from fastpref.optim import build_optimizer
from fastpref.selfcheck import check_model
from fastpref.step import backward

pytest.importorskip("peft")

BETA = 0.3
FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "embedding": {"lora_target_modules": ("embed_tokens", "up_proj")},
    "parameters": {"lora_target_parameters": ("q_proj.weight", "mlp.up_proj.weight")},
    "whole modules": {"lora_modules_to_save": ("embed_tokens", "model.norm")},
    "ranks": {
        "lora_rank_pattern": ("q_proj=2", "layers.1.mlp.*=5"),
        "lora_alpha_pattern": ("v_proj=3",),
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "lora_r": 4},
    "mica": {"init_lora_weights": "mica"},
    "b with bias": {"lora_bias": True},
}


def some_pairs(vocab: int = 200) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    found = []
    for n, (prompt, common, chosen, rejected) in enumerate(
        [(9, 0, 1, 1), (3, 4, 6, 2), (14, 2, 9, 12), (5, 3, 0, 2), (8, 1, 2, 2)]
    ):
        start = rng.integers(0, vocab, common)
        ids = [rng.integers(0, vocab, prompt)]
        ids += [np.r_[start, rng.integers(0, vocab, k)] for k in (chosen, rejected)]
        reference = {"ref_chosen": -30.0 - n, "ref_rejected": -29.0}
        found.append(TokenPair(n, 0, "", *(x.astype(np.int32) for x in ids), False, **reference))
    return found


@pytest.fixture
def config(tiny_model_dir: Path) -> Config:
    return Config(
        model_name_or_path=str(tiny_model_dir), max_length=64, trainable="lora", lora_r=3, beta=BETA
    )


def shaken(model: PairModel) -> PairModel:
    """With an adapter that does something: as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def plain_logp(adapter: Any, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """peft's model, one sequence in a forward of its own."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
    logits = adapter(input_ids=ids[None], use_cache=False).logits[0]
    own = ids[len(prompt) :]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, own[:, None]).sum()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_pefts_own(config: Config, form: str) -> None:
    wide = dataclasses.replace(
        config, **FORMS[form], dtype="float32" if form == "mica" else "float64"
    )
    model = shaken(load_model(wide))
    model.module.double()
    model = dataclasses.replace(model, dtype=torch.float64)
    pairs = some_pairs()
    learning = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in n or "modules_to_save" in n for n in learning)

    with model.plain_attention():
        rows = [
            [plain_logp(model.adapter, p.prompt, y) for y in (p.chosen, p.rejected)] for p in pairs
        ]
        chosen, rejected = torch.stack([torch.stack(row) for row in rows]).unbind(1)
        reference = torch.tensor([[p.ref_chosen, p.ref_rejected] for p in pairs]).double().unbind(1)
        margin = (chosen - reference[0]) - (rejected - reference[1])
        (-torch.nn.functional.logsigmoid(BETA * margin).sum() / 7).backward()
    expected = {n: p.grad for n, p in learning.items()}
    assert all(float(g.norm()) > 0 for g in expected.values() if g is not None)

    model.module.zero_grad()
    result = backward(model, pack_pairs(pairs), LOSSES["sigmoid"], wide, num_pairs=7)
    torch.testing.assert_close(result.x.chosen, chosen.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.x.rejected, rejected.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.module.named_parameters():
        if name in learning:
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error <= 1e-6, f"gradient of {name}: relative error {error:.1e}"
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_adapter_changes_nothing_and_off_is_the_model(config: Config, form: str) -> None:
    base = load_model(dataclasses.replace(config, trainable="all", lora_r=16))
    model = load_model(dataclasses.replace(config, **FORMS[form]))
    assert model.identity == base.identity and model.reference_off
    learning = [n for n, p in model.module.named_parameters() if p.requires_grad]
    batch = pack_pairs(some_pairs())
    with torch.no_grad():
        expected = base.logp(batch).logp
        fresh = model.logp(batch).logp
        if form == "orthogonal":  # B A is zero but for rounding
            torch.testing.assert_close(fresh, expected, rtol=1e-5, atol=0)
        else:
            assert torch.equal(fresh, expected)
        shaken(model)
        assert float((model.logp(batch).logp - expected).abs().max()) > 1e-2
        with model.as_reference():
            assert torch.equal(model.logp(batch).logp, expected)
        assert float((model.logp(batch).logp - expected).abs().max()) > 1e-2
    assert [n for n, p in model.module.named_parameters() if p.requires_grad] == learning
    assert not any("lora_B" in n for n in learning) if form == "mica" else True


def test_first_values_follow_the_seed_alone(config: Config) -> None:
    def values(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        own = lora.weights(load_model(dataclasses.replace(config, seed=seed)).module)
        assert torch.equal(torch.rand(1), torch.manual_seed(noise) and torch.rand(1))
        return {n: t.clone() for n, t in own.items()}

    one, same, other = values(1, 0), values(1, 5), values(2, 0)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("form", FORMS)
def test_saved_is_what_peft_loads(config: Config, form: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(config, **FORMS[form])
    model = shaken(load_model(config))
    lora.save(model.module, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    base = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad(), model.plain_attention():
        expected = model.module(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        if form != "b with bias":
            truth = copy.deepcopy(model.module).double()(input_ids=ids).logits
            merged = lora.merge(model.adapter)
            assert merged is model.module and not lora.is_adapted(merged)
            assert not [n for n, _ in merged.named_parameters() if "lora" in n or "save" in n]
            ours, theirs = merged(input_ids=ids).logits - truth, expected - truth
            assert ours.norm() <= 4 * theirs.norm() + 1e-7 * truth.norm()

    again = load_model(config)
    lora.load(again.module, tmp_path)
    fresh = lora.weights(again.module)
    assert fresh and all(
        torch.equal(t, fresh[n]) for n, t in lora.weights(loaded).items() if n in fresh
    )
    assert lora.digest(again.module) != lora.digest(load_model(config).module)


def test_biases_that_learn(config: Config, tmp_path: Path) -> None:
    """Of a model that has some: GPT-2, whose layers also hold their weights transposed."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).save_pretrained(base)
    own = dataclasses.replace(config, model_name_or_path=str(base))
    kinds = (("none", (), 0), ("lora_only", (), 8), ("all", (), 13), ("all", ("ln_f",), 13))
    for number, (biases, whole, count) in enumerate(kinds):
        form = dataclasses.replace(own, lora_train_biases=biases, lora_modules_to_save=whole)
        model = load_model(form, tokenizer=object())
        learning = [n for n, p in model.module.named_parameters() if p.requires_grad]
        assert sum(n.endswith(".bias") for n in learning) == count
        assert check_model(model, some_pairs()) < 1e-4
        lora.save(shaken(model).module, tmp_path / str(number))
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / str(number)
        ).eval()
        ids = torch.arange(2, 40)[None]
        with torch.no_grad(), model.plain_attention():
            expected = model.module(input_ids=ids).logits
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        again = load_model(form, tokenizer=object())
        lora.load(again.module, tmp_path / str(number))
        kept = lora.weights(again.module)
        assert all(torch.equal(t, kept[n]) for n, t in lora.weights(model.module).items())
        # peft's own file lists some biases twice.
        loaded.save_pretrained(tmp_path / f"peft-{number}")
        lora.load(again.module, tmp_path / f"peft-{number}")


def test_the_head_is_frozen_and_its_norms_are_still_exact(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two products instead of three; a fresh adapter's norms are those of full training."""
    asked = []
    whole = torch_tiles.backward

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append((kwargs["need_hidden"], kwargs["need_weight"], args[5].exps.numel()))
        return whole(*args, **kwargs)

    monkeypatch.setattr(torch_tiles, "backward", spy)
    batch = pack_pairs(some_pairs())
    full = dataclasses.replace(config, trainable="all", lora_r=16)
    results = [
        backward(load_model(c), batch, LOSSES["sigmoid"], c, 5, norms="exact")
        for c in (config, full)
    ]
    assert asked[0] == (True, False, 0)  # no exponentials are kept either
    assert asked[1][:2] == (True, True) and asked[1][2] > 0
    for name, values in results[0].norms.items():
        torch.testing.assert_close(values, results[1].norms[name], rtol=1e-6, atol=0)
        assert bool((values != 0).all())


def test_dropout_is_on_in_training_steps_alone(config: Config) -> None:
    model = shaken(load_model(dataclasses.replace(config, lora_dropout=0.5)))
    batch = pack_pairs(some_pairs())

    def logp() -> Tensor:
        with torch.no_grad():
            return model.logp(batch).logp

    still, state = logp(), torch.get_rng_state()
    assert torch.equal(logp(), still) and torch.equal(torch.get_rng_state(), state)
    assert check_model(model, some_pairs()) < 1e-4
    with model.dropout():
        assert not torch.equal(logp(), logp())
        assert not model.module.training
    assert torch.equal(logp(), still)


def test_weight_decay_leaves_magnitudes_alone(config: Config) -> None:
    model = load_model(dataclasses.replace(config, use_dora=True))
    settings = dataclasses.replace(config, weight_decay=0.1)
    decayed, undecayed = build_optimizer(model.module.named_parameters(), settings).param_groups
    assert decayed["weight_decay"] == 0.1 and undecayed["weight_decay"] == 0
    assert all("lora_A" in n or "lora_B" in n for n in decayed["param_names"])
    assert undecayed["param_names"]
    assert all("lora_magnitude_vector" in n for n in undecayed["param_names"])


def test_the_digest_is_of_what_the_adapter_does(config: Config, tmp_path: Path) -> None:
    model = shaken(load_model(config))
    lora.save(model.module, tmp_path)
    digest = lora.digest(model.module)

    def continued(**changes: Any) -> PairModel:
        return load_model(Config(
            model_name_or_path=config.model_name_or_path, max_length=64, trainable="lora",
            adapter_name_or_path=str(tmp_path), **changes,
        ))  # fmt: skip

    one = continued()
    assert lora.digest(one.module) == digest and digest in one.identity and not one.reference_off
    assert continued(lora_dropout=0.3, seed=4).identity == one.identity
    without = continued(adapter_reference="base")
    assert without.identity == load_model(config).identity and without.reference_off
    settings = tmp_path / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": 32', '"lora_alpha": 33'))
    assert continued().identity != one.identity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["lora", "dora", "parameters"])
def test_the_self_check_passes(config: Config, dtype: str, form: str) -> None:
    model = shaken(load_model(dataclasses.replace(config, **FORMS[form], dtype=dtype)))
    assert check_model(model, some_pairs()) < (5e-2 if dtype == "bfloat16" else 1e-4)
