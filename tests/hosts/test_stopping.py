"""SIGTERM and SIGINT: noted where there is something to save, at once elsewhere."""

import signal
import subprocess
import sys
import time

import pytest

from flax_asr.hosts import stopping

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


def run(where: str, signals: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, where, signals],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_outside_of_updates_the_process_ends_at_once(name):
    done = run("compiling", name)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == f"\n{name}: stopped. Run the same command to go on.\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_among_updates_the_signal_is_noted(name):
    done = run("deferred", name)
    assert (done.returncode, done.stdout) == (0, f"after {name} True\nend\n")
    assert done.stderr == f"\n{name}: finishing this update, then saving.\n"


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_process_at_once(second):
    done = run("deferred", f"SIGINT,{second}")
    assert (done.returncode, done.stdout) == (75, "after SIGINT True\n")
    assert f"{second} again: stopped at once." in done.stderr


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
