"""Files of JSON objects that are whole or not there, whoever else writes them."""

import json

import pytest

from flax_asr import errors
from flax_asr.record import json_lines


def test_two_that_write_a_file_at_once_do_not_get_each_other_s_lines(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with json_lines.writer(path) as first:
        first({"by": "first", "text": "a" * 10_000})
        with json_lines.writer(path) as second:
            first({"by": "first", "text": "\ud83d"})
            second({"by": "second"})
        assert path.read_text() == '{"by": "second"}\n'
    text = path.read_bytes().decode("utf-8", "surrogatepass")
    assert [json.loads(line)["by"] for line in text.splitlines()] == ["first", "first"]
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(errors.CheckpointError, match=r"cannot write .*a\.jsonl: No such file"),
        json_lines.writer(tmp_path / "gone" / "a.jsonl"),
    ):
        pass
