"""`python -m bench norms`: what norms and sketches of every pair cost on the CPU.

Beside the backward of the same linear layers, in one run (`norm_cases`). On a GPU it is part of
`python -m bench gpu --part op`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from bench import measure, results

if TYPE_CHECKING:
    import torch

HELP = "cost of per-pair norms and sketches beside a layer's backward, or the head's (--part head)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's command line."""
    add = parser.add_argument
    add("--part", choices=("layers", "head"), default="layers", help="what is measured")
    add("--check", action="store_true", help="exit with 1 where a target is missed")
    add("--tokens", type=int, default=2048, help="packed tokens of a micro-batch")
    add("--lengths", type=int, nargs="+", default=[64, 256], help="tokens of a pair")
    add("--repeats", type=int, default=15, help="turns of every contender")
    add("--no_record", action="store_true", help="append nothing to bench/results")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, record; 1 where `--check` finds a target missed."""
    if arguments.part == "head":
        from bench import head_norms

        return head_norms.run(arguments)
    import torch

    from bench.norm_cases import QWEN_HALF, TINY, Case, measure_case, table_of

    if min(arguments.lengths) < 1 or max(arguments.lengths) > arguments.tokens:
        raise SystemExit("bench norms: --lengths are at least 1 and at most --tokens")
    if arguments.repeats < 1:
        raise SystemExit(f"bench norms: --repeats is at least 1, got {arguments.repeats}")
    where = measure.surroundings(f"{measure.cpu_name()} x{os.cpu_count()}")
    warning = measure.warn_if_busy()
    if warning:
        print(f"warning: {warning}")
    shown, values = {}, {}
    for layer in (QWEN_HALF, TINY):
        for length in arguments.lengths:
            case = Case(layer, arguments.tokens, length)
            device = torch.device("cpu")
            facts, shares = measure_case(case, device, arguments.repeats, seconds_of)
            shown[case.name] = facts
            print(table_of(case, facts))
            for what, share in shares.items():
                values[f"{what}_share_{layer.name}_{length}"] = share
    checks = results.verdicts("norms", {name: value["value"] for name, value in values.items()})
    setting = {"tokens": arguments.tokens, "lengths": arguments.lengths, "dtype": "float32"}
    setting["repeats"] = arguments.repeats
    record = results.record_of("norms", where, setting, shown, dict(values), checks)
    return results.close(arguments, record, checks, warning=warning)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
