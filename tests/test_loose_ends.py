"""What a write in many threads says besides the one error that it raises."""

import asyncio
import gc
import logging
import sys
import types

import pytest

from flax_asr import loose_ends


def leave(failure: Exception) -> None:
    """A task that failed, and nobody asks what became of it."""
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(failure)
    loop.close()
    gc.collect()


def names(caplog) -> list[str]:
    return [type(record.exc_info[1]).__name__ for record in caplog.records if record.exc_info]


def test_failures_that_are_told_are_not_shown_again_and_others_are(caplog, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: shown.append(str(found.exc_value)))
    with loose_ends.hidden((OSError,)):
        leave(OSError())
        leave(KeyError())
        logging.getLogger("absl").error("a traceback")
        for error in (RuntimeError("Event loop is closed"), RuntimeError("another")):
            sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert (names(caplog), shown) == (["KeyError"], ["another"])
    assert "a traceback" not in caplog.text
    leave(OSError())
    logging.getLogger("absl").error("a traceback")
    assert names(caplog) == ["KeyError", "OSError"]
    assert "a traceback" in caplog.text


def test_what_an_error_s_frames_hold_on_to_is_dropped_while_it_is_hidden(caplog):
    def fail():
        loop = asyncio.new_event_loop()
        failed = loop.create_future()
        failed.set_exception(OSError())
        loop.close()
        raise OSError

    with loose_ends.hidden((OSError,)):
        with pytest.raises(OSError) as raised:  # noqa: PT011  the type alone counts
            fail()
        loose_ends.drop(raised.value)
    del raised
    gc.collect()
    assert names(caplog) == []
