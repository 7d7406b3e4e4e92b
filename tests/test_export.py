"""The exported folder: verified against PyTorch, and never kept when it is wrong."""

import dataclasses
import errno
import functools
import json
import logging
import os
import pathlib
import types

import numpy as np
import pytest
import small_saved
import torch
import transformers

from flax_asr import config, errors, export, torch_logits
from flax_asr.models import layers, short_attention, weights
from flax_asr.record import lineage

pytestmark = pytest.mark.usefixtures("quick_compilation")

RUN = config.Config(data=config.DataConfig(source="x", language="eu"))


@pytest.fixture
def torch_here(monkeypatch):
    """PyTorch in this process, which has it loaded: one of its own takes seconds to start."""

    def run(command, **how):
        torch_logits._main(*command[3:])
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(torch_logits.subprocess, "run", run)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run") / "export"
    saved = small_saved.saved()
    # With PyTorch in a process of its own, as users have it.
    done = export.write_folder(folder, saved, RUN, saved.meta.facts)
    assert done.logits < 1e-4
    return folder


@pytest.mark.parametrize("architecture", ["xls-r", "base"])
def test_logits_in_pytorch_are_compared(architecture, torch_here, tmp_path):
    saved = small_saved.saved(architecture)
    done = export.write_folder(tmp_path / "out", saved, RUN, saved.meta.facts)
    assert done.logits is not None
    assert done.logits < 1e-4
    assert done.tensors == len(weights.read(tmp_path / "out"))
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert settings["return_attention_mask"] == saved.meta.use_attention_mask


def test_the_folder_holds_what_clients_need_and_no_processor(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "vocab.json",
        "flax_asr.json",
    }
    stored = json.loads((exported / "config.json").read_text())
    assert stored["architectures"] == ["Wav2Vec2ForCTC"]
    assert (stored["vocab_size"], stored["pad_token_id"]) == (11, 0)
    assert (stored["bos_token_id"], stored["eos_token_id"]) == (None, None)
    facts = json.loads((exported / "flax_asr.json").read_text())
    assert facts["language"] == "eu"
    assert facts["normalization"] == ["lower", "spaces"]
    assert facts["splits"]["test"]["hash"] == "ab" * 32
    assert {"JAX", "Transformers"} <= facts["versions"].keys()


def test_transformers_loads_everything_and_writes_our_text(exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert len(tokenizer) == 11
    extractor = transformers.AutoFeatureExtractor.from_pretrained(exported)
    assert extractor.do_normalize
    assert extractor.return_attention_mask
    _, loading_info = transformers.AutoModelForCTC.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(loading_info.values()), loading_info
    ids = [3, 3, 0, 3, 2, 4]
    assert tokenizer.decode(ids) == "aa b"


def test_a_weight_that_pytorch_reads_otherwise_is_not_kept(torch_here, tmp_path, monkeypatch):
    true = export.torch_logits.of
    monkeypatch.setattr(export.torch_logits, "of", lambda *a: true(*a) + 1e-2)
    saved = small_saved.saved()
    with pytest.raises(errors.ModelError, match="differ by 1"):
        export.write_folder(tmp_path / "out", saved, RUN, saved.meta.facts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("place", "passes"), [(0, True), (1, False)])
def test_a_large_logit_excuses_its_own_rounding_and_no_other_s(monkeypatch, place, passes):
    theirs = np.zeros((2, 50, 3), np.float32)
    theirs[0, 0, 0] = 1000.0
    ours = theirs.copy()
    ours[0, 0, place] += 0.05
    monkeypatch.setattr(export, "_torch_is_installed", lambda: True)
    monkeypatch.setattr(export, "_jax_logits", lambda *arguments: ours)
    monkeypatch.setattr(export.torch_logits, "of", lambda *arguments: theirs)
    compare = functools.partial(
        export._compare_logits, pathlib.Path(), {}, transformers.Wav2Vec2Config()
    )
    if passes:
        assert compare() == pytest.approx(0.05, rel=1e-2)
    else:
        with pytest.raises(errors.ModelError, match="differ by"):
            compare()


def test_on_a_tpu_machine_the_check_computes_as_on_any_other_cpu(torch_here, tmp_path, monkeypatch):
    """Where JAX computes on a TPU by default, its kernels would run on the CPU interpreted."""

    def refused(*arguments):
        raise AssertionError("a kernel for TPU, on the CPU")

    monkeypatch.setattr(layers, "default_platform", lambda: "tpu")
    monkeypatch.setattr(short_attention, "attend", refused)
    saved = small_saved.saved()
    assert export.write_folder(tmp_path / "out", saved, RUN, saved.meta.facts).logits < 1e-4


def test_a_flipped_bit_on_the_disk_is_noticed_and_the_old_folder_stays(
    torch_here, tmp_path, monkeypatch
):
    saved = small_saved.saved()
    export.write_folder(tmp_path / "out", saved, RUN, saved.meta.facts)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    true = weights.write

    def damaging(folder, tensors):
        path = true(folder, tensors)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(export.weights, "write", damaging)
    with pytest.raises(errors.ModelError, match=r"the parameter .* read back differs"):
        export.write_folder(tmp_path / "out", small_saved.saved(seed=1), RUN, saved.meta.facts)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_torch_the_tensors_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_torch_is_installed", lambda: False)
    saved = small_saved.saved()
    done = export.write_folder(tmp_path / "out", saved, RUN, saved.meta.facts)
    assert done.logits is None
    assert "not installed" in str(done)


def test_without_masks_there_is_no_mask_vector_to_compare(torch_here, tmp_path):
    saved = small_saved.saved(mask_time_prob=0.0, mask_feature_prob=0.0)
    done = export.write_folder(tmp_path / "out", saved, RUN, saved.meta.facts)
    assert done.logits < 1e-4


def test_a_second_export_takes_the_place_of_the_first(tmp_path):
    (tmp_path / "out").mkdir()
    link = tmp_path.with_name(f"link to {tmp_path.name}")
    link.symlink_to(tmp_path / "out")
    for seed in (0, 1):
        small_saved.export_folder(link, small_saved.saved(seed=seed))
    assert link.is_symlink()
    model = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        bias = model.lm_head.bias.numpy()
    np.testing.assert_array_equal(bias, small_saved.saved(seed=1).params["lm_head"]["bias"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    (tmp_path / ".new.unfinished").mkdir()
    rename = pathlib.Path.rename

    def failing(path, target):
        if path.name == ".new.unfinished":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        export._replace(tmp_path / ".new.unfinished", tmp_path / "out")
    assert (tmp_path / "out" / "old").is_file()


def test_an_export_is_on_the_disk_before_it_has_its_name(tmp_path, done):
    """A run that is marked as finished after it makes it no second time."""
    new = tmp_path / ".new.unfinished"
    new.mkdir()
    for name in ("a", "b"):
        (new / name).write_text(name)
    export._replace(new, tmp_path / "out")
    assert sorted(done[:2]) == ["a", "b"]
    assert done[2:] == [".new.unfinished -> out", tmp_path.name]


def test_what_it_says_of_itself_is_json_for_every_reader(tmp_path):
    """Of a run that diverged too, whose loss is no number."""
    saved = small_saved.saved()
    metrics = {"eval_loss": float("nan"), "eval_cer": 0.5}
    saved = dataclasses.replace(saved, meta=dataclasses.replace(saved.meta, metrics=metrics))
    small_saved.export_folder(tmp_path / "out", saved)

    def refuse(word):
        raise AssertionError(word)

    content = (tmp_path / "out" / lineage.FILE).read_text(encoding="utf-8")
    assert json.loads(content, parse_constant=refuse)["metrics"] == {
        "eval_loss": None,
        "eval_cer": 0.5,
    }


def test_export_of_what_is_no_run_says_so(tmp_path):
    with pytest.raises(errors.CheckpointError, match="not a run folder"):
        export.command(str(tmp_path), str(tmp_path / "out"))


def test_the_command_says_once_what_it_made(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(export, "_torch_is_installed", lambda: False)
    monkeypatch.setattr(export.inventory, "is_run", lambda folder: True)
    saved = small_saved.saved(
        run=dataclasses.replace(RUN, train=config.TrainConfig(global_batch_size=8))
    )
    monkeypatch.setattr(export.checkpoint, "load_model", lambda *_: saved)
    with caplog.at_level(logging.INFO, logger="flax_asr"):
        export.command("run", str(tmp_path / "out"))
    said = capsys.readouterr().out + caplog.text
    assert said.startswith(f"step 30 of run is in {tmp_path}/out: ")
    assert said.count("read back bit for bit; torch is not installed") == 1


def test_export_does_not_overwrite_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(export.inventory, "is_run", lambda folder: True)
    (tmp_path / "photo.jpg").write_text("x")
    for place in (tmp_path, tmp_path / "photo.jpg", os.devnull):
        with pytest.raises(errors.ModelError, match="holds something else"):
            export.command("run", str(place))
