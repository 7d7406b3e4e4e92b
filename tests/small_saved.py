"""A small model as a checkpoint gives it, and a small prepared split, both without a run."""

import pathlib

import numpy as np
import pytest
import torch
from models import small_torch

from flax_asr import audio, checkpoint, config, export, inventory, vocabulary
from flax_asr.data import shard_writer, shards
from flax_asr.models import convert

VOCABULARY = vocabulary.Vocabulary(
    ("[PAD]", "[UNK]", "|", *"abcdefgh"), blank=0, unknown=1, delimiter="|"
)


def saved(
    architecture: str = "xls-r",
    seed: int = 0,
    facts: dict | None = None,
    metrics: dict | None = None,
    run: config.Config | None = None,
    do_normalize: bool = True,
    **changes,
) -> checkpoint.SavedModel:
    """Random weights, and a head that says a lot."""
    model_config = small_torch.config(architecture, ctc_loss_reduction="mean", **changes)
    model = small_torch.model("Wav2Vec2ForCTC", model_config, seed)
    with torch.no_grad():
        # Every symbol as likely as any other, so that the model says a lot, unknown ones too.
        logits = model(torch.tensor(speech(8000, seed))[None] / 0.4).logits[0]
        model.lm_head.weight /= logits.std(dim=0)[:, None]
        model.lm_head.bias.sub_(logits.mean(dim=0)).div_(logits.std(dim=0))
    tensors = small_torch.tensors(model)
    split = {"release": "cv-corpus-9", "hash": "ab" * 32, "clips": 7, "seconds": 3600.0}
    meta = inventory.Meta(
        step=30,
        run=config.as_dict(run or config.Config(data=config.DataConfig(source="x", language="eu"))),
        model_config=model_config.to_dict(),
        vocabulary=VOCABULARY.to_json(),
        normalization=["lower", "spaces"],
        do_normalize=do_normalize,
        use_attention_mask=model_config.feat_extract_norm == "layer",
        group_rows=8,
        facts={
            "started_from": "facebook/wav2vec2-xls-r-300m",
            "revision": "c0ffee",
            "head": "fresh, 11 symbols",
            "splits": {"train": split, "eval": split, "test": split},
        }
        | (facts or {}),
        metrics=metrics or {},
        window={},
    )
    return checkpoint.SavedModel(
        model_config=model_config,
        params=convert.params_from_torch(tensors, model_config, head=True),
        vocabulary=VOCABULARY,
        meta=meta,
    )


def export_folder(folder: pathlib.Path, model: checkpoint.SavedModel) -> None:
    """The model's export, not compared in PyTorch: tests/test_export.py is about that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_torch_is_installed", lambda: False)
        export.write_folder(folder, model, config.build(model.meta.run), model.meta.facts)


def speech(samples: int, seed: int) -> np.ndarray:
    """Noise whose loudness and colour change, so that a random model says something."""
    rng = np.random.default_rng(seed)
    times = np.arange(samples) / audio.SAMPLE_RATE_HZ
    tone = np.sin(2 * np.pi * (200 + 100 * np.sin(5 * times + seed)) * times * rng.uniform(1, 4))
    envelope = 0.3 + 0.2 * np.sin(2 * np.pi * times * rng.uniform(2, 6))
    return (envelope * (tone + 0.3 * rng.standard_normal(samples))).astype(np.float32)


def split(folder, sentences, seconds=(0.05, 0.3), seed: int = 0) -> shards.PreparedSplit:
    """A prepared split with one clip a sentence; genders and one accent are known."""
    rng = np.random.default_rng(seed)
    with shard_writer.ShardWriter(folder) as writer:
        for number, sentence in enumerate(sentences):
            length = int(rng.uniform(*seconds) * audio.SAMPLE_RATE_HZ)
            pcm, gain = audio.encode_int16(speech(length, number) * 0.7)
            facts = shards.ClipFacts(
                f"clip{number}.mp3",
                sentence,
                speaker=f"secret{number % 3}",
                gender=("female", "male", "")[number % 3],
            )
            writer.add(facts, pcm, gain, shards.pcm_digest(pcm, gain))
        writer.finish(source="small", release="cv-corpus-9", split="test")
    return shards.PreparedSplit.open(folder)
