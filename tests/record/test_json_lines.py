"""Files of JSON objects that are whole or not there, whoever else writes them."""

import io
import json

import pytest

from flax_asr import errors
from flax_asr.record import json_lines


def test_two_that_write_a_file_at_once_do_not_get_each_other_s_lines(tmp_path):
    path = tmp_path / "predictions.jsonl"

    def first():
        yield {"by": "first", "text": "a" * 10_000}
        json_lines.write(path, [{"by": "second"}])
        assert path.read_text() == '{"by": "second"}\n'
        yield {"by": "first", "text": "\ud83d"}

    json_lines.write(path, first())
    text = path.read_bytes().decode("utf-8", "surrogatepass")
    assert [json.loads(line)["by"] for line in text.splitlines()] == ["first", "first"]
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_what_is_broken_off_leaves_the_old_file(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("old")

    def broken_off():
        yield {"id": "1"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        json_lines.write(path, broken_off())
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(errors.CheckpointError, match=r"cannot write .*a\.jsonl: No such file"):
        json_lines.write(tmp_path / "gone" / "a.jsonl", [])


def test_what_the_system_has_no_words_for_is_told_in_those_of_who_raised_it(tmp_path):
    def failing():
        yield {"id": "1"}
        raise io.UnsupportedOperation("not writable")

    with pytest.raises(errors.CheckpointError, match=r"a\.jsonl: not writable\.$"):
        json_lines.write(tmp_path / "a.jsonl", failing())
    assert errors.why(OSError()) == "OSError"
