"""torch.compile of the decoder blocks: what it refuses, and that its numbers are the plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastpref import recompute
from fastpref.compile import compile_blocks, demand_compiler
from fastpref.config import Config
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.loading import prepare
from fastpref.model import PairModel


def model(layers: int = 4) -> PairModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    prepare(module)
    return PairModel(module, None, torch.device("cpu"), torch.float32, "")


def pairs(count: int) -> list[TokenPair]:
    rng = np.random.default_rng(count)
    found = []
    for n in range(count):
        ids = [rng.integers(0, 64, k).astype(np.int32) for k in rng.integers(2, 12, 3)]
        found.append(TokenPair(n, 0, "", *ids, ()))
    return found


def results(model: PairModel, count: int) -> list[torch.Tensor]:
    for p in model.trained:
        p.grad = None
    logp = model.logp(pack_pairs(pairs(count))).logp
    (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    return [logp.detach(), *(p.grad.clone() for p in model.trained if p.grad is not None)]


def adapted(model: PairModel) -> PairModel:
    import dataclasses

    from fastpref import lora

    config = Config(model_name_or_path="m", dataset_name=("d",), output_dir="o", trainable="lora")
    adapter = lora.attach(model.module, config)
    with torch.no_grad():  # B begins at zero, which would hide A's gradient
        for p in model.module.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    return dataclasses.replace(model, adapter=adapter)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "full", "lora"])
def test_compiled_blocks_give_the_plain_numbers_and_share_their_graphs(kind: str) -> None:
    import torch._dynamo as dynamo

    own = model()
    if kind == "lora":
        pytest.importorskip("peft")
        own = adapted(own)
    if kind == "full":
        recompute.checkpoint_layers(own.module, "full")
    plain = [results(own, count) for count in (3, 5, 9)]
    dynamo.reset()
    dynamo.utils.counters.clear()
    assert compile_blocks(own.module) == 4
    found = [results(own, 3), results(own, 5)]
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    found.append(results(own, 9))
    # Four blocks and three sizes of batch. A block has three graphs, before attention and after it;
    # LoRA's first block has its own, as its input wants no gradient.
    assert graphs < 3 * 4 and dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for a, b in zip(plain, found, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"track": "sketch"}, "track: sketch puts taps"),
        ({"track": "exact"}, "track: exact puts taps"),
        ({"gradient_checkpointing": "selective"}, "gradient_checkpointing: selective"),
        ({"gradient_checkpointing": "auto"}, "gradient_checkpointing: auto"),
        ({"trainable": "head"}, "computes no block"),
    ],
)
def test_what_does_not_compose_is_refused(changes: dict[str, Any], reason: str) -> None:
    base = {"model_name_or_path": "m", "dataset_name": ("d",), "output_dir": "o"}
    with pytest.raises(ValueError, match=reason) as caught:
        Config(**base, torch_compile=True, **changes)  # type: ignore[arg-type]
    assert "set torch_compile: false" in str(caught.value)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no g\+\+ or clang\+\+ .*Install g\+\+.*CXX"):
        demand_compiler(torch.device("cpu"))
    with pytest.raises(ValueError, match="gcc or clang"):
        demand_compiler(torch.device("cuda"))
    own = tmp_path / "mine"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("CXX", str(own))
    demand_compiler(torch.device("cpu"))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no decoder blocks"):
        compile_blocks(nn.Linear(2, 2))
