"""A prompt packed once with all its responses = one plain forward per response, full logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref.attention_dense import build_dense
from fastpref.data.branches import MAX_TOKENS_PER_PROMPT, Probe, pack_probes, plan_probes
from fastpref.model import PairModel
from tests.architectures import WINDOW, InFloat64, V, packed, tiny_model

STATS = ("entropy", "sum_sq_prob", "residual_sq", "argmax_logp", "argmax", "log1m_pmax")


def probe(n: int, prompt: int, response: int) -> Probe:
    prompt_ids = np.random.default_rng(1000 + n // 100).integers(0, V, prompt).astype(np.int32)
    response_ids = np.random.default_rng(n).integers(0, V, response).astype(np.int32)
    return Probe(n, n // 100, 0, "chosen", prompt_ids, response_ids)


# Twelve responses to one prompt, of one token to more than the window; two; one; an empty prompt.
GROUPS = [
    [probe(n, 9, length) for n, length in enumerate((1, 4, 1, 8, 2, 3, 11, 5, 6, 1, 2, 7))],
    [probe(100, 3, 4), probe(101, 3, 1)],
    [probe(200, 14, 9)],
    [probe(300, 0, 3), probe(301, 0, 5), probe(302, 0, 2)],
    [probe(400, 1, 1), probe(401, 1, 6)],
]
PROBES = [probe for group in GROUPS for probe in group]
assert max(len(p.prompt) + len(p.response) for p in PROBES) > 3 * WINDOW


def plain_logits(model: PairModel, probe: Probe) -> Tensor:
    """(scored, V) transformers' own forward of the one sequence."""
    ids = torch.from_numpy(np.r_[probe.prompt, probe.response].astype(np.int64))
    with model.plain_attention():
        logits = model.module(input_ids=ids[None], use_cache=False).logits[0]  # type: ignore[operator]
    return logits[max(len(probe.prompt), 1) - 1 : -1]


def targets(probe: Probe) -> Tensor:
    own = probe.response[len(probe.response) - probe.scored :]
    return torch.from_numpy(own.astype(np.int64))


@pytest.mark.parametrize(
    "name,tolerance",
    [("gpt2", 1e-12), ("llama", 1e-12), ("qwen3", 1e-12), ("phi3", 1e-12), ("gpt_neox", 1e-12)]
    + [("mistral", 1e-12), ("gemma2", 1e-12), ("gemma3_text", 1e-12)],
)
def test_packed_equals_plain(name: str, tolerance: float) -> None:
    with InFloat64():
        model = packed(tiny_model(name))
        batch = pack_probes(GROUPS)
        assert len(batch.lengths[0]) == 13 and batch.num_tokens < sum(
            len(p.prompt) + len(p.response) for p in PROBES
        )
        ours = model.row_logp(batch, STATS)
        logits = [plain_logits(model, p) for p in PROBES]
        logp = torch.cat(logits).log_softmax(-1)
        target = torch.cat([targets(p) for p in PROBES])
        assert torch.equal(batch.target, target)
        own = logp.gather(1, target[:, None])[:, 0]
        others = logp.clone().scatter_(1, logp.argmax(1, keepdim=True), -torch.inf)
        one_hot = torch.nn.functional.one_hot(target, V)
        expected = {
            "logp": own,
            "entropy": -(logp.exp() * logp).sum(1),
            "sum_sq_prob": logp.exp().square().sum(1),
            "residual_sq": (logp.exp() - one_hot).square().sum(1),
            "argmax_logp": logp.amax(1),
            "log1m_pmax": others.logsumexp(1),
        }
        for field, truth in expected.items():
            error = (getattr(ours, field) - truth).abs().max() / truth.abs().max()
            assert float(error) < tolerance, (field, float(error))
        assert ours.argmax is not None and torch.equal(ours.argmax, logp.argmax(1))
        assert torch.equal(batch.scored, torch.tensor([p.scored for p in PROBES]))

        # Gradients of a sum that tells the responses apart.
        slope = torch.linspace(1.0, -2.0, len(PROBES), dtype=torch.float64)
        parameters = [p for p in model.module.parameters() if p.requires_grad]
        packed_logp = model.logp(batch).logp
        mine = torch.autograd.grad(slope @ packed_logp, parameters, allow_unused=True)
        sums = torch.stack([part.sum() for part in own.split(batch.scored.tolist())])
        plain = torch.autograd.grad(slope @ sums, parameters, allow_unused=True)
        largest = max(float(g.abs().max()) for g in plain if g is not None)
        for a, b in zip(mine, plain, strict=True):
            if b is not None:
                assert a is not None
                assert float((a - b).abs().max()) < tolerance * largest


def test_responses_do_not_see_each_other() -> None:
    model = packed(tiny_model("llama"))
    alone = pack_probes([[GROUPS[0][3]]])
    together = pack_probes([GROUPS[0]])
    changed = [*GROUPS[0]]
    changed[2] = probe(900, 9, 1)
    changed[2] = Probe(2, 0, 0, "chosen", GROUPS[0][0].prompt, changed[2].response)
    changed[6] = Probe(6, 0, 0, "chosen", GROUPS[0][0].prompt, probe(906, 9, 11).response)
    other = pack_probes([changed])
    with torch.no_grad():
        first, second, third = (model.logp(b).logp for b in (alone, together, other))
    torch.testing.assert_close(first[0], second[3], rtol=1e-13, atol=0)
    assert second[3] == third[3] and second[6] != third[6]


def test_layout_of_mixed_numbers_of_branches() -> None:
    """Who sees whom, by plain loops over tokens."""
    lengths = [(5, 2, 1, 3), (4, 1), (6, 0, 3, 0, 2), (0, 2, 1)]
    layout = build_dense(lengths, "cpu")
    slot = layout.slot if layout.slot is not None else torch.arange(sum(map(sum, lengths)))
    tokens = [
        (p, part, position)
        for p, (prefix, *branches) in enumerate(lengths)
        for part, start, count in [(0, 0, prefix)]
        + [(b + 1, prefix, n) for b, n in enumerate(branches)]
        for position in range(start, start + count)
    ]
    for window in (None, 3):
        whole = torch.full((len(tokens), len(tokens)), False)
        base = 0
        where = {}
        for block, mask in zip(layout.blocks, layout.mask(window, torch.float32), strict=True):
            for row in range(block.pairs):
                for column in range(block.length):
                    where[base + row * block.length + column] = (mask[row, 0], column)
            base += block.pairs * block.length
        for q in range(len(tokens)):
            for k in range(len(tokens)):
                mask, at = where[int(slot[q])]
                other, to = where[int(slot[k])]
                same_row = mask.data_ptr() == other.data_ptr()
                whole[q, k] = same_row and bool(mask[at, to] == 0)
        for q, (pair, part, position) in enumerate(tokens):
            for k, (other_pair, other_part, other_position) in enumerate(tokens):
                seen = (
                    pair == other_pair
                    and other_part in (0, part)
                    and other_position <= position
                    and (window is None or position - other_position < window)
                )
                assert bool(whole[q, k]) == seen, (q, k, window)


def test_plan_keeps_to_the_budget_and_takes_every_probe_once() -> None:
    for budget in (25, 40, 200):
        plan = plan_probes(PROBES, budget)
        assert sorted(i for own in plan for group in own for i in group) == list(range(len(PROBES)))
        for own in plan:
            batch = pack_probes([[PROBES[i] for i in group] for group in own])
            assert batch.num_tokens <= budget
            for group in own:
                assert len({PROBES[i].prompt.tobytes() for i in group}) == 1
    assert sum(len(own) for own in plan_probes(PROBES, 200)) == len(GROUPS)
    assert len(plan_probes(PROBES, 25)) > len(plan_probes(PROBES, 200))
    with pytest.raises(ValueError, match=r"probe 200 \(chosen\) has 22 packed tokens.*is 20"):
        plan_probes(PROBES, 20)
    long = [probe(n, 1000, 900) for n in range(700, 712)]
    groups = [group for own in plan_probes(long, 10**6) for group in own]
    assert len(groups) > 1
    assert max(1000 + 899 * len(group) for group in groups) <= MAX_TOKENS_PER_PROMPT


def test_one_token_responses_cost_no_token() -> None:
    batch = pack_probes([[probe(n, 6, 1) for n in range(5)]])
    assert batch.num_tokens == 6 and batch.rows.tolist() == [5] * 5
