"""One packed, prefix-shared batch = one plain forward and backward per sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref import loading
from fastpref.config import Config
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.losses import LOSSES, LossOptions, PairLogp
from fastpref.model import PairModel
from fastpref.step import backward

V = 61
SHAPE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BETA = 0.3


def build(name: str) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    extra: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2}
    llama = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, **extra}
    if name == "gpt2":
        # With dropout: `prepare` must switch it off.
        config = hf.GPT2Config(
            vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5, **extra
        )
        return hf.GPT2LMHeadModel(config)
    if name == "gemma2":  # soft caps in attention and head, windows in every second layer
        own = {"head_dim": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(sliding_window=5, **own, **llama))
    if name == "mistral":
        return hf.MistralForCausalLM(hf.MistralConfig(sliding_window=5, **llama))
    if name == "llama-tied":
        return hf.LlamaForCausalLM(hf.LlamaConfig(tie_word_embeddings=True, **llama))
    return hf.LlamaForCausalLM(hf.LlamaConfig(attention_dropout=0.5, **llama))


def pair(n: int, prompt: int, common: int, chosen: int, rejected: int) -> TokenPair:
    rng = np.random.default_rng(n)
    start = rng.integers(0, V, common)
    rest = [rng.integers(0, V, k) for k in (chosen, rejected)]
    if chosen and rejected:
        rest[1][0] = (rest[0][0] + 1) % V
    ids = [rng.integers(0, V, prompt), np.r_[start, rest[0]], np.r_[start, rest[1]]]
    return TokenPair(n, 0, "", *(x.astype(np.int32) for x in ids), truncated=False)


# One token each; common starts; one completion that begins the other; lengths that need blocks of
# their own and lengths that are gathered together with padding; longer than Mistral's window.
PAIRS = [
    pair(0, 9, 0, 1, 1),
    pair(1, 3, 4, 6, 2),
    pair(2, 14, 2, 9, 12),
    pair(3, 8, 0, 3, 1),
    pair(4, 5, 3, 0, 2),
    pair(5, 1, 0, 2, 5),
    pair(6, 8, 1, 2, 2),
]
REFERENCE = torch.linspace(-30, -20, 2 * len(PAIRS), dtype=torch.float64).view(2, -1)


def plain_logp(module: Any, prompt: np.ndarray, completion: np.ndarray) -> tuple[Tensor, Tensor]:
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
    logits = module(input_ids=ids[None], use_cache=False).logits[0]
    scored = logits[len(prompt) - 1 : -1]
    own = ids[len(prompt) :]
    return logits, (scored.log_softmax(-1).gather(1, own[:, None])).sum()


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("gpt2", 1e-12), ("llama", 1e-6), ("llama-tied", 1e-6), ("mistral", 1e-6), ("gemma2", 1e-6)],
)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_values_and_every_gradient(name: str, tolerance: float, loss_type: str) -> None:
    module = build(name).double()
    loss = LOSSES[loss_type]

    # Plain: transformers' own forward, one sequence at a time, no dropout.
    module.eval()
    rows = [[plain_logp(module, p.prompt, y)[1] for y in (p.chosen, p.rejected)] for p in PAIRS]
    chosen, rejected = torch.stack([torch.stack(row) for row in rows]).unbind(1)
    lengths = torch.tensor([[len(p.chosen), len(p.rejected)] for p in PAIRS]).unbind(1)
    x = PairLogp(chosen, rejected, *REFERENCE, *lengths)
    plain_loss = loss.fn(x, LossOptions(beta=BETA))
    (plain_loss.sum() / 5).backward()
    expected = {n: p.grad.clone() for n, p in module.named_parameters()}
    with torch.no_grad():
        logits = [plain_logp(module, p.prompt, p.rejected)[0] for p in PAIRS]

    # Packed.
    module.zero_grad()
    module.train()
    loading.prepare(module)
    packed = PairModel(module, None, torch.device("cpu"), torch.float64, "")
    batch = pack_pairs(PAIRS)
    batch = type(batch)(**{**vars(batch), "ref_chosen": REFERENCE[0], "ref_rejected": REFERENCE[1]})
    config = Config(beta=BETA, loss_type=loss_type)
    result = backward(packed, batch, loss, config, num_pairs=5)

    torch.testing.assert_close(result.x.chosen, chosen.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(result.x.rejected, rejected.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(result.loss, plain_loss.detach(), rtol=10 * tolerance, atol=0)
    for n, p in module.named_parameters():
        error = (p.grad - expected[n]).norm() / expected[n].norm()
        assert error <= tolerance, f"gradient of {n}: relative error {error:.1e}"

    # Logits of the rejected sequence, prefix and rest, from the packed hidden states.
    with torch.no_grad():
        ours = packed.hidden(batch) @ packed.head.weight.T
        if packed.head.softcap:
            ours = packed.head.softcap * torch.tanh(ours / packed.head.softcap)
    start = 0
    for (prefix, own_chosen, own_rejected), full in zip(batch.lengths, logits, strict=True):
        rest = start + prefix + own_chosen
        mine = torch.cat([ours[start : start + prefix], ours[rest : rest + own_rejected]])
        error = (mine - full[: len(mine)]).abs().max() / full.abs().max()
        assert error <= tolerance
        start = rest + own_rejected


def test_order_and_composition_of_a_batch_change_nothing() -> None:
    module = build("llama").double()
    loading.prepare(module)
    packed = PairModel(module, None, torch.device("cpu"), torch.float64, "")
    with torch.no_grad():
        together = packed.logp(pack_pairs(PAIRS)).logp.view(-1, 3)
        backwards = packed.logp(pack_pairs(PAIRS[::-1])).logp.view(-1, 3).flip(0)
        alone = torch.stack([packed.logp(pack_pairs([p])).logp for p in PAIRS])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(together, backwards, rtol=1e-6, atol=1e-12)
