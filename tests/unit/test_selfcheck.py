"""What packing cannot compute is refused before training, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpref import attention_dense, selfcheck
from fastpref.config import Config
from fastpref.data.tokenize import TokenPair
from fastpref.loading import load_model, prepare
from fastpref.model import PairModel
from fastpref.selfcheck import TOLERANCE, check_model
from tests.architectures import PAIRS, packed, tiny_model


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
    monkeypatch.setattr(
        attention_dense, "_related", lambda query, key: torch.ones_like(key, dtype=bool)
    )
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
    with pytest.raises(ValueError, match="Bloom.*AttentionInterface"):
        check_model(wrap(hf.BloomForCausalLM(config)), some_pairs())


def test_dropout_that_a_layer_keeps_as_a_number_is_off() -> None:
    """OPT's and BioGPT's is no nn.Dropout, and layers may be left out whole."""
    module = tiny_model("opt", torch.float32, dropout=0.5, layerdrop=0.5).train()
    assert check_model(packed(module), PAIRS) < 1e-4


def test_bfloat16_is_checked_in_float32_so_that_a_small_mistake_shows() -> None:
    """A head that is 3 % off: less than what rounding to bfloat16 may do to a gradient."""
    module = llama()
    head = module.lm_head.forward
    module.lm_head.forward = lambda x: head(x) * 1.03
    with pytest.raises(ValueError, match="torch.float32 explains"):
        check_model(wrap(module, torch.bfloat16), some_pairs())


def test_not_finite_in_bfloat16_alone() -> None:
    module = llama()
    forward = module.model.norm.forward

    def narrow(x: torch.Tensor) -> torch.Tensor:
        return forward(x) * (torch.inf if torch.is_autocast_enabled("cpu") else 1.0)

    module.model.norm.forward = narrow
    with pytest.raises(ValueError, match="not finite in torch.bfloat16.*dtype: float32"):
        check_model(wrap(module, torch.bfloat16), some_pairs())


def test_a_model_that_fails_by_itself_is_not_called_unsupported() -> None:
    module = llama()

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("some weight")

    module.model.norm.forward = broken
    with pytest.raises(ValueError, match="cannot compute in torch.float32: 'some weight'") as error:
        check_model(wrap(module), some_pairs())
    assert "not supported" not in str(error.value)


def test_no_memory_is_not_called_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(llama())

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 8 GiB.")

    monkeypatch.setattr(selfcheck, "_packed", full)
    with pytest.raises(ValueError, match="8 GiB. Set max_tokens_per_microbatch") as error:
        check_model(model, some_pairs())
    assert "not supported" not in str(error.value)


def test_the_comparison_stays_within_the_runs_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 + 5, 10, 7 fed tokens are the longest and the others: 16 + 7 fit into 25, 33 do not."""
    seen: list[list[int]] = []

    def noted(model: PairModel, pairs: list[TokenPair]) -> Any:
        seen.append([len(p.prompt) for p in pairs])
        return packed(model, pairs)

    packed = selfcheck._packed
    monkeypatch.setattr(selfcheck, "_packed", noted)
    model = wrap(llama())
    for budget, prompts in ((None, [12, 3, 9, 5]), (25, [12, 3]), (1, [12])):
        check_model(model, some_pairs(), budget)
        assert seen.pop() == prompts


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
    with pytest.raises(ValueError, match="(?s)cannot be loaded.*pytorch_model.bin. are not read"):
        load_model(Config(model_name_or_path=str(pickled), max_length=64))
    for name in (str(tmp_path / "none"), "./none", "runs/none/final"):
        with pytest.raises(ValueError, match="cannot be loaded: there is no such folder"):
            load_model(Config(model_name_or_path=name))


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
