"""Ctrl-C: it reaches the command line whoever catches it on the way, and never cuts off the clearing up."""

from __future__ import annotations

import signal
import sys

AGAIN = 0.2
"""Seconds until an interrupt that nobody let through is raised again."""


def listen() -> None:
    """Raise KeyboardInterrupt on SIGINT, and again until it arrives: no library can hide it by catching all."""
    signal.signal(signal.SIGINT, _interrupt)


def calm() -> None:
    """Raise the interrupt that arrived no more, and let the process end with its own exit code."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
    # CPython remembers a KeyboardInterrupt that left the code of an exec(), which dataclasses and torch run, and kills
    # `python -m` at its end by SIGINT, however well it was caught since; the next exec() makes it forget.
    exec("")  # noqa: S102


def _interrupt(*_: object) -> None:
    _raise_again_later()
    raise KeyboardInterrupt


def _again(*_: object) -> None:
    _raise_again_later()
    if not _under_way(sys.exc_info()[1]):
        raise KeyboardInterrupt


def _raise_again_later() -> None:
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _again)
        signal.setitimer(signal.ITIMER_REAL, AGAIN)


def _under_way(handled: BaseException | None) -> bool:
    """Return whether an interrupt is being handled, by a `finally` that clears up for instance."""
    while handled is not None and not isinstance(handled, KeyboardInterrupt):
        handled = handled.__context__
    return handled is not None
