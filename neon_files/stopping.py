"""SIGTERM and Ctrl-C: work in progress is saved first, then the process ends with 128 + the signal's number."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from neon_files.launcher import command_line


class Stopped(BaseException):
    """Raised in the main thread by a signal: at once, or by a loop that has written its state. No Exception, so that
    no handler of errors takes it for one."""

    def __init__(self, number: int):
        self.number, self.exit_code = number, 128 + number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}; go on with: {command_line()}")

    def __reduce__(self):  # it may come from a worker process
        return type(self), (self.number,)


class _State:
    loops = 0  # that ask after each step
    received = 0  # the first signal, 0: none


def asked() -> int:
    """The signal that asks this process to stop, 0 without one."""
    return _State.received


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise `Stopped`; nothing changes outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, _receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        _State.received = 0
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _receive(number: int, frame: object) -> None:
    impatient = bool(_State.received) and "RANK" not in os.environ  # a launcher repeats the terminal's Ctrl-C
    _State.received = _State.received or number
    if impatient or not _State.loops:
        raise Stopped(_State.received)


@contextmanager
def signals_wait() -> Iterator[Callable[[], int]]:
    """Inside, the first signal is only recorded. The body calls the yielded function after each step; where it returns
    a signal instead of 0, the body saves its work and raises `Stopped`."""
    _State.loops += 1
    try:
        yield asked
    finally:
        _State.loops -= 1
    if _State.received and not _State.loops:  # in the last step
        raise Stopped(_State.received)
