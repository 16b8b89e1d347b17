"""Signals and the end of a command's process, with a command in place of the real ones."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import Any

import pytest

BEFORE = """
import contextlib, hashlib, sys, time, types
from renee_ray import signals
from renee_ray.cli.program import program
from renee_ray.signals import at_signals, unwinding

def ready():
    print("ready", flush=True)

def main(arguments):
{body}
    return 0

signals.CLEAN_UP_S = {clean_up_s}
sys.modules["renee_ray.cli.main"] = types.SimpleNamespace(main=main)
program([])
"""
CLEANS_UP = """
    try:
        with unwinding():
            ready(); time.sleep(60)
    except KeyboardInterrupt:
        print("cleaned", flush=True)
        return 130
"""
HANGS = """
    with unwinding():
        try:
            ready(); time.sleep(60)
        finally:
            ready(); time.sleep(60)
"""
INSIDE_A_LIBRARY = """
    with unwinding():
        ready(); hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
IN_A_CALLBACK = """
    class Thing:
        def __del__(self):
            ready(); time.sleep(60)
    with unwinding():
        Thing()
        print("lost", flush=True)
        time.sleep(60)
"""
TAKES_IT = """
    taken = []
    with unwinding(), at_signals(lambda number, frame: taken.append(number)):
        ready()
        while not taken:
            time.sleep(0.01)
    print(taken, flush=True)
"""
DONE = """
    with unwinding():
        pass
    ready(); time.sleep(1); print("result", flush=True)
"""
FORKS = """
    import os, signal
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(1)  # it has begun
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    time.sleep(0.3)
"""
AFTER_OTHER_WORK = f"\n    with unwinding():\n        pass\n{INSIDE_A_LIBRARY}"
LINE = "renee-ray: interrupted\n"


def run(body: str, *signals: int, clean_up_s: float = 60) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a command that gets each signal when it
    says that it is ready."""
    code = BEFORE.format(body=body, clean_up_s=clean_up_s)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout is not None
        for number in signals:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.1)  # it is inside the call that follows
            process.send_signal(number)
        out, err = process.communicate(timeout=50)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("    ready(); time.sleep(60)", (130, "", LINE)),
        ("    ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)", (130, "", LINE)),
        (CLEANS_UP, (130, "cleaned\n", "")),
    ],
)
def test_a_signal_ends_a_command(body: str, outcome: Any, number: int) -> None:
    assert run(body, number) == outcome


def test_a_command_may_take_signals_for_itself() -> None:
    assert run(TAKES_IT, signal.SIGTERM) == (0, "[15]\n", "")


def test_a_second_signal_ends_it_at_once() -> None:
    assert run(HANGS, signal.SIGINT, signal.SIGINT) == (130, "", LINE)


def test_a_signal_after_the_work_is_done_loses_no_result() -> None:
    """Else a finished conversion would look interrupted, and the same command be refused."""
    assert run(DONE, signal.SIGINT) == (0, "result\n", "")


@pytest.mark.parametrize("body", [INSIDE_A_LIBRARY, IN_A_CALLBACK, AFTER_OTHER_WORK])
def test_the_end_comes_though_the_main_thread_does_not(body: str) -> None:
    """And an exception that is lost in a callback is not reported."""
    status, _, err = run(body, signal.SIGINT, clean_up_s=1)
    assert (status, err) == (130, LINE)


def test_a_forked_child_has_signals_of_its_own() -> None:
    assert run(FORKS)[:2] == (0, "-15\n")


def test_a_fault_of_ours_has_its_traceback() -> None:
    status, _, err = run("    raise ZeroDivisionError")
    assert status == 1 and err.rstrip().endswith("ZeroDivisionError")
