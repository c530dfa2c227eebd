"""The main job in minutes: make a preference set, train on it, show each behavior's update rate."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastpref.commands import show_log
from fastpref.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--output_dir`, `--pairs_per_behavior` and `--seed`."""
    parser.add_argument("--output_dir", default="runs/demo", help="folder of the run [runs/demo]")
    parser.add_argument(
        "--pairs_per_behavior", type=int, default=200, help="size of the made set [200]"
    )
    parser.add_argument("--seed", default="0", help="of data and run [0]")


def run(args: argparse.Namespace) -> int:
    """Generate, train, print the table of behaviors, write report.html."""
    show_log()
    folder = Path(args.output_dir)
    data = folder / "data"
    config = load_config(
        overrides={
            "dataset_name": [str(data)],
            "output_dir": str(folder),
            "overwrite_output_dir": "true",
            "seed": args.seed,
            "max_length": "256",
            "learning_rate": "3e-4",
            "num_train_epochs": "2",
            "stratify": "true",
            "eval_steps": "7",
            "eval_sample_size": "32",
            "logging_steps": "2",
        }
    )
    from fastpref.data.generate import generate, write_dataset
    from fastpref.report.html import write_report
    from fastpref.report.tables import behavior_table
    from fastpref.train import train

    rows = generate("demo", args.pairs_per_behavior, config.seed)
    for file in write_dataset(data, rows):
        print(f"made {file}")
    train(config)
    print(behavior_table(folder))
    print(f"report: {write_report(folder)}   records: {folder / 'records'}")
    return 0
