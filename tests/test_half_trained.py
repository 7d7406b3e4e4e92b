"""A model that has learnt half of a language, trained and scored as in 2022 and as it should be."""

import json

import jiwer
import pytest
import small_tones
import small_training
import transformers

from flax_asr import __main__, audio, evaluate, export
from flax_asr.record import runlog

UPDATES = 120


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_tones.corpus(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def run(source):
    """Trained with the trailing delimiter, which the padding then repeats."""
    folder = source.parent / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_torch_is_installed", None)
        small_training.without_torch()
        more = {
            "train__compat": "hf-4.17",
            "train__max_steps": UPDATES,
            "train__eval_steps": 20,
            "optim__lr_scheduler_type": "constant",
            "optim__learning_rate": 3e-3,
        }
        assert __main__.main(small_tones.command(source, folder, **more)) == 0
    return folder


@pytest.mark.slow
def test_our_errors_are_those_of_one_clip_at_a_time(run, source, tmp_path):
    scores = tmp_path / "scores.jsonl"
    evaluate.command(str(run), [], str(scores), legacy=True)
    line = json.loads(scores.read_text(encoding="utf-8"))
    assert 0.01 < line["eval_cer"] < 0.9, "not half trained"
    assert line["legacy_cer"] >= 0

    listen = transformers.pipeline("automatic-speech-recognition", model=str(run / "export"))
    said = {}
    for row in (source / "zh-HK" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        _, name, sentence = row.split("\t")
        clip = audio.decode(source / "zh-HK" / "clips" / name)
        said[name] = (sentence, listen(clip)["text"].replace(" ", ""))
    references, hypotheses = zip(*said.values(), strict=True)
    assert line["eval_cer"] == jiwer.cer(list(references), list(hypotheses))
    lines = (run / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()
    for prediction in map(json.loads, lines):
        assert prediction["hypothesis"].replace(" ", "") == said[prediction["id"]][1]


@pytest.mark.slow
def test_padding_adds_errors_and_log_and_card_say_which_is_which(run):
    events = [event for event in runlog.read(run) if "eval_cer" in event]
    added = [event["eval_cer"] - event["eval_real_cer"] for event in events]
    assert max(added) > 0.01, added
    assert "padded frames too" in events[-1]["eval_rule"]
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "Cer over real frames only: " in card
    assert "The error rates are those of the scripts of 2022" in card
