"""Results for programs survive every locale and every file name."""

import io
import json
import math
import os
import sys

import pytest

from flax_asr import errors
from flax_asr.console import results


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso-8859-1"])
def test_standard_output_of_any_encoding_takes_any_text(encoding, monkeypatch):
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding=encoding))
    sent = {"path": "caf\u00e9.mp3", "text": "你好"}
    with results.writer("-") as write:
        write(sent)
    line = stream.getvalue()
    assert json.loads(line.decode(encoding)) == sent
    assert ("你好".encode() in line) == (encoding == "utf-8")


def test_a_file_name_that_is_no_utf8_comes_back_as_it_was(tmp_path):
    name = os.fsdecode(b"caf\xe9.mp3")
    with results.writer(str(tmp_path / "out.jsonl")) as write:
        write({"path": name, "text": "é"})
    found = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert os.fsencode(found["path"]) == b"caf\xe9.mp3"


def test_figures_that_are_no_numbers_are_null(tmp_path):
    """Of a model that diverged, say; jq and others refuse Python's words for them."""
    sent = {
        "eval_loss": math.nan,
        "groups": [{"wer": math.inf, "clips": 2}],
        "room": (-math.inf, 1),
    }
    with results.writer(str(tmp_path / "out.jsonl")) as write:
        write(sent)

    def refuse(word):
        raise AssertionError(word)

    found = json.loads((tmp_path / "out.jsonl").read_text(), parse_constant=refuse)
    assert found == {"eval_loss": None, "groups": [{"wer": None, "clips": 2}], "room": [None, 1]}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_a_disk_that_fills_up_is_one_message():
    with pytest.raises(errors.ConfigError) as refusal, results.writer("/dev/full") as write:
        write({"text": "one"})
    assert str(refusal.value) == "--json /dev/full cannot be written: No space left on device."
