"""Every recipe loads, says only what differs from the defaults, and shows how to run it."""

import pathlib
import re
import shlex

import pytest
from ruamel.yaml import YAML

from flax_asr import __main__, batch_size, config

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def _header(path: pathlib.Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    count = next(n for n, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#") for line in lines[:count])


def _commands(path: pathlib.Path) -> list[list[str]]:
    """The words after `python train.py` of each command in the header."""
    joined = _header(path).replace("\\\n", " ")
    found = re.findall(r"^   python train\.py (.*?)(?:  +\(.*)?$", joined, re.MULTILINE)
    return [shlex.split(words) for words in found]


def test_there_are_recipes():
    assert len(RECIPES) >= 5


@every_recipe
def test_a_recipe_loads(path):
    assert config.load(path) != config.Config()


@every_recipe
def test_no_key_repeats_a_default(path):
    said = YAML(typ="safe").load(path)
    defaults = config.as_dict(config.Config())
    repeated = {
        f"{name}.{key}"
        for name, section in said.items()
        if isinstance(section, dict)
        for key, value in section.items()
        if value == defaults[name][key]
    }
    repeated |= {name for name, value in said.items() if value == defaults[name]}
    assert repeated == set()


@every_recipe
def test_the_header_shows_a_command_that_parses_and_is_complete(path):
    commands = _commands(path)
    assert commands, "no line `#   python train.py ...` in the header"
    for words in commands:
        own, options = __main__.split(["train", *words])
        known = __main__._parser().parse_args(own)
        assert ROOT / known.config == path
        cfg = config.load(path, options)
        cfg.require("output_dir", "data.source", "data.language")


@every_recipe
def test_the_header_names_the_hardware(path):
    assert "Hardware: " in _header(path)


@pytest.mark.parametrize("path", [p for p in RECIPES if "xls_r" in p.stem or "cheap" in p.stem])
def test_an_expectation_that_nobody_has_tried_says_so(path):
    assert "What to expect (this recipe has not been run" in _header(path)


# The visible hyperparameters of the model card of w11wo/wav2vec2-xls-r-300m-zh-HK.
def test_zh_hk_has_the_hyperparameters_of_the_published_card():
    cfg = config.load(ROOT / "configs" / "xls_r_300m_zh_hk.yaml")
    assert (cfg.seed, cfg.data.language) == (42, "zh-HK")
    assert cfg.model.pretrained == "facebook/wav2vec2-xls-r-300m"
    optim, train = cfg.optim, cfg.train
    assert (optim.learning_rate, optim.warmup_steps) == (7.5e-05, 2000)
    assert (optim.adam_beta1, optim.adam_beta2, optim.adam_epsilon) == (0.9, 0.999, 1e-08)
    assert (optim.lr_scheduler_type, optim.weight_decay) == ("linear", 0.0)
    assert (train.num_train_epochs, train.mixed_precision) == (50, "fp16")
    assert train.per_device_train_batch_size == train.per_device_eval_batch_size == 8
    assert (train.eval_steps, train.logging_steps) == (500, 100)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_zh_hk_updates_with_32_clips_on_any_number_of_devices(devices):
    cfg = config.load(ROOT / "configs" / "xls_r_300m_zh_hk.yaml")
    assert batch_size.resolve(cfg, devices).train.global_batch_size == 32
    smaller = config.load(
        ROOT / "configs" / "xls_r_300m_zh_hk.yaml", ["--train.per_device_train_batch_size", "4"]
    )
    assert batch_size.resolve(smaller, 8).train.global_batch_size == 32


@pytest.mark.parametrize(
    ("name", "devices", "micro_batches"),
    [("v5e8", 8, 1), ("gpu80", 1, 4)],
)
def test_a_fitted_recipe_fits_its_number_of_devices(name, devices, micro_batches):
    cfg = batch_size.resolve(config.load(ROOT / "configs" / f"xls_r_300m_{name}.yaml"), devices)
    at_once = devices * cfg.train.per_device_train_batch_size
    assert cfg.train.global_batch_size == micro_batches * at_once
