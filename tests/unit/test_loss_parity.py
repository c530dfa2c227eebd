"""Every loss, and every option of them, against TRL's own `_compute_loss`: loss, gradient, metrics.

TRL gets the same weights and pairs in its own padded layout. Its fused head accumulates in float32,
which would be all that the comparison sees, so a plain float64 head of the same outputs stands in
its place (tests/golden/test_trl_parity.py runs TRL as it is). What it makes of them is its own
code. What differences are left, some 1e-7, come from the norms of transformers' Llama, which
compute in float32 whatever the model's dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastpref.config import Config
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.loading import load_model
from fastpref.losses import get_loss
from fastpref.model import PairModel
from fastpref.observe import metric_sums, metrics_of
from fastpref.reference import sequence_logp
from fastpref.step import PairResult, backward

trl = pytest.importorskip("trl")

LENGTHS = [(3, 2, 7, 0), (9, 6, 6, 3), (5, 1, 1, 0), (2, 8, 3, 2), (7, 4, 5, 4), (4, 5, 2, 1)]
SHARED_LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
OTHERS = ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")


def make_pairs(vocab: int) -> list[TokenPair]:
    """Prompts and completions of many lengths; some completions begin alike, one is a prefix."""
    rng = np.random.default_rng(3)

    def draw(n: int) -> np.ndarray:
        return rng.integers(2, vocab, n).astype(np.int32)

    pairs = []
    for i, (prompt, chosen, rejected, common) in enumerate(LENGTHS):
        start = draw(common)
        own = [np.concatenate([start, draw(n - common)]) for n in (chosen, rejected)]
        pairs.append(TokenPair(i, 0, "", draw(prompt), own[0], own[1], False))
    return pairs


class PlainHead(nn.Module):
    """A causal LM that gives what TRL's fused head gives, from float64 logits written out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, input_ids: Any, attention_mask: Any, labels: Any, **_: Any
    ) -> SimpleNamespace:
        logits = self.module(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        labels = labels[:, 1:]
        mask = labels != -100
        target = labels.clamp(min=0)[..., None]
        logp = logits.log_softmax(-1)
        p = logp.exp()
        found = {
            "log_probs": logp.gather(-1, target)[..., 0],
            "entropy": -(p * logp).sum(-1),
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1, keepdim=True)[..., 0] == target[..., 0],
            "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        }
        return SimpleNamespace(**{k: v.masked_fill(~mask, 0) for k, v in found.items()})


class TorchForTrl:
    """torch, where float64 also goes by the name float32: TRL clamps the alpha divergence's
    exponent by a table of dtypes that lacks float64, and forms the exponential in float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@dataclasses.dataclass
class Both:
    """TRL's trainer and our model, with the same weights, pairs and reference."""

    trainer: Any
    batch: dict[str, torch.Tensor]  # TRL's collated one
    policy: nn.Module
    their_reference: nn.Module
    ours: PairModel
    reference: PairModel
    pairs: list[TokenPair]

    def theirs(self, config: Config) -> tuple[float, dict[str, Any], list[Any]]:
        """TRL's loss, metrics and gradients by parameter."""
        trainer = self.trainer
        trainer.loss_types = list(config.loss_type)
        trainer.loss_weights = list(config.loss_weights) or [1.0] * len(config.loss_type)
        names = ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef")
        for name in (*names, "ld_alpha", "use_weighting"):
            setattr(trainer, name, getattr(config, name))
        trainer.args.discopop_tau = config.discopop_tau
        trainer._metrics["train"].clear()
        trainer.model.train()
        self.policy.zero_grad()
        trainer.ref_model = PlainHead(self.their_reference)
        loss = trainer._compute_loss(PlainHead(self.policy), self.batch, False)
        loss.backward()
        metrics = {k: v[0] for k, v in trainer._metrics["train"].items()}
        return loss.item(), metrics, [p.grad.clone() for p in self.policy.parameters()]

    def mine(self, config: Config) -> tuple[float, PairResult, list[Any]]:
        """Our loss, result and gradients by parameter."""
        loss = get_loss(config.loss_type, config.loss_weights)
        batch = pack_pairs(self.pairs)
        chosen, rejected = sequence_logp(self.reference, batch, config.ld_alpha)
        batch = dataclasses.replace(batch, ref_chosen=chosen, ref_rejected=rejected)
        if config.ld_alpha is not None:
            batch = batch.with_tails()
        self.ours.module.zero_grad()
        result = backward(self.ours, batch, loss, config, len(self.pairs))
        grads = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for p in self.ours.module.parameters()
        ]
        return result.loss.mean().item(), result, grads


def model_with_noise(folder: Path, seed: int, size: float, packed: bool) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    if packed:
        model = load_model(Config(model_name_or_path=str(folder), max_length=64, dtype="float64"))
        module = model.module
    else:
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))
    return model if packed else module


@pytest.fixture(scope="module")
def both(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    from datasets import Dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
        trainer = trl.DPOTrainer(
            str(tiny_model_dir),
            args=trl.DPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                bf16=False,
                use_cpu=True,
                report_to="none",
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
        )
        models = [
            model_with_noise(tiny_model_dir, seed, size, packed)
            for packed in (False, True)
            for seed, size in ((1, 0.05), (2, 0.02))
        ]
        pairs = make_pairs(models[0].config.vocab_size)
        rows = [
            {f"{k}_ids": getattr(p, k).tolist() for k in ("prompt", "chosen", "rejected")}
            for p in pairs
        ]
        patch.setattr("trl.trainer.dpo_trainer.torch", TorchForTrl())
        yield Both(trainer, trainer.data_collator(rows), *models, pairs)


def config(loss_type: Any, **options: Any) -> Config:
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    if "exo_pair" in names:
        options.setdefault("label_smoothing", 0.01)
    return Config(loss_type=names, **{"beta": 0.3, **options})


CASES: dict[str, Config] = {
    **{name: config(name) for name in (*SHARED_LOSSES, *OTHERS, "sft")},
    **{
        f"{name}-smooth": config(name, label_smoothing=0.2)
        for name in ("exo_pair", "robust", "aot", "aot_unpaired")
    },
    "discopop-tau": config("discopop", discopop_tau=0.7),
    **{
        f"{name}-{kind}": config(name, f_divergence_type=kind)
        for name in SHARED_LOSSES
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "alpha-0": config("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.0),
    "alpha-1": config("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    "alpha-1.5": config(
        "sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.5
    ),
    "mpo": config(("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0)),
    "list": config(("sigmoid", "ipo", "aot")),
    "list-js": config(
        ("sigmoid", "sft"), loss_weights=(1.0, 0.5), f_divergence_type="js_divergence"
    ),
    **{f"{name}-ld": config(name, ld_alpha=0.4) for name in (*SHARED_LOSSES, *OTHERS)},
    "ld-0": config("sigmoid", ld_alpha=0.0),
    "ld-1": config("sigmoid", ld_alpha=1.0),
    "ld-list": config(("robust", "sft"), ld_alpha=0.4, label_smoothing=0.1),
    **{
        f"{name}-wpo": config(name, use_weighting=True)
        for name in (*SHARED_LOSSES, *OTHERS)
        # TRL refuses aot* with it, and weighing hinge in place breaks its own backward.
        if not name.startswith("aot") and name != "hinge"
    },
    "wpo-ld-list": config(
        ("sigmoid", "apo_zero"), use_weighting=True, ld_alpha=0.5, loss_weights=(1.0, 2.0)
    ),
    "wpo-js": config("robust", use_weighting=True, f_divergence_type="js_divergence"),
}


def relative(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Length of a - b over length of b, all parameters together."""
    difference = sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))
    size = sum(float(y.square().sum()) for y in b)
    return (difference / size) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_equal_to_trl(both: Both, name: str) -> None:
    case = CASES[name]
    loss, metrics, grads = both.theirs(case)
    mine, result, own_grads = both.mine(case)
    assert mine == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert relative(own_grads, grads) < 1e-6
    shown = metrics_of(metric_sums([result], torch.device("cpu")).tolist())
    assert set(shown) - {"loss"} == set(metrics) - {"num_tokens"}
    for key in set(shown) - {"loss"}:
        if name == "sft" and key.startswith("rewards"):
            continue  # TRL keeps a reference for them
        assert shown[key] == pytest.approx(metrics[key], rel=1e-5, abs=1e-6), key


class CpoStub:
    """What the loss of TRL's CPOTrainer reads of its trainer; the methods are TRL's."""

    def __init__(self, cls: type, **settings: Any) -> None:
        for name in ("concatenated_inputs", "get_batch_logps"):
            setattr(self, name, getattr(cls, name))
        for name in ("cpo_loss", "odds_ratio_loss", "concatenated_forward"):
            if hasattr(cls, name):
                setattr(self, name, getattr(cls, name).__get__(self))
        same = {"device": torch.device("cpu"), "gather_for_metrics": lambda x: x}
        self.accelerator = SimpleNamespace(**same)
        self.is_encoder_decoder = self.aux_loss_enabled = False
        self.pad_token_id = self.padding_value = 0
        self.alpha = 0.0
        vars(self).update(settings)


def padded(pairs: list[TokenPair]) -> dict[str, torch.Tensor]:
    """The batch of TRL's DPODataCollatorWithPadding."""
    batch = {}
    for side in ("chosen", "rejected"):
        ids = [torch.from_numpy(np.concatenate([p.prompt, getattr(p, side)])).long() for p in pairs]
        labels = [x.clone() for x in ids]
        for pair, row in zip(pairs, labels, strict=True):
            row[: len(pair.prompt)] = -100
        pad = torch.nn.utils.rnn.pad_sequence
        batch[f"{side}_input_ids"] = pad(ids, True, 0)
        batch[f"{side}_attention_mask"] = pad([torch.ones_like(x) for x in ids], True, 0)
        batch[f"{side}_labels"] = pad(labels, True, -100)
    return batch


def reference_free_equal(both: Both, cls: type, case: Config, **settings: Any) -> None:
    stub = CpoStub(cls, beta=case.beta, label_smoothing=case.label_smoothing, **settings)
    both.policy.zero_grad()
    loss, metrics = cls.get_batch_loss_metrics(stub, both.policy, padded(both.pairs))  # type: ignore[attr-defined]
    loss.backward()
    mine, result, grads = both.mine(case)
    assert mine == pytest.approx(loss.item(), rel=1e-6)
    assert relative(grads, [p.grad for p in both.policy.parameters()]) < 1e-6  # type: ignore[misc]
    shown = metrics_of(metric_sums([result], torch.device("cpu")).tolist())
    for side in ("chosen", "rejected", "margins", "accuracies"):
        assert shown[f"rewards/{side}"] == pytest.approx(metrics[f"rewards/{side}"], rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reference_free_equal_to_trl(both: Both, smoothing: float) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    case = config("cpo", label_smoothing=smoothing, cpo_alpha=0.7)
    reference_free_equal(both, cpo, case, loss_type="sigmoid", cpo_alpha=0.7)
    case = config("simpo", label_smoothing=smoothing, simpo_gamma=0.8)
    reference_free_equal(both, cpo, case, loss_type="simpo", cpo_alpha=0, simpo_gamma=0.8)
    case = config(("simpo", "sft"), label_smoothing=smoothing, loss_weights=(1.0, 0.7))
    reference_free_equal(both, cpo, case, loss_type="simpo", cpo_alpha=0.7, simpo_gamma=0.5)


def test_orpo_equal_to_trl_where_no_prompt_is_scored(both: Both) -> None:
    """TRL's likelihood counts the prompt, the paper's does not: one token is scored in neither. And
    TRL's is per token of the batch: chosen completions of one length make that the same, too."""
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    pairs = [
        dataclasses.replace(p, prompt=p.prompt[:1], chosen=np.resize(p.chosen, 5))
        for p in both.pairs
    ]
    reference_free_equal(dataclasses.replace(both, pairs=pairs), orpo, config("orpo"))
