"""Adapters over weights of 4 bits beside adapters over the same weights written out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastpref import optim, quantised
from fastpref.config import Config
from fastpref.data.pack import pack_pairs
from fastpref.dynamics.recorder import read_records
from fastpref.loading import load_model
from fastpref.planner import made_pairs
from fastpref.rehearsal import rehearse
from fastpref.train import train

FOUR = {"load_in_4bit": True}


@pytest.fixture(scope="module")
def base(tiny_tokenizer: Any, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(
            vocab_size=len(tiny_tokenizer), initializer_range=0.2, bos_token_id=None,
            eos_token_id=tiny_tokenizer.eos_token_id, **sizes, **heads,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return Config(
        model_name_or_path=str(folder),
        dataset_name=(str(tiny_data),),
        ref_cache_dir=str(tmp_path_factory.mktemp("reference")),
        trainable="lora",
        lora_r=4,
        max_length=44,
        train_batch_size=8,
        max_steps=6,
        save_steps=3,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        warmup_steps=0,
        eval_steps=0,
    )


def run(config: Config, folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(config, output_dir=str(folder), **changes), progress=False)


def losses(folder: Path) -> np.ndarray:
    return np.array(read_records(folder, "steps")["loss"].to_pylist())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def written_out(config: Config, folder: Path) -> Path:
    """The model with every weight rounded to 4 bits, as a plain one in float32."""
    import bitsandbytes.functional as four
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = load_model(dataclasses.replace(config, **FOUR))
    plain = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    names = {id(m): n for n, m in model.module.named_modules()}
    count = 0
    for layer in quantised.layers(model.module):
        name = names[id(layer)].removesuffix(".base_layer")
        wide = four.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(wide)
        count += 1
    assert count == 14
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(config.model_name_or_path).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def four(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base, tmp_path_factory.mktemp("four") / "run", **FOUR)


def test_a_run_is_that_on_the_rounded_weights(base: Config, tmp_path: Path, four: Path) -> None:
    rounded = written_out(base, tmp_path / "rounded")
    plain = run(base, tmp_path / "plain", model_name_or_path=str(rounded))
    np.testing.assert_allclose(losses(four), losses(plain), rtol=0, atol=2e-5)
    assert losses(plain)[-1] < losses(plain)[0] - 0.02  # something was learnt
    one, other = adapter(four), adapter(plain)
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).norm() <= 1e-3 * other[name].norm(), name
    full = run(base, tmp_path / "full")
    assert np.abs(losses(four) - losses(full)).max() > 1e-3  # rounding to 4 bits is no small thing


def test_a_resumed_run_has_the_bits_of_the_straight_one(
    base: Config, tmp_path: Path, four: Path
) -> None:
    run(base, tmp_path / "run", max_steps=3, **FOUR)
    resumed = run(base, tmp_path / "run", **FOUR)
    assert np.array_equal(losses(four), losses(resumed))
    one, other = adapter(four), adapter(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_peft_reads_the_adapter_onto_the_model(base: Config, four: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base.model_name_or_path)
    model = PeftModel.from_pretrained(plain, str(four))
    norms = [p.norm() for n, p in model.named_parameters() if "lora_B" in n]
    assert len(norms) == 14 and all(norm > 0 for norm in norms)


@pytest.mark.parametrize("track", ["sketch", "exact"])
def test_gradients_of_every_pair_are_those_on_the_rounded_weights(
    base: Config, tmp_path: Path, track: str
) -> None:
    few = {"track": track, "rate_every": 0, "max_steps": 2, "save_steps": 2}
    rounded = written_out(base, tmp_path / "rounded")
    plain = run(base, tmp_path / "plain", model_name_or_path=str(rounded), **few)
    found = run(base, tmp_path / "four", **FOUR, **few)
    norms = [
        np.array(read_records(folder, "pairs")["gnorm_loss"].to_pylist(), float)
        for folder in (plain, found)
    ]
    assert np.isfinite(norms[0]).all() and (norms[0] > 0).all()
    np.testing.assert_allclose(norms[1], norms[0], rtol=2e-3)


def test_bfloat16_nested_scales_and_recomputation(base: Config, tmp_path: Path) -> None:
    narrow = {"dtype": "bfloat16", "weights_dtype": "bfloat16", "use_bnb_nested_quant": True}
    kept = run(base, tmp_path / "none", **FOUR, **narrow)
    again = run(base, tmp_path / "full", gradient_checkpointing="full", **FOUR, **narrow)
    assert np.array_equal(losses(kept), losses(again))
    assert np.isfinite(losses(kept)).all()


@pytest.mark.parametrize("nested", [False, True])
def test_a_plan_knows_weights_of_4_bits(base: Config, nested: bool) -> None:
    config = dataclasses.replace(base, **FOUR, dtype="float32", use_bnb_nested_quant=nested)
    model = load_model(config)
    own = [p.numel() * p.element_size() for p in model.module.parameters()]
    scales = 0
    for layer in quantised.layers(model.module):
        state = layer.weight.quant_state
        scales += state.absmax.numel() * state.absmax.element_size()
        if nested:
            scales += state.state2.absmax.numel() * 4
    step = rehearse(config, pack_pairs(made_pairs(20, 8, 4)), accumulates=False, gpu=False)
    assert step.peak["weights"] == pytest.approx(sum(own) + scales, rel=0.01)
    assert step.weights > 14 * 64 * 32  # counted as weights, not as bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "all"}, "set trainable: lora"),
        ({"save_merged": True}, "not with load_in_4bit"),
        ({"dtype": "float64"}, "set dtype"),
        ({"load_in_4bit": False, "bnb_4bit_quant_type": "fp4"}, "an option of load_in_4bit"),
        ({"init_lora_weights": "mica"}, "mica"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{"trainable": "lora", **FOUR, **changes})


def test_missing_packages_are_named(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(optim.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'load_in_4bit needs bitsandbytes.*"fastpref\[qlora\]"'):
        load_model(dataclasses.replace(base, **FOUR))


def test_a_quantised_layer_is_not_trained_whole(base: Config) -> None:
    config = dataclasses.replace(
        base, **FOUR, lora_target_modules=("q_proj",), lora_modules_to_save=("up_proj",)
    )
    with pytest.raises(ValueError, match=r"lora_modules_to_save: .*up_proj.* 4 bits"):
        load_model(config)


def test_the_run_says_what_it_is(four: Path) -> None:
    text = (four / "config.yaml").read_text(encoding="utf-8")
    assert "load_in_4bit: true" in text and "bnb_4bit_quant_type: nf4" in text
    settings = json.loads((four / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["peft_type"] == "LORA"
