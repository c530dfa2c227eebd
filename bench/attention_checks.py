"""Checks of attention backends for `bench gpu --part correctness`: each one that is there, against
dense blocks in float64, beside what sdpa is off in the same precision."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bench import attention_cases
from bench.attention_cases import Case
from fastpref.attention_backends import Backend
from fastpref.attention_dense import build_dense
from fastpref.attention_layout import Terms
from fastpref.attention_varlen import build_varlen

Found = Mapping[str, tuple[float, float]]  # what -> (measured, bound)
LEAST = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float64: 1e-14}  # relative errors
PAIRS = ((5, 2, 1), (129, 0, 3), (14, 2, 65), (6, 1, 1), (1, 0, 0), (0, 2, 1), (140, 31, 9))
BRANCHES = ((5, 2, 1, 3), (64, 1), (70, 0, 3, 0, 2), (0, 2, 1), (3,), (17, 1, 1, 1, 130))
CASES = {
    "grouped heads": (Case("", PAIRS, 8, 2, 64), Terms()),
    "width 128, a head each": (Case("", PAIRS, 4, 4, 128), Terms(scale=0.05)),
    "window": (Case("", PAIRS, 8, 2, 64), Terms(window=37)),
    "window of two": (Case("", PAIRS, 4, 4, 64), Terms(window=2)),
    "softcap": (Case("", PAIRS, 8, 4, 64), Terms(softcap=2.0)),
    "softcap and window": (Case("", PAIRS, 8, 4, 128), Terms(softcap=2.0, window=20)),
    "many branches": (Case("", BRANCHES, 8, 2, 64), Terms()),
    "single queries in the second call": (Case("", ((40, 9, 1),) * 5, 8, 2, 64), Terms()),
    "answers of one token": (Case("", ((40, 0, 0), (33, 0, 0)), 8, 2, 64), Terms()),
    "long": (Case("", ((1500, 700, 900), (300, 900, 20)), 4, 1, 128), Terms()),
}


class Session(attention_cases.Session, Protocol):
    """What this module needs of `bench.gpu.Session`."""


def checks(session: Session) -> Iterator[tuple[str, Callable[[Any], Found]]]:
    """(name, check) of every backend that is here."""
    cuda = session.device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16) if cuda else (torch.float64,)
    found = attention_cases.backends(session, dtypes[0])
    for name, backend in found:
        deterministic = "not deterministic" not in name
        for what, (case, terms) in CASES.items():
            if terms.softcap is not None and not backend.softcap:
                continue
            if session.dry and what == "long":
                continue
            for dtype in dtypes if deterministic else dtypes[:1]:
                label = f"attention, {name}, {what}, {str(dtype)[6:]}"
                yield (
                    label,
                    functools.partial(
                        _against_float64, case=case, terms=terms, backend=backend, dtype=dtype,
                        bits=deterministic,
                    ),
                )  # fmt: skip
        if deterministic:
            yield f"attention, {name}, no wait", functools.partial(_no_wait, backend=backend)
            yield f"attention, {name}, a Llama", functools.partial(_model, backend=backend)


def _against_float64(
    session: Session, case: Case, terms: Terms, backend: Backend, dtype: torch.dtype, bits: bool
) -> Found:
    """At most twice what sdpa is off, or what a rounding of each number is."""
    ours, dense, same = attention_cases.checked(case, backend, session.device, dtype, terms)
    least = LEAST[dtype]
    found = {name: (error, max(2 * dense[name], least)) for name, error in ours.items()}
    return {**found, "bits differ": (float(not same), 0.0)} if bits else found


def _no_wait(session: Session, backend: Backend) -> Found:
    """Layouts, forward and backward with every implicit synchronisation made an error."""
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float64
    case = CASES["grouped heads"][0]
    tensors = attention_cases.make_tensors(case, dtype, session.device)

    def once() -> list[Tensor]:
        layouts = (
            build_varlen(case.lengths, session.device, backend),
            build_dense(case.lengths, session.device),
        )
        return [
            attention_cases.results_of(
                lambda q, k, v: layout.attend(q, k, v, Terms()),  # noqa: B023
                tensors,
            )[0]
            for layout in layouts
        ]

    once()
    if session.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        if session.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return {}


def _model(session: Session, backend: Backend) -> Found:
    """The start-up self-check of a small Llama in the run's precision, with this backend."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastpref.data.tokenize import TokenPair
    from fastpref.loading import prepare
    from fastpref.model import PairModel
    from fastpref.selfcheck import TOLERANCE, check_model

    cuda = session.device.type == "cuda"
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    module = LlamaForCausalLM(config).to(session.device, torch.float32 if cuda else torch.float64)
    prepare(module)
    model = PairModel(module, None, session.device, module.dtype, "")
    if cuda:
        model = dataclasses.replace(model, dtype=torch.bfloat16)
    rng = np.random.default_rng(0)
    pairs = []
    for n, sizes in enumerate([(40, 12, 30), (7, 1, 9), (100, 50, 3), (20, 1, 1)]):
        prompt, chosen, rejected = (rng.integers(0, 512, k).astype(np.int32) for k in sizes)
        pairs.append(TokenPair(n, 0, "", prompt, chosen, rejected, ()))
    worst = check_model(dataclasses.replace(model, attention=backend), pairs)
    return {"packed and separate": (worst, TOLERANCE[torch.float32])}
