"""Probes -> packed `ProbeBatch`es within a token budget, the prompt once for all its responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastpref.batch import ProbeBatch
from fastpref.data.pack import plan_microbatches

# Attention computes a prompt and its responses as one dense square, of which B responses fill
# about a B-th part beyond the prompt: past this many tokens the prompt is better computed again.
MAX_TOKENS_PER_PROMPT = 4096


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed response to a prompt, as token ids, whose log-prob is followed through a run."""

    probe_id: int  # int64 >= 0, the same in every run that has the probe
    prompt_id: int  # of its prompt
    behavior: int  # index into the run's behaviors; -1: none
    response_type: str
    prompt: np.ndarray  # (prompt,) int32
    response: np.ndarray  # (response,) int32, its EOS included, if one was added
    id: str = ""  # the user's, "" if there is none
    source: str = ""  # file of a probe that was read, "" of one made from the run's pairs
    line: int = 0

    @property
    def scored(self) -> int:
        """Scored tokens: all of the response but, after an empty prompt, the first."""
        return len(self.response) - (len(self.prompt) == 0)


def fed_lengths(probes: Sequence[Probe]) -> tuple[int, ...]:
    """Fed tokens of the prompt and of each of its responses; ``probes`` are of one prompt."""
    return (len(probes[0].prompt), *(len(probe.response) - 1 for probe in probes))


def plan_probes(probes: Sequence[Probe], max_tokens: int) -> list[list[list[int]]]:
    """Micro-batches of at most ``max_tokens`` fed tokens: lists of prompts, as the indices into
    ``probes`` of their responses.

    A function of the arguments alone. A prompt whose responses do not fit together, or would make
    a dense block of attention too large, stands more than once. Raises ValueError for a probe that
    is larger than the budget by itself.
    """
    of_prompt: dict[bytes, list[int]] = {}
    for i, probe in enumerate(probes):
        of_prompt.setdefault(probe.prompt.tobytes(), []).append(i)
    limit = min(max_tokens, MAX_TOKENS_PER_PROMPT)
    groups: list[list[int]] = []
    for members in of_prompt.values():
        room = -1  # what is left for further responses beside the last prompt
        for i in members:
            own = len(probes[i].response) - 1
            if own > room:
                groups.append([])
                room = limit - len(probes[i].prompt)
            groups[-1].append(i)
            room -= own
    fed = np.array([sum(fed_lengths([probes[i] for i in group])) for group in groups], np.int64)
    if fed.max(initial=0) > max_tokens:
        worst = probes[groups[int(fed.argmax())][0]]
        raise ValueError(
            f"probe {worst.id or worst.probe_id} ({worst.response_type}) has {fed.max()} packed "
            f"tokens, but max_tokens_per_microbatch is {max_tokens}. Set it to at least "
            f"{fed.max()}, or lower max_length."
        )
    plan = plan_microbatches(fed, np.arange(len(groups)), max_tokens)
    return [[groups[g] for g in own] for own in plan]


def pack_probes(groups: Sequence[Sequence[Probe]]) -> ProbeBatch:
    """Pack prompts in the given order, each group the responses to one, on the CPU."""
    tokens, positions, rows, target, scored = [], [], [], [], []
    lengths = tuple(fed_lengths(group) for group in groups)
    start = 0
    for group, (prompt_len, *branches) in zip(groups, lengths, strict=True):
        tokens.append(group[0].prompt)
        positions.append(np.arange(prompt_len))
        last = start + prompt_len - 1
        start += prompt_len
        for probe, fed in zip(group, branches, strict=True):
            tokens.append(probe.response[:fed])
            positions.append(np.arange(prompt_len, prompt_len + fed))
            own = np.arange(start - 1, start + fed)
            own[0] = last  # the prompt's last token predicts every response's first one
            unpredicted = len(probe.response) - probe.scored
            rows.append(own[unpredicted:])
            target.append(probe.response[unpredicted:])
            scored.append(probe.scored)
            start += fed
    number = np.arange(len(scored), dtype=np.int32)
    return ProbeBatch(
        tokens=_int64(np.concatenate(tokens)),
        positions=_int64(np.concatenate(positions)),
        rows=_int64(np.concatenate(rows)),
        target=_int64(np.concatenate(target)),
        segment_id=torch.from_numpy(np.repeat(number, scored)),
        pair_of_token=_int64(np.repeat(np.arange(len(groups)), [sum(own) for own in lengths])),
        scored=_int64(np.array(scored)),
        lengths=lengths,
    )


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))
