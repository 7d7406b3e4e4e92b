"""Every source gives the same clips; every defect of one is named."""

import dataclasses
import gzip
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from flax_asr.common_voice import Clip, open_source
from flax_asr.errors import DataError
from flax_asr.sources import archives, clips, hub

RELEASE = "cv-corpus-25.0-2026-03-09"
COLUMNS = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents "
    "variant locale segment"
)


def sound(seed):
    buffer = io.BytesIO()
    samples = np.random.default_rng(seed).normal(0, 0.1, 1600)
    soundfile.write(buffer, samples, 16_000, format="WAV")
    return buffer.getvalue()


SENTENCES = {
    "train": ["你好", 'a "quote', "NA", "line\u2028separator\x85here"],
    "dev": ["好"],
    "test": ["null"],
}


def write_release(root, language="zh-HK", release=RELEASE):
    """Returns the language's folder of a release with four, one and one clips."""
    folder = root / release / language
    (folder / "clips").mkdir(parents=True)
    for split, sentences in SENTENCES.items():
        lines = [COLUMNS.replace(" ", "\t")]
        for i, sentence in enumerate(sentences):
            name = f"common_voice_{split}_{i}.mp3"
            (folder / "clips" / name).write_bytes(sound(len(name) + i))
            facts = f"twenties\tfemale_feminine\t香港\t\t{language}\t"
            lines.append(f"speaker{i}\t{name}\t0\t{sentence}\t\t2\t0\t{facts}")
        (folder / f"{split}.tsv").write_bytes(("\n".join(lines) + "\n").encode())
    (folder / "clip_durations.tsv").write_text("clip\tduration[ms]\n")
    (folder / "reported.tsv").write_text("sentence_id\tsentence\n")
    return folder


@pytest.fixture
def release(tmp_path):
    return write_release(tmp_path)


def pack(folder, file, mode="w:gz"):
    with tarfile.open(file, mode) as archive:
        archive.add(folder.parent, arcname=folder.parent.name)
    return file


def everything(source):
    """The clips of all splits by id, each with the bytes of its audio."""
    found = {}
    for split in source.splits():
        for clip in source.read(split):
            content = clip.audio_bytes
            if content is None:
                content = pathlib.Path(clip.audio).read_bytes()
            found[split, clip.id] = dataclasses.replace(clip, audio=None, audio_bytes=content)
    return found


def read(source, split="train", **options):
    return list(open_source(str(source), language="zh-HK", **options).read(split))


def test_a_release_is_read_with_its_facts(release):
    source = open_source(str(release), language="zh-HK")
    assert source.splits() == ("train", "dev", "test")
    assert source.release == RELEASE
    clips = list(source.read("train"))
    assert [clip.sentence for clip in clips] == SENTENCES["train"]
    assert clips[0] == Clip(
        id="common_voice_train_0.mp3",
        sentence="你好",
        audio=str(release / "clips" / "common_voice_train_0.mp3"),
        speaker="speaker0",
        age="twenties",
        gender="female_feminine",
        accent="香港",
    )
    assert list(source.read("train")) == clips


def test_the_folder_above_the_language_will_do(release, tmp_path):
    expected = everything(open_source(str(release), language="zh-HK"))
    assert everything(open_source(str(release.parent), language="zh-HK")) == expected
    assert everything(open_source(str(tmp_path), language="zh-HK")) == expected


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_an_archive_gives_what_its_folder_gives(release, tmp_path, mode, format):
    file = tmp_path / ("release.tar.gz" if mode == "w:gz" else "release.tar")
    with tarfile.open(file, mode, format=format) as archive:
        archive.add(release.parent, arcname=release.parent.name)
    source = open_source(str(file), language="zh-HK")
    assert source.splits() == ("train", "dev", "test")
    assert source.release == RELEASE
    assert everything(source) == everything(open_source(str(release), language="zh-HK"))
    order = [clip.id for clip in source.read("train")]
    assert [clip.id for clip in source.read("train")] == order


@pytest.mark.parametrize("prefix", ["", "./"])
def test_an_archive_of_the_first_releases_has_no_folder_of_the_language(release, tmp_path, prefix):
    """As cv-corpus-1/en.tar.gz; a Mac adds files of its own."""
    (release / "._train.tsv").write_bytes(b"\0\5\26\7")
    file = tmp_path / "cv-corpus-1" / "zh-HK.tar.gz"
    file.parent.mkdir()
    with tarfile.open(file, "w:gz") as archive:
        for part in sorted(release.iterdir()):
            archive.add(part, arcname=prefix + part.name)
    source = open_source(str(file), language="zh-HK")
    assert source.splits() == ("train", "dev", "test")
    assert source.release == "cv-corpus-1"
    assert everything(source) == everything(open_source(str(release), language="zh-HK"))


def test_reading_an_archive_writes_nothing_beside_it(release, tmp_path):
    file = pack(release, tmp_path / "release.tar.gz")
    before = sorted(tmp_path.rglob("*"))
    assert len(read(file)) == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_long_names_in_archives_are_read(tmp_path):
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        file = tmp_path / "long.tar"
        name = "é" * 60 + "/" + "x" * 150 + ".mp3"
        with tarfile.open(file, "w", format=format) as archive:
            information = tarfile.TarInfo(name)
            information.size = 3
            archive.addfile(information, io.BytesIO(b"abc"))
        assert [(n, size, b.read()) for n, size, b in archives.members(file)] == [(name, 3, b"abc")]


def test_links_and_paths_that_lead_out_of_an_archive_are_passed_over(release, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (release / "clips" / "common_voice_train_0.mp3").unlink()
    (release / "clips" / "common_voice_train_0.mp3").symlink_to(secret)
    file = tmp_path / "release.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        hard = tarfile.TarInfo(f"{RELEASE}/zh-HK/clips/common_voice_train_1.mp3")
        hard.type, hard.linkname, hard.size = tarfile.LNKTYPE, str(secret), 512
        archive.addfile(hard)
        outside = tarfile.TarInfo(f"../../{RELEASE}/zh-HK/train.tsv")
        outside.size = 4
        archive.addfile(outside, io.BytesIO(b"evil"))
        (release / "clips" / "common_voice_train_1.mp3").unlink()
        archive.add(release.parent, arcname=RELEASE)
    clips = {clip.id: clip for clip in read(file)}
    assert clips["common_voice_train_0.mp3"].refused == "not in the archive"
    assert clips["common_voice_train_1.mp3"].refused == "not in the archive"
    assert clips["common_voice_train_2.mp3"].audio_bytes
    # Refused ones come last, and carry no audio.
    assert [bool(clip.refused) for clip in read(file)] == [False, False, True, True]


def test_a_damaged_or_foreign_archive_is_refused(release, tmp_path):
    file = pack(release, tmp_path / "release.tar.gz")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="download it again"):
        read(file)
    file.write_bytes(gzip.compress(gzip.decompress(content)[:-12_000]))
    with pytest.raises(DataError, match="cut after"):
        read(file)
    changed = bytearray(gzip.decompress(content))
    changed[100:108] = b"\xff" * 8
    file.write_bytes(gzip.compress(bytes(changed)))
    with pytest.raises(DataError, match="not a tar archive"):
        read(file)
    file.write_bytes(b"<html>please log in</html>" * 50)
    with pytest.raises(DataError, match="not a tar archive"):
        read(file)
    pack(write_release(tmp_path / "other", "yue"), file)
    with pytest.raises(DataError, match="without 'zh-HK'; it has 'yue'"):
        read(file)


def test_any_cut_of_an_archive_is_an_error_or_complete(release, tmp_path):
    content = pack(release, tmp_path / "release.tar.gz").read_bytes()
    file = tmp_path / "cut.tar.gz"
    for length in np.random.default_rng(0).integers(1, len(content) - 1, size=30):
        file.write_bytes(content[:length])
        with pytest.raises(DataError):
            read(file)


def test_an_archive_that_explodes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_FREE_BYTES", 2**20)
    file = tmp_path / "bomb.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        information = tarfile.TarInfo(f"{RELEASE}/zh-HK/train.tsv")
        information.size = 2**24
        archive.addfile(information, io.BytesIO(bytes(2**24)))
    with pytest.raises(DataError, match="more than 100 times"):
        read(file)
    with open(file, "wb") as stream, gzip.open(stream, "wb") as zipped:
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, 2**32
        zipped.write(header.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match="a header of 4294967296 bytes"):
        read(file)


def test_rows_that_lead_out_of_a_release_become_refused_clips(release, tmp_path):
    paths = ["../../secret.mp3", "/etc/passwd", "", "a/../../b.mp3", "..\\x.mp3", "hash0123"]
    rows = "".join(f"s\t{path}\t好\n" for path in paths) + "s\ta.mp3\t好\tand\tmore\n"
    (release / "train.tsv").write_text(f"client_id\tpath\tsentence\n{rows}")
    for source in (release, pack(release, tmp_path / "release.tar.gz")):
        clips = {clip.id: clip for clip in read(source)}
        good = clips.pop("hash0123.mp3")
        assert not good.refused or good.refused == "not in the archive"
        assert len(clips) == 6
        for clip in clips.values():
            assert clip.refused
            assert (clip.audio, clip.audio_bytes) == (None, None)


def test_columns_of_all_releases_are_found_by_name(release):
    (release / "train.tsv").write_bytes(
        "\ufeffsentence\taccent\tpath\tspeaker\r\n好\thk\tabc\tme\r\n".encode()
    )
    (clip,) = read(release)
    assert (clip.sentence, clip.accent, clip.id, clip.speaker) == ("好", "hk", "abc.mp3", "me")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path\ttext\na\tb\n", r"no column 'sentence'; it has 'path', 'text'.*data.text_column"),
        (b"", "the file is empty"),
        (b"path\tsentence\n", "the split 'train' has no clips"),
        (b"path\tsentence\na\tfine\nb\tcaf\xe9\n", r"train.tsv, line 3: not UTF-8 \(byte 0xe9"),
        ("path\tsentence\r\n".encode("utf-16"), "written in UTF-16"),
        (b"path\tpath\tsentence\n", r"twice: \['path'\]"),
        (b"path\tsentence\na\t" + b"x" * 2**21, "line 2: longer than 1 MiB"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(release, content, message):
    (release / "train.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(release)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    ],
)
def test_a_table_that_is_no_file_is_named(release, make, message):
    (release / "train.tsv").unlink()
    make(release / "train.tsv")
    with pytest.raises(DataError, match=rf"train\.tsv cannot be read: {message}\."):
        read(release)


def test_another_text_column_can_be_named(release):
    (release / "train.tsv").write_bytes(b"path\ttext\na\tb\n")
    assert [clip.sentence for clip in read(release, text_column="text")] == ["b"]


def test_a_missing_split_is_refused_with_those_that_are_there(release):
    with pytest.raises(
        DataError, match=r"no split 'valid'; it has train, dev, test\. .*eval_splits"
    ):
        open_source(str(release), language="zh-HK").read("valid")


@pytest.mark.parametrize("split", ["train+dev", "train[:10%]"])
def test_splits_as_datasets_slices_them_are_answered_with_ours(release, split):
    with pytest.raises(DataError, match=r"it has train, .*written a,b; data\.max_train_clips"):
        open_source(str(release), language="zh-HK").read(split)


def test_what_is_no_source_is_refused_with_what_would_be(release, tmp_path):
    with pytest.raises(DataError, match=r"nothing is there\. It may be"):
        read(tmp_path / "absent")
    for source in ("~nobody-is-called-so/x.csv", "hf:~nobody-is-called-so/x"):
        with pytest.raises(DataError, match="nobody-is-called-so"):
            open_source(source, language="en")
    with pytest.raises(DataError, match="read from a disk: copy it"):
        open_source("gs://b/cv.tar.gz", language="en")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="cannot tell what it is; unpack it"):
        read(tmp_path / "x.zip")
    for above in release.parents[:2]:
        with pytest.raises(DataError, match=r"without 'yue'; it has 'zh-HK'$"):
            open_source(str(above), language="yue")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="not a Common Voice release"):
        read(empty)
    (empty / "train.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="write parquet:"):
        read(empty)
    os.rename(release / "clips", release / "elsewhere")
    with pytest.raises(DataError, match=r"no folder clips/.*name the table itself"):
        read(release)


SPONTANEOUS = (
    "client_id\taudio_id\taudio_file\tduration_ms\tprompt_id\tprompt\ttranscription\tvotes\tage\t"
    "gender\tlanguage\tsplit\tchar_per_sec\tquality_tags\n"
    "me\t1\tone.mp3\t100\t7\tWhy?\tBecause.\t2\tteens\t\tWelsh\ttrain\t9\t\n"
    "me\t2\ttwo.mp3\t100\t7\tWhy?\tI know.\t2\t\t\tWelsh\tdev\t9\t\n"
    "you\t3\tthree.mp3\t100\t8\tWhen?\t\t0\t\t\tWelsh\t\t\t\n"
)


def write_spontaneous(root, language="cy", release="sps-corpus-3.0-2026-03-09"):
    """Returns the folder of a release of spontaneous speech with a clip in each of three splits."""
    folder = root / f"{release}-{language}"
    (folder / "audios").mkdir(parents=True)
    for number, name in enumerate(("one", "two", "three")):
        (folder / "audios" / f"{name}.mp3").write_bytes(sound(number))
    (folder / f"ss-corpus-{language}.tsv").write_text(SPONTANEOUS)
    (folder / f"ss-reported-audios-{language}.tsv").write_text("audio_id\treason\n")
    return folder


@pytest.mark.parametrize("form", ["folder", "above", "archive"])
def test_a_release_of_spontaneous_speech_is_read(tmp_path, form):
    place = folder = write_spontaneous(tmp_path / "releases")
    if form == "above":
        write_spontaneous(place.parent, "mt")
        place = place.parent
    elif form == "archive":
        place = tmp_path / f"{folder.name}.tar.gz"
        with tarfile.open(place, "w:gz") as archive:
            archive.add(folder, folder.name)
    source = open_source(str(place), language="cy")
    assert (source.release, source.splits()) == (folder.name, ("train", "dev", "other"))
    (clip,) = source.read("train")
    assert (clip.id, clip.sentence, clip.speaker) == ("one.mp3", "Because.", "me")
    assert clip.age == "teens"
    content = clip.audio_bytes or pathlib.Path(clip.audio).read_bytes()
    assert content == (folder / "audios" / "one.mp3").read_bytes()
    # What nobody has written down yet.
    assert [clip.sentence for clip in source.read("other")] == [""]
    prompts = open_source(str(place), language="cy", text_column="prompt")
    assert [clip.sentence for clip in prompts.read("dev")] == ["Why?"]
    with pytest.raises(DataError, match=r"without 'de'; it has .*'cy'"):
        open_source(str(place), language="de")


@pytest.mark.parametrize("older", ["cv-corpus-3", "cv-corpus-17.0-2024-03-15", "cv-corpus-9.0"])
def test_of_several_releases_the_newest_is_read(release, older):
    write_release(release.parents[1], release=older)
    found = open_source(str(release.parents[1]), language="zh-HK")
    assert (found.release, found.name) == (RELEASE, str(release))


def test_of_a_release_and_its_delta_all_of_it_is_read(release):
    write_release(release.parents[1], release="cv-corpus-25.0-delta-2026-03-09")
    assert open_source(str(release.parents[1]), language="zh-HK").release == RELEASE


def test_of_several_releases_of_spontaneous_speech_the_newest_is_read(tmp_path):
    for release in ("sps-corpus-2.0-2025-12-05", "sps-corpus-10.0-2028-03-09", "sps-corpus-9.1"):
        write_spontaneous(tmp_path, release=release)
    found = open_source(str(tmp_path), language="cy")
    assert found.release == "sps-corpus-10.0-2028-03-09-cy"


def test_scripted_speech_goes_before_spontaneous_speech_of_the_same_language(release):
    write_spontaneous(release.parents[1], "zh-HK")
    source = open_source(str(release.parents[1]), language="zh-HK")
    assert source.release == RELEASE


def test_spontaneous_speech_without_its_recordings_is_refused(tmp_path):
    folder = write_spontaneous(tmp_path)
    os.rename(folder / "audios", folder / "elsewhere")
    with pytest.raises(DataError, match="no folder audios/"):
        open_source(str(folder), language="cy")


def test_clips_of_another_language_are_warned_of(release, caplog):
    assert len(list(open_source(str(release), language="zh-HK").read("train"))) == 4
    assert caplog.text == ""
    assert len(list(open_source(str(release), language="cy").read("train"))) == 4
    assert caplog.text.count("the locale is 'zh-HK', but data.language 'cy'") == 1


MANIFESTS = {
    "csv": 'path,sentence,split,age\na.wav,"say ""hi"", you",train,teens\nb.wav,NA,dev,\n',
    "tsv": 'path\tsentence\tsplit\tage\na.wav\tsay "hi", you\ttrain\tteens\nb.wav\tNA\tdev\t\n',
    "jsonl": '{"path": "a.wav", "sentence": "say \\"hi\\", you", "split": "train", '
    '"age": "teens"}\n'
    '\n{"path": "b.wav", "sentence": "NA", "split": "dev"}\n',
}


@pytest.mark.parametrize("suffix", MANIFESTS)
def test_a_manifest_of_any_kind_gives_the_same_clips(tmp_path, suffix):
    file = tmp_path / f"clips.{suffix}"
    file.write_text(MANIFESTS[suffix])
    source = open_source(str(file), language="en")
    assert source.splits() == ("train", "dev")
    assert list(source.read("train")) == [
        Clip("a.wav", 'say "hi", you', audio=str(tmp_path / "a.wav"), age="teens")
    ]
    assert [clip.sentence for clip in source.read("dev")] == ["NA"]


def test_a_manifest_s_clips_of_another_language_are_warned_of_once(tmp_path, caplog):
    table = tmp_path / "clips.jsonl"

    def warnings(*locales, language="cy"):
        caplog.clear()
        rows = [{"path": "a.wav", "sentence": "a", "locale": locale} for locale in locales]
        table.write_text("\n".join(map(json.dumps, rows)))
        source = open_source(str(table), language=language)
        assert len(list(source.read("train"))) == len(list(source.read("train"))) == len(rows)
        return caplog.messages

    (warning,) = warnings("cy", "", None, "de", "de", "fr")
    assert f"{table}, line 4: the locale is 'de', but data.language 'cy'" in warning
    assert warnings("cy", "CY", "cy-GB", "cy_GB.UTF-8", "", None) == []
    assert warnings("zh", "zh-HK", language="zh-HK")
    assert warnings("sve", language="sv")
    assert warnings(["cy"])
    assert warnings(7) == []  # the hub has numbers for names


def test_a_manifest_without_splits_is_train(tmp_path):
    file = tmp_path / "clips.csv"
    file.write_text(f"path,sentence\n{tmp_path}/x/a.wav,hi\n")
    source = open_source(str(file), language="en")
    assert [clip.audio for clip in source.read("train")] == [f"{tmp_path}/x/a.wav"]
    with pytest.raises(DataError, match="no split 'dev'; it has train"):
        source.read("dev")


@pytest.mark.parametrize("name", ["~nobody-is-called-so.wav", "~/a.wav"])
def test_a_tilde_before_what_is_no_user_is_part_of_a_name(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/of/mine")
    (tmp_path / "clips.csv").write_text(f"path,sentence\n{name},hi\n")
    (clip,) = open_source(str(tmp_path / "clips.csv"), language="en").read("train")
    expected = "/home/of/mine/a.wav" if name == "~/a.wav" else f"{tmp_path}/{name}"
    assert (clip.id, clip.audio) == (name, expected)


def test_a_transcript_that_is_no_text_is_refused_by_row(tmp_path):
    file = tmp_path / "digits.jsonl"
    said = ["7", 7, None, True, ["7"], float("nan")]
    lines = [json.dumps({"path": f"{n}.wav", "sentence": s}) for n, s in enumerate(said)]
    file.write_text("\n".join(lines))
    found = list(open_source(str(file), language="en").read("train"))
    assert [clip.sentence for clip in found] == ["7", "", "", "", "", ""]
    assert [clip.refused != "" for clip in found] == [False, True, False, True, True, False]
    assert found[1].refused == "its transcript is 7: int, where text is expected"
    assert found[1].audio is None


def test_a_split_may_be_a_number(tmp_path):
    file = tmp_path / "folds.jsonl"
    file.write_text(
        '{"path": "a", "sentence": "b", "split": 1}\n{"path": "c", "sentence": "d", "split": 2}\n'
    )
    source = open_source(str(file), language="en")
    assert [[clip.id for clip in source.read(split)] for split in "12"] == [["a"], ["c"]]


def test_spaces_beside_a_split_are_no_part_of_its_name(tmp_path):
    file = tmp_path / "clips.csv"
    file.write_text("path,sentence,split\na,b,train \nc,d,train\ne,f, dev\n")
    source = open_source(str(file), language="en")
    assert source.splits() == ("train", "dev")
    assert [clip.id for clip in source.read("train")] == ["a", "c"]


def test_a_part_of_a_recording_is_refused_by_row(tmp_path):
    file = tmp_path / "clips.jsonl"
    rows = [("a", 0), ("b", 0.0), ("c", 1.5), ("d", "2")]
    lines = [json.dumps({"path": p, "sentence": "s", "offset": offset}) for p, offset in rows]
    file.write_text("\n".join(lines))
    found = list(open_source(str(file), language="en").read("train"))
    assert [clip.refused != "" for clip in found] == [False, False, True, True]
    assert "begins 1.5 s into its recording" in found[2].refused
    assert found[2].audio is None


@pytest.mark.parametrize("start", ["start", "offset", "begin_time"])
def test_the_first_part_of_a_recording_is_refused_like_the_others(tmp_path, start):
    """Its transcript would be trained on with all of the recording."""
    file = tmp_path / "clips.csv"
    rows = "long.wav,0.0,2.5,a\nown.wav,0.0,1.0,b\nlong.wav,2.5,4.0,c\ntwice.wav,7,8,d\n"
    file.write_text(f"path,{start},end,sentence\n{rows}")
    found = list(open_source(str(file), language="en").read("train"))
    assert [clip.refused != "" for clip in found[:3]] == [True, False, True]
    assert (
        found[0].refused == "long.wav has rows that begin elsewhere in it; cut such clips out first"
    )
    # A corpus of clips that are cut already may say where they came from.
    assert (found[3].refused == "") == (start != "offset")


def test_rows_with_one_beginning_are_no_parts(tmp_path):
    file = tmp_path / "clips.jsonl"
    rows = [{"path": p, "sentence": "s", "start": 0.0} for p in ("a", "a", {"path": "b"}, None)]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = list(open_source(str(file), language="en").read("train"))
    assert [clip.refused for clip in found] == ["", "", *["the row has no path"] * 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "path,text\na,b\n", "no column 'sentence'"),
        ("a.csv", "file_name,sentence\na,b\n", "the name 'path': rename 'file_name'$"),
        ("a.jsonl", '{"audio_filepath": "a", "text": "b"}\n', "rename 'audio_filepath'. If the"),
        ("a.csv", "path;sentence\na;b\n", "separated by ';': a .tsv has tabs"),
        ("a.csv", 'path,sentence\na,"b\n', "line 2: unexpected end of data"),
        ("a.csv", "path,sentence\n", "a header and no clips"),
        ("a.csv", "path,sentence\ra,b\rc,d\r", r"a carriage return alone.*tr '\\r' '\\n' <"),
        ("a.tsv", "path\tsentence\ra\tb\r", "a carriage return alone"),
        ("a.jsonl", '{"path": "a"}\r{"path": "b"}\r' + 2**20 * " ", "a carriage return alone"),
        ("a.jsonl", '{"path": "a", "sentence": "b"}\n{"path"\n', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: a list where an object is expected"),
        ("a.jsonl", '{"path": "a", "sentence": "\\ud800"}\n', "line 1: half of a surrogate pair"),
        ("a.csv", "path,sentence,split\na,b,\n", "line 2: the column split is empty"),
        # Without a split they would be clips of every split.
        ("a.tsv", "path\tsentence\tsplit\na\tb\ttest\nc\td\n", "line 3: the column split is empty"),
        ("a.tsv", "path\tsentence\tsplit\na\tb\nc\td\ttest\n", "line 3: has a split, but no line"),
        (
            "a.jsonl",
            '{"path": "a", "sentence": "b", "split": "test"}\n{"path": "c", "sentence": "d"}\n',
            "line 2: the column split is empty",
        ),
    ],
)
def test_a_wrong_manifest_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, newline="")
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_characters_beyond_the_basic_plane_may_be_escaped(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"path": "a", "sentence": "\\ud840\\udf0e \\\\ud800"}\n')
    (clip,) = open_source(str(file), language="yue").read("train")
    assert clip.sentence == "\U0002030e \\ud800"


def hub_rows(release, split):
    return [
        {
            "client_id": f"speaker{i}",
            "path": f"common_voice_{split}_{i}.mp3",
            "audio": {
                "bytes": (release / "clips" / f"common_voice_{split}_{i}.mp3").read_bytes(),
                "path": f"common_voice_{split}_{i}.mp3",
            },
            "sentence": sentence,
            "age": "twenties",
            "gender": "female_feminine",
            "accent": "香港",
        }
        for i, sentence in enumerate(SENTENCES[split])
    ]


@pytest.mark.parametrize("layout", ["{}-00000-of-00001.parquet", "{}/0000.parquet", "{}.parquet"])
def test_parquet_files_give_what_the_release_gives(release, tmp_path, layout):
    for split in SENTENCES:
        file = tmp_path / "parquet" / layout.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(hub_rows(release, split)), file)
    source = open_source(f"parquet:{tmp_path}/parquet/**/*.parquet", language="zh-HK")
    assert source.splits() == ("train", "dev", "test")
    assert everything(source) == everything(open_source(str(release), language="zh-HK"))


def test_audio_in_parquet_may_be_bytes_or_a_path_and_names_stay_unique(tmp_path):
    rows = [
        {"audio": {"bytes": b"x", "path": "a.wav"}, "sentence": "1"},
        {"audio": {"bytes": b"y", "path": "a.wav"}, "sentence": "2"},
        {"audio": {"bytes": None, "path": "sub/a.wav"}, "sentence": "3"},
        {"audio": {"bytes": None, "path": "/etc/passwd"}, "sentence": "4"},
        {"audio": {"bytes": None, "path": None}, "sentence": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "validation.parquet")
    source = open_source(f"parquet:{tmp_path}/*.parquet", language="en")
    # Common Voice's name for the split will do.
    clips = list(source.read("dev"))
    assert [c.id for c in clips] == ["a.wav", "validation-1", "sub/a.wav", "passwd", "validation-4"]
    assert [c.audio_bytes for c in clips] == [b"x", b"y", None, None, None]
    assert [c.audio for c in clips] == [None, None, f"{tmp_path}/sub/a.wav", None, None]
    assert [bool(c.refused) for c in clips] == [False, False, False, True, True]
    pq.write_table(pa.table({"audio": [b"z"], "sentence": ["1"]}), tmp_path / "train.parquet")
    (clip,) = open_source(f"parquet:{tmp_path}/train.parquet", language="en").read("train")
    assert (clip.id, clip.audio_bytes) == ("train-0", b"z")


def test_audio_of_another_form_is_refused_by_row(tmp_path):
    rows = [{"audio": {"array": [0.0], "sampling_rate": 16_000}, "sentence": "1"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    (clip,) = open_source(f"parquet:{tmp_path}/train.parquet", language="en").read("train")
    assert clip.refused == "its audio is neither bytes nor a path"


def test_a_remote_recording_that_is_too_large_is_refused_by_row(monkeypatch):
    monkeypatch.setattr(clips, "MOST_BYTES", 100)
    for name, size in (("small", 100), ("large", 101)):
        with fsspec.open(f"memory://{name}.wav", "wb") as file:
            file.write(bytes(size))
    rows = [
        {"audio": {"bytes": None, "path": f"memory://{name}.wav"}, "sentence": name}
        for name in ("small", "large")
    ]
    small, large = hub._hub_clips("hf:x", "train", rows, "sentence", "en")
    assert (small.audio, small.audio_bytes, small.refused) == (None, bytes(100), "")
    assert (large.audio, large.audio_bytes) == (None, None)
    assert large.refused == "over 100 bytes are too many for a clip"


@pytest.mark.parametrize("form", ["table", "parquet", "release"])
def test_splits_that_differ_in_case_only_are_refused(release, tmp_path, form):
    if form == "table":
        source = tmp_path / "clips.csv"
        source.write_text("path,sentence,split\na.wav,a,Train\nb.wav,b,train\n")
    elif form == "parquet":
        source = f"parquet:{tmp_path}/*.parquet"
        for split in ("Train", "train"):
            pq.write_table(
                pa.table({"audio": [b"z"], "sentence": ["1"]}), tmp_path / f"{split}.parquet"
            )
    else:
        source = release
        (release / "Train.tsv").write_bytes((release / "train.tsv").read_bytes())
    with pytest.raises(DataError, match=r"a split 'Train' and a split 'train': if they are one"):
        open_source(str(source), language="zh-HK")


@pytest.mark.parametrize("form", ["parquet:{}/*.parquet", "hf:{}"])
def test_rows_of_another_language_are_warned_of_once(tmp_path, caplog, form):
    for number, locales in enumerate([["cy", "cy-GB", None], ["de", "de"]]):
        rows = [
            {"audio": {"bytes": b"x", "path": "a"}, "sentence": "s", "locale": locale}
            for locale in locales
        ]
        pq.write_table(
            pa.Table.from_pylist(rows), tmp_path / f"train-0000{number}-of-00002.parquet"
        )
    source = open_source(form.format(tmp_path), language="cy")
    assert len(list(source.read("train"))) == 5
    (warning,) = caplog.messages
    assert f"{source.name}, split train, row 3: the locale is 'de', but data.language" in warning


@pytest.mark.parametrize("source", ["hf:", "hf::cy"])
def test_an_empty_name_is_no_dataset(source, tmp_path, monkeypatch):
    """Not the current folder, which may hold a corpus that nobody meant."""
    datasets.Dataset.from_dict({"audio": ["a"], "sentence": ["b"]}).save_to_disk(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="hf: names no dataset"):
        read(source)


def test_a_folder_of_parquet_files_is_answered_with_the_pattern(tmp_path):
    with pytest.raises(DataError, match=rf"is a folder: .* write parquet:{tmp_path}/\*\.parquet"):
        read(f"parquet:{tmp_path}")


def test_wrong_parquet_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        read(f"parquet:{tmp_path}/*.parquet")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a parquet file"):
        read(f"parquet:{tmp_path}/*.parquet")
    pq.write_table(pa.table({"audio": [b"z"], "text": ["1"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="no column 'sentence'; it has 'audio', 'text'"):
        read(f"parquet:{tmp_path}/*.parquet")


def test_a_local_dataset_of_the_hub_is_read_both_ways(release, tmp_path):
    # The cast makes what Common Voice's datasets on the hub are: to encode would need torchcodec.
    splits = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(hub_rows(release, split)).cast_column(
                "audio", datasets.Audio(sampling_rate=48_000)
            )
            for split in ("train", "test")
        }
    )
    splits.save_to_disk(tmp_path / "saved")
    (tmp_path / "files" / "data").mkdir(parents=True)
    for split, table in splits.items():
        table.to_parquet(tmp_path / "files" / "data" / f"{split}-00000-of-00001.parquet")
    expected = everything(open_source(str(release), language="zh-HK"))
    expected = {key: clip for key, clip in expected.items() if key[0] != "dev"}
    for folder in ("saved", "files"):
        source = open_source(f"hf:{tmp_path}/{folder}", language="zh-HK")
        assert source.splits() == ("train", "test")
        assert everything(source) == expected
        assert source.release.partition("@")[0] == folder  # not where it lies, for the card


@pytest.mark.parametrize("source", ["hf:{}/saved", "hf:{}/files"])
def test_the_command_reads_a_dataset_though_it_keeps_torch_out(release, tmp_path, source):
    (tmp_path / "files").mkdir()
    train = datasets.Dataset.from_list(hub_rows(release, "train"))
    train.to_parquet(tmp_path / "files" / "train-00000-of-00001.parquet")
    datasets.DatasetDict({"train": train}).save_to_disk(tmp_path / "saved")
    words = ["prepare", "--data.source", source.format(tmp_path), "--data.language", "zh-HK"]
    splits = ["--data.eval_splits", "[]", "--data.test_splits", "[]"]
    code = "import sys; from flax_asr.__main__ import *; print(command(), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, *splits, "--output_dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("0 False\n"), done.stderr
    assert "train: 4 clips" in done.stdout


def test_a_folder_of_recordings_and_their_metadata_is_read_without_torchcodec(release, tmp_path):
    for split, sentences in SENTENCES.items():
        folder = tmp_path / "folder" / split
        folder.mkdir(parents=True)
        lines = []
        for i, sentence in enumerate(sentences):
            content = (release / "clips" / f"common_voice_{split}_{i}.mp3").read_bytes()
            (folder / f"{split}{i}.wav").write_bytes(content)
            lines.append(json.dumps({"file_name": f"{split}{i}.wav", "sentence": sentence}))
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = everything(open_source(f"hf:{tmp_path}/folder", language="zh-HK"))
    expected = everything(open_source(str(release), language="zh-HK"))

    def heard(clips):
        return sorted((clip.sentence, clip.audio_bytes) for clip in clips.values())

    assert heard(found) == heard(expected)


class ConnectError(huggingface_hub.errors.HTTPError):
    """By its name the one of the HTTP library, whichever that is."""


@pytest.fixture
def knocks(monkeypatch):
    """Answers of the hub, one a request, and the pauses before them; any more is a failure."""
    answers, pauses = [], []

    def asked(self, name, **options):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", asked)
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return answers, pauses


def test_without_a_network_a_dataset_of_the_hub_is_soon_looked_for_in_the_cache(
    knocks, tmp_path, monkeypatch
):
    answers, pauses = knocks
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    load = datasets.load_dataset_builder

    def load_offline(*arguments):
        assert datasets.config.HF_HUB_OFFLINE
        return load(*arguments)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_offline)
    answers += 3 * [ConnectError("Name or service not known")]
    with pytest.raises(DataError, match=r"cannot be reached \(Name.*hf download some/corpus"):
        open_source("hf:some/corpus", language="cy")
    assert (answers, sum(pauses)) == ([], 3)
    assert not datasets.config.HF_HUB_OFFLINE

    rows = {"audio": [{"bytes": b"x", "path": "a.wav"}], "sentence": ["a"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "corpus" / "train.parquet")
    datasets.load_dataset(str(tmp_path / "corpus"), cache_dir=tmp_path / "made")
    (tmp_path / "made" / "corpus").rename(tmp_path / "some___corpus")
    answers += 3 * [ConnectError("Name or service not known")]
    (clip,) = open_source("hf:some/corpus", language="cy").read("train")
    assert clip.sentence == "a"


@pytest.mark.parametrize(
    "answer", [ConnectionResetError("by peer"), ValueError("no id"), "an answer", "at last"]
)
def test_a_hub_that_can_be_reached_is_left_to_the_patience_of_its_library(
    knocks, answer, monkeypatch
):
    answers, _ = knocks
    answers += [*(2 * [ConnectError("refused")] if answer == "at last" else []), answer]

    def load(*_):
        assert not datasets.config.HF_HUB_OFFLINE
        raise ValueError("its own words")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(DataError, match=r"hf:some/corpus: cannot be opened: its own words"):
        open_source("hf:some/corpus", language="cy")
    assert answers == []


def test_a_dataset_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be opened"):
        read(f"hf:{tmp_path}/nothing/there")
    datasets.Dataset.from_dict({"audio": [b"x"], "text": ["1"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="no column 'sentence'"):
        read(f"hf:{tmp_path}/saved")
    assert json.dumps([c.sentence for c in read(f"hf:{tmp_path}/saved", text_column="text")]) == (
        '["1"]'
    )
