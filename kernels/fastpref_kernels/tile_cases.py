"""The kernels of `linear_logprob`'s Triton backend at every entry of its tile table, as cases for
ahead-of-time compilation: launches recorded from the backend itself, on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from . import triton_tiles
from ._aot import AotCase, case_of
from ._head_checks import ROW_STATS, SEGMENT_STATS
from ._launch import TRITON_TILES, Launch, TritonTile, recorded
from .count_sketch import BUCKETS, Buckets, CountSketch
from .torch_tiles import Transform

ALL_STATS = frozenset(SEGMENT_STATS + ROW_STATS)
# name -> softcap and bias, statistics, training, sketch
VARIANTS: dict[str, tuple[bool, frozenset[str], bool, bool]] = {
    "training": (False, frozenset(), True, False),
    "training, sketch": (False, frozenset(), True, True),
    "training, softcap, bias, statistics": (True, ALL_STATS, True, False),
    "training, softcap, bias, statistics, sketch": (True, ALL_STATS, True, True),
    "no grad": (False, frozenset(), False, False),
    "no grad, statistics": (False, ALL_STATS, False, False),
}
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def aot_cases() -> list[AotCase]:
    """Every specialisation; those of the widest tile in bfloat16 for sm_80 and sm_100 too."""
    cases: dict[str, AotCase] = {}
    widest = max(TRITON_TILES, key=lambda entry: entry[-1].width)
    for entry in TRITON_TILES:
        _, dtypes, _, _, tile = entry
        for dtype in dtypes:
            archs = (80, 90, 100) if entry is widest and dtype == torch.bfloat16 else (90,)
            for variant, asked in VARIANTS.items():
                for launch in launches(tile, dtype, *asked):
                    case = case_of("", launch, archs)
                    # What the case depends on names it; the same thing again is left out.
                    name = f"{_name(launch)} {SHORT[dtype]} {_flags(launch.arguments, variant)}"
                    stores = launch.arguments.get("KEEP", True)
                    # Signs are bytes: eight entries' are 8 bytes, and rightly so.
                    loads = launch.arguments.get("signs") is None
                    case = replace(case, name=name, wide_loads=loads, wide_stores=stores)
                    cases.setdefault(name, case)
    return list(cases.values())


def launches(
    tile: TritonTile,
    dtype: torch.dtype,
    every: bool,
    stats: frozenset[str],
    train: bool,
    sketch: bool,
) -> Iterator[Launch]:
    """What one call launches for a head of two tiles, one of them kept, of 4096 columns."""
    rows, dim, vocab = 32, 4096, 2 * tile.width
    options: dict[str, Any] = {"device": "meta", "dtype": dtype}
    hidden, weight = torch.empty(rows, dim, **options), torch.empty(vocab, dim, **options)
    target = torch.empty(rows, device="meta", dtype=torch.int64)
    transform = Transform(None, 1.0, None, 1.0)
    if every:
        transform = Transform(torch.empty(vocab, **options), 1.5, 30.0, 0.9)
    seen: list[Launch] = []
    like, buckets = hidden.new_empty(0, dtype=torch.float32), Buckets.of(0, "lm_head", BUCKETS)
    riders = [CountSketch(buckets, vocab, rows, like)] if sketch else []
    with recorded(seen.append):
        _, saved = triton_tiles.forward(
            hidden,
            weight,
            target,
            transform,
            tile=tile,
            kept=int(train),
            need_hidden=train,
            stats=stats,
            riders=riders,
        )
        if train:
            triton_tiles.backward(
                torch.empty(rows, device="meta"),
                hidden,
                weight,
                target,
                transform,
                saved,
                tile=tile,
                need_hidden=True,
                need_weight=True,
                need_bias=every,
            )
    yield from seen


def _name(launch: Launch) -> str:
    return str(launch.kernel.__name__).removesuffix("_kernel")


def _flags(arguments: Mapping[str, Any], variant: str) -> str:
    if "KEEP" in arguments:
        return f"{arguments['BLOCK']} {variant}"
    chosen = [name.lower() for name in ("SOFTCAP", "FIRST") if arguments.get(name)]
    return " ".join([str(arguments["BLOCK"]), *chosen])
