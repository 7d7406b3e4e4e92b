"""Signals that ask to stop: noted where there is something to save, at once elsewhere."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flax_asr.hosts import stopping

NAMES = ("SIGTERM", "SIGINT", "SIGHUP")
SCRIPT = """
import contextlib, os, signal, sys, time
from flax_asr.hosts import stopping
deferred, signals = sys.argv[1] == "deferred", sys.argv[2].split(",")
with stopping.Stop() as stop, stop.deferred() if deferred else contextlib.nullcontext():
    for name in signals:
        os.kill(os.getpid(), getattr(signal, name))
        print("after", name, stop.asked, flush=True)
print("end", flush=True)
"""


def run(where: str, signals: str, *before: str, stderr: int = subprocess.PIPE):
    return subprocess.run(
        [*before, sys.executable, "-c", SCRIPT, where, signals],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", NAMES)
def test_outside_of_updates_the_process_ends_at_once(name):
    done = run("compiling", name)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == f"\n{name}: stopped. Run the same command to go on.\n"


@pytest.mark.parametrize("name", NAMES)
def test_among_updates_the_signal_is_noted(name):
    done = run("deferred", name)
    assert (done.returncode, done.stdout) == (0, f"after {name} True\nend\n")
    assert done.stderr == f"\n{name}: finishing this update, then saving.\n"


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_process_at_once(second):
    done = run("deferred", f"SIGINT,{second}")
    assert (done.returncode, done.stdout) == (75, "after SIGINT True\n")
    assert f"{second} again: stopped at once." in done.stderr


@pytest.mark.parametrize("first", NAMES)
def test_a_closed_terminal_does_not_hurry(first):
    """One that closes sends SIGHUP twice, by the system and by the shell."""
    done = run("deferred", f"{first},SIGHUP")
    assert (done.returncode, done.stdout) == (0, f"after {first} True\nafter SIGHUP True\nend\n")


def test_nohup_keeps_a_run_going():
    done = run("deferred", "SIGHUP", "nohup")
    assert (done.returncode, done.stdout) == (0, "after SIGHUP False\nend\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_noted_where_nobody_reads_what_is_said(name):
    """As where Ctrl-C ends both the run and a `| tee` behind it."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = run("deferred", name, stderr=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stdout) == (0, f"after {name} True\nend\n")


def test_afterwards_the_signals_are_as_they_were():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stopping.Stop() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        with stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            limit = time.monotonic() + 5
            while not stop.asked and time.monotonic() < limit:
                pass
        assert stop.asked
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_after_the_last_look_is_obeyed():
    left = []
    with stopping.Stop(lambda status, message: left.append((status, message))) as stop:
        with stop.deferred():
            stop.obey()
            signal.raise_signal(signal.SIGTERM)
        assert left == []
        stop.obey()
    assert left == [(75, "stopped. Run the same command to go on.")]


def test_a_thread_leaves_the_signals_to_their_owner():
    """A run that a program's thread starts: Python lets the main one alone take signals."""
    seen = []

    def run():
        before = signal.getsignal(signal.SIGTERM)
        with stopping.Stop() as stop, stop.deferred():
            seen.append((stop.asked, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
