"""AdamW on the head: against torch's own over the full softmax, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastpref.theory.adamw import HeadPath, adamw_recursion
from fastpref.theory.pairs import FrozenPairs, frozen_pairs
from tests.theory.simulate import VOCABULARY, YES, gaussian_pairs, mixed_pairs

BETA, RATE = 0.3, 0.02


def trained(
    pairs: FrozenPairs, batches: list[np.ndarray | None], clip: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """(E, P) margins and (E,) head change by torch.optim.AdamW and autograd."""
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(VOCABULARY, pairs.features.shape[1], generator=generator).double()
    head = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([head], lr=RATE, weight_decay=0.0)
    features = torch.from_numpy(pairs.features)
    rows = torch.arange(len(features))

    def margin() -> torch.Tensor:
        policy = torch.log_softmax(features @ head.T, dim=1)
        reference = torch.log_softmax(features @ start.T, dim=1)
        gain = policy - reference
        return (
            gain[rows, torch.from_numpy(pairs.chosen)]
            - gain[rows, torch.from_numpy(pairs.rejected)]
        )

    seen, norms = [margin().detach().numpy()], [0.0]
    for batch in batches:
        own = slice(None) if batch is None else torch.from_numpy(batch)
        optimizer.zero_grad()
        (-torch.nn.functional.logsigmoid(BETA * margin()[own])).mean().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([head], clip)
        assert head.grad is not None
        # What the softmax's normaliser leaves in rows that are no answers is rounding; AdamW would
        # blow it up. In exact arithmetic it is 0.
        others = np.setdiff1d(np.arange(VOCABULARY), pairs.tokens)
        assert bool((head.grad[others].abs() < 1e-15).all())
        head.grad[others] = 0.0
        optimizer.step()
        seen.append(margin().detach().numpy())
        norms.append(float(torch.linalg.norm((head - start).detach())))
    return np.stack(seen), np.array(norms)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("mixed", [False, True])
def test_equals_training_the_whole_head(mixed: bool, clip: float | None) -> None:
    pairs = mixed_pairs(3) if mixed else gaussian_pairs(2, (60,))
    rng = np.random.default_rng(5)
    batches: list[np.ndarray | None] = [rng.permutation(len(pairs.chosen))[:16] for _ in range(12)]
    batches[4] = None
    margin, norms = trained(pairs, batches, clip)
    found = adamw_recursion(pairs, batches, RATE, BETA, max_grad_norm=clip, probes=pairs)
    assert found.step.tolist() == list(range(13))
    np.testing.assert_allclose(found.margin, margin, rtol=0, atol=1e-9 * np.abs(margin).max())
    np.testing.assert_allclose(found.head_norm, norms, rtol=1e-9)
    np.testing.assert_array_equal(found.probe_margin, found.margin)


def test_first_step_moves_every_weight_by_the_rate() -> None:
    pairs = gaussian_pairs(2, (60,))
    found: HeadPath = adamw_recursion(pairs, [None], RATE, BETA)
    assert found.head_norm[1] == pytest.approx(
        RATE * np.sqrt(2 * pairs.features.shape[1]), rel=1e-5
    )
    plus = pairs.chosen == YES
    d = pairs.features[plus].mean(axis=0) - pairs.features[~plus].mean(axis=0)
    assert found.margin[1].mean() == pytest.approx(RATE * np.abs(d).sum(), rel=1e-5)


def test_refuses_probes_of_other_answers() -> None:
    pairs = gaussian_pairs(2, (60,))
    other = frozen_pairs(pairs.features[:1], [7], [8])
    with pytest.raises(ValueError, match=r"probes have the answer tokens \[7, 8\]"):
        adamw_recursion(pairs, [None], RATE, BETA, probes=other)
    with pytest.raises(ValueError, match="batch 1 holds index"):
        adamw_recursion(pairs, [np.array([99])], RATE, BETA)
