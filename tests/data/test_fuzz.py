"""Whatever is wrong with a corpus costs the clips that it concerns, by name, every time alike.

benchmarks/fuzz_audio.py does the same with thousands of files, and watches memory.
"""

import json
import pathlib

import damaged_files
import numpy as np
import pytest
import soundfile

from flax_asr import config, text, vocabulary
from flax_asr.data import examples, prepare
from flax_asr.diagnosis import findings

CLIPS = 6 + 2 * len(damaged_files.DAMAGES)


def prepared(source: pathlib.Path, folder: pathlib.Path, workers: int):
    data = config.DataConfig(
        source=str(source),
        language="zh-HK",
        train_splits=("train",),
        eval_splits=(),
        test_splits=(),
        num_workers=workers,
        prepared_dir=str(folder),
    )
    return prepare.prepare(config.Config(output_dir=str(folder), data=data))["train"]


def test_damaged_recordings_cost_their_clips_and_are_named_the_same_every_time(tmp_path):
    release = tmp_path / "zh-HK"
    (release / "clips").mkdir(parents=True)
    files = damaged_files.write(release / "clips", CLIPS, hours=False)
    rows = ["path\tsentence", *(f"{path.name}\t{damaged_files.SENTENCE}" for _, path in files)]
    (release / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    first, second = (prepared(release, tmp_path / str(n), workers=n) for n in (1, 2))
    assert first.hash == second.hash
    assert first.left_out == second.left_out
    ends = dict.fromkeys(first.ids, "decoded") | {e.id: e.reason for e in first.left_out}
    assert len(ends) == len(first) + len(first.left_out) == CLIPS
    for kind, path in files:
        wanted = damaged_files.PROMISED.get(kind, ends[path.name])
        same = wanted == "decoded" and ends[path.name] == "same_audio"
        assert ends[path.name] == wanted or same, (kind, path.name)
    assert set(ends.values()) - {"decoded"} <= set(findings.REASONS)
    assert not {"crashed", "timeout", "failed"} & set(ends.values())


def test_damaged_tables_are_read_or_refused_the_same_every_time(tmp_path):
    numbers = range(3 * 18)
    first, second = (
        [damaged_files.read_table(tmp_path / run, number) for number in numbers] for run in "ab"
    )
    assert first == second
    read = [json.loads(end) for _, end in first if not end.startswith("refused")]
    outside = {"../l.wav", "/etc/passwd", "..\\..\\m.wav", "sub/../../n.wav"}
    assert any(clip in outside for clips in read for clip, _, _ in clips)
    for (_, end), number in zip(first, numbers, strict=True):
        if damaged_files.table(number)[1] == ".tsv" and not end.startswith("refused"):
            assert all(why for clip, _, why in json.loads(end) if clip in outside)
    whole = [json.loads(end) for kind, end in first if kind in ("whole", "windows lines")]
    said = [sentence for _, sentence in damaged_files.ROWS]
    assert len(whole) == 6
    assert all([sentence for _, sentence, _ in clips] == said for clips in whole)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_strange_sentences_arrive_as_they_are_and_train_without_what_nobody_says(tmp_path, ends):
    release = tmp_path / "zh-HK"
    (release / "clips").mkdir(parents=True)
    rng = np.random.default_rng(0)
    inside = [(path, said) for path, said in damaged_files.ROWS if len(path) == 5]
    for path, _ in inside:
        soundfile.write(release / "clips" / path, rng.normal(0, 0.1, 16_000), 16_000)
    lines = ["path\tsentence", *("\t".join(row) for row in damaged_files.ROWS)]
    (release / "train.tsv").write_bytes("".join(f"{line}{ends}" for line in lines).encode())
    split = prepared(release, tmp_path / "prepared", workers=1)
    kept = dict(zip(split.ids, split.sentences, strict=True))
    assert kept == {path: said for path, said in dict(reversed(inside)).items() if said}
    assert {entry.reason for entry in split.left_out} == {
        "missing",
        "duplicate",
        "empty_transcript",
    }
    normalizer = text.normalizer("zh-HK")
    found = vocabulary.Vocabulary.from_transcripts(map(normalizer, split.sentences))
    assert not set(found.characters) & set('\0\x1b\x07\u200b\u200f\u202e\ufeff"')
    built = examples.build(
        [split], normalize=normalizer, vocabulary=found, frame_lengths=lambda n: n // 320, seed=0
    )
    assert [(entry.id, entry.reason) for entry in built.left_out] == [("g.wav", "label_too_long")]
    assert "na" in built.references
