"""Train on preference pairs.

    fastpref train --dataset_name my-pairs/ --output_dir runs/mine
    fastpref train examples/persona.yaml --dataset_name my-pairs/ --learning_rate 5e-6

dataset_name alone has no default. The command line wins over the file. A run that was stopped goes
on where it stood when the same command is given again.
"""

from __future__ import annotations

import argparse

from fastpref.commands import add_config_options, config_from_options, show_log

add_arguments = add_config_options


def run(args: argparse.Namespace) -> int:
    """Train, then print the table of behaviors and say where the report can be made."""
    config = config_from_options(args)
    show_log()
    from fastpref import dist
    from fastpref.report.tables import behavior_table
    from fastpref.train import train

    folder = train(config)
    if dist.is_main() and config.record and config.eval_steps:
        print(behavior_table(folder))
    if dist.is_main():
        print(f"run: {folder}   report: fastpref report {folder}")
    return 0
