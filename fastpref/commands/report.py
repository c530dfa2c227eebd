"""Write a run's report.html and print its per-behavior table.

Reads the files of the run folder only; the run may be going on, finished, or killed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastpref.report.html import write_report
from fastpref.report.tables import behavior_table, read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fastpref report`."""
    parser.add_argument("run", type=Path, help="folder of the run (output_dir of train)")
    parser.add_argument("--out", type=Path, help="the page to write (default: RUN/report.html)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code. ValueError if RUN is not the folder of a run."""
    files = read_run(args.run)
    if files.curves:
        print(behavior_table(files))
    else:
        print(f"{args.run}: no evaluation is recorded (yet), so there is no table of behaviors")
    print(f"report: {write_report(files, args.out)}")
    return 0
