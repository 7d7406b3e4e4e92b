"""What a batch becomes on its way into the model, and what its loss is made of."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import torch
import transformers
from models import small_torch

from flax_asr import criterion, ctc
from flax_asr.models import upper, wav2vec2

VOCAB = 11

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Told(nn.Module):
    """Stands for the model: has what it is told kept, and gives these logits."""

    logits: Any
    keep: Any

    def __call__(self, audio, **told):
        self.keep({"audio": audio, **told})
        return wav2vec2.CTCOutput(self.logits, None, None)


def scored(batch, key=None, use_attention_mask=True, **changes):
    """Losses, logits and real frames of a batch, and what the model was told."""
    config = small_torch.config(**changes)
    frames = int(wav2vec2.frame_lengths(config, batch.audio.shape[1]))
    logits = np.random.default_rng(0).normal(size=(len(batch.gains), frames, VOCAB))
    kept = []
    objective = criterion.Objective(
        Told(jnp.asarray(logits, jnp.float32), kept.append),
        config,
        use_attention_mask=use_attention_mask,
    )
    found = criterion.forward(objective, {}, criterion.Batch(*batch), key)
    return found, kept[0]


def test_the_waveform_is_that_of_transformers_feature_extractor():
    """Of a quiet recording too, where the number that keeps the variance from 0 counts."""
    batch = small_run.batch(4, 1, VOCAB, fillers=1)
    batch = batch._replace(gains=np.array([3e-5, 1e-4, 1e-7, 1], np.float32))
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    clips = [batch.audio[i, : batch.sample_lengths[i]] * batch.gains[i] for i in range(3)]
    theirs = extractor(clips, sampling_rate=16_000, padding="max_length", max_length=1600)
    ours = np.asarray(criterion.waveform(criterion.Batch(*batch), True))
    np.testing.assert_allclose(ours[:3], theirs["input_values"], rtol=0, atol=2e-6)
    assert not ours[3].any()
    raw = np.asarray(criterion.waveform(criterion.Batch(*batch), False))
    np.testing.assert_allclose(raw[1, : len(clips[1])], clips[1], rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_a_clip_is_torchs_a_label_or_in_all(reduction):
    batch = small_run.batch(4, 2, VOCAB)
    (losses, logits, frames), _ = scored(batch, ctc_loss_reduction=reduction)
    theirs = torch.nn.functional.ctc_loss(
        torch.tensor(np.asarray(logits)).log_softmax(-1).transpose(0, 1),
        torch.tensor(batch.labels),
        torch.tensor(np.asarray(frames)),
        torch.tensor(batch.label_lengths),
        reduction="none",
    ).numpy()
    divisor = batch.label_lengths if reduction == "mean" else 1
    np.testing.assert_allclose(losses, theirs / divisor, rtol=1e-5)


@pytest.mark.parametrize("told", [True, False])
def test_masks_stay_in_the_frames_that_the_model_knows_to_be_real(told):
    batch = small_run.batch(8, 3, VOCAB)
    options = {"mask_time_prob": 0.6, "mask_time_length": 2, "mask_feature_prob": 0.3}
    options["mask_feature_length"] = 2
    (_, _, frames), heard = scored(batch, jax.random.key(0), told, **options)
    padding = np.arange(heard["mask_time_indices"].shape[1]) >= np.asarray(frames)[:, None]
    assert padding.any(axis=1).all()
    assert heard["mask_time_indices"].any(axis=1).all()
    assert (heard["mask_time_indices"] & padding).any() != told
    assert (heard["attention_mask"] is not None) == told
    assert heard["mask_feature_indices"].any(axis=1).all()
    assert not heard["deterministic"]


def test_nothing_is_masked_or_dropped_where_no_key_is_given():
    _, heard = scored(small_run.batch(2, 4, VOCAB), mask_time_prob=0.6, mask_feature_prob=0.3)
    assert heard["mask_time_indices"] is heard["mask_feature_indices"] is None
    assert heard["deterministic"]
    lengths = small_run.batch(2, 4, VOCAB).sample_lengths
    assert heard["attention_mask"].sum(axis=1).tolist() == lengths.tolist()


def test_a_cached_batch_meets_the_dropout_of_the_whole_model(monkeypatch):
    config = small_torch.config(apply_spec_augment=False)
    batch = criterion.Batch(*small_run.batch(2, 1, VOCAB))
    frames = int(wav2vec2.frame_lengths(config, batch.audio.shape[1]))
    logits = jnp.zeros((2, frames, VOCAB))
    keys = []

    class Part(nn.Module):
        """Stands for the model, or for its upper part."""

        result: Any

        def apply(self, variables, *inputs, rngs, **told):
            keys.append(None if rngs is None else jax.random.key_data(rngs["dropout"]).tolist())
            return self.result

    whole = Part(wav2vec2.CTCOutput(logits, None, None))
    objective = criterion.Objective(whole, config, lower_layers=1)
    monkeypatch.setattr(ctc, "ctc_loss", lambda *arguments, **options: jnp.zeros(2))
    monkeypatch.setattr(upper, "of", lambda module, lower_layers: Part(logits))
    hidden_state = jnp.zeros((2, frames, config.hidden_size))
    for given in (batch, criterion.CachedBatch(hidden_state, *batch[2:])):
        for key in (jax.random.key(3), None):
            criterion.forward(objective, {}, given, key)
    assert keys[:2] == keys[2:]
    assert keys[0] is not None
    assert keys[1] is None
