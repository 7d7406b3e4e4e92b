"""A bar on a terminal, plain lines in a log."""

import io
import os

import pytest

from flax_asr import errors
from flax_asr.console import progress, terminal
from flax_asr.console.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(params=["pipe", "terminal", "disk"])
def unheard(request):
    """A stream that takes nothing: nobody reads it, or it is closed or full."""
    if request.param == "disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("a disk that is always full")
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        read, write = os.pipe() if request.param == "pipe" else os.openpty()
        os.close(read)
    with open(write, "w") as stream:
        yield stream
        terminal.leave(stream)


def test_what_nobody_can_read_stops_no_work(unheard):
    with pytest.raises((OSError, errors.ConfigError), match=r"Broken pipe|output error|No space"):
        terminal.show("a", unheard)
    with Progress(2, "compiling", "programs", stream=unheard, line_seconds=0) as bar:
        for _ in range(2000):
            bar.write("line " * 10)
        bar.advance(2, loss=0.1)
    assert bar.done == 2


def test_a_bar_on_a_terminal_that_is_closed_stops_no_work():
    read, write = os.openpty()
    with open(write, "w") as stream:
        with Progress(2, "compiling", "programs", stream=stream) as bar:
            bar.advance()
            os.close(read)
            bar.write("line")
            bar.advance()
            bar.write("line")
        assert bar.done == 2
        terminal.leave(stream)


def test_a_log_gets_a_line_at_the_end_and_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(100, "preparing train", "clips", stream=out, line_seconds=10) as bar:
        for _ in range(24):
            now[0] += 1.0
            bar.advance(4, left_out=3, loss=0.123456)
    assert out.getvalue().splitlines() == [
        "preparing train: 40/100 clips, 4/s, 0:00:15 left, left_out 3, loss 0.1235",
        "preparing train: 80/100 clips, 4/s, 0:00:05 left, left_out 3, loss 0.1235",
        "preparing train: 96/100 clips, 4/s, 0:00:01 left, left_out 3, loss 0.1235",
    ]


def test_what_was_done_before_counts_but_not_for_the_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(None, "x", "clips", initial=1000, stream=out) as bar:
        now[0] = 2.0
        bar.advance(10)
    assert out.getvalue() == "x: 1010 clips, 5/s\n"


def test_the_end_is_not_written_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(2, "compiling", "programs", stream=out, line_seconds=30) as bar:
        bar.advance()
        now[0] = 40.0
        bar.advance()
    assert out.getvalue() == "compiling: 2/2 programs, 0.05/s\n"


def test_a_terminal_gets_a_bar():
    out = Terminal()
    with Progress(3, "training", "updates", stream=out) as bar:
        bar.advance(2, loss=1.5)
        bar.write("a line")
        bar.advance(1)
    text = out.getvalue()
    assert "training: 100%" in text
    assert "3/3" in text
    assert "loss 1.5" in text
    assert "a line\n" in text


def test_an_error_inside_is_not_followed_by_a_line():
    out = io.StringIO()

    def fail():
        with Progress(3, "a", "b", stream=out) as bar:
            bar.advance(1)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert out.getvalue() == ""


def test_standard_output_stays_clean(capsys):
    with Progress(1, "a", "b") as bar:
        bar.advance(1)
        bar.write("note")
    found = capsys.readouterr()
    assert found.out == ""
    assert "a: 1/1 b" in found.err
    assert "note" in found.err


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_other_hosts_than_the_first_show_none(monkeypatch, stream):
    monkeypatch.setattr(progress, "_shown", True)
    progress.hide()
    out = stream()
    with Progress(3, "training", "updates", stream=out, line_seconds=0) as bar:
        bar.advance(3)
    assert out.getvalue() == ""
