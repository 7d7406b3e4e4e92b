"""Preparation end to end: real files, real processes, every reason to leave a clip out."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import soundfile
from pyarrow import parquet

from flax_asr import common_voice, config, errors
from flax_asr.data import decoding, prepare, prepared_dir, shard_writer, shards

COLUMNS = "client_id path sentence up_votes down_votes age gender accents locale segment".split()


def speech_like(seconds: float, seed: int, rate: int = 16_000, peak: float = 0.5) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(int(seconds * rate))
    return (peak * noise / np.abs(noise).max()).astype(np.float32)


def write_release(folder: Path, splits: dict[str, list[tuple[str, str]]]) -> Path:
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = ["\t".join(COLUMNS)]
        for number, (path, sentence) in enumerate(rows):
            speaker = f"speaker{number % 2}"
            lines.append(f"{speaker}\t{path}\t{sentence}\t2\t0\ttwenties\t\t香港\tzh-HK\t")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_clip(folder: Path, name: str, seconds: float, seed: int, **options) -> tuple[str, str]:
    rate = options.pop("rate", 16_000)
    samples = speech_like(seconds, seed, rate, **options)
    soundfile.write(folder / "clips" / name, samples, rate, subtype="PCM_16")
    return name, f"句子 {seed}"


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "cv-corpus-0" / "zh-HK"
    write_release(folder, {})
    rows = [write_clip(folder, f"{i}.wav", 0.3 + 0.05 * i, i) for i in range(20)]
    return write_release(folder, {"train": rows[:12], "dev": rows[12:16], "test": rows[16:]})


def configuration(release: Path, output_dir: Path, **data) -> config.Config:
    data = {"source": str(release), "language": "zh-HK", "num_workers": 1} | data
    return config.Config(output_dir=str(output_dir), data=config.DataConfig(**data))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_finds_a_flipped_bit_in_prepared_audio(release, tmp_path):
    cfg = configuration(release, tmp_path / "run")
    prepare.command(cfg)
    (audio,) = (prepared_dir.folder(cfg) / "train").glob("audio-*")
    content = bytearray(audio.read_bytes())
    content[len(content) // 2] ^= 1
    audio.write_bytes(content)
    with pytest.raises(errors.DataError, match=f"{audio.name} is not what was written"):
        prepare.command(cfg)


def test_every_split_is_prepared_once(release, tmp_path, capsys, caplog):
    caplog.set_level("INFO", logger="flax_asr")
    cfg = configuration(release, tmp_path / "run", num_workers=2)
    splits = prepare.prepare(cfg)
    assert list(splits) == ["train", "dev", "test"]
    assert [len(split) for split in splits.values()] == [12, 4, 4]
    assert "train: 12 clips, 0.00 h" in caplog.text
    capsys.readouterr()
    assert splits["train"].folder == prepared_dir.folder(cfg) / "train"
    train = splits["train"]
    assert train.ids == [f"{i}.wav" for i in range(12)]
    assert train.sentences[3] == "句子 3"
    assert train.speakers[:3] == ["speaker0", "speaker1", "speaker0"]
    for row in (0, 11):
        heard = train.audio(row) * train.gains[row]
        wanted, _ = soundfile.read(release / "clips" / f"{row}.wav", dtype="float32")
        assert len(heard) == len(wanted)
        assert np.abs(heard - wanted).max() <= 0.51 * train.gains[row]
    before = {path: path.stat().st_mtime_ns for path in train.folder.iterdir()}
    again = prepare.prepare(cfg)
    assert {path: path.stat().st_mtime_ns for path in train.folder.iterdir()} == before
    assert again["train"].hash == train.hash
    assert capsys.readouterr().err == ""


def test_the_command_says_once_what_it_prepared(release, tmp_path, capsys, caplog):
    caplog.set_level("INFO", logger="flax_asr")
    cfg = configuration(release, tmp_path / "run")
    for _ in range(2):
        prepare.command(cfg)
        said = capsys.readouterr().out + caplog.text
        assert said.count("train: 12 clips") == 1
        caplog.clear()


def test_bytes_do_not_depend_on_the_number_of_processes(release, tmp_path):
    folders = []
    for workers in (1, 3):
        cfg = configuration(
            release,
            tmp_path / "run",
            num_workers=workers,
            prepared_dir=str(tmp_path / f"prepared-{workers}"),
            eval_splits=(),
            test_splits=(),
        )
        folders.append(prepare.prepare(cfg)["train"].folder)
    assert contents(folders[0]) == contents(folders[1])


def test_every_clip_left_out_is_named_with_its_reason(tmp_path):
    folder = tmp_path / "release"
    write_release(folder, {})
    rows = [
        write_clip(folder, "good.wav", 0.5, 0),
        ("missing.wav", "不見"),
        ("html.wav", "網頁"),
        write_clip(folder, "silent.wav", 0.5, 1, peak=0.0),
        write_clip(folder, "short.wav", 0.19, 2),
        write_clip(folder, "exactly_short.wav", 0.2, 3),
        write_clip(folder, "exactly_long.wav", 1.0, 4),
        write_clip(folder, "long.wav", 1.01, 5),
        (write_clip(folder, "wordless.wav", 0.5, 6)[0], " "),
        ("good.wav", "又是"),
        write_clip(folder, "copy.wav", 0.5, 0),
        write_clip(folder, "resampled.wav", 0.5, 7, rate=48_000),
        ("../outside.wav", "外面"),
    ]
    (folder / "clips" / "html.wav").write_text("<html>404 Not Found</html>" * 20)
    write_release(folder, {"train": rows})
    cfg = configuration(
        folder,
        tmp_path / "run",
        min_seconds=0.2,
        max_seconds=1.0,
        num_workers=2,
        eval_splits=(),
        test_splits=(),
    )
    train = prepare.prepare(cfg)["train"]
    assert train.ids == ["good.wav", "exactly_short.wav", "exactly_long.wav", "resampled.wav"]
    assert train.samples.tolist() == [8000, 3200, 16_000, 8000]
    assert [(entry.id, entry.reason) for entry in train.left_out] == [
        ("missing.wav", "missing"),
        ("html.wav", "damaged"),
        ("silent.wav", "silent"),
        ("short.wav", "too_short"),
        ("long.wav", "too_long"),
        ("wordless.wav", "empty_transcript"),
        ("good.wav", "duplicate"),
        ("copy.wav", "same_audio"),
        ("../outside.wav", "missing"),
    ]
    assert train.left_out[-2].detail == "as good.wav"
    assert prepare.report(train).endswith(
        "left out 9: 2 missing, 1 damaged, 1 silent, 1 too_short, 1 too_long, 1 empty_transcript,"
        " 1 duplicate, 1 same_audio (left_out.jsonl there names each)"
    )
    lines = (train.folder / "left_out.jsonl").read_text(encoding="utf-8").splitlines()
    named = [json.loads(line) for line in lines]
    assert [entry["id"] for entry in named] == [entry.id for entry in train.left_out]


def deadly_decode(task):
    if task.id == "3.wav":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.id == "7.wav":
        time.sleep(60)
    return decoding.decode(task)


def test_processes_that_die_or_hang_cost_their_clip(release, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.decoding, "decode", deadly_decode)
    monkeypatch.setattr(prepare, "CLIP_LIMIT_SECONDS", 1.5)
    cfg = configuration(release, tmp_path / "run", eval_splits=(), test_splits=(), num_workers=2)
    train = prepare.prepare(cfg)["train"]
    assert train.ids == [f"{i}.wav" for i in range(12) if i not in (3, 7)]
    assert [(e.id, e.reason) for e in train.left_out] == [
        ("3.wav", "crashed"),
        ("7.wav", "timeout"),
    ]


class Stop(Exception):
    pass


def test_an_interrupted_preparation_goes_on_and_ends_in_the_same_bytes(
    release, tmp_path, monkeypatch
):
    only = {"eval_splits": (), "test_splits": ()}
    whole = prepare.prepare(
        configuration(release, tmp_path / "run", prepared_dir=str(tmp_path / "whole"), **only)
    )
    cfg = configuration(release, tmp_path / "run", **only)
    record, recorded = prepare._record, []

    def stop_after(clips):
        def failing_record(writer, clip, result):
            if len(recorded) == clips:
                raise Stop
            recorded.append(clip.id)
            record(writer, clip, result)

        return failing_record

    monkeypatch.setattr(prepare, "_record", stop_after(7))
    with pytest.raises(Stop):
        prepare.prepare(cfg)
    folder = prepared_dir.folder(cfg) / "train"
    assert not shards.is_finished(folder)
    monkeypatch.setattr(prepare, "_record", stop_after(None))
    train = prepare.prepare(cfg)["train"]
    assert recorded == [f"{i}.wav" for i in range(12)]  # none of them twice
    assert contents(train.folder) == contents(whole["train"].folder)


def test_a_twin_of_a_clip_from_before_an_interruption_is_a_twin(tmp_path):
    first, other = common_voice.Clip("0.wav", "一"), common_voice.Clip("1.wav", "二")
    clips = [first, other, common_voice.Clip("0.wav", "三")]
    tasks = prepare._tasks(config.Config(), clips, [("0.wav", "一")], tmp_path)
    assert [left_out and left_out.reason for (_, left_out), _ in tasks] == [None, "duplicate"]


def prepare_slowly(cfg: config.Config, clip_seconds: float) -> None:
    """In a process of its own: every clip is handed to the system, and takes its time."""
    prepare._FLUSH_CLIPS = 1
    record = prepare._record

    def slow_record(*arguments):
        record(*arguments)
        time.sleep(clip_seconds)

    prepare._record = slow_record
    prepare.prepare(cfg)


def start_slowly(cfg: config.Config, clip_seconds: float = 0.0) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(
        target=prepare_slowly, args=(cfg, clip_seconds)
    )
    process.start()
    return process


def test_kills_in_the_middle_change_nothing(release, tmp_path):
    only = {"eval_splits": (), "test_splits": ()}
    cfg = configuration(release, tmp_path / "run", **only)
    journal = prepared_dir.folder(cfg) / "train" / "journal.jsonl"
    for clips in (3, 8):
        process = start_slowly(cfg, clip_seconds=0.2)
        while process.is_alive() and not (
            journal.exists() and journal.read_bytes().count(b"\n") > clips
        ):
            time.sleep(0.005)
        process.kill()
        process.join()
        assert not shards.is_finished(journal.parent)
        with open(journal, "ab") as file:
            file.write(b'{"id": "half a li')  # where another kill could have hit
    train = prepare.prepare(cfg)["train"]
    whole = prepare.prepare(
        configuration(release, tmp_path / "run", prepared_dir=str(tmp_path / "whole"), **only)
    )["train"]
    assert contents(train.folder) == contents(whole.folder)


def test_two_at_once_in_one_folder_end_alike(release, tmp_path):
    cfg = configuration(release, tmp_path / "run", eval_splits=(), test_splits=())
    processes = [start_slowly(cfg, clip_seconds=0.05) for _ in range(2)]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert len(prepare.prepare(cfg, verify=True)["train"]) == 12


def test_a_source_that_changed_in_between_is_refused(release, tmp_path):
    cfg = configuration(release, tmp_path / "run", eval_splits=(), test_splits=())
    folder = prepared_dir.folder(cfg) / "train"
    settings = prepared_dir.made_from(cfg, "train")
    with shard_writer.ShardWriter(folder, settings=settings) as writer:
        writer.leave_out("another", shards.LeftOut("0.wav", "missing", ""))
    with pytest.raises(errors.DataError, match=r"changed since .* was interrupted: the clip 0.wav"):
        prepare.prepare(cfg)
    shard_writer.ShardWriter(folder, settings=settings).discard()
    prepare.prepare(cfg)
    table = release / "train.tsv"
    table.write_text(table.read_text().replace("句子 3", "句子 33"))
    with pytest.raises(errors.DataError, match="the source has changed since"):
        prepare.prepare(cfg)
    table.unlink()  # a source that is gone is no reason to refuse what was made from it
    assert len(prepare.prepare(cfg)["train"]) == 12


def test_a_named_folder_is_not_used_for_other_settings(release, tmp_path):
    named = {"prepared_dir": str(tmp_path / "mine"), "eval_splits": (), "test_splits": ()}
    prepare.prepare(configuration(release, tmp_path / "run", **named))
    with pytest.raises(
        errors.DataError, match=r"mine/train was prepared with data.max_seconds 20.0, .* says 10.0"
    ):
        prepare.prepare(configuration(release, tmp_path / "run", max_seconds=10, **named))


def test_the_default_folder_is_keyed_by_what_the_content_depends_on(release, tmp_path):
    def folder(**data):
        return prepared_dir.folder(configuration(release, tmp_path / "runs" / "a", **data))

    assert folder().parent == tmp_path / "runs"
    assert folder().name.startswith("prepared-")
    assert len(folder().name) == len("prepared-") + 12
    same = [{}, {"num_buckets": 3}, {"num_workers": 5}, {"max_train_clips": 9}]
    assert {folder(**data) for data in same} == {folder()}
    other = [
        {"source": "elsewhere"},
        {"language": "yue"},
        {"text_column": "text"},
        {"min_seconds": 1.0},
        {"max_seconds": 10.0},
        {"trim_silence": True},
    ]
    assert len({folder(**data) for data in [{}, *other]}) == len(other) + 1
    assert folder(prepared_dir="there") == Path("there")
    bucket = config.Config(
        output_dir="gs://bucket/run", data=config.DataConfig(source="s", language="yue")
    )
    assert prepared_dir.folder(bucket).parent == Path.home() / ".cache" / "flax_asr"


def test_unusable_splits_are_refused(release, tmp_path):
    cfg = configuration(release, tmp_path / "run", train_splits=("trian",))
    with pytest.raises(errors.DataError, match=r"no split .trian.; it has train"):
        prepare.prepare(cfg)
    cfg = configuration(release, tmp_path / "run", test_splits=("tset",))
    with pytest.raises(errors.DataError, match=r"no split .tset."):
        prepare.prepare(cfg)
    assert not prepared_dir.folder(cfg).exists()  # not after hours of the others
    for path in (release / "clips").iterdir():
        path.rename(path.with_suffix(".aside"))
    cfg = configuration(release, tmp_path / "run")
    with pytest.raises(errors.DataError, match=r"split train .* can be used: 12 missing.*0\.wav"):
        prepare.prepare(cfg)
    for path in (release / "clips").iterdir():
        path.rename(path.with_suffix(".wav"))
    assert len(prepare.prepare(cfg)["train"]) == 12  # the failure was not kept


def test_a_second_process_waits_for_the_first(release, tmp_path, capsys, monkeypatch):
    cfg = configuration(release, tmp_path / "run", eval_splits=(), test_splits=())
    folder = prepared_dir.folder(cfg) / "train"
    flock, calls = fcntl.flock, []

    def first_finishes_meanwhile(descriptor, operation):
        calls.append(operation)
        if operation & fcntl.LOCK_NB and len(calls) == 1:
            raise BlockingIOError
        if len(calls) == 2:
            prepare.prepare(cfg)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", first_finishes_meanwhile)
    prepared = []
    prepare_split = prepare._prepare_split
    monkeypatch.setattr(
        prepare, "_prepare_split", lambda *a: prepared.append(a[2]) or prepare_split(*a)
    )
    assert len(prepare.prepare(cfg)["train"]) == 12
    assert prepared == ["train"]  # the first did it, the second opened it
    assert f"Waiting for another process to prepare {folder}" in capsys.readouterr().err
    assert len(calls) == 3


def test_a_full_disk_is_reported_and_what_is_done_is_kept(release, tmp_path, monkeypatch):
    cfg = configuration(release, tmp_path / "run", eval_splits=(), test_splits=())
    add, added = shard_writer.ShardWriter.add, []

    def full(self, *arguments):
        if len(added) == 5:
            raise OSError(28, "No space left on device")
        added.append(arguments)
        add(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(shard_writer.ShardWriter, "add", full)
        with pytest.raises(errors.DataError, match=r"No space is left for .*goes on"):
            prepare.prepare(cfg)
    with contextlib.closing(
        shard_writer.ShardWriter(
            prepared_dir.folder(cfg) / "train",
            settings=prepared_dir.made_from(cfg, "train"),
        )
    ) as writer:
        assert len(writer.done) == 5


def test_a_disk_that_is_full_at_the_end_costs_no_clip(release, tmp_path, monkeypatch):
    cfg = configuration(release, tmp_path / "run", eval_splits=(), test_splits=())
    folder = prepared_dir.folder(cfg) / "train"
    folder.mkdir(parents=True)
    (folder / "clips.jsonl").symlink_to("/dev/full")  # the system itself says that it is full
    with pytest.raises(errors.DataError, match="No space is left"):
        prepare.prepare(cfg)
    assert not shards.is_finished(folder)
    (folder / "clips.jsonl").unlink()
    monkeypatch.setattr(prepare, "_record", None)  # everything is there already
    assert len(prepare.prepare(cfg, verify=True)["train"]) == 12


def test_a_folder_that_cannot_be_made_is_refused(release, tmp_path):
    (tmp_path / "file").write_text("")
    cfg = configuration(release, tmp_path / "run", prepared_dir=str(tmp_path / "file" / "here"))
    with pytest.raises(errors.DataError, match=r"file/here/train cannot be made: Not a directory"):
        prepare.prepare(cfg)


def test_dev_and_validation_are_two_names_of_one_split(release, tmp_path):
    cfg = configuration(release, tmp_path / "run", train_splits=("validation",), test_splits=())
    splits = prepare.prepare(cfg)
    assert splits["validation"].hash == splits["dev"].hash


@pytest.mark.parametrize("above", [0, 2], ids=["language", "above the release"])
def test_a_changed_table_is_noticed_by_either_name_and_from_any_folder(release, tmp_path, above):
    source = release if above == 0 else release.parents[above - 1]
    names = {"train_splits": ("validation",), "eval_splits": (), "test_splits": ()}
    cfg = configuration(source, tmp_path / "run", **names)
    prepare.prepare(cfg)
    table = release / "dev.tsv"
    table.write_text(table.read_text(encoding="utf-8").replace("句子", "別的"), encoding="utf-8")
    with pytest.raises(errors.DataError, match="or the source has changed since"):
        prepare.prepare(cfg)


def test_changed_parquet_files_are_noticed(release, tmp_path):
    def write(split, names):
        rows = [{"audio": (release / "clips" / n).read_bytes(), "sentence": n} for n in names]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")

    write("train", ["0.wav", "1.wav"])
    only = {"eval_splits": (), "test_splits": ()}
    cfg = configuration(f"parquet:{tmp_path}/*.parquet", tmp_path / "run", **only)
    before = prepare.prepare(cfg)["train"]
    write("test", ["3.wav"])  # which is nothing to the training split
    assert prepare.prepare(cfg)["train"].hash == before.hash
    write("train", ["0.wav", "1.wav", "2.wav"])
    with pytest.raises(errors.DataError, match="or the source has changed since"):
        prepare.prepare(cfg)


@pytest.mark.parametrize("form", ["folder", "saved"])
def test_a_changed_local_dataset_is_noticed(release, tmp_path, form):
    folder = tmp_path / "dataset"

    def write(sentences):
        names = [f"{i}.wav" for i in range(len(sentences))]
        if form == "saved":
            audio = [{"bytes": (release / "clips" / n).read_bytes(), "path": n} for n in names]
            columns = {"audio": audio, "sentence": sentences}
            datasets.DatasetDict(train=datasets.Dataset.from_dict(columns)).save_to_disk(folder)
            return
        folder.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(release / "clips" / name, folder)
        rows = [f"{n},{s}" for n, s in zip(names, sentences, strict=True)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,sentence", *rows]))

    write(["one", "two"])
    cfg = configuration(f"hf:{folder}", tmp_path / "run", eval_splits=(), test_splits=())
    before = prepare.prepare(cfg)["train"]
    assert before.sentences == ["one", "two"]
    assert prepare.prepare(cfg)["train"].hash == before.hash
    write(["one", "too"])
    with pytest.raises(errors.DataError, match="or the source has changed since"):
        prepare.prepare(cfg)


def test_silence_is_trimmed_on_request(tmp_path):
    folder = write_release(tmp_path / "release", {})
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    quiet = np.zeros(16_000)
    (folder / "clips").mkdir(exist_ok=True)
    soundfile.write(folder / "clips" / "a.wav", np.concatenate([quiet, tone, quiet]), 16_000)
    write_release(folder, {"train": [("a.wav", "一")]})
    only = {"eval_splits": (), "test_splits": ()}
    seconds = [
        prepare.prepare(configuration(folder, tmp_path / "run", trim_silence=trim, **only))[
            "train"
        ].seconds
        for trim in (False, True)
    ]
    assert seconds[0] == 3.0
    assert 1.0 <= seconds[1] <= 1.5
