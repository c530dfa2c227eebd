"""Run experiments of Im & Li (arXiv 2403.18742): predictions beside what training shows.

    fastpref reproduce --list
    fastpref reproduce last-layer rates --data persona/
    fastpref reproduce all --model MODEL --data persona/ hh-rlhf/harmless-base.jsonl

Hyper-parameters are the paper's unless given. Each experiment writes a figure, outcome.json,
curves.csv and its runs with their records to OUTPUT_DIR/NAME; docs/reproduce.md explains them.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import time
from pathlib import Path

from fastpref.config import Config
from fastpref.reproduce.names import EXPERIMENTS

ALL = "all"
log = logging.getLogger("fastpref.reproduce")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAMEs and the fields of `Settings`."""
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help="experiments of --list, or all")
    add("--list", action="store_true", help="name the experiments and end")
    add("--model", default="fastpref-tiny", help="folder or name [fastpref-tiny]")
    add("--data", nargs="+", default=[], help="files and folders of persona statements, of HH-RLHF")
    add("--behaviors", nargs="+", default=[], help="names of files or official numbers, not those "
        "of the paper")  # fmt: skip
    add("--steps", type=int, help="optimizer steps")
    add("--learning_rate", type=float, help="in the place of the experiment's")
    add("--beta", type=float, help="in the place of the experiment's")
    add("--train_batch_size", type=int, help="pairs per step")
    add("--seed", type=int, help="of split and batches")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float64 [auto]")
    add("--max_length", type=int, help="tokens of a prompt with its answer [256, dialogues 512]")
    add("--output_dir", default="runs/reproduce", help="a folder each goes there [runs/reproduce]")


def run(args: argparse.Namespace) -> int:
    """List, or run the experiments in their order.

    Raises ValueError for what cannot be run; where several were asked for, after the others.
    """
    if args.list:
        print("\n".join(f"{name:<14} {own.help}" for name, own in EXPERIMENTS.items()))
        return 0
    names = _names(args.names)
    from fastpref.reproduce.behaviors import find_files
    from fastpref.reproduce.outcome import summary, write_outcome
    from fastpref.reproduce.settings import Settings
    from fastpref.runfolder import demand_writable

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    given = ("model", "steps", "learning_rate", "beta", "train_batch_size", "seed", "device")
    options = {name: getattr(args, name) for name in (*given, "dtype", "max_length")}
    _check(options)
    output = Path(args.output_dir).expanduser()
    demand_writable(output)
    for needs in dict.fromkeys(EXPERIMENTS[name].needs for name in names):  # before any is run
        find_files(args.data, needs)
    refused = []
    for name in names:
        began = time.perf_counter()
        folder = output / name
        settings = Settings(
            data=tuple(args.data), folder=folder, behaviors=tuple(args.behaviors), **options
        )
        try:
            outcome = importlib.import_module(EXPERIMENTS[name].module).run(settings)
        except ValueError as error:  # the others may well be possible with this model and data
            refused.append(error if len(names) == 1 else ValueError(f"{name}: {error}"))
            log.warning("%s: refused, see the end", name)
            continue
        write_outcome(settings, outcome)
        print(summary(outcome))
        log.info("%s: %s, %.0f s", name, folder, time.perf_counter() - began)
    if refused:
        raise ValueError("\n".join(map(str, refused)))
    return 0


def _names(words: list[str]) -> list[str]:
    if not words:
        raise ValueError(f"name an experiment: {', '.join(EXPERIMENTS)}, or {ALL}")
    for word in words:
        if word not in EXPERIMENTS and word != ALL:
            near = difflib.get_close_matches(word, EXPERIMENTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(EXPERIMENTS)}"
            raise ValueError(f"unknown experiment {word!r}; {hint}")
    return list(EXPERIMENTS) if ALL in words else list(dict.fromkeys(words))


def _check(options: dict[str, object]) -> None:
    """What `Config` says of the values, under its names of them."""
    if options["steps"] is not None and not int(str(options["steps"])) >= 1:
        raise ValueError(f"--steps: expected 1 or more, got {options['steps']}")
    own = {"model": "model_name_or_path", "steps": "max_steps"}
    given = {own.get(name, name): value for name, value in options.items() if value is not None}
    Config(**given)  # type: ignore[arg-type]
