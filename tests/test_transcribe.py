"""Text of audio files: transformers' pipeline says the same, windows leave no seam, failures stay
alone."""

import itertools
import json

import numpy as np
import pytest
import small_saved
import soundfile
import transformers

from flax_asr import alignment, audio, errors, loading, transcribe
from flax_asr.models import wav2vec2

pytestmark = pytest.mark.usefixtures("quick_compilation")

SECONDS = (0.11, 0.17, 0.4, 0.55)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """The small model makes 800 frames a second: everything is 16 times as short as usual."""
    monkeypatch.setattr(transcribe, "SHAPE_SECONDS", (0.25,))
    monkeypatch.setattr(transcribe, "WINDOW_SECONDS", 0.6)


@pytest.fixture(scope="module", params=["xls-r", "base"])
def exported(request, tmp_path_factory):
    """One model that does not hear padding, one that does."""
    folder = tmp_path_factory.mktemp(request.param) / "export"
    saved = small_saved.saved(request.param)
    small_saved.export_folder(folder, saved)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    paths = []
    for number, seconds in enumerate(SECONDS):
        path = folder / f"{number}.flac"
        samples = small_saved.speech(int(seconds * 16_000), number)
        soundfile.write(path, np.clip(samples, -1, 1), 16_000)
        paths.append(str(path))
    return paths


def _recogniser(folder, rows=2) -> transcribe.Recogniser:
    return transcribe.Recogniser(loading.load(str(folder)), "fp32", rows)


def test_the_text_is_that_of_transformers_pipeline(exported, clips):
    pipeline = transformers.pipeline("automatic-speech-recognition", model=str(exported))
    theirs = [pipeline(audio.decode(path))["text"] for path in clips]
    ours = [text for _, text in _recogniser(exported).texts(clips)]
    assert ours == theirs
    assert len(set(ours)) == len(clips)


def test_the_text_does_not_depend_on_the_batch(exported, clips):
    together = list(_recogniser(exported, rows=4).texts([*clips, *clips]))
    one_by_one = [result for path in clips for result in _recogniser(exported, 1).texts([path])]
    assert together == [*one_by_one, *one_by_one]


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    """A model that hears no more than its own neighbourhood."""
    saved = small_saved.saved(do_normalize=False)
    for layer in saved.params["wav2vec2"]["encoder"]["layers"].values():
        layer["attention"]["out_proj"]["kernel"] = np.zeros_like(
            layer["attention"]["out_proj"]["kernel"]
        )
    folder = tmp_path_factory.mktemp("near") / "export"
    small_saved.export_folder(folder, saved)
    return folder


@pytest.fixture
def windowed(monkeypatch, near):
    """That model with windows of 0.3 s."""
    monkeypatch.setattr(transcribe, "WINDOW_SECONDS", 0.3)
    monkeypatch.setattr(transcribe, "OVERLAP_SECONDS", 0.1)
    monkeypatch.setattr(transcribe, "SHAPE_SECONDS", (0.1,))
    return _recogniser(near, rows=3)


@pytest.mark.parametrize("samples", [4900, 5000, 8601, 17_345, 26_660])
def test_every_frame_of_a_long_file_is_kept_once_in_its_place(windowed, samples):
    windows = windowed.windows(samples)
    stride = 20
    kept = np.concatenate(
        [np.arange(w.first_frame, w.last_frame) + w.start_sample // stride for w in windows]
    )
    total = wav2vec2.frame_lengths(windowed._model.config, samples)
    assert kept.tolist() == list(range(total))
    for window in windows:
        assert window.start_sample % stride == 0
        assert window.end_sample <= samples
    # As much of each overlap is dropped on the one side as on the other: 0.05 s or more.
    for left, right in itertools.pairwise(windows):
        size = wav2vec2.frame_lengths(windowed._model.config, left.end_sample - left.start_sample)
        assert right.first_frame >= 40
        assert size - left.last_frame >= 40
    assert len({w.end_sample - w.start_sample for w in windows}) == 1


def test_windows_leave_no_seam(windowed, tmp_path):
    """Without attention, and without normalisation of the file, frames depend on their
    neighbourhood alone: cutting must change nothing."""
    samples = small_saved.speech(18_345, 5).clip(-1, 1)
    soundfile.write(tmp_path / "long.wav", samples, 16_000, subtype="FLOAT")
    assert len(windowed.windows(len(samples))) > 5
    ((_, text),) = windowed.texts([str(tmp_path / "long.wav")])

    model = windowed._model
    logits = model.objective("fp32").module.apply({"params": model.params}, samples[None]).logits
    whole = np.asarray(logits[0]).argmax(-1)
    expected = model.vocabulary.decode(alignment.greedy_collapse(whole, model.vocabulary.blank))
    assert len(expected) > 100
    assert text == expected


def test_few_shapes_for_many_lengths(windowed):
    shapes = {windowed._padded(samples) for samples in range(200, 4800, 37)}
    assert len(shapes) == 2


def test_every_program_is_compiled_with_the_options_of_the_chip(near, clips, caplog):
    recogniser = _recogniser(near)
    recogniser._evaluate.options = {"xla_no_such_option": "1"}
    assert len(list(recogniser.texts(clips[:1]))) == 1
    assert "compiling without xla_no_such_option" in caplog.text


def test_a_file_that_fails_does_not_stop_the_others(exported, clips, tmp_path, capsys):
    html = tmp_path / "page.mp3"
    html.write_text("<html>not found</html>" * 100)
    files = [clips[0], str(html), str(tmp_path / "none.wav"), clips[1]]
    status = transcribe.command(str(exported), files, str(tmp_path / "out.jsonl"))
    assert status == 2
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == files
    assert [line["text"] is None for line in lines] == [False, True, True, False]
    output = capsys.readouterr()
    assert output.err.count("page.mp3: damaged") == 1
    assert output.err.count("none.wav: missing") == 1
    assert [line.split("\t")[0] for line in output.out.splitlines()] == [clips[0], clips[1]]


def test_scores_that_are_no_numbers_are_no_text(near, clips):
    loaded = loading.load(str(near))
    loaded.params["lm_head"]["bias"][1] = np.nan
    ((_, found),) = transcribe.Recogniser(loaded, "fp16", 1).texts(clips[:1])
    assert str(found) == (
        "overflow: the scores in fp16 are NaN: give --train.mixed_precision bf16 or fp32"
    )


def test_json_to_standard_output_is_all_there_is_on_it(exported, clips, capsys):
    assert transcribe.command(str(exported), clips[:2], "-") == 0
    output = capsys.readouterr()
    assert [json.loads(line)["path"] for line in output.out.splitlines()] == clips[:2]
    assert clips[0] in output.err


def test_a_recording_shorter_than_a_frame_and_a_silent_one(exported, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.full(12, 0.5), 16_000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16_000)
    short, silent = (
        found
        for _, found in _recogniser(exported).texts(
            [str(tmp_path / "short.wav"), str(tmp_path / "silent.wav")]
        )
    )
    assert isinstance(short, errors.AudioError)
    assert short.reason == "too_short"
    assert silent == ""


def test_an_option_that_means_nothing_here_is_refused_before_the_model_is_read():
    with pytest.raises(errors.ConfigError, match=r"--optim\.learning_rate changes nothing"):
        transcribe.command("nowhere", ["a.wav"], None, ["--optim.learning_rate=1"])
