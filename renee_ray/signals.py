"""SIGINT and SIGTERM of a command's process, and the end of the process.

SIGINT and SIGTERM mean the same:

    the first    before the work has begun (`unwinding`), the end; then, KeyboardInterrupt in the
                 main thread, which gives back what the command holds, for CLEAN_UP_S at most
    the second   the end, at once
    a late one   the work is done: nothing, the command says what came of it and ends as it would
    meanwhile    a command may take them for itself (`at_signals`), as training does, which asks
                 its workers for a checkpoint

The end is os._exit. The teardown of an interpreter whose threads are still inside Ray ends with
signal 11 at times, and takes seconds in which a further signal would show a traceback. A thread
sees to it, which the C handler wakes: the main thread may be inside a library's call for long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
CLEAN_UP_S = 10.0
BOTH = (signal.SIGINT, signal.SIGTERM)


class _State:
    """asked: signals so far; unwinding: whether the first becomes an exception; done: whether the
    work is, so that the same command would find it so."""

    asked = 0
    unwinding = False
    done = False
    leaving = threading.Lock()


def install() -> None:
    """Takes over SIGINT and SIGTERM of this process."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    for number in BOTH:
        signal.signal(number, _handle)
    os.register_at_fork(after_in_child=_forget)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(wake,), name="signals", daemon=True).start()


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """What a signal interrupts inside has something to give back."""
    _State.unwinding, _State.done = True, False
    try:
        yield
        _State.done = True
    finally:
        _State.unwinding = False


def interrupted() -> bool:
    """Whether a signal has asked this process to end: what fails then is its consequence."""
    return _State.asked > 0


def of_command() -> bool:
    """Whether this is the process of a command, which ends after an interrupt."""
    return _State.unwinding


@contextlib.contextmanager
def at_signals(
    handle: Callable[[int, FrameType | None], None], numbers: Iterable[signal.Signals] = BOTH
) -> Iterator[None]:
    """The signals call `handle` and do nothing else meanwhile; in the main thread alone."""
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(status: int, message: str = "") -> NoReturn:
    """Ends the process, with a line to standard error; Ray, if it was started here, ends too."""
    if not _State.leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread is at it
    try:
        # Not by an import statement: the main thread may hold the lock of just that import.
        cluster = sys.modules.get("renee_ray.service.cluster.connect")
        if leave_ray := getattr(cluster, "leave_ray", None):
            leave_ray(orderly=status == 0)
        if message:
            show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
            os.write(2, show_cursor + f"{message}\n".encode())
    finally:
        os._exit(status)


def _forget() -> None:
    """In a forked child, whose signals are its own."""
    signal.set_wakeup_fd(-1)
    for number in BOTH:
        signal.signal(number, signal.SIG_DFL)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.unwinding and not _State.asked:
        _State.asked = 1
        # An exception that comes at any point may come inside a callback, which reports it.
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None
        raise KeyboardInterrupt


def _watch(wake: int) -> None:
    """Sees to the end of the process; the main thread only gets the exception."""
    seen = 0
    while numbers := os.read(wake, 1):
        if signal.getsignal(numbers[0]) is not _handle:
            continue  # a command has taken it for itself
        seen += 1
        if _State.done and seen == 1:
            continue
        if seen > 1 or not (_State.unwinding or _State.asked):
            leave(INTERRUPTED, "renee-ray: interrupted")
        clock = threading.Timer(CLEAN_UP_S, leave, (INTERRUPTED, "renee-ray: interrupted"))
        clock.daemon = True
        clock.start()
