"""Features from a packed pass against transformers' own forward of each prompt by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpref import frozen
from fastpref.config import load_config
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.frozen import check_features, first_tokens, prefix_features
from fastpref.loading import load_model, prepare
from fastpref.model import PairModel

YES, NO, EOS = 7, 9, 0


def pair(prompt: list[int], chosen: list[int], rejected: list[int], number: int = 0) -> TokenPair:
    ids = (np.array(part, np.int32) for part in (prompt, chosen, rejected))
    return TokenPair(number, 0, "", *ids, truncated=())


def some_pairs(vocabulary: int = 250) -> list[TokenPair]:
    """Prompts with long, short and no common start, one that another begins with, one twice."""
    rng = np.random.default_rng(3)
    frame = rng.integers(20, vocabulary, 12).tolist()
    prompts = [frame + rng.integers(20, vocabulary, n).tolist() for n in (3, 8, 1, 5, 30)]
    prompts += [rng.integers(20, vocabulary, n).tolist() for n in (1, 4, 17)]
    prompts += [prompts[1][:-2], prompts[0]]
    return [pair(prompt, [YES, EOS], [NO, EOS], n) for n, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PairModel:
    return load_model(
        load_config(None, {"model_name_or_path": str(tiny_model_dir), "dtype": "float64",
                           "max_length": "128"})
    )  # fmt: skip


def plain_states(model: PairModel, pairs: list[TokenPair]) -> np.ndarray:
    """(P, D) float64 last hidden states, a forward for each prompt."""
    rows = []
    with model.plain_attention(), torch.no_grad():
        for own in pairs:
            ids = torch.from_numpy(own.prompt.astype(np.int64))[None]
            out: Any = model.module(ids, output_hidden_states=True, use_cache=False)
            rows.append(out.hidden_states[-1][0, -1].double().numpy())
    return np.stack(rows)


def test_first_tokens() -> None:
    pairs = [
        pair([5, 6], [YES], [NO]),
        pair([5, 6], [YES, EOS], [NO, EOS]),
        pair([5], [8, 8, YES, 4], [8, 8, NO]),
        pair([5], [YES], [YES, 4]),  # one begins with the other
        pair([], [YES, 3], [NO, 3]),  # nothing predicts the first token
        pair([], [8, YES], [8, NO]),
    ]
    found = first_tokens(pairs, EOS)
    assert [p.prompt.tolist() for p in found.pairs] == [[5, 6], [5, 6], [5, 8, 8], [8]]
    assert all((p.chosen, p.rejected) == ([YES], [NO]) for p in found.pairs)
    assert (found.shared_start, found.longer, found.ended) == (2, 2, 1)
    assert found.without == [pairs[3], pairs[4]]


@pytest.mark.parametrize("max_tokens", [47, 10_000])
def test_features_are_the_models_own(model: PairModel, max_tokens: int) -> None:
    pairs = first_tokens(some_pairs()).pairs
    found = prefix_features(model, pairs, max_tokens=max_tokens)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, plain_states(model, pairs), rtol=1e-9, atol=1e-11)


def test_common_starts_are_computed_once(model: PairModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = first_tokens(some_pairs()).pairs
    fed: list[int] = []
    hidden = PairModel.hidden
    monkeypatch.setattr(
        PairModel, "hidden", lambda self, batch: fed.append(batch.num_tokens) or hidden(self, batch)
    )
    shared = prefix_features(model, pairs, max_tokens=10_000)
    monkeypatch.setattr(frozen, "WORTH_SHARING", 0)
    apart = prefix_features(model, pairs, max_tokens=10_000)
    distinct = {tuple(p.prompt.tolist()) for p in pairs}
    assert fed[1] == sum(map(len, distinct)) and fed[0] <= fed[1] - 3 * 12
    np.testing.assert_allclose(shared, apart, rtol=1e-9, atol=1e-11)


def test_a_prompt_beyond_the_budget_is_named(model: PairModel) -> None:
    with pytest.raises(ValueError, match="max_tokens_per_microbatch is 20"):
        prefix_features(model, first_tokens(some_pairs()).pairs, max_tokens=20)


def test_double_norm_is_the_official_one(model: PairModel) -> None:
    pairs = first_tokens(some_pairs()).pairs
    states = plain_states(model, pairs)
    gamma = model.module.base_model.norm.weight  # type: ignore[union-attr]
    with torch.no_grad():
        gamma.copy_(torch.linspace(0.3, 2.0, len(gamma)))
    try:
        states = plain_states(model, pairs)
        found = prefix_features(model, pairs, max_tokens=500, double_norm=True)
        again = states / np.sqrt((states**2).mean(1, keepdims=True) + 1e-5) * gamma.detach().numpy()
        np.testing.assert_allclose(found, again, rtol=2e-6, atol=1e-7)
        assert abs(again - states).max() > 0.1
        once = prefix_features(model, pairs, max_tokens=500)  # the model's own norm is untouched
        np.testing.assert_allclose(once, states, rtol=1e-9, atol=1e-11)
    finally:
        with torch.no_grad():
            gamma.fill_(1.0)


def other_model(kind: str) -> PairModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 500, "hidden_size": 16, "num_hidden_layers": 1, "bos_token_id": None}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 0}
    own: dict[str, Any] = {
        "granite": {"logits_scaling": 4.0, "intermediate_size": 24},
        "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8, "intermediate_size": 24},
        "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 1},
    }[kind]
    small = {"vocab_size": 500} if kind == "gpt2" else small
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind, **small, **own)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    prepare(module)
    return PairModel(module, None, torch.device("cpu"), torch.float64, kind)


@pytest.mark.parametrize("kind", ["granite", "gemma2", "gpt2"])
def test_other_heads(kind: str) -> None:
    """A logit scale is in the features, a cap is not; LayerNorm can be repeated too."""
    model = other_model(kind)
    pairs = first_tokens(some_pairs()).pairs
    found = prefix_features(model, pairs, max_tokens=500)
    scale = 0.25 if kind == "granite" else 1.0
    states = plain_states(model, pairs)
    np.testing.assert_allclose(found, scale * states, rtol=1e-5, atol=1e-7)
    assert check_features(model, pairs) < 1e-5
    if kind == "gpt2":
        twice = prefix_features(model, pairs, max_tokens=500, double_norm=True)
        again = states - states.mean(1, keepdims=True)
        again /= np.sqrt(states.var(1, keepdims=True) + 1e-5)  # weight 1, bias 0
        np.testing.assert_allclose(twice, again, rtol=1e-9, atol=1e-11)


def test_a_head_of_its_own_kind_is_refused(model: PairModel) -> None:
    pairs = first_tokens(some_pairs()).pairs
    assert check_features(model, pairs) < 1e-9
    head: Any = model.module.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_hook(lambda module, args, out: out * 1.5)
    try:
        with pytest.raises(ValueError, match="LlamaForCausalLM .* differ from the model's own"):
            check_features(model, pairs)
    finally:
        hook.remove()
    wrong = dataclasses.replace(model, module=model.module)
    with torch.no_grad():
        kept = head.weight.clone()
        head.weight[3] = torch.nan
    try:
        with pytest.raises(ValueError, match="logits are not finite"):
            check_features(wrong, pairs)
    finally:
        with torch.no_grad():
            head.weight.copy_(kept)


def test_double_norm_of_a_model_that_ends_in_none(model: PairModel) -> None:
    body: Any = model.module.base_model
    norm, body.norm = body.norm, torch.nn.Identity()
    try:
        with pytest.raises(ValueError, match="LlamaForCausalLM does not end in a norm"):
            pairs = first_tokens(some_pairs()).pairs
            prefix_features(model, pairs, max_tokens=500, double_norm=True)
    finally:
        body.norm = norm


def test_an_evaluation_sees_the_same_features(model: PairModel) -> None:
    pairs = [
        *some_pairs(),
        pair([30, 31], [8, 8, YES, 4], [8, 8, NO], 97),  # they part at the third token
        pair([30], [YES], [YES, 4], 98),  # and here behind the whole chosen one
    ]
    seen = model.logp_and_features(pack_pairs(pairs))[1].detach()
    firsts = first_tokens(pairs, EOS).pairs
    expected = prefix_features(model, [*firsts, pair([30, YES], [1], [2])], max_tokens=500)
    np.testing.assert_allclose(seen.numpy(), expected, rtol=0, atol=1e-12)
