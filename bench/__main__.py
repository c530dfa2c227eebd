"""The front: `python -m bench NAME [--check] ...`; `python -m bench NAME --help` tells the rest."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

CASES = {
    "train": "bench.train",
    "head": "bench.head",
    "norms": "bench.norms",
    "kernels": "bench.kernels",
    "aot": "bench.aot",
    "roofline": "bench.roofline",
    "track": "bench.track",
    "gpu": "bench.gpu",
}  # name -> module with `add_arguments` and `run`
PLANNED = ("dropin", "faults")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit status (1: `--check` found something amiss)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    if argv and argv[0] in PLANNED:
        parser.error(f"there is no benchmark {argv[0]!r} yet; there is: {', '.join(CASES)}")
    for name, module_name in CASES.items():
        module = importlib.import_module(module_name)
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.HELP))
    arguments = parser.parse_args(argv)
    return int(importlib.import_module(CASES[arguments.name]).run(arguments))


if __name__ == "__main__":
    # Before any Hugging Face package is imported: everything measured is local.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())
