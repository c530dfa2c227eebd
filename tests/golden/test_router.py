"""Mixtures of experts: their load-balancing loss is TRL's, whatever the packing; runs go on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.data.pack import pack_pairs
from fastpref.losses import get_loss
from fastpref.model import PairModel
from fastpref.optim import build_optimizer
from fastpref.router import find_router
from fastpref.step import train_step
from fastpref.train import train
from tests.architectures import PAIRS, InFloat64, packed, tiny_config, tiny_model
from tests.golden import test_trl_parity as parity
from tests.golden.test_ranks import run_on_two

COEF = 0.3
REFERENCE = torch.linspace(-30, -20, 2 * len(PAIRS), dtype=torch.float64).view(2, -1)
GIVEN = [
    dataclasses.replace(pair, ref_chosen=float(c), ref_rejected=float(r))
    for pair, c, r in zip(PAIRS, *REFERENCE, strict=True)
]


def mixture(model_type: str) -> PairModel:
    model = packed(tiny_model(model_type))
    return dataclasses.replace(model, router=find_router(model.module.config, COEF))


def stepped(model: PairModel, batches: list[list[Any]]) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, aux_loss and gradients of one optimizer step that changes nothing."""
    config = Config(beta=0.3, learning_rate=0.0, optim="sgd", max_grad_norm=0.0)
    optimizer = build_optimizer(model.module.named_parameters(), config)
    packs = (pack_pairs(pairs, whole=True) for pairs in batches)
    result = train_step(
        model, packs, get_loss(config.loss_type), config, len(PAIRS), optimizer, None
    )
    assert result.aux_loss is not None
    grads = {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}
    return float(result.loss), float(result.aux_loss), grads


def padded(module: Any) -> tuple[Tensor, Tensor]:
    """As TRL has it, of one padded batch: the mean of DPO's loss, and transformers' aux_loss."""
    rows = [np.r_[p.prompt, y] for p in PAIRS for y in (p.chosen, p.rejected)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(rows):
        ids[row, : len(own)], mask[row, : len(own)] = torch.from_numpy(own.astype(np.int64)), 1
    out = module(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    logp = out.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    prompts = torch.tensor([len(p.prompt) for p in PAIRS]).repeat_interleave(2)[:, None]
    scored = (torch.arange(1, ids.shape[1]) >= prompts) & mask[:, 1:].bool()
    chosen, rejected = (logp * scored).sum(dim=1).view(-1, 2).T - REFERENCE
    return -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean(), out.aux_loss


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_one_step_is_the_padded_one(model_type: str) -> None:
    module = tiny_model(model_type)
    module.set_experts_implementation("eager")
    with InFloat64():
        loss, aux = padded(module)
        (loss + COEF * aux).backward()
        expected = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        ours, our_aux, grads = stepped(mixture(model_type), [GIVEN])
    assert our_aux == pytest.approx(float(aux), rel=1e-9) and 1.5 < our_aux
    assert ours == pytest.approx(float(loss + COEF * aux), rel=1e-6)  # references are float32
    for name, grad in expected.items():
        error = (grads[name] - grad).norm() / max(float(grad.norm()), 1e-6)
        assert error <= 1e-6, f"gradient of {name}: {error:.1e}"
    routers = [n for n in expected if n.endswith(("gate.weight", "router.weight"))]
    assert routers and all(expected[n].norm() > 1e-3 for n in routers)


def test_micro_batches_are_invisible() -> None:
    """Together, in two parts and one by one: the same loss and gradient."""
    with InFloat64():
        whole = stepped(mixture("mixtral"), [GIVEN])
        for batches in ([GIVEN[:3], GIVEN[3:]], [[pair] for pair in GIVEN]):
            loss, aux, grads = stepped(mixture("mixtral"), batches)
            assert loss == pytest.approx(whole[0], rel=1e-6)
            assert aux == pytest.approx(whole[1], rel=1e-12)
            for name, grad in whole[2].items():
                torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-12)


def test_what_a_pair_counts() -> None:
    """Every token of both sequences, last ones included: a prefix twice, a rest once."""
    batch = pack_pairs(PAIRS, whole=True)
    counted = batch.sequences_of_token()
    assert int(counted.sum()) == sum(
        2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in PAIRS
    )
    first = PAIRS[1]  # prompt 3, common 4, rests 6 and 2
    assert counted[batch.pair_of_token == 1].tolist() == [2] * 7 + [1] * 8
    tokens = batch.tokens[batch.pair_of_token == 1]
    assert tokens.tolist() == [*first.prompt, *first.chosen, *first.rejected[4:]]
    batch.check()
    short = pack_pairs(PAIRS)
    for name in ("target", "segment_id", "chosen_scored", "rejected_scored"):
        assert torch.equal(getattr(batch, name), getattr(short, name))
    for at, short_at in zip(batch.rows, short.rows, strict=True):
        assert batch.tokens[at] == short.tokens[short_at]
        assert batch.positions[at] == short.positions[short_at]


@pytest.fixture(scope="module")
def mixture_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random Mixtral in Hugging Face's layout, experts apart in its files. Read-only."""
    from transformers import MixtralForCausalLM

    folder = tmp_path_factory.mktemp("tiny-mixtral")
    config = tiny_config(
        "mixtral",
        vocab_size=len(tiny_tokenizer),
        max_position_embeddings=256,
        sliding_window=None,
        initializer_range=0.2,
        router_aux_loss_coef=COEF,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(mixture_dir: Path, tiny_data: Path, tmp_path: Path) -> Config:
    return Config(
        model_name_or_path=str(mixture_dir),
        dataset_name=(str(tiny_data),),
        output_dir=str(tmp_path / "run"),
        ref_cache_dir=str(tmp_path / "reference"),
        max_length=96,
        train_batch_size=8,
        max_tokens_per_microbatch=200,
        learning_rate=1e-2,
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        logging_steps=1,
    )


def lines(run: Path, split: str = "train") -> list[dict[str, Any]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["split"] == split]


def test_a_run_and_its_continuation(config: Config, tmp_path: Path) -> None:
    """Bit for bit, with fused experts whose files hold them apart; the model's own coefficient."""
    straight = train(
        dataclasses.replace(config, output_dir=str(tmp_path / "straight")), progress=False
    )
    train(dataclasses.replace(config, max_steps=2), progress=False)
    resumed = train(config, progress=False)
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()
    steps = lines(straight)
    assert all(line["aux_loss"] > 1.5 and line["loss"] > COEF * line["aux_loss"] for line in steps)
    without = train(
        dataclasses.replace(config, router_aux_loss_coef=0.0, output_dir=str(tmp_path / "zero")),
        progress=False,
    )
    assert not any("aux_loss" in line for line in lines(without))
    first, plain = steps[0], lines(without)[0]
    assert first["loss"] == pytest.approx(plain["loss"] + COEF * first["aux_loss"], rel=1e-5)


@pytest.mark.slow
def test_same_trajectory_as_trl(
    mixture_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    monkeypatch.setattr(parity, "STEPS", 12)
    case = parity.Case("sigmoid", "sgd", 0.2, 0.0, "linear", 1e-6, 2e-7, 1e-4)
    rows = parity.pairs()
    theirs, _ = parity.run_trl(case, rows, mixture_dir, tmp_path / "trl")
    ours, _ = parity.run_fastpref(case, rows, mixture_dir, tmp_path / "fastpref")
    for key in (*parity.LOGGED, "aux_loss"):
        if key == "rewards/accuracies":  # rounding decides it where every margin is 0
            continue
        a, b = (np.array([line[key] for line in side]) for side in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=key)
    assert np.ptp([line["aux_loss"] for line in theirs]) > 1e-3


@pytest.mark.slow
def test_two_ranks_equal_one(config: Config, tmp_path: Path) -> None:
    """The balance is that of all ranks' tokens together."""
    one = train(config, progress=False)
    changed = dataclasses.asdict(dataclasses.replace(config, output_dir=str(tmp_path / "two")))
    given = ("model_name_or_path", "ref_cache_dir", "max_length", "train_batch_size", "max_steps")
    given += ("max_tokens_per_microbatch", "learning_rate", "save_steps", "eval_steps")
    options = {name: str(changed[name]) for name in (*given, "logging_steps")}
    run_on_two({**options, "dataset_name": config.dataset_name[0]}, tmp_path / "two")
    for ours, theirs in zip(lines(tmp_path / "two"), lines(one), strict=True):
        for key in ("aux_loss", "loss", "grad_norm", "rewards/margins"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


def test_refused(config: Config, tiny_model_dir: Path) -> None:
    from fastpref.loading import load_model

    with pytest.raises(ValueError, match="router_aux_loss_coef=0.1: llama is no mixture"):
        load_model(
            dataclasses.replace(
                config, model_name_or_path=str(tiny_model_dir), router_aux_loss_coef=0.1
            )
        )
    lora = dataclasses.replace(config, trainable="lora", lora_dropout=0.1)
    with pytest.raises(ValueError, match="lora_dropout=0.1: the load-balancing loss"):
        load_model(lora)
    with pytest.raises(ValueError, match="dbrx does not say how many experts"):
        find_router(tiny_config("dbrx"), 0.1)
    assert find_router(tiny_config("llama"), None) is None
    assert find_router(tiny_config("mixtral"), 0.0) is None


def test_a_balance_that_comes_out_otherwise_is_refused() -> None:
    from fastpref.selfcheck import check_model

    model = mixture("mixtral")
    assert model.router
    check_model(model, PAIRS)
    other = dataclasses.replace(model, router=dataclasses.replace(model.router, top_k=1))
    model.module.base_model.forward = _with_other_logits(model.module.base_model.forward)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="comes out as .* Set router_aux_loss_coef: 0"):
        check_model(model, PAIRS)
    model.module.base_model.forward = _without_logits(model.module.base_model.forward)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="shows no layer.* Set router_aux_loss_coef: 0"):
        check_model(other, PAIRS)


def _with_other_logits(forward: Any) -> Any:
    def changed(*given: Any, **named: Any) -> Any:
        out = forward(*given, **named)
        if named.get("output_router_logits") and "pair_layout" in named:
            out.router_logits = tuple(2 * layer for layer in out.router_logits)
        return out

    return changed


def _without_logits(forward: Any) -> Any:
    def changed(*given: Any, **named: Any) -> Any:
        out = forward(*given, **named)
        if named.get("output_router_logits"):
            out.router_logits = ()
        return out

    return changed
