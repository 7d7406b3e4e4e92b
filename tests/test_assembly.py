"""A run before its first update: what it is warned of."""

import types

import pytest
import small_saved
from models import small_torch

from flax_asr import assembly, config, corpora, origins


@pytest.mark.parametrize(("architecture", "heard"), [("base", True), ("xls-r", False)])
def test_a_run_is_warned_of_an_encoder_that_hears_padding(tmp_path, architecture, heard):
    words = ["--data.language=en", "--data.eval_splits=[]", "--data.test_splits=[]"]
    cfg = config.build({}, [*words, "--train.max_steps=1000", "--train.mixed_precision=fp32"])
    start = origins.Origin(
        small_torch.config(architecture), None, None, True, not heard, {"head": "kept"}
    )
    kept = {"train": small_saved.split(tmp_path / "train", ["abc", "cab"], seconds=(1.0, 2.0))}
    # What is asked of it, without a model and its programs.
    made = object.__new__(assembly.Assembly)
    made.cfg, made.start, made.updates = cfg, start, 1000
    made.devices, made.plan = (
        types.SimpleNamespace(platform="cpu", count=1),
        types.SimpleNamespace(padding=0.2),
    )
    made.corpus = corpora.gather(cfg, start, kept)
    said = [line for line in made.warnings() if "padd" in line]
    assert len(said) == heard
    if heard:
        assert "its output changes with the padding (20% of a batch)" in said[0]
