"""A run before its first update: what it is warned of, and its parameters."""

import dataclasses
import types

import jax
import pytest
import small_saved
from models import small_torch

from flax_asr import assembly, config, corpora, experiment, origins


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
    made.start.model_config.mask_time_length = 10_000
    assert any(line.startswith("no clip is masked") for line in made.warnings())
    said = [line for line in made.warnings() if "padd" in line]
    assert len(said) == heard
    if heard:
        assert "its output changes with the padding (20% of a batch)" in said[0]


def test_parameters_have_their_shapes_where_the_form_of_attention_cannot_compute():
    """`doctor` counts them on the CPU of a machine whose GPU is another process's."""
    start = origins.Origin(small_torch.config(), None, None, True, True, {})

    def shapes(attention):
        cfg = config.build({"model": {"attention": attention}})
        return experiment.parameter_shapes(experiment.objective(cfg, start))

    assert jax.tree.leaves(shapes("cudnn"))
    assert shapes("cudnn") == shapes("xla")


@pytest.mark.parametrize("updates", [40, 60])
def test_what_a_run_was_made_longer_by_is_remembered(updates):
    """By every later start, and for a best checkpoint from before the last extension."""
    saved = small_saved.saved(facts={"updates": 20})
    made = object.__new__(assembly.Assembly)
    made.cfg, made.updates = config.build({"train": {"max_steps": updates}}), updates
    made.past = None
    assert made._extensions() == []
    first = {"after": 20, "planned": 20}
    facts = {"updates": 40, "extensions": [first]}
    made.past = dataclasses.replace(saved.meta, step=30, facts=facts)
    extensions = [first] if updates == 40 else [first, {"after": 30, "planned": 40}]
    assert made._extensions() == extensions
    found = made.described(saved).meta
    assert (found.facts["updates"], found.facts["extensions"]) == (updates, extensions)
    assert found.facts.keys() >= saved.meta.facts.keys()
    assert found.run["train"]["max_steps"] == updates
