"""Labels from prepared splits: what is left out and why, what is held out, what is drawn."""

import numpy as np
import pytest
from small_splits import noise, write_split

from flax_asr import errors
from flax_asr.data.examples import build
from flax_asr.vocabulary import Vocabulary

VOCABULARY = Vocabulary.from_transcripts(["abcdefgh 你好嗎"])


def frame_lengths(samples):
    return (samples - 80) // 320


def normalize(sentence):
    return sentence.lower().replace("。", "").strip()


def examples(splits, **options):
    return build(
        splits,
        normalize=normalize,
        vocabulary=VOCABULARY,
        frame_lengths=frame_lengths,
        **options,
    )


def reasons(data):
    return {entry.id: entry.reason for entry in data.left_out}


def test_rows_carry_labels_audio_and_facts(tmp_path):
    first = write_split(tmp_path / "train", ["你好。", "A b"], shard_bytes=8_000)
    second = write_split(tmp_path / "dev", ["嗎", "Cab"], samples=[6000, 7000], split="dev")
    assert (len(first.maps), len(second.maps)) == (2, 1)
    data = examples([first, second])
    assert len(data) == 4
    assert data.references == ["你好", "a b", "嗎", "cab"]
    assert data.ids == ["train-0.mp3", "train-1.mp3", "dev-0.mp3", "dev-1.mp3"]
    assert data.label_lengths.tolist() == [2, 3, 1, 3]
    for row, reference in enumerate(data.references):
        assert data.labels(row).dtype == np.int32
        assert VOCABULARY.decode(data.labels(row)) == reference
        np.testing.assert_array_equal(data.audio(row), noise(4000 + 1000 * row, row % 2))
    np.testing.assert_array_equal(data.gains, np.float32([1e-4, 2e-4, 1e-4, 2e-4]))
    assert data.samples.tolist() == [4000, 5000, 6000, 7000]
    assert data.seconds == pytest.approx(22_000 / 16_000)
    assert data.facts(3) == {
        "speaker": "speaker-1",
        "age": "twenties",
        "gender": "",
        "accent": "出生地：香港",
    }
    assert data.left_out == []


def test_what_cannot_be_learnt_is_left_out_by_name(tmp_path):
    # 5 frames: "abcde" fits, "abcdef" does not, and neither does "aabbb" with its three blanks.
    split = write_split(
        tmp_path, ["abcde", "abcdef", "aab", "aabbb", " 。 "], samples=[1680 + 319] * 5
    )
    assert frame_lengths(split.samples).tolist() == [5] * 5
    data = examples([split])
    assert data.references == ["abcde", "aab"]
    assert reasons(data) == {
        "train-1.mp3": "label_too_long",
        "train-3.mp3": "label_too_long",
        "train-4.mp3": "empty_transcript",
    }
    assert data.left_out[1].detail == "8 frames needed, 5 there"
    assert data.left_out_summary() == "2 label_too_long, 1 empty_transcript"
    np.testing.assert_array_equal(data.audio(1), noise(1999, 2))


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    split = write_split(tmp_path, ["。", ""])
    with pytest.raises(errors.DataError, match="No clip of train can be used: 2 empty_transcript"):
        examples([split])


def test_a_clip_in_two_joined_splits_counts_once(tmp_path):
    train = write_split(tmp_path / "train", ["a", "b"], ids=["1", "2"])
    validated = write_split(tmp_path / "validated", ["b", "c"], ids=["2", "3"], split="validated")
    data = examples([train, validated])
    assert data.ids == ["1", "2", "3"]
    assert reasons(data) == {"2": "duplicate"}


def test_sentences_and_speakers_that_are_scored_are_not_trained_on(tmp_path):
    validated = write_split(
        tmp_path / "validated",
        ["你好", "a b", "abc", "你好。", "cab", "h"],
        speakers=["s1", "s2", "tester", "s3", "", ""],
        ids=["test-0.mp3", "1", "2", "3", "4", "5"],
        split="validated",
    )
    test = write_split(tmp_path / "test", ["你好", "CAB。"], speakers=["tester", ""], split="test")
    data = examples([validated], exclude=[test])
    assert data.ids == ["1", "5"]
    assert reasons(data) == {
        "test-0.mp3": "held_out_clip",
        "2": "held_out_speaker",
        "3": "held_out_sentence",
        "4": "held_out_sentence",
    }
    assert len(examples([validated])) == 6


def test_max_clips_draws_the_same_part_every_time(tmp_path):
    sentences = list("abcdefgh" * 5)
    split = write_split(tmp_path, sentences, samples=[2000] * 40)
    part = examples([split], max_clips=10, seed=1)
    assert len(part) == 10
    assert part.clips_available == 40
    assert part.ids == examples([split], max_clips=10, seed=1).ids
    assert part.ids != examples([split], max_clips=10, seed=2).ids
    assert [split.ids.index(clip_id) for clip_id in part.ids] == sorted(
        split.ids.index(clip_id) for clip_id in part.ids
    )
    for row, clip_id in enumerate(part.ids):
        np.testing.assert_array_equal(part.audio(row), split.audio(split.ids.index(clip_id)))
    assert examples([split], max_clips=100).ids == split.ids
    assert part.hash != examples([split]).hash
