"""`python -m bench track`: its gates, its memory, what it writes and refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bench import results, track_cases
from bench.__main__ import main
from bench.measure import peak_of
from bench.track_cases import DRY, HH, LONG, PERSONA, Subject
from fastpref.data.pack import fed_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(DRY, PERSONA, 6, CPU)


def test_lengths_are_those_of_the_data() -> None:
    persona, hh = (fed_tokens(lengths.pairs(2000, 300, 0)).mean() for lengths in (PERSONA, HH))
    assert 33 < persona < 36  # 33.5 in Anthropic's persona files under fastpref-tiny's tokenizer
    assert 180 < hh < 240
    assert set(fed_tokens(LONG.pairs(50, 300, 0)).tolist()) == {510}  # last ones are never fed


def test_a_subject_passes_its_gates(subject: Subject) -> None:
    assert subject.wrong() is None and 0 < subject.error < 1e-4


def test_gates_see_other_bits_and_wrong_norms(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subject.train

    def another(mode: str, turn: int) -> Any:
        result = real(mode, turn)
        if mode == "sketch":
            subject.model.trained[3].grad.flatten()[0] += 1e-7  # type: ignore[union-attr]
        return result

    with monkeypatch.context() as patch:
        patch.setattr(subject, "train", another)
        assert subject.wrong() == "gradients are other bits with track sketch"
    layer = subject.model.module.model.layers[0].mlp.down_proj
    plain = layer.forward
    with monkeypatch.context() as patch:  # a weight that is used twice, of which a tap sees one use
        patch.setattr(layer, "forward", lambda x: plain(x) + x @ layer.weight.t())
        assert "differ" in str(subject.wrong())


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> None:
        first = torch.zeros(250_000)  # 1 MB
        del first
        second = torch.zeros(500_000)
        third = torch.zeros(250_000)
        del second, third

    assert peak_of(call, CPU) == pytest.approx(3e6, rel=0.01)
    assert peak_of(lambda: None, CPU) == 0


def test_stated_memory_is_an_upper_bound_and_not_a_loose_one(subject: Subject) -> None:
    plain = subject.peak_bytes("none")
    assert track_cases.stated_bytes(subject, "none", 0, plain) == 0
    # Of the head's op what it holds at the step's peak, if that is there.
    head = subject.peak_bytes("head") - plain
    assert 0 <= head <= track_cases.stated_bytes(subject, "head", 0, plain) < plain / 100
    for mode in ("sketch", "exact"):
        extra = subject.peak_bytes(mode) - plain
        stated = track_cases.stated_bytes(subject, mode, 0, plain)
        assert 0.5 * stated < extra <= stated, mode


def test_a_whole_run_with_tiny_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["track", "--sizes", "dry", "--lengths", "persona", "--pairs_per_step", "4"]
    assert main([*call, "--repeats", "1", "--no_record", "--no_opacus"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    values, facts = record["values"], record["contenders"]["dry_persona"]
    for mode in ("sketch", "exact"):
        assert values[f"memory_{mode}_dry_persona"]["value"] == 0.0
        assert values[f"rates_share_{mode}_dry_persona"]["value"] > 0
        share = facts["seconds"][mode]["q50"] / facts["seconds"]["none"]["q50"] - 1
        assert values[f"{mode}_share_dry_persona"]["value"] == pytest.approx(share)
    # Its sizes are not those that targets are stated for: `--check` misses them.
    assert main([*call, "--repeats", "1", "--no_record", "--no_opacus", "--check"]) == 1


def test_without_opacus_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opacus.grad_sample", None)
    call = ["track", "--sizes", "dry", "--lengths", "persona", "--pairs_per_step", "4"]
    assert main([*call, "--repeats", "1", "--no_record"]) == 0
    shown = capsys.readouterr().out
    assert "opacus is not timed: not installed" in shown
    assert json.loads(shown.splitlines()[-1])["missing"] == ["opacus"]


def test_targets_are_those_of_the_issue() -> None:
    found = {check.name: check.target for check in results.verdicts("track", {})}
    for size in ("5m", "100m"):
        assert found[f"sketch_share_{size}_persona"] == "at most 0.05"
        assert found[f"exact_share_{size}_persona"] == "at most 0.35"
        for mode in ("sketch", "exact"):
            assert found[f"memory_{mode}_{size}_persona"] == "at most 0.01"


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(SystemExit, match="at least 1"):
        main(["track", "--repeats", "0"])
