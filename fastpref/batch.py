"""`PairBatch`: some preference pairs, packed without padding, each prefix present once; and
`ProbeBatch`: some prompts with any number of responses to each, packed likewise.

A pair is laid out as ``[prefix | chosen rest | rejected rest]`` where the prefix is the prompt plus
the longest common start of the two completions. A completion's last token is never fed, because
nothing is predicted from it. T packed tokens, R rows, P pairs, S = 3 P segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.transfer import to_device

GROUP = 3  # segments of a pair: shared, chosen rest, rejected rest
# Under ld_alpha: shared, chosen rest and its tail, rejected rest and its tail.
GROUP_WITH_TAILS = 5


@dataclass(frozen=True)
class PairBatch:
    """Packed pairs, all tensors on one device.

    A *row* is one scored position: the hidden state at ``rows[r]`` predicts ``target[r]``. The last
    token of a prefix may stand in ``rows`` twice, once for each completion's first own token.
    Segment 3p holds the rows that both completions of pair p share, 3p+1 the chosen one's own,
    3p+2 the rejected one's own; `with_tails` cuts the latter two in two.

    With `hidden`, the states that the body would give are there already (`trainable: head`), those
    of scored positions alone: T counts them, and there are no tokens and positions.
    """

    tokens: Tensor  # (T,) int64; (0,) with hidden
    positions: Tensor  # (T,) int64; the rejected rest restarts at prefix_len; (0,) with hidden
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
    ref_chosen: Tensor  # (P,) float64, reference log-prob in nats; nan = not known
    ref_rejected: Tensor  # (P,) float64
    lengths: tuple[tuple[int, int, int], ...]  # host copy of (prefix, chosen, rejected) lengths
    segment_rows: tuple[tuple[int, ...], ...]  # host copy of the rows of each segment, by pair
    group: int = GROUP  # segments of a pair
    hidden: Tensor | None = None  # (T, D) final hidden states, in place of tokens
    whole: bool = False  # every token is fed, a completion's last one too
    loss_weight: Tensor | None = None  # (P,) float64, what a pair's loss is multiplied by; None: 1

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens that the body computes: T, or none with `hidden`."""
        return self.tokens.numel()

    @property
    def num_segments(self) -> int:
        """S = 3 P (5 P with tails)."""
        return self.group * self.num_pairs

    @property
    def counts(self) -> list[int]:
        """(S,) rows of every segment, on the host."""
        return [rows for own in self.segment_rows for rows in own]

    @property
    def shared_scored(self) -> Tensor:
        """(P,) scored tokens that both completions start with."""
        return self._segment_counts()[:: self.group]

    def _segment_counts(self) -> Tensor:
        """(S,) int64 rows of every segment. Not `bincount`, for which a GPU is waited for."""
        ends = torch.arange(self.num_segments + 1, device=self.segment_id.device).int()
        return torch.searchsorted(self.segment_id, ends).diff()

    def first_own_rows(self) -> Tensor:
        """(2, P) the rows that score the first tokens in which chosen and rejected part; -1 where a
        completion has no such token, or no prefix predicts it. Both read the state of the prefix's
        end."""
        count = self._segment_counts().view(-1, self.group)
        half = (self.group - 1) // 2  # segments of a rest, its tail included
        first = count[:, 0] + count.sum(dim=1).cumsum(0) - count.sum(dim=1)
        rest = count[:, 1:].view(self.num_pairs, 2, half).sum(dim=2).T
        rows = torch.stack([first, first + rest[0]])
        return torch.where((rest > 0) & (self.prefix_len > 0), rows, -1)

    def read_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) each pair's first token that predicts a scored one, and (P,) the tokens from there
        to the pair's end, in which all of `rows` lie; on the host."""
        return _spans(self.lengths, [rows[0] for rows in self.segment_rows])

    @property
    def unread(self) -> int:
        """Tokens before those of `read_spans`: nothing reads their final states. None with
        `hidden`."""
        return self.num_tokens - int(self.read_spans()[1].sum()) if self.num_tokens else 0

    def sequences_of_token(self) -> Tensor:
        """(T,) int64: in how many of its pair's sequences each token stands, a prefix's in two."""
        parts = torch.stack([self.prefix_len, self.chosen_len, self.rejected_len], dim=1).flatten()
        twice = torch.ones_like(parts)
        twice[::GROUP] += 1
        return twice.repeat_interleave(parts, output_size=self.num_tokens)

    def with_tails(self) -> PairBatch:
        """The same batch in 5 segments a pair: each rest ends in a tail of its own.

        The tail is what lies beyond the length of the pair's shorter completion, so at most one of
        the two has rows. Segments 5p + 0, 1, 2, 3, 4: shared, chosen, its tail, rejected, its tail.
        """
        segment = self.segment_id.long()
        count = self._segment_counts()
        place = (
            torch.arange(len(segment), device=segment.device) - (count.cumsum(0) - count)[segment]
        )
        pair, part = segment // GROUP, segment % GROUP
        place += torch.where(part > 0, count[GROUP * pair], 0)  # within the completion, from 0
        shorter = torch.minimum(self.chosen_scored, self.rejected_scored)
        own = part + (part == 2) + (place >= shorter[pair])  # 0, 1, 3, or the tail after it
        scored = []
        for common, *rests in self.segment_rows:
            own_rows = [min(rest, min(rests)) for rest in rests]  # the rest of the rest is its tail
            tails = [rest - rows for rest, rows in zip(rests, own_rows, strict=True)]
            scored.append((common, own_rows[0], tails[0], own_rows[1], tails[1]))
        return replace(
            self,
            segment_id=(GROUP_WITH_TAILS * pair + own).to(self.segment_id.dtype),
            segment_rows=tuple(scored),
            group=GROUP_WITH_TAILS,
        )

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on ``device``, for which nobody waits."""
        return replace(self, **_moved(self, device))

    def check(self, vocab_size: int | None = None) -> None:
        """Raise ValueError where the batch breaks its own layout (waits for the device)."""
        count = self.pair_of_token.numel()
        if self.hidden is None:
            fed = int((self.prefix_len + self.chosen_len + self.rejected_len).sum())
            _demand(fed == count, f"part lengths sum to {fed}, but T = {count}")
            _demand(self.num_tokens == count, f"{self.num_tokens} tokens, but T = {count}")
        else:
            _demand(len(self.hidden) == count, f"{len(self.hidden)} states, but T = {count}")
            _demand(self.num_tokens == 0, "there are hidden states, so there must be no tokens")
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
                0 <= int(self.rows.min()) and int(self.rows.max()) < count,
                f"rows outside 0..{count - 1}",
            )
        _demand(
            torch.equal(self.pair_of_token[self.rows], segment // self.group),
            "a row points at a token of another pair",
        )
        counts = torch.bincount(segment, minlength=self.num_segments).view(-1, self.group)
        on_host = [list(own) for own in self.segment_rows]
        _demand(counts.tolist() == on_host, "`segment_rows` disagrees with segment_id")
        shared, rests = counts[:, 0], counts[:, 1:].view(self.num_pairs, 2, -1).sum(dim=2)
        scored = torch.stack([shared + rests[:, 0], shared + rests[:, 1]])
        declared = torch.stack([self.chosen_scored, self.rejected_scored])
        _demand(torch.equal(scored, declared), "chosen_scored/rejected_scored disagree with rows")
        if vocab_size is not None:
            for name in ("tokens", "target"):
                ids = getattr(self, name)
                top = int(ids.max()) if ids.numel() else 0
                _demand(top < vocab_size, f"{name} holds id {top}; vocabulary has {vocab_size}")


@dataclass(frozen=True)
class ProbeBatch:
    """Prompts with any number of responses to each, packed, all tensors on one device.

    A prompt is laid out as ``[prompt | response 1 | response 2 | ...]``; every response attends to
    the prompt and to itself. As in a `PairBatch` its last token is not fed, and the prompt's last
    one stands in ``rows`` once for each response. Rows stand response by response: segment s holds
    those of the batch's s-th response.
    """

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64; every response goes on from the end of its prompt
    rows: Tensor  # (R,) int64, indices into T
    target: Tensor  # (R,) int64
    segment_id: Tensor  # (R,) int32, non-decreasing
    pair_of_token: Tensor  # (T,) int64, of its prompt: prompts stand where pairs do
    scored: Tensor  # (S,) int64, rows of each response
    lengths: tuple[tuple[int, ...], ...]  # on the host: fed tokens of prompt, of each response
    hidden: None = None  # as in a `PairBatch`, where states may be there already

    @property
    def num_pairs(self) -> int:
        """Prompts; one may stand more than once, with other responses."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens.numel()

    @property
    def num_segments(self) -> int:
        """S, responses."""
        return self.scored.numel()

    @property
    def group(self) -> int:
        """Segments whose head gradients are held against each other: each by itself."""
        return 1

    @property
    def counts(self) -> None:
        """The host does not know the rows of responses."""
        return None

    def read_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """(prompts,) as of a `PairBatch`: each prompt's last token, and those from there on."""
        return _spans(self.lengths, [0] * self.num_pairs)

    def to(self, device: torch.device | str) -> ProbeBatch:
        """The same batch on ``device``, for which nobody waits."""
        return replace(self, **_moved(self, device))


def _spans(
    lengths: Sequence[Sequence[int]],  # fed tokens of each prefix and its branches
    shared: Sequence[int],  # scored rows of each prefix but for its end's
) -> tuple[np.ndarray, np.ndarray]:
    fed = np.array([sum(own) for own in lengths], np.int64)
    prefix = np.array([own[0] for own in lengths], np.int64)
    unread = np.maximum(prefix - 1 - np.asarray(shared, np.int64), 0)
    return np.cumsum(fed) - fed + unread, fed - unread


def _moved(batch: PairBatch | ProbeBatch, device: torch.device | str) -> dict[str, Any]:
    """The tensors of a batch on ``device``."""
    values = ((f.name, getattr(batch, f.name)) for f in fields(batch))
    return dict(to_device({n: x for n, x in values if isinstance(x, Tensor)}, device))


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"PairBatch: {message}. Batches of fastpref.data.pack hold this.")
