"""Scoring probes by hand: what it keeps in memory, and the squeezing alarm on constructed cases."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
import torch

from fastpref.config import Config
from fastpref.data.branches import Probe, pack_probes
from fastpref.probes import Probing
from tests.architectures import packed, tiny_model


def largest_allocation(compute: Any) -> int:
    """Bytes of the largest single allocation inside ``compute()``, in custom ops too."""
    with torch.profiler.profile(profile_memory=True) as profile:
        compute()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_no_logits_are_stored() -> None:
    """Nothing of rows x vocabulary: a tile of it at most, whatever the vocabulary."""
    vocab, length = 20_000, 30
    rng = np.random.default_rng(0)
    prompt = np.arange(5, dtype=np.int32)
    responses = [rng.integers(0, vocab, length).astype(np.int32) for _ in range(10)]
    probes = [Probe(i, 0, 0, "chosen", prompt, own) for i, own in enumerate(responses)]
    model = packed(
        tiny_model("llama", torch.float32, vocab_size=vocab, max_position_embeddings=512)
    )
    config = Config(output_dir="x", probe_every=1, max_tokens_per_microbatch=400)
    probing = Probing(config, probes, ["b"], vocab)
    rows = 10 * length
    with torch.no_grad():
        head = model.head.weight
        whole = largest_allocation(lambda: torch.randn(rows, head.shape[1]) @ head.t())
    assert whole == rows * vocab * 4  # it does see what is to be absent
    assert largest_allocation(lambda: probing.score(model)) < whole / 4


class Lines:
    """What stands in the place of a run's journal and records."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.recorded: list[dict[str, Any]] = []

    def metrics(self, line: dict[str, Any]) -> None:
        self.told.append(line)

    def perf(self, line: dict[str, Any]) -> None:
        assert line["probes_per_second"] > 0

    def rows(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        self.recorded += [{**row, "step": step, "table": name} for row in rows]


@pytest.mark.parametrize("gradient", ["rejected falls", "chosen rises"])
def test_squeezing_is_told_once_and_counted(
    gradient: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By hand: pushing down an unlikely response squeezes, pulling up the chosen one does not."""
    model = packed(tiny_model("llama"))
    head = model.module.get_parameter("lm_head.weight")
    with torch.no_grad():
        head.mul_(4.0)  # a model that is sure of something else
    prompt = np.array([5, 9, 3], np.int32)
    ids = torch.tensor(prompt[None].astype(np.int64))
    with torch.no_grad(), model.plain_attention():
        first = model.module(input_ids=ids).logits[0, -1].softmax(-1)  # type: ignore[operator]
    order = first.argsort().tolist()
    chosen, rejected = order[len(order) // 2], order[1]
    # A step of the head down grad log p(rejected) changes log p(chosen) by p_c - sum p^2 + p_r < 0
    # and log p(argmax) by p_max - sum p^2 + p_r > 0, times its size.
    assert first[chosen] + first[rejected] < first.square().sum() < first.max()
    probes = [
        Probe(0, 0, 0, "chosen", prompt, np.array([chosen], np.int32)),
        Probe(1, 0, 0, "rejected", prompt, np.array([rejected], np.int32)),
        Probe(2, 1, 1, "chosen", prompt, np.array([order[-1]], np.int32)),  # no rejected probe
    ]
    probing = Probing(Config(output_dir="x", probe_every=1), probes, ["a", "b"], 61)
    probing.begin(model)
    lines: Any = Lines()
    probing.run(model, 0, 0.0, lines, lines)
    assert "squeezing" not in lines.told[0]
    at = probes[1] if gradient == "rejected falls" else probes[0]
    direction = -1.0 if gradient == "rejected falls" else 1.0
    batch = pack_probes([[at]])
    with caplog.at_level(logging.WARNING, logger="fastpref.probes"):
        for step in (1, 2, 3):
            (grad,) = torch.autograd.grad(model.logp(batch).logp.sum(), [head])
            with torch.no_grad():
                head.add_(grad, alpha=direction * 1e-4)
            probing.run(model, step, 0.1 * step, lines, lines)
    told = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    squeezed = gradient == "rejected falls"
    rows = [row for row in lines.recorded if row["table"] == "squeezing"]
    assert [(row["step"], row["behavior"]) for row in rows] == [(s, "a") for s in (1, 2, 3)]
    assert [row["alarm"] for row in rows] == [squeezed] * 3
    assert [line["squeezing_total"] for line in lines.told[1:]] == [s * squeezed for s in (1, 2, 3)]
    assert [line["behavior/a/squeezing"] for line in lines.told[1:]] == [int(squeezed)] * 3
    assert len(told) == squeezed
    if squeezed:
        assert "squeezing at step 1, behavior a" in told[0]
        assert all(row["argmax"] > 0 > max(row["chosen"], row["rejected"]) for row in rows)
    # A resumed run counts on and does not warn again.
    other = Probing(Config(output_dir="x", probe_every=1), probes, ["a", "b"], 61)
    other.begin(model)
    other.load_state_dict(json.loads(json.dumps(probing.state_dict())))
    assert other.state_dict() == probing.state_dict()
