"""Which modules get an adapter; what is refused, by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import lora, lora_settings
from fastpref.config import Config
from fastpref.loading import load_model, load_tokenizer

pytest.importorskip("peft")

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def config(tiny_model_dir: Path) -> Config:
    return Config(model_name_or_path=str(tiny_model_dir), max_length=64, trainable="lora", lora_r=2)


@pytest.fixture
def saved(config: Config, tmp_path: Path) -> Path:
    """Folder of a small adapter."""
    folder = tmp_path / "adapter"
    small = dataclasses.replace(config, lora_target_modules=("q_proj", "up_proj"))
    lora.save(load_model(small).module, folder)
    return folder


def continued(config: Config, folder: Path | str, **changes: Any) -> Config:
    return Config(
        model_name_or_path=config.model_name_or_path, max_length=64, trainable="lora",
        adapter_name_or_path=str(folder), **changes,
    )  # fmt: skip


def adapted(config: Config, **changes: Any) -> dict[str, int]:
    """Name -> rank of every module with an adapter, without the `model.` that all begin with."""
    module = load_model(dataclasses.replace(config, **changes)).module
    return {
        name.removeprefix("model.").removesuffix(".base_layer"): layer.r["default"]
        for name, layer in module.named_modules()
        if hasattr(layer, "lora_A")
    }


def in_layers(names: tuple[str, ...], layers: tuple[int, ...] = (0, 1)) -> set[str]:
    ends = {n: ("self_attn." if n[0] in "qkvo" else "mlp.") + n for n in names}
    if "gate_proj" in names:
        ends["gate_proj"] = "mlp.gate_proj"
    return {f"layers.{i}.{end}" for i in layers for end in ends.values()}


@pytest.mark.parametrize(
    ("changes", "names", "layers"),
    [
        ({}, LINEAR, (0, 1)),
        ({"lora_target_modules": ("all-linear",)}, LINEAR, (0, 1)),
        ({"lora_target_modules": ("q_proj",)}, ("q_proj",), (0, 1)),
        ({"lora_target_modules": ("q_proj", "mlp.up_proj")}, ("q_proj", "up_proj"), (0, 1)),
        ({"lora_target_modules": ("model.layers.1.self_attn.v_proj",)}, ("v_proj",), (1,)),
        ({"lora_target_modules": (r".*\.0\..*\.(q|v)_proj",)}, ("q_proj", "v_proj"), (0,)),
        ({"lora_exclude_modules": ("mlp.up_proj", "down_proj")}, LINEAR[:5], (0, 1)),
        ({"lora_exclude_modules": (r".*\.mlp\..*",)}, LINEAR[:4], (0, 1)),
        ({"lora_layers_to_transform": (1,)}, LINEAR, (1,)),
        (
            {"lora_layers_to_transform": (0,), "lora_layers_pattern": ("layers",)},
            LINEAR,
            (0,),
        ),
        ({"lora_target_parameters": ("k_proj.weight",)}, ("k_proj",), (0, 1)),
        (
            {
                "lora_target_parameters": ("k_proj.weight",),
                "lora_target_modules": ("up_proj",),
            },
            ("k_proj", "up_proj"),
            (0, 1),
        ),
    ],
    ids=lambda value: "+".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_targets(
    config: Config, changes: dict[str, Any], names: tuple[str, ...], layers: tuple[int, ...]
) -> None:
    assert set(adapted(config, **changes)) == in_layers(names, layers)


def test_ranks_and_alphas_by_name(config: Config) -> None:
    changed = dataclasses.replace(
        config,
        lora_target_modules=("q_proj", "v_proj"),
        lora_rank_pattern=("v_proj=8", r"layers\.1\..*q_proj=4"),
        lora_alpha_pattern=("v_proj=4",),
    )
    ranks = adapted(changed)
    assert ranks == {
        "layers.0.self_attn.q_proj": 2,
        "layers.1.self_attn.q_proj": 4,
        "layers.0.self_attn.v_proj": 8,
        "layers.1.self_attn.v_proj": 8,
    }
    layer = load_model(changed).module.get_submodule("model.layers.0.self_attn.v_proj")
    assert layer.scaling["default"] == 4 / 8  # type: ignore[index]


def test_all_linear_gives_full_names_where_ends_are_ambiguous() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.ModuleDict(
                {"gate": torch.nn.Linear(2, 2), "up": torch.nn.Linear(2, 2)}
            )
            self.b = torch.nn.ModuleDict({"gate": torch.nn.ReLU()})
            self.head = torch.nn.Linear(2, 2)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    assert lora_settings.all_linear(Odd()) == ["a.gate", "a.up"]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"lora_target_modules": ("q_prj",)}, "LlamaForCausalLM is 'q_prj'; did you mean q_proj?"),
        ({"lora_target_modules": ("q_proj", "mlp.upproj")}, "did you mean mlp.up_proj?"),
        ({"lora_target_modules": ("zzz",)}, "its linear layers are down_proj, gate_proj"),
        ({"lora_target_modules": (r".*\.query",)}, r"is '.*\\.query'; its linear layers are"),
        ({"lora_target_modules": (r".*",)}, "stands for model too, a LlamaModel"),
        ({"lora_target_modules": ("q_proj", "mlp")}, "model.layers.0.mlp too, a LlamaMLP"),
        ({"lora_exclude_modules": ("up_prj",)}, "lora_exclude_modules: .*did you mean up_proj?"),
        ({"lora_exclude_modules": (r".*",)}, "peft cannot make this adapter"),
        (
            {"lora_target_modules": ("q_proj", "v_proj"), "lora_exclude_modules": ("q_proj",)},
            "nothing is left of 'q_proj'",
        ),
        ({"lora_target_parameters": ("q_proj.wait",)}, "did you mean q_proj.weight?"),
        ({"lora_modules_to_save": ("norms",)}, "lora_modules_to_save: .*did you mean norm?"),
        ({"lora_target_modules": ("q_proj,v_proj",)}, "'q_proj,v_proj'; name several as a list"),
        ({"lora_target_modules": ("all_linear",)}, "did you mean all-linear?"),
        ({"lora_layers_to_transform": (0, 7)}, "no layer 7; layers are numbered 0 to 1"),
        ({"lora_layers_to_transform": (7,)}, "no layer 7; layers are numbered 0 to 1"),
        (
            {"lora_layers_to_transform": (0, 1), "lora_exclude_modules": (r".*layers\.1\..*",)},
            "layer 1; what is adapted lies in layers 0",
        ),
        (
            {"lora_layers_to_transform": (0,), "lora_layers_pattern": ("layer",)},
            "did you mean layers?",
        ),
        ({"lora_rank_pattern": ("w_proj=3",)}, "lora_rank_pattern: 'w_proj' stands for none"),
        ({"lora_alpha_pattern": ("embed_tokens=3",)}, "lora_alpha_pattern: 'embed_tokens' stands"),
        ({"lora_target_modules": ("q_proj", "lm_head")}, "target_modules, is the output head"),
        ({"lora_target_parameters": ("lm_head.weight",)}, "target_modules, is the output head"),
        ({"lora_modules_to_save": ("lm_head",)}, "modules_to_save, is the output head"),
        ({"lora_bias": True, "save_merged": True}, "save_merged: the adapter of .*_proj has"),
        ({"init_lora_weights": "mica", "lora_r": 64}, "this adapter: MiCA requires"),
    ],
)  # fmt: skip
def test_refused(config: Config, changes: dict[str, Any], part: str) -> None:
    changed = dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match=part):
        load_model(changed)


@pytest.mark.parametrize("field", ["lora_target_modules", "lora_modules_to_save"])
def test_an_embedding_that_is_the_head_is_refused(
    config: Config, field: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    module.config.tie_word_embeddings = True
    module.tie_weights()
    module.save_pretrained(tmp_path)
    load_tokenizer(config).save_pretrained(tmp_path)
    tied = dataclasses.replace(
        config, model_name_or_path=str(tmp_path), **{field: ("embed_tokens",)}
    )
    with pytest.raises(ValueError, match="shares its weight with the output head lm_head"):
        load_model(tied)


def test_without_peft(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape('pip install "fastpref[lora]"')):
        load_model(config)


def test_an_adapter_brings_its_settings(config: Config, saved: Path) -> None:
    module = load_model(continued(config, saved, lora_dropout=0.2)).module
    names = {n for n, layer in module.named_modules() if hasattr(layer, "lora_A")}
    assert {n.removeprefix("model.") for n in names} == in_layers(("q_proj", "up_proj"))
    settings = module.peft_config["default"]
    assert (settings.r, settings.lora_dropout, settings.inference_mode) == (2, 0.2, False)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA, got"),
        ({"peft_type": "NONE"}, "not the settings of a peft adapter"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the model's own"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.*option that fastpref lacks"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head, one of the target_modules, is"),
        ({"target_modules": ["q_proj"]}, "holds .*up_proj.lora_A.weight, for which LlamaFor"),
        ({"target_modules": ["q_proj", "up_proj", "o_proj"]}, "lacks .*o_proj.lora_A.weight, for"),
        ({"r": 3}, r"q_proj.lora_A.weight: expected \(3, 32\), got \(2, 32\).*another model"),
        ({"target_modules": ["c_attn"]}, "peft cannot make this adapter: Target modules"),
    ],
)  # fmt: skip
def test_adapters_that_are_refused(
    config: Config, saved: Path, values: dict[str, Any], part: str
) -> None:
    edit(saved / "adapter_config.json", **values)
    with pytest.raises(ValueError, match=part) as raised:
        load_model(continued(config, saved))
    assert str(saved) in str(raised.value)


def test_initial_values_of_the_file_win_over_those_of_its_settings(
    config: Config, saved: Path
) -> None:
    before = load_model(continued(config, saved)).identity
    for start in ("eva", "gaussian", False, True):
        edit(saved / "adapter_config.json", init_lora_weights=start)
        assert load_model(continued(config, saved)).identity == before


def test_a_start_that_changes_the_model_goes_on_from_pefts_own_files(
    config: Config, tmp_path: Path
) -> None:
    """What docs/lora.md advises for PiSSA: the changed model and its adapter are the old model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    ids = torch.arange(2, 30)[None]
    expected = module(input_ids=ids).logits
    settings = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
    wrapped = get_peft_model(module, settings)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.unload().save_pretrained(tmp_path / "changed")
    load_tokenizer(config).save_pretrained(tmp_path / "changed")
    model = load_model(
        dataclasses.replace(
            continued(config, tmp_path / "adapter"), model_name_or_path=str(tmp_path / "changed")
        )
    )
    assert not model.reference_off
    with model.plain_attention():
        ours = model.module(input_ids=ids).logits
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_folders_that_hold_no_adapter(config: Config, saved: Path, tmp_path: Path) -> None:
    for name in (tmp_path / "absent", "nobody/nothing"):
        with pytest.raises(ValueError, match="(?s)adapter_name_or_path=.*cannot be.*Expected"):
            load_model(continued(config, name))
    with pytest.raises(ValueError, match="no adapter_config.json there"):
        load_model(continued(config, tmp_path))
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not the settings of a peft adapter"):
        load_model(continued(config, saved))
    weights = saved / "adapter_model.safetensors"
    weights.rename(saved / "adapter_model.bin")
    with pytest.raises(ValueError, match="no adapter_model.safetensors there"):
        load_model(continued(config, saved))


def test_damaged_weights(config: Config, saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="adapter_model.safetensors: cannot be read"):
        load_model(continued(config, saved))


def test_the_adapter_of_another_model(
    config: Config, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other"
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=60, num_attention_heads=2, max_position_embeddings=64, **sizes)
    ).save_pretrained(other)
    changed = dataclasses.replace(continued(config, saved), model_name_or_path=str(other))
    with pytest.raises(ValueError, match=r"expected \(2, 16\), got \(2, 32\).*another model"):
        load_model(changed, tokenizer=object())
    assert f"was made on {config.model_name_or_path} and goes on {other}" in caplog.text


def test_an_adapter_is_no_model(config: Config, saved: Path) -> None:
    changed = dataclasses.replace(config, model_name_or_path=str(saved))
    with pytest.raises(ValueError, match=f"adapter_name_or_path: {saved} and model_name_or_path: "):
        load_tokenizer(changed)


def test_biases_of_the_adapter_and_the_model_as_reference(config: Config, saved: Path) -> None:
    edit(saved / "adapter_config.json", bias="all")
    with pytest.raises(ValueError, match="Set adapter_reference: initial"):
        load_model(continued(config, saved, adapter_reference="base"))
