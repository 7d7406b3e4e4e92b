"""Damage to prepared audio is found beside the run, wherever it is."""

import threading

import pytest
from small_splits import write_split

from flax_asr import errors
from flax_asr.data import rereading, shards


@pytest.fixture
def splits(tmp_path):
    def write(name):
        return write_split(
            tmp_path / name, ["a", "b", "c"], samples=[4000] * 3, split=name, shard_bytes=9000
        )

    return [write("train"), write("dev")]


def test_sound_audio_passes(splits):
    assert [len(split.audio_files) for split in splits] == [3, 3]
    audio = rereading.Rereading([*splits, splits[0]])
    audio.wait()
    audio.check()


@pytest.mark.parametrize("where", [(0, 0), (0, 2), (1, 1)])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_any_damaged_file_is_named_with_the_way_out(splits, where, damage):
    split = splits[where[0]]
    path = split.folder / split.audio_files[where[1]]
    if damage == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    audio = rereading.Rereading(splits)
    what = "cannot be read" if damage == "gone" else "is not what was written"
    with pytest.raises(errors.DataError, match=f"{path} {what}.*Delete the folder {split.folder}"):
        audio.wait()
    with pytest.raises(errors.DataError, match=str(path)):
        audio.check()


def test_of_several_damaged_files_the_first_is_named(splits):
    first, second = (splits[0].folder / name for name in splits[0].audio_files[1:])
    first.unlink()
    second.unlink()
    with pytest.raises(errors.DataError, match=f"{first} cannot be read"):
        rereading.Rereading(splits).wait()


@pytest.mark.parametrize("hangs", [False, True])
def test_a_closed_one_ends_with_the_file_at_hand_unless_the_disk_hangs(splits, monkeypatch, hangs):
    read, begun, mended = [], threading.Event(), threading.Event()

    def verify(split, name):
        read.append(name)
        begun.set()
        mended.wait(60.0 if hangs else 0.1)

    monkeypatch.setattr(shards.PreparedSplit, "verify", verify)
    monkeypatch.setattr(rereading, "PATIENCE_SECONDS", 0.1 if hangs else 60.0)
    audio = rereading.Rereading(splits)
    begun.wait()
    audio.close()
    assert audio._thread.is_alive() == hangs
    mended.set()
    audio.wait()
    assert read == ["audio-00000.bin"]
