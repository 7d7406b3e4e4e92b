"""`evaluate` and `transcribe` say of options that change nothing in them that they do not."""

import pytest

from flax_asr import config, errors
from flax_asr.console import model_options


def test_a_model_is_transcribed_with_in_a_precision_and_a_batch_and_no_more():
    taken = {name for name in config.option_types() if model_options.takes("transcribe", name)}
    assert taken == {"train.per_device_eval_batch_size", "train.mixed_precision"}


def test_a_model_is_scored_on_other_data_too():
    taken = {name for name in config.option_types() if model_options.takes("evaluate", name)}
    assert taken == {
        *("seed", "text.normalization"),
        *("train.per_device_eval_batch_size", "train.mixed_precision"),
        *("data.source", "data.language", "data.text_column", "data.test_splits"),
        *("data.prepared_dir", "data.min_seconds", "data.max_seconds", "data.trim_silence"),
        *("data.num_buckets", "data.num_workers", "data.max_eval_clips"),
    }


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("evaluate", "--optim.learning_rate=1", "--optim.learning_rate changes nothing in `eva"),
        ("evaluate", "--text.vocabulary x", "--text.vocabulary changes nothing in `evaluate`"),
        ("evaluate", "--data.augment.speed=1,2", "--data.augment.speed changes nothing"),
        (
            "transcribe",
            "--model.attention=xla --data.language cy --optim.warmup_steps 1",
            "--model.attention and --optim.warmup_steps change nothing in `transcribe`: leave them"
            " out. `flax-asr transcribe --help` lists",
        ),
    ],
)
def test_options_without_meaning_for_a_model_are_refused_all_at_once(command, words, message):
    with pytest.raises(errors.ConfigError) as refusal:
        model_options.check(command, words.split())
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("evaluate", "--data.eval_splits dev", "What is scored are the splits of data.test_splits"),
        ("transcribe", "--data.language=cy", "--data.language changes nothing in `transcribe`."),
        ("transcribe", "--data.source=x --seed 1", "--data.source and --seed change nothing"),
    ],
)
def test_what_the_other_command_or_training_has_a_use_for_is_warned_of(
    command, words, message, caplog
):
    model_options.check(command, words.split())
    assert message in caplog.text


def test_what_changes_something_is_not_spoken_of(caplog):
    model_options.check("evaluate", "--data.language=cy --train.mixed_precision bf16".split())
    model_options.check("transcribe", ["--train.mixed_precision=bf16"])
    assert not caplog.messages


def test_what_is_no_option_is_left_to_who_names_the_nearest(caplog):
    model_options.check("transcribe", ["--train.mixed_precison", "fp32"])
    assert not caplog.messages
