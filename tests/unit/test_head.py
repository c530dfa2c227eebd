"""The head alone learns: what is frozen, untied and saved, and gradients over cached states."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastpref.config import Config
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.features import with_features
from fastpref.head import freeze_body
from fastpref.loading import prepare
from fastpref.losses import LOSSES
from fastpref.model import PairModel
from fastpref.step import backward

V = 61
REFERENCE = {"ref_chosen": -20.0, "ref_rejected": -21.0}


def build(name: str) -> Any:
    """A random two-layer model; "-tied": of an architecture that ties its head by default."""
    import transformers as hf

    torch.manual_seed(0)
    no_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    base = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base |= {"intermediate_size": 24, "initializer_range": 0.2, **no_ids}
    few = {**base, "num_key_value_heads": 1}
    match name:
        case "llama":
            return hf.LlamaForCausalLM(hf.LlamaConfig(**few))
        case "llama-tied":
            return hf.LlamaForCausalLM(hf.LlamaConfig(tie_word_embeddings=True, **few))
        case "gemma2-tied":  # softcap, scaled embedding
            own = {"head_dim": 8, "final_logit_softcapping": 5.0}
            return hf.Gemma2ForCausalLM(hf.Gemma2Config(**own, **few))
        case "cohere-tied":
            return hf.CohereForCausalLM(hf.CohereConfig(logit_scale=0.25, **few))
        case "granite-tied":
            own = {"logits_scaling": 3.0, "tie_word_embeddings": True}
            return hf.GraniteForCausalLM(hf.GraniteConfig(**own, **few))
        case "qwen3-tied":
            own = {"head_dim": 8, "tie_word_embeddings": True}
            return hf.Qwen3ForCausalLM(hf.Qwen3Config(**own, **few))
        case "phi":  # a bias
            return hf.PhiForCausalLM(hf.PhiConfig(**base))
        case "gpt-neox":
            return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**base))
        case "gpt2-tied":
            sizes = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
            return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, initializer_range=0.2, **no_ids))
    raise AssertionError(name)


NAMES = ["llama", "llama-tied", "gemma2-tied", "cohere-tied", "granite-tied", "qwen3-tied"]
NAMES += ["phi", "gpt-neox", "gpt2-tied"]


def pair(n: int, prompt: int, common: int, chosen: int, rejected: int) -> TokenPair:
    rng = np.random.default_rng(n)
    start, rest = rng.integers(0, V, common), [rng.integers(0, V, k) for k in (chosen, rejected)]
    if chosen and rejected:
        rest[1][0] = (rest[0][0] + 1) % V
    ids = [rng.integers(0, V, prompt), np.r_[start, rest[0]], np.r_[start, rest[1]]]
    return TokenPair(n, 0, "", *(x.astype(np.int32) for x in ids), False, **REFERENCE)


PAIRS = [pair(0, 9, 0, 1, 1), pair(1, 3, 4, 6, 2), pair(2, 5, 3, 0, 2), pair(3, 1, 0, 2, 5)]


def paired(module: Any) -> PairModel:
    prepare(module)
    return PairModel(module, None, torch.device("cpu"), torch.float64, "")


@pytest.mark.parametrize("name", NAMES)
def test_over_cached_states_the_head_has_the_gradient_that_it_has_over_the_body(
    name: str, tmp_path: Path
) -> None:
    model = paired(build(name).double())
    loss, config = LOSSES["ipo"], Config(beta=0.3, loss_type="ipo")
    # All weights learn; a tied one would collect the embedding's gradient too.
    layer = model.module.get_output_embeddings()  # type: ignore[operator]
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    whole = backward(model, pack_pairs(PAIRS), loss, config, len(PAIRS), "exact")
    expected = [p.grad.clone() for p in layer.parameters()]
    assert any(p.grad is not None for p in model.module.base_model.parameters())

    model = freeze_body(paired(build(name).double()))
    features = with_features(model, PAIRS, cache_dir=str(tmp_path), progress=False)
    ours = backward(model, features.pack(PAIRS), loss, config, len(PAIRS), "exact")
    # To rounding: a row of a product has other last bits on some processors where other rows are
    # computed beside it. Entries of a gradient are sums that may cancel.
    close = functools.partial(torch.testing.assert_close, rtol=1e-13)
    close(ours.loss, whole.loss, atol=0)
    close(ours.weight, whole.weight, atol=0)
    close(ours.norms, whole.norms, atol=0)
    layer = model.module.get_output_embeddings()  # type: ignore[operator]
    assert model.trained == list(layer.parameters())
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        close(parameter.grad, grad, atol=1e-14 * float(grad.abs().max()))
    assert all(p.grad is None for p in model.module.base_model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_head_is_saved_and_loads_as_any_other(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = freeze_body(paired(build(name)))
    module: Any = model.module
    body = {n: p.clone() for n, p in module.base_model.state_dict().items()}
    with torch.no_grad():
        model.head.weight.add_(torch.randn_like(model.head.weight))
    module.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not loaded.config.get_text_config().tie_word_embeddings
    assert torch.equal(loaded.get_output_embeddings().weight, model.head.weight)
    for n, tensor in loaded.base_model.state_dict().items():
        assert torch.equal(tensor, body[n]), n
    ids = torch.arange(7)[None]
    with torch.no_grad(), model.plain_attention():
        torch.testing.assert_close(loaded(ids).logits, module(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_only_a_tied_head_is_copied_and_the_log_says_so(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = build(name)
    tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert tied == name.endswith("-tied")
    weight = module.get_output_embeddings().weight
    before = weight.detach().clone()
    with caplog.at_level("INFO"):
        model = freeze_body(paired(module))
    assert (model.head.weight is weight) == (not tied)
    assert torch.equal(model.head.weight, before)
    assert ("tied to the embedding" in caplog.text) == tied
    assert model.frozen_body and not model.module.get_input_embeddings().weight.requires_grad  # type: ignore[operator]


def test_models_without_a_linear_head_are_refused() -> None:
    module = build("llama")
    module.lm_head = nn.Bilinear(2, 2, V)
    with pytest.raises(ValueError, match="LlamaForCausalLM has Bilinear. Set trainable: all"):
        freeze_body(paired(module))
    module.set_output_embeddings(None)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no output head"):
        _ = paired(module).head
    with pytest.raises(ValueError, match="needs a linear output head"):
        freeze_body(paired(module))
