"""The ends of a run that a caller may want to tell apart; everything else is a ValueError."""

from __future__ import annotations


class NonFiniteError(ArithmeticError):
    """A loss or gradient is infinite or NaN; the message names step and pairs. Exit code 3."""


class OutOfMemory(RuntimeError):
    """Forward or backward of a step did not fit, on this rank or on another. Weights and optimizer
    are as before the step, and there are no gradients."""


class Preempted(Exception):
    """The process was asked to end (SIGTERM) and stopped at a whole step. Exit code 143."""
