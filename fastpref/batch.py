"""`PairBatch`: some preference pairs, packed without padding, each prefix present once.

A pair is laid out as ``[prefix | chosen rest | rejected rest]`` where the prefix is the prompt plus
the longest common start of the two completions. A completion's last token is never fed, because
nothing is predicted from it. T packed tokens, R rows, P pairs, S = 3 P segments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

GROUP = 3  # segments of a pair: shared, chosen rest, rejected rest


@dataclass(frozen=True)
class PairBatch:
    """Packed pairs, all tensors on one device.

    A *row* is one scored position: the hidden state at ``rows[r]`` predicts ``target[r]``. The last
    token of a prefix may stand in ``rows`` twice, once for each completion's first own token.
    Segment 3p holds the rows that both completions of pair p share, 3p+1 the chosen one's own,
    3p+2 the rejected one's own.
    """

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64; the rejected rest restarts at prefix_len
    rows: Tensor  # (R,) int64, indices into T
    target: Tensor  # (R,) int64
    segment_id: Tensor  # (R,) int32, non-decreasing
    pair_of_token: Tensor  # (T,) int64
    prefix_len: Tensor  # (P,) int64, fed tokens of the prefix
    chosen_len: Tensor  # (P,) int64, fed tokens of the chosen rest
    rejected_len: Tensor  # (P,) int64, fed tokens of the rejected rest
    chosen_scored: Tensor  # (P,) int64, |y| of the chosen completion, shared rows included
    rejected_scored: Tensor  # (P,) int64
    pair_id: Tensor  # (P,) int64
    behavior: Tensor  # (P,) int64, index into the run's list of behaviors
    ref_chosen: Tensor  # (P,) float32, reference log-prob in nats; nan = not known
    ref_rejected: Tensor  # (P,) float32
    lengths: tuple[tuple[int, int, int], ...]  # host copy of (prefix, chosen, rejected) lengths

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T, the tokens that the body computes."""
        return self.tokens.numel()

    @property
    def num_segments(self) -> int:
        """S = 3 P."""
        return GROUP * self.num_pairs

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on ``device``; copies from pinned memory do not wait."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return PairBatch(**moved)

    def check(self, vocab_size: int | None = None) -> None:
        """Raise ValueError where the batch breaks its own layout (waits for the device)."""
        fed = int((self.prefix_len + self.chosen_len + self.rejected_len).sum())
        _demand(fed == self.num_tokens, f"part lengths sum to {fed}, but T = {self.num_tokens}")
        _demand(self.positions.shape == self.tokens.shape, "positions and tokens differ in shape")
        host = torch.tensor(self.lengths, device=self.tokens.device)
        parts = torch.stack([self.prefix_len, self.chosen_len, self.rejected_len], dim=1)
        _demand(torch.equal(host.reshape(-1, 3), parts), "`lengths` is not the part lengths")
        segment = self.segment_id.long()
        _demand(bool((segment.diff() >= 0).all()), "segment_id decreases")
        if segment.numel():
            _demand(
                0 <= int(segment.min()) and int(segment.max()) < self.num_segments,
                f"segment_id outside 0..{self.num_segments - 1}",
            )
            _demand(
                0 <= int(self.rows.min()) and int(self.rows.max()) < self.num_tokens,
                f"rows outside 0..{self.num_tokens - 1}",
            )
        _demand(
            torch.equal(self.pair_of_token[self.rows], segment // GROUP),
            "a row points at a token of another pair",
        )
        counts = torch.bincount(segment, minlength=self.num_segments).view(-1, GROUP)
        scored = torch.stack([counts[:, 0] + counts[:, 1], counts[:, 0] + counts[:, 2]])
        declared = torch.stack([self.chosen_scored, self.rejected_scored])
        _demand(torch.equal(scored, declared), "chosen_scored/rejected_scored disagree with rows")
        if vocab_size is not None:
            for name in ("tokens", "target"):
                ids = getattr(self, name)
                top = int(ids.max()) if ids.numel() else 0
                _demand(top < vocab_size, f"{name} holds id {top}; vocabulary has {vocab_size}")


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"PairBatch: {message}. Batches of fastpref.data.pack hold this.")
