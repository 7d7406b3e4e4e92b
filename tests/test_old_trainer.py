"""The old semantics against the log history that transformers 4.17.0 itself wrote."""

import json
import pathlib
import re

import pytest
import safetensors.numpy
import small_old_run as old
import small_training
import transformers

from flax_asr import __main__, assembly, compat, export, vocabulary
from flax_asr.record import runlog

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "hf417_log.json"
DEVICES = 2


@pytest.fixture(scope="module")
def theirs():
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory, theirs):
    """The same run, and what it was made of."""
    folder, made = tmp_path_factory.mktemp("old"), []

    class Kept(assembly.Assembly):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    options = {
        "output_dir": folder / "run",
        "data.source": old.corpus(folder),
        "data.language": "zh-HK",
        "data.prepared_dir": folder / "prepared",
        "data.test_splits": "[]",
        "data.num_buckets": 1,
        "data.num_workers": 1,
        "model.pretrained": _pretrained(folder / "model", theirs["vocabulary"]),
        "optim.learning_rate": old.LEARNING_RATE,
        "optim.warmup_steps": old.WARMUP_STEPS,
        "optim.weight_decay": old.WEIGHT_DECAY,
        "train.compat": "hf-4.17",
        "train.num_train_epochs": old.EPOCHS,
        "train.global_batch_size": old.MICRO_BATCH * old.ACCUMULATION,
        "train.per_device_train_batch_size": old.MICRO_BATCH // DEVICES,
        "train.per_device_eval_batch_size": old.EVAL_BATCH // DEVICES,
        "train.mixed_precision": "fp32",
        "train.logging_steps": old.LOGGING_STEPS,
        "train.eval_steps": old.EVAL_STEPS,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "Assembly", Kept)
        patch.setattr(export, "_torch_is_installed", None)
        small_training.without_torch()
        arguments = [f"--{name}={value}" for name, value in options.items()]
        assert __main__.main(["train", *arguments]) == 0
    return made[0], runlog.read(folder / "run")


def _pretrained(folder: pathlib.Path, tokens: dict[str, int]) -> pathlib.Path:
    """A folder of 2022 with the weights of the old run."""
    settings = transformers.Wav2Vec2Config(
        **old.MODEL, vocab_size=len(tokens), pad_token_id=tokens["[PAD]"]
    )
    settings.save_pretrained(folder)
    torch_model = transformers.Wav2Vec2ForCTC(settings)
    shapes = {
        re.sub(
            r"parametrizations\.weight\.original([01])", lambda m: "weight_" + "gv"[int(m[1])], name
        ): (tuple(value.shape))
        for name, value in torch_model.state_dict().items()
    }
    safetensors.numpy.save_file(old.weights(shapes), folder / "model.safetensors")
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "[PAD]", "unk_token": "[UNK]"})
    )
    return folder


def _number(clip: str) -> int:
    return int(re.search(r"\d+", clip)[0])


def _batches(made: assembly.Assembly) -> list[list[list[int]]]:
    """The clips of every micro-batch of every epoch; those of the last that no update has, too."""
    plan, ids = made.plan, made.corpus.train.ids
    updates = range(made.updates + plan.updates_per_epoch)
    groups = [group for update in updates for group in plan.update(update)]
    return [
        [
            [_number(ids[row]) for row in group.rows if row >= 0]
            for group in groups
            if group.epoch == epoch
        ]
        for epoch in range(old.EPOCHS)
    ]


def test_the_batches_are_those_that_the_old_trainer_was_given(ours, theirs, tmp_path):
    """Else the figures say nothing: another plan needs another log, made as its head says."""
    found = _batches(ours[0])
    (tmp_path / "batches.json").write_text(json.dumps(found))
    assert found == theirs["batches"], f"see {tmp_path / 'batches.json'}"


def test_vocabulary_and_targets_are_those_of_the_old_tokenizer(ours, theirs):
    made, _ = ours
    data = made.corpus.train
    rule = compat.normalizer(made.cfg)
    texts = [
        rule(old.sentence(split, n)) for split, count in old.CLIPS.items() for n in range(count)
    ]
    found = vocabulary.Vocabulary.from_transcripts(texts, layout="hf-4.17")
    assert {token: number for number, token in enumerate(found.tokens)} == theirs["vocabulary"]
    labels = {_number(name): data.labels(row).tolist() for row, name in enumerate(data.ids)}
    assert [labels[n] for n in range(old.CLIPS["train"])] == theirs["targets"]


def test_every_line_of_the_log_is_that_of_the_old_trainer(ours, theirs):
    made, events = ours
    *expected, last = theirs["log_history"]
    assert made.updates == theirs["planned"] == theirs["updates"]
    found = [event for event in events if "loss" in event or "eval_loss" in event]
    assert [(e["step"], e["epoch"]) for e in found] == [(e["step"], e["epoch"]) for e in expected]
    for event, line in zip(found, expected, strict=True):
        exact = {name: line[name] for name in ("learning_rate",) if name in line}
        assert {name: event[name] for name in exact} == pytest.approx(exact, rel=1e-6, abs=0)
        losses = {name: line[name] for name in ("loss", "eval_loss") if name in line}
        assert {name: event[name] for name in losses} == pytest.approx(losses, rel=1e-3), line
        rates = {name: line[name] for name in ("eval_wer", "eval_cer") if name in line}
        # A frame at which two symbols are as likely may fall either way: one of 59 characters.
        assert {name: event[name] for name in rates} == pytest.approx(rates, abs=0.02)
    mean = sum(e["loss"] for e in found if "loss" in e) * old.LOGGING_STEPS / made.updates
    assert mean == pytest.approx(last["train_loss"], rel=1e-3)
