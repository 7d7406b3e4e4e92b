"""The prepared format: what goes in comes out, damage is noticed, an interruption costs nothing."""

import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from small_splits import add, noise, write_split

from flax_asr import errors
from flax_asr.data.shard_writer import ShardWriter
from flax_asr.data.shards import ClipFacts, LeftOut, PreparedSplit, pcm_digest

SENTENCES = ["你好。", '"NA" says 𠮷', "", "early", "", "tab\tand\nnewline"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_clips_come_back_as_they_were_added(tmp_path):
    split = write_split(tmp_path / "train", SENTENCES, shard_bytes=25_000)
    assert "journal.jsonl" not in contents(tmp_path / "train")
    assert split.sentences == SENTENCES
    assert split.ids[3] == "train-3.mp3"
    assert split.speakers == [f"speaker-{i % 3}" for i in range(6)]
    assert split.accents[5] == "出生地：香港"
    assert split.ages[0] == "twenties"
    assert split.genders[0] == ""
    assert split.left_out == [LeftOut("bad.mp3", "damaged", "cut")]
    assert split.release == "cv-0"
    assert split.samples.dtype == np.int32
    assert split.samples.tolist() == [4000, 5000, 6000, 7000, 8000, 9000]
    assert split.seconds == pytest.approx(39_000 / 16_000)
    np.testing.assert_array_equal(split.gains, np.float32(1e-4 * np.arange(1, 7)))
    for row in range(6):
        np.testing.assert_array_equal(split.audio(row), noise(4000 + 1000 * row, row))
        with pytest.raises(ValueError, match="read-only"):
            split.audio(row)[0] = 1


CLIP = st.tuples(
    st.builds(ClipFacts, *[st.text(max_size=8)] * 6),
    hypothesis_numpy.arrays(np.int16, st.integers(1, 40)),
    st.floats(2**-20, 8, width=32),
)
LEFT_OUT = st.tuples(st.text(max_size=8), st.builds(LeftOut, *[st.text(max_size=8)] * 3))


@settings(max_examples=40, deadline=None)
@given(st.lists(CLIP, min_size=1, max_size=6), st.lists(LEFT_OUT, max_size=3), st.data())
def test_any_samples_and_any_text_come_back_even_over_an_interruption(
    tmp_path_factory, clips, left_out, data
):
    folder = tmp_path_factory.mktemp("split")
    shard_bytes = data.draw(st.integers(1, 200))
    stop = data.draw(st.integers(0, len(clips)))
    for some in (clips[:stop], clips[stop:]):
        with ShardWriter(folder, shard_bytes=shard_bytes) as writer:
            for facts, pcm, gain in some:
                add(writer, facts, pcm, gain)
    with ShardWriter(folder, shard_bytes=shard_bytes) as writer:
        assert writer.done == [(facts.id, facts.sentence) for facts, _, _ in clips]
        for sentence, entry in left_out:
            writer.leave_out(sentence, entry)
        writer.finish(source="s", release="r", split="train")
    split = PreparedSplit.open(folder, verify=True)
    texts = zip(
        split.ids,
        split.sentences,
        split.speakers,
        split.ages,
        split.genders,
        split.accents,
        strict=True,
    )
    assert [ClipFacts(*fields) for fields in texts] == [facts for facts, _, _ in clips]
    assert split.left_out == [entry for _, entry in left_out]
    for row, (_, pcm, gain) in enumerate(clips):
        np.testing.assert_array_equal(split.audio(row), pcm)
        assert split.gains[row] == np.float32(gain)


def test_shards_are_bounded_and_a_long_clip_has_one_of_its_own(tmp_path):
    write_split(
        tmp_path, SENTENCES, samples=[4000, 4000, 20_000, 4000, 4000, 4000], shard_bytes=17_000
    )
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("audio-*.bin"))]
    assert sizes == [16_000, 40_000, 16_000, 8000]


def test_the_hash_is_of_the_content_and_not_of_the_place(tmp_path):
    first = write_split(tmp_path / "a" / "train", SENTENCES)
    again = write_split(tmp_path / "b" / "elsewhere", SENTENCES)
    assert first.hash == again.hash
    assert contents(first.folder) == contents(again.folder)
    text = write_split(tmp_path / "c", [*SENTENCES[:-1], "other"])
    length = write_split(tmp_path / "d", SENTENCES, samples=[4000, 5000, 6000, 7000, 8000, 9001])
    assert len({first.hash, text.hash, length.hash}) == 3


@pytest.mark.parametrize(
    "name", ["audio-00000.bin", "samples.npy", "offsets.npy", "clips.jsonl", "left_out.jsonl"]
)
def test_damage_is_noticed_and_named(tmp_path, name):
    write_split(tmp_path / "sound", SENTENCES, shard_bytes=25_000)

    def damaged(change):
        shutil.rmtree(tmp_path / "train", ignore_errors=True)
        shutil.copytree(tmp_path / "sound", tmp_path / "train")
        change(tmp_path / "train" / name)
        return tmp_path / "train"

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)

    for change, what in (
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes; the manifest says"),
    ):
        with pytest.raises(errors.DataError, match=f"{name} .*{what}.*Delete the folder"):
            PreparedSplit.open(damaged(change))
    with pytest.raises(errors.DataError, match=f"{name} .*sha256 differs.*prepare"):
        PreparedSplit.open(damaged(flip), verify=name.startswith("audio-"))
    PreparedSplit.open(tmp_path / "sound", verify=True)


def test_a_damaged_unfinished_or_foreign_manifest_is_refused(tmp_path):
    with pytest.raises(errors.DataError, match="not a finished prepared split"):
        PreparedSplit.open(tmp_path / "nowhere")
    path = write_split(tmp_path, SENTENCES).folder / "manifest.json"
    sound = path.read_text()
    path.write_text(sound.replace('"cv-0"', '"cv-1"'))
    with pytest.raises(errors.DataError, match=r"manifest.json is not what was written"):
        PreparedSplit.open(tmp_path)
    path.write_text(sound[:-2])
    with pytest.raises(errors.DataError, match="is not JSON"):
        PreparedSplit.open(tmp_path)
    path.write_text(json.dumps(json.loads(sound) | {"format": 99}))
    with pytest.raises(errors.DataError, match=r"format 99.*delete the folder"):
        PreparedSplit.open(tmp_path)


def write_some(folder, clips, settings=None):
    """Adds the clips from where the folder stands; returns how many were there."""
    with ShardWriter(folder, settings=settings, shard_bytes=25_000) as writer:
        found = list(writer.done)
        for i in clips:
            if i == 2:
                writer.leave_out("two", LeftOut("2", "silent", ""))
            else:
                add(writer, ClipFacts(str(i), f"sentence {i}"), noise(3000 + 500 * i, i))
        return found


def finish(folder, settings=None):
    with ShardWriter(folder, settings=settings, shard_bytes=25_000) as writer:
        writer.finish(source="s", release="r", split="train")
    return contents(folder)


def test_an_interrupted_folder_is_taken_up_and_ends_in_the_same_bytes(tmp_path):
    write_some(tmp_path / "whole", range(9))
    whole = finish(tmp_path / "whole")
    for stop in range(9):
        folder = tmp_path / str(stop)
        write_some(folder, range(stop))
        with open(folder / "journal.jsonl", "ab") as journal:
            journal.write(b'{"id": "half a li')
        for shard in folder.glob("audio-*.bin"):  # bytes of clips that the journal lacks
            with open(shard, "ab") as audio:
                audio.write(b"xyz")
        (folder / "audio-00009.bin").write_bytes(b"xyz")
        assert write_some(folder, []) == [
            (str(i), "two" if i == 2 else f"sentence {i}") for i in range(stop)
        ]
        write_some(folder, range(stop, 9))
        assert finish(folder) == whole


def test_only_what_journal_and_audio_agree_on_is_kept(tmp_path):
    write_some(tmp_path / "whole", range(9))
    whole = finish(tmp_path / "whole")
    for byte in (10, 6100, 15_000, 24_000):
        folder = tmp_path / str(byte)
        write_some(folder, range(9))
        shard = folder / "audio-00000.bin"
        data = bytearray(shard.read_bytes())
        data[byte % len(data)] ^= 1
        shard.write_bytes(data)
        kept = len(write_some(folder, []))
        starts = list(itertools.accumulate([6000, 7000, 0, 9000, 10_000], initial=0))
        assert kept == max(i for i, start in enumerate(starts) if start <= byte % len(data))
        write_some(folder, range(kept, 9))
        assert finish(folder) == whole


def test_clips_that_are_left_out_do_not_change_the_hash(tmp_path):
    for clips in (2, 3):  # the third one is left out
        write_some(tmp_path / str(clips), range(clips))
        finish(tmp_path / str(clips))
    without, beside = (PreparedSplit.open(tmp_path / str(clips)) for clips in (2, 3))
    assert (len(without.left_out), len(beside.left_out)) == (0, 1)
    assert without.hash == beside.hash


def test_other_settings_start_afresh(tmp_path):
    write_some(tmp_path, range(3), settings={"max_seconds": 20})
    assert len(write_some(tmp_path, [], settings={"max_seconds": 20})) == 3
    assert write_some(tmp_path, [], settings={"max_seconds": 10}) == []
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_a_louder_recording_of_the_same_integers_is_another_one():
    quiet, loud = (pcm_digest(noise(100, 0), gain) for gain in (1 / 32768, 1 / 16384))
    assert quiet != loud
    assert quiet == pcm_digest(noise(100, 0), 1 / 32768) != pcm_digest(noise(100, 1), 1 / 32768)


def test_digests_of_kept_clips_survive_an_interruption(tmp_path):
    write_some(tmp_path, range(4))
    with ShardWriter(tmp_path, shard_bytes=25_000) as writer:
        assert sorted(writer.digests.values()) == ["0", "1", "3"]
        assert writer.clips == 3
        writer.discard()
    assert list(tmp_path.iterdir()) == []
