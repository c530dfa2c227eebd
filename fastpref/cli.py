"""The `fastpref` command: names of the commands, exit codes. Each command is its own module.

A command's module has `add_arguments(parser)` and `run(args) -> int` and is imported only when it
is the one asked for, so that `fastpref --help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from fastpref import __version__
from fastpref.config import explain_unknown, field_names
from fastpref.errors import NonFiniteError, Preempted

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("fastpref.commands.train", "train a model on preference pairs"),
    "watch": ("fastpref.commands.watch", "follow a run in the terminal, behavior by behavior"),
    "report": ("fastpref.commands.report", "write a run's report.html"),
    "inspect": ("fastpref.commands.inspect", "look at a data set before training on it"),
    "plan": ("fastpref.commands.plan", "estimate a run's memory before anything is loaded"),
    "theory": ("fastpref.commands.theory", "predict what pairs teach a model, before training"),
    "profile": ("fastpref.commands.profile", "a model's gradients on pairs, without training"),
    "reproduce": ("fastpref.commands.reproduce", "the paper's experiments, prediction beside run"),
    "refcache": ("fastpref.commands.refcache", "compute reference log-probs ahead of training"),
    "env": ("fastpref.commands.env", "versions and hardware, for bug reports"),
    "demo": ("fastpref.commands.demo", "generate data, train and report, in minutes"),
}
BAD_INPUT, NON_FINITE, INTERRUPTED, PREEMPTED = 2, 3, 130, 143


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are ValueErrors, as all bad input is."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; help texts beside the options where they fit."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, bad input 2, non-finite 3, interrupted 130,
    preempted 143. FASTPREF_DEBUG=1 shows tracebacks."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except SystemExit as end:  # argparse leaves this way after --help
        return end.code if isinstance(end.code, int) else 0
    except ValueError as error:
        return _fail(error, BAD_INPUT)
    except NonFiniteError as error:
        return _fail(error, NON_FINITE)
    except Preempted as error:
        return _fail(error, PREEMPTED)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted"), INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has left; without this, Python complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be read or written, a full disk
        return _fail(error, BAD_INPUT)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if args else BAD_INPUT
    if args[0] == "--version":
        print(f"fastpref {__version__}")
        return 0
    name = args[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {name!r}; {hint}")
    command = importlib.import_module(COMMANDS[name][0])
    parser = CommandParser(
        prog=f"fastpref {name}",
        description=command.__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    options, unknown = parser.parse_known_args(args[1:])
    if unknown:
        raise ValueError(_explain_option(parser, unknown[0]))
    code: int = command.run(options)
    return code


def _explain_option(parser: argparse.ArgumentParser, word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r} (see {parser.prog} --help)"
    option = word.split("=", 1)[0]
    known = list(parser._option_string_actions)  # argparse has no public list of them
    if "--output_dir" in known and option.lstrip("-") in field_names():
        return f"{option}: an option of training, not of {parser.prog}"
    if "--learning_rate" in known:  # the options are the fields of Config
        return f"{option}: {explain_unknown(option.lstrip('-'))}"
    near = difflib.get_close_matches(option, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help"
    return f"{option}: unknown option; {hint}"


def _overview() -> str:
    rows = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastpref COMMAND ...",
            "",
            "Train on preference pairs, and see how each behavior drives the model.",
            "",
            *rows,
            "",
            "fastpref COMMAND --help explains a command; fastpref --version prints the version;",
            "FASTPREF_DEBUG=1 in the environment shows tracebacks of errors.",
        ]
    )


def _fail(error: BaseException, code: int) -> int:
    if os.environ.get("FASTPREF_DEBUG") == "1":
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr)
    return code
