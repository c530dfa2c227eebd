"""The benchmark of norms: its dry run, and that it times nothing that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bench import norm_cases, norm_checks
from bench.norms import seconds_of


class Session:
    """What `bench.gpu.Session` offers, without a file."""

    device = torch.device("cpu")
    dry, repeats = True, 1

    def __init__(self) -> None:
        self.notes: dict[str, Any] = {}
        self.lines: list[Mapping[str, Any]] = []

    def has_time(self, case: str) -> bool:
        return True

    def write(self, line: Mapping[str, Any]) -> None:
        self.lines.append(line)


def test_part_of_the_gpu_benchmark() -> None:
    session = Session()
    values = norm_cases.run(session, seconds_of)
    assert values.keys() == {"norms_share_64", "sketch_share_64"}
    assert all(share and share["value"] > 0 for share in values.values())
    (line,) = session.lines
    assert line["error"] < 1e-5 and session.notes["norms"]


def test_a_wrong_norm_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = norm_cases.linear_norms
    monkeypatch.setattr(norm_cases, "linear_norms", lambda *a, **o: 1.02 * real(*a, **o))
    with pytest.raises(ValueError, match="a norm is off by .*; not timed"):
        norm_cases.run(Session(), seconds_of)


@pytest.mark.parametrize("name,check", list(norm_checks.checks()))
def test_checks_hold_here(name: str, check: Any) -> None:
    for what, (value, bound) in check(Session()).items():
        assert value <= bound, f"{name}: {what}"
