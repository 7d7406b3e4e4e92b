"""The configuration is strict, says what is wrong, and comes back as it was written."""

import dataclasses
import pathlib
import re
import types
import typing

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flax_asr import __main__, config, errors, trainer_names
from flax_asr.console import option_help
from flax_asr.models import layers


def _file(tmp_path: pathlib.Path, text: str) -> pathlib.Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_options_win_over_the_file(tmp_path):
    path = _file(tmp_path, "seed: 1\noptim: {learning_rate: 1e-3}\n")
    cfg = config.load(path, ["--optim.learning_rate", "1e-4", "--data.train_splits=train,dev"])
    assert (cfg.seed, cfg.optim.learning_rate) == (1, 1e-4)
    assert cfg.data.train_splits == ("train", "dev")


def test_fields_of_the_model_stand_in_the_order_of_the_command_line():
    """In config.yaml and in checkpoints, whatever the seed of Python's hashes."""
    fields = [f"mask_{name}" for name in "length prob time feature min spans rate part".split()]
    cfg = config.load(None, [f"--model.config.{name}=1" for name in fields])
    assert list(cfg.model.config) == fields


@pytest.mark.parametrize(
    ("written", "splits"),
    [("dev", ("dev",)), ("dev, other", ("dev", "other")), ("[dev]", ("dev",)), ("[]", ())],
)
def test_a_file_spells_lists_as_the_command_line_does(tmp_path, written, splits):
    path = _file(tmp_path, f"data:\n  eval_splits: {written}\n")
    assert config.load(path).data.eval_splits == splits


def test_lists_take_brackets_commas_and_a_single_name():
    for given_text, expected in {
        "[train,dev]": ("train", "dev"),
        "train,dev": ("train", "dev"),
        "test": ("test",),
    }.items():
        cfg = config.load(None, ["--data.eval_splits", given_text])
        assert cfg.data.eval_splits == expected


def test_a_section_inside_of_another_is_read_from_files_and_options_and_written(tmp_path):
    path = _file(tmp_path, "data:\n  augment: {speed: [0.9, 1.1], pitch: [-1, 1]}\n")
    cfg = config.load(path, ["--data.augment.speed", "0.95,1", "--data.augment.gain_db=[-6, 6]"])
    expected = config.AugmentConfig(speed=(0.95, 1.0), pitch=(-1.0, 1.0), gain_db=(-6.0, 6.0))
    assert cfg.data.augment == expected
    config.save(cfg, path)
    assert config.load(path) == cfg
    assert config.load(_file(tmp_path, "data: {augment: }")) == config.Config()


def test_an_empty_section_means_its_defaults(tmp_path):
    assert config.load(_file(tmp_path, "optim:\ntrain: {}\n")) == config.Config()


def test_scalars_are_yaml_1_2(tmp_path):
    cfg = config.load(
        _file(tmp_path, "seed: 010\ndata: {language: no}\noptim: {adam_epsilon: 1e-8}\n")
    )
    assert (cfg.seed, cfg.data.language, cfg.optim.adam_epsilon) == (10, "no", 1e-8)


def test_one_field_of_the_model_configuration_leaves_those_of_the_file(tmp_path):
    path = _file(tmp_path, "model: {config: {mask_time_prob: 0.3, layerdrop: 0.05}}")
    one = config.load(path, ["--model.config.mask_time_prob", "0.05"])
    assert one.model.config == {"mask_time_prob": 0.05, "layerdrop": 0.05}
    whole = config.load(path, ["--model.config.layerdrop=0", "--model.config={hidden_dropout: 1}"])
    assert whole.model.config == {"hidden_dropout": 1, "layerdrop": 0}
    empty = _file(tmp_path, "model: {config: }")
    assert config.load(empty, ["--model.config.layerdrop=0"]).model.config == {"layerdrop": 0}
    with pytest.raises(errors.ConfigError, match=r"model\.config is 3"):
        config.load(_file(tmp_path, "model: {config: 3}"), ["--model.config.layerdrop=0"])


def test_a_leading_tilde_is_the_home_of_the_user_wherever_a_place_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = """
        output_dir: ~/runs/cy
        data: {source: ~/cy.tar.gz, prepared_dir: ~/old}
        model: {pretrained: ~/xls-r}
        text: {vocabulary: ~/vocab.json}
    """
    cfg = config.load(_file(tmp_path, text), ["--data.prepared_dir=~/prepared"])
    assert (cfg.output_dir, cfg.data.source) == ("/home/me/runs/cy", "/home/me/cy.tar.gz")
    assert cfg.data.prepared_dir == "/home/me/prepared"
    assert (cfg.model.pretrained, cfg.text.vocabulary) == (
        "/home/me/xls-r",
        "/home/me/vocab.json",
    )
    assert config.load(None, ["--output_dir=gs://a/~"]).output_dir == "gs://a/~"


def test_fields_of_the_model_configuration_are_options_too():
    cfg = config.load(None, ["--model.config.mask_time_prob", "0.75"])
    assert cfg.model.config == {"mask_time_prob": 0.75}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {learning_rate: 1e-4}", "optim.learning_rate"),
        ("optim: {learning_rat: 1e-4}", "did you mean optim.learning_rate"),
        ("fp16: true", "train.mixed_precision fp16"),
        ("train: {warmup_ratio: 0.1}", "optim.warmup_fraction"),
        ("optim: {learning_rate: '1e-4'}", "optim.learning_rate is '1e-4'"),
        ("optim: {learning_rate: -1}", "must be larger than 0"),
        ("optim: {learning_rate: .nan}", "must be finite"),
        (r'output_dir: "a\0b"', "a string must not contain the character NUL"),
        ("optim: {warmup_steps: 1, warmup_fraction: 0.1}", "exclude each other"),
        ("optim: {hold_fraction: 0.4}", "only optim.lr_scheduler_type tri_stage"),
        (
            "optim: {lr_scheduler_type: tri_stage, warmup_fraction: 0.7, hold_fraction: 0.4}",
            "more than the whole run",
        ),
        ("data: {augment: {speed: [1.1, 0.9]}}", "data.augment.speed is [1.1, 0.9]"),
        ("data: {augment: {speed: [0.9, .nan]}}", "must be [low, high], in 0.5 to 2"),
        ("data: {augment: {pich: [1, 2]}}", "did you mean data.augment.pitch"),
        ("data: {augment: 3}", "data.augment is a section"),
        ("optim: {ema_decay: 1.0}", "optim.ema_decay is 1.0"),
        ("optim: {head_learning_rate: 0}", "optim.head_learning_rate is 0"),
        ("train: {mixed_precision: fp17}", "one of fp32, bf16, fp16"),
        ("train: {max_steps: 1.5}", "train.max_steps is 1.5"),
        ("train: {gradient_checkpointing: no}", "gradient_checkpointing is 'no'"),
        ("train: {global_batch_size: 32, gradient_accumulation_steps: 4}", "exclude each other"),
        ("data: {min_seconds: 3, max_seconds: 2}", "data.max_seconds is 2"),
        ("data: {train_splits: [train, dev, train]}", "name every split once"),
        ("seed: 4294967296", "seed is 4294967296: it must be less than 4294967296"),
        ("data: {train_splits: [train/clean]}", "data.train_splits: 'train/clean' cannot be"),
        ("data: {eval_splits: [..]}", "data.eval_splits: '..' cannot be the name of a folder"),
        ("data: [1, 2]", "data is a section"),
        ("data: {eval_splits: null}", "data.eval_splits is None: write a list such as [train,dev]"),
        ("seed: 1\nseed: 2", "duplicate key"),
        ("seed: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("- 1", "expected `section:` lines"),
        ("seed: [1", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_way_out(tmp_path, text, expected):
    path = _file(tmp_path, text)
    with pytest.raises(errors.ConfigError) as caught:
        config.load(path)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--train.learning_rate", "1"], "it is optim.learning_rate"),
        (["--optim.learning_rat", "1"], "did you mean optim.learning_rate"),
        (["--optim.learning_rate"], "needs a value"),
        (["--seed", "1", "--seed", "2"], "given twice"),
        (["--model.config.layerdrop=0", "--model.config.layerdrop=1"], "given twice"),
        (["--data.trim_silence", "no"], "data.trim_silence is 'no'"),
        (
            ["--data.eval_splits", "null"],
            "data.eval_splits is None: write a list such as [train,dev]",
        ),
        (["stray"], "unexpected argument stray"),
    ],
)
def test_a_wrong_option_is_refused(options, expected):
    with pytest.raises(errors.ConfigError) as caught:
        config.load(None, options)
    assert expected in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(errors.ConfigError, match=r"absent\.yaml"):
        config.load(tmp_path / "absent.yaml")


def test_every_name_of_the_trainer_leads_to_a_real_option():
    names = config.option_types()
    for answer in trainer_names.OURS.values():
        first = answer.split()[0].rstrip(":")
        command = re.match("the command `flax-asr (.*)`$", answer)
        assert (
            first in names
            or answer.startswith(("nothing", "the option --restart"))
            or command[1] in __main__.COMMANDS
        )


def test_every_option_is_explained_with_its_choices_and_its_default():
    listed = option_help.listing()
    assert all(f"--{name} " in listed for name in config.option_types())
    assert "One of fp32, bf16, fp16. (default bf16)" in listed
    assert "the splits to train on. (default [train])" in listed
    assert "every clip. (default false)" in listed


def test_the_policies_of_gradient_checkpointing_are_those_of_the_model():
    kind = config.option_types()["model.remat_policy"]
    assert ("none", *typing.get_args(kind)) == layers.REMAT_POLICIES


_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts


def _of_kind(kind) -> st.SearchStrategy:
    """Values that an option of this type may have."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return st.one_of(*(_of_kind(member) for member in typing.get_args(kind)))
    if kind is types.NoneType:
        return st.none()
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return st.lists(_of_kind(typing.get_args(kind)[0]), max_size=3).map(tuple)
    if kind == dict[str, typing.Any]:
        return st.dictionaries(_texts, _values | st.lists(_values, max_size=2), max_size=3)
    return {
        bool: st.booleans(),
        str: _texts,
        float: st.floats(0, 1, exclude_max=True) | st.floats(1e-300, 1e300),
        int: st.integers(0, 2**60),
    }[kind]


def _build(sections: dict) -> config.Config | None:
    """None where a value is out of its range, or two options exclude each other."""
    try:
        return config.build(sections)
    except errors.ConfigError:
        return None


@pytest.mark.parametrize(
    "text", ["\x85", "a\u2028b", "\ufeff", "no", "1e-8", "tab\t", "\U0001f600"]
)
def test_any_text_loads_back_equal(tmp_path, text):
    cfg = config.build({"data": {"source": text}})
    config.save(cfg, tmp_path / "c.yaml")
    assert config.load(tmp_path / "c.yaml") == cfg


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_configuration_loads_back_equal(tmp_path_factory, data):
    kinds = config.option_types()
    names = data.draw(st.sets(st.sampled_from(sorted(kinds)), max_size=12))
    sections: dict = {}
    for name in sorted(names):
        section, _, key = name.rpartition(".")
        value = data.draw(_of_kind(kinds[name]), label=name)
        if _build({section: {key: value}} if section else {key: value}) is not None:
            place = sections.setdefault(section, {}) if section else sections
            place[key] = value
    cfg = _build(sections)
    assume(cfg is not None)
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    config.save(cfg, path)
    assert config.load(path) == cfg
    assert config.build(config.as_dict(cfg)) == cfg


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["", "data", "text", "model", "optim", "train"]),
    st.text(st.characters(codec="ascii", categories=["Ll", "Nd"], include_characters="_-")),
)
def test_any_unknown_key_is_named(section, key):
    name = f"{section}.{key}" if section else key
    is_known = any(f"{option}.".startswith(f"{name}.") for option in config.option_types())
    if is_known or key in ("data", "text", "model", "optim", "train"):
        return
    for read in (
        lambda: config.build({section: {key: 1}} if section else {key: 1}),
        lambda: config.load(None, [f"--{name}=1"]),
    ):
        with pytest.raises(errors.ConfigError) as caught:
            read()
        assert "there is no option" in str(caught.value)
        assert name.partition(".")[0] in str(caught.value)


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Config().seed = 1


@pytest.mark.parametrize("name", ["train.compat", "train.max_steps", "data.source"])
def test_null_on_the_command_line_unsets_an_option(name):
    set_to = {"train.compat": "hf-4.17", "train.max_steps": 3, "data.source": "x"}[name]
    section, _, key = name.partition(".")
    cfg = config.build({section: {key: set_to}}, [f"--{name}=null"])
    assert getattr(getattr(cfg, section), key) is None


def test_all_options_that_do_not_exist_are_named_at_once():
    words = ["--model_name_or_path", "x", "--seed=1", "--fp16", "--length_column_name=input_length"]
    with pytest.raises(errors.ConfigError) as caught:
        config.build({}, words)
    lines = str(caught.value).splitlines()
    assert [line.split()[4].rstrip(":") for line in lines] == [
        "model_name_or_path",
        "fp16",
        "length_column_name",
    ]
    assert "nothing: lengths come from the audio" in lines[2]


@pytest.mark.parametrize("name", ["output_dir", "data.prepared_dir", "model.pretrained"])
def test_an_empty_place_is_not_the_current_folder(name):
    with pytest.raises(errors.ConfigError, match=f"^{name} is empty"):
        config.build({}, [f"--{name}", ""])


def test_a_place_that_cannot_be_written_down_is_refused():
    """As a terminal gives a name from an old disk."""
    cfg = config.build({"data": {"source": "m\udce9"}, "output_dir": "run"})
    with pytest.raises(errors.ConfigError, match=r"^data\.source is 'm\\udce9': .* not UTF-8"):
        cfg.require("output_dir", "data.source")
