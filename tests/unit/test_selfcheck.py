"""What packing cannot compute is refused before training, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpref import attention
from fastpref.config import Config
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel, check_architecture, load_model, prepare
from fastpref.selfcheck import TOLERANCE, check_model


def some_pairs() -> list[TokenPair]:
    rng = np.random.default_rng(0)
    found = []
    for n, length in enumerate((12, 3, 7, 9, 5)):
        ids = [rng.integers(0, 40, k).astype(np.int32) for k in (length, 3, 4)]
        found.append(TokenPair(n, 0, "", *ids, truncated=False))
    return found


def wrap(module: Any, dtype: torch.dtype = torch.float32) -> PairModel:
    prepare(module)
    return PairModel(module, None, torch.device("cpu"), dtype, "")


def llama(**extra: Any) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **extra,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_model_passes(dtype: torch.dtype) -> None:
    assert check_model(wrap(llama(), dtype), some_pairs()) < TOLERANCE[dtype] / 2


def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rule that the rejected rest does not see the chosen one."""
    monkeypatch.setattr(attention, "CHOSEN", -1)
    with pytest.raises(ValueError, match="LlamaForCausalLM.*differ in"):
        check_model(wrap(llama()), some_pairs())


def test_a_layer_that_looks_along_the_sequence_is_found() -> None:
    module = llama()
    forward = module.model.layers[0].mlp.forward

    def mixing(x: torch.Tensor) -> torch.Tensor:
        return forward(x) + 0.1 * x.cumsum(dim=1)

    module.model.layers[0].mlp.forward = mixing
    with pytest.raises(ValueError, match="looks along the sequence"):
        check_model(wrap(module), some_pairs())


def test_a_head_of_its_own_kind_is_found() -> None:
    module = llama()
    head = module.lm_head.forward
    module.lm_head.forward = lambda x: head(x) * 1.2
    with pytest.raises(ValueError, match="transforms its logits"):
        check_model(wrap(module), some_pairs())


def test_a_model_without_the_interface_is_refused() -> None:
    import transformers as hf

    config = hf.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match="Bloom"):
        check_model(wrap(hf.BloomForCausalLM(config)), some_pairs())


def test_refused_by_their_config() -> None:
    import transformers as hf

    with pytest.raises(ValueError, match="linear_attention"):
        check_architecture(hf.Qwen3NextConfig(), max_length=64)
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="'dynamic'"):
        check_architecture(hf.LlamaConfig(rope_parameters=scaled), max_length=64)
    with pytest.raises(ValueError, match="at most 64"):
        check_architecture(hf.GPT2Config(n_positions=64), max_length=65)
    check_architecture(hf.LlamaConfig(), max_length=64)


def test_weights_that_are_not_there_or_not_safetensors(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    with pytest.raises(ValueError, match="(?s)cannot be loaded.*Expected"):
        load_model(Config(model_name_or_path=str(tmp_path)))
    import shutil

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model_dir, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(2)}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(Config(model_name_or_path=str(pickled), max_length=64))


@pytest.mark.parametrize("damage", ["one weight missing", "file cut", "not a number"])
def test_damaged_weights_are_refused(damage: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model_dir, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    if damage == "file cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "one weight missing":
        del weights[name]
        save_file(weights, file, metadata={"format": "pt"})
    else:
        weights[name][0, 0] = torch.nan
        save_file(weights, file, metadata={"format": "pt"})
    said = {
        "one weight missing": f"1 weights are not in its files.*{name}",
        "file cut": "cannot be loaded",
        "not a number": "not finite",
    }
    with pytest.raises(ValueError, match=said[damage]):
        check_model(load_model(Config(model_name_or_path=str(folder), max_length=64)), some_pairs())


def test_devices_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="device='cuda:99'"):
        load_model(Config(device="cuda:99"), tokenizer=object())
