"""What training or a score leaves out is counted for people, and named in the run's folder."""

import json
import logging

import pytest
from data import small_splits

from flax_asr import errors, vocabulary
from flax_asr.data import examples
from flax_asr.record import left_out


def built(split, **options):
    return examples.build(
        [split],
        normalize=str.lower,
        vocabulary=vocabulary.Vocabulary.from_transcripts(["abcdefgh"]),
        frame_lengths=lambda samples: samples // 320,
        **options,
    )


def test_every_clip_that_a_run_leaves_out_is_named(tmp_path, caplog):
    test = small_splits.write_split(tmp_path / "test", ["cab", ""], split="test")
    validated = small_splits.write_split(
        tmp_path / "validated",
        ["ab", "abcdefgh", "cab", "h"],
        samples=[4000, 640, 4000, 4000],
        ids=["1", "2", "test-0.mp3", "\ud83d"],
        speakers=["", "", "", ""],
        split="validated",
    )
    train, scored = built(validated, exclude=[test]), built(test)
    with caplog.at_level(logging.INFO, logger="flax_asr"):
        left_out.record(tmp_path, {"train": train, "eval": train, "test": scored})
    text = (tmp_path / left_out.FILE).read_bytes().decode("utf-8", "surrogatepass")
    lines = [json.loads(line) for line in text.splitlines()]
    named = {(line["set"], line["id"]): line["reason"] for line in lines}
    assert named == {
        ("train", "2"): "label_too_long",
        ("train", "test-0.mp3"): "held_out_clip",
        ("eval", "2"): "label_too_long",
        ("eval", "test-0.mp3"): "held_out_clip",
        ("test", "test-1.mp3"): "empty_transcript",
    }
    assert list(lines[0]) == ["set", "id", "reason", "detail"]
    assert lines[0]["detail"] == "8 frames needed, 2 there"
    assert "train: of the prepared clips 2 are left out: 1 label_too_long, 1 held" in caplog.text
    assert "test: of the prepared clips 1 are left out: 1 empty_transcript" in caplog.text


def test_beside_predictions_stands_what_their_score_left_out(tmp_path):
    lacking = built(small_splits.write_split(tmp_path / "test", ["cab", ""], split="test"))
    whole = built(small_splits.write_split(tmp_path / "dev", ["cab"], split="dev"))
    (tmp_path / left_out.FILE).write_text("of the run")
    predictions = tmp_path / "predictions-test.jsonl"
    file = left_out.beside(predictions, "test", lacking)
    assert file == tmp_path / "left_out-test.jsonl"
    assert json.loads(file.read_text(encoding="utf-8"))["id"] == "test-1.mp3"
    assert left_out.beside(predictions, "test", whole) is None
    assert not file.exists()
    assert (tmp_path / left_out.FILE).read_text() == "of the run"
    file.mkdir()
    with pytest.raises(errors.CheckpointError, match=r"cannot remove .*left_out-test\.jsonl"):
        left_out.beside(predictions, "test", whole)


def test_where_nothing_is_left_out_nothing_is_said(tmp_path, caplog):
    split = small_splits.write_split(tmp_path / "train", ["ab"])
    with caplog.at_level(logging.INFO, logger="flax_asr"):
        left_out.record(tmp_path, {"train": built(split)})
    assert (tmp_path / left_out.FILE).read_bytes() == b""
    assert caplog.text == ""


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    split = small_splits.write_split(tmp_path / "train", ["ab"])
    with pytest.raises(errors.CheckpointError, match=r"cannot write .*left_out\.jsonl: No such"):
        left_out.record(tmp_path / "gone", {"train": built(split)})
