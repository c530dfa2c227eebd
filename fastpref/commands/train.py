"""Train on preference pairs: `fastpref train CONFIG.yaml --field value ...`."""

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
