"""Follow a run in the terminal: how far it is, every behavior's margin and rates, curves, alarms.

    fastpref watch runs/mine                       # q quits, s sorts by the next column
    fastpref watch runs/mine --once --sort share   # one print

The run may be going on, finished, or killed; its files are read, nothing is written. Without a
terminal (a pipe, a file) it prints once and ends.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live

from fastpref.report.live import LiveRun
from fastpref.report.live_table import (
    QUANTITIES,
    SORT_KEYS,
    View,
    demand_behaviors,
    demand_split,
    rows_of,
    sortable,
    splits_of,
)
from fastpref.report.live_view import screen

_PAGE = 10  # rows
_KEYS: dict[str, Callable[[View], View]] = {
    "r": lambda view: replace(view, reverse=not view.reverse),
    "c": lambda view: replace(view, curves=not view.curves),
    "k": lambda view: replace(view, offset=max(view.offset - 1, 0)),
    "j": lambda view: replace(view, offset=view.offset + 1),
    "\x1b[A": lambda view: replace(view, offset=max(view.offset - 1, 0)),
    "\x1b[B": lambda view: replace(view, offset=view.offset + 1),
    "\x1b[5~": lambda view: replace(view, offset=max(view.offset - _PAGE, 0)),
    "\x1b[6~": lambda view: replace(view, offset=view.offset + _PAGE),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fastpref watch`."""
    parser.add_argument("run", type=Path, help="folder of the run (output_dir of train)")
    parser.add_argument(
        "--sort",
        default="rate",
        metavar="KEY",
        help=f"order of the behaviors, one of {', '.join(SORT_KEYS)} [rate]",
    )
    parser.add_argument("--reverse", action="store_true", help="the smallest first")
    parser.add_argument(
        "--behaviors", nargs="+", default=(), metavar="NAME", help="these alone; parts of names do"
    )
    parser.add_argument("--split", help="train_sample, eval or rate_sample [the first there is]")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between looks [2]")
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument("--no_curves", action="store_true", help="the table alone")
    meanings = "\n".join(f"  {q.key:<10} {q.meaning}" for q in QUANTITIES if q.meaning)
    parser.epilog = f"Columns:\n{meanings}"


def run(args: argparse.Namespace) -> int:
    """Show the run until the user leaves; returns 0. ValueError for bad input, at any time."""
    if not args.interval > 0:
        raise ValueError(f"--interval {args.interval:g}: expected seconds above 0")
    view = View(args.sort, args.reverse, args.split, curves=not args.no_curves)
    followed = LiveRun(args.run)
    followed.look()
    if args.behaviors:
        known = sorted({*followed.behaviors(), *followed.index_behaviors()})
        view = replace(view, behaviors=demand_behaviors(args.behaviors, known))
    demand_split(followed, args.split)
    console = Console(highlight=False)
    unicode = not console.options.ascii_only
    if args.once or not console.is_terminal or console.is_dumb_terminal:
        for line in screen(followed, view, console.width, None, unicode):
            console.print(line, no_wrap=True, overflow="crop", crop=False)
        return 0
    try:
        with ExitStack() as stack:
            stack.enter_context(_ended_by_sigterm())
            keys = stack.enter_context(_Keys())
            live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
            _follow(followed, view, args.interval, console, live, keys, unicode)
    except KeyboardInterrupt:
        pass  # the other way to leave
    return 0


def _follow(
    followed: LiveRun,
    view: View,
    interval: float,
    console: Console,
    live: Live,
    keys: _Keys,
    unicode: bool,
) -> None:
    due = time.monotonic() + interval
    while True:
        lines = screen(followed, view, console.width, console.height, unicode)
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
        live.update(Group(*lines), refresh=True)
        for key in keys.wait(due - time.monotonic()):
            if key in ("q", "Q", "\x04"):
                return
            if key == "t":
                view = _next_split(followed, view)
            elif key in ("s", "S"):
                split = demand_split(followed, view.split)
                known = sortable(rows_of(followed, split, view)) if split else []
                view = view.next_sort(1 if key == "s" else -1, known)
            elif key in _KEYS:
                view = _KEYS[key](view)
        if time.monotonic() >= due:
            followed.look()
            due = time.monotonic() + interval


def _next_split(followed: LiveRun, view: View) -> View:
    known = splits_of(followed)
    if not known:
        return view
    now = demand_split(followed, view.split)
    at = known.index(now) if now else -1
    return replace(view, split=known[(at + 1) % len(known)], offset=0)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Leave through the context managers, which give the terminal back as it was."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Keys:
    """What is typed, without waiting for Enter, and changes of the terminal's size.

    Where stdin is no terminal, or the system has none of this (Windows), nothing is ever typed.
    """

    def __enter__(self) -> _Keys:
        self._stdin: int | None = None
        self._wake: tuple[int, int] | None = None
        try:
            import termios
            import tty
        except ImportError:
            return self
        if sys.stdin.isatty():
            self._stdin = sys.stdin.fileno()
            self._settings = termios.tcgetattr(self._stdin)
            tty.setcbreak(self._stdin)
        # A signal writes to a pipe that `wait` listens to: a new size is drawn at once.
        self._wake = os.pipe()
        for end in self._wake:
            os.set_blocking(end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        self._old_resize = signal.signal(signal.SIGWINCH, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stdin is not None:
            import termios

            termios.tcsetattr(self._stdin, termios.TCSADRAIN, self._settings)
        if self._wake is not None:
            signal.signal(signal.SIGWINCH, self._old_resize)
            signal.set_wakeup_fd(self._old_wakeup)
            for end in self._wake:
                os.close(end)

    def wait(self, seconds: float) -> list[str]:
        """The keys typed, after at most ``seconds``; earlier where one is, or the size changes."""
        sources = [fd for fd in (self._stdin, self._wake and self._wake[0]) if fd is not None]
        if not sources:
            time.sleep(max(seconds, 0.0))
            return []
        ready, _, _ = select.select(sources, [], [], max(seconds, 0.0))
        if self._wake and self._wake[0] in ready:
            os.read(self._wake[0], 512)
        if self._stdin not in ready or self._stdin is None:
            return []
        typed = os.read(self._stdin, 512).decode(errors="replace")
        if not typed:  # the terminal is gone
            return ["q"]
        return split_keys(typed)


def split_keys(typed: str) -> list[str]:
    """Keys of what a terminal sent: single characters, and whole sequences such as an arrow's."""
    keys = []
    while typed:
        length = 1
        if typed.startswith(("\x1b[", "\x1bO")):
            length = next((i for i in range(2, len(typed)) if typed[i] in _FINAL), 1) + 1
        keys.append(typed[:length].replace("\x1bO", "\x1b["))
        typed = typed[length:]
    return keys


_FINAL = "~ABCDHF"
