"""What to expect of a run before it starts: its first losses, and how much it computes."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int
from transformers import Wav2Vec2Config

from flax_asr import config, optim
from flax_asr.data import examples
from flax_asr.estimate import flops
from flax_asr.models import wav2vec2


@dataclass(frozen=True)
class Losses:
    """Expected losses, in nats: means over clips, per token with ctc_loss_reduction "mean".

    Attributes:
        first: loss of a fresh head, which gives every symbol the same probability.
        plateau: loss of a model that knows how frequent each character is and nothing of the audio.
            Training stays there for a while before it begins to use the audio.
        unigram_entropy: entropy of a character, from the same frequencies.
        token_share: labels per frame.
    """

    first: float
    plateau: float
    unigram_entropy: float
    token_share: float


def losses(data: examples.Examples, model_config: Wav2Vec2Config, vocab_size: int) -> Losses:
    """The losses to expect of a model with so many symbols on these examples."""
    labels = [data.labels(row) for row in range(len(data))]
    frames = np.asarray(wav2vec2.frame_lengths(model_config, data.samples), np.float64)
    tokens = np.asarray(data.label_lengths, np.float64)
    repeats = np.array([(found[1:] == found[:-1]).sum() for found in labels], np.float64)
    counts = np.bincount(np.concatenate(labels), minlength=vocab_size)
    log_share = np.log(np.maximum(counts, 1) / counts.sum())
    entropy = -float((counts / counts.sum()) @ log_share)
    characters = np.array([-log_share[found].sum() for found in labels])
    unit = tokens if model_config.ctc_loss_reduction == "mean" else np.ones_like(tokens)
    first = uniform_loss(frames, tokens, repeats, vocab_size)
    return Losses(
        first=float((first / unit).mean()),
        plateau=float(((characters + timing_loss(frames, tokens, repeats)) / unit).mean()),
        unigram_entropy=entropy,
        token_share=float(tokens.sum() / frames.sum()),
    )


def uniform_loss(
    frames: Float64[np.ndarray, " clips"],
    tokens: Float64[np.ndarray, " clips"],
    repeats: Float64[np.ndarray, " clips"],
    vocab_size: int,
) -> Float64[np.ndarray, " clips"]:
    """CTC loss where every symbol has the same probability at every frame.

    Source: each of the `vocab ** frames` paths is as likely as any other, and
    `binomial(frames + tokens - repeats, 2 * tokens)` of them read as the transcript (stars and
    bars over the tokens, each one frame or more, and the blanks between, which repeats need).
    """
    return frames * math.log(vocab_size) - _log_binomial(frames + tokens - repeats, 2 * tokens)


def timing_loss(
    frames: Float64[np.ndarray, " clips"],
    tokens: Float64[np.ndarray, " clips"],
    repeats: Float64[np.ndarray, " clips"],
) -> Float64[np.ndarray, " clips"]:
    """The part of the plateau's loss that is due to not knowing where the tokens are.

    Source: every frame is a token with probability tokens / frames, one frame each; paths that
    hold a token for several frames are so rare in this model that they are left out.
    """
    share = tokens / frames
    blanks = frames - tokens
    silent = np.where(blanks > 0, blanks * np.log(np.where(blanks > 0, 1 - share, 1.0)), 0.0)
    return -_log_binomial(frames - repeats, tokens) - tokens * np.log(share) - silent


def _log_binomial(
    n: Float64[np.ndarray, " clips"], k: Float64[np.ndarray, " clips"]
) -> Float64[np.ndarray, " clips"]:
    lgamma = np.vectorize(math.lgamma, otypes=[np.float64])
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


@dataclass(frozen=True)
class Work:
    """All that a run computes: padded samples that are trained on and scored, and updates.

    With `cached`, training starts from the cached output of the frozen layers; the samples of the
    pass that computes it are counted in `scored_samples`.
    """

    model_config: Wav2Vec2Config
    model: config.ModelConfig
    trained_samples: float
    scored_samples: float
    updates: int
    cached: bool = False

    def seconds_at(self, samples: int, samples_per_second: float, update_seconds: float) -> float:
        """Seconds of the run at the measured speed of training on clips of `samples`.

        Scoring is a forward pass only; clips of other lengths cost in proportion.
        """
        share = self._forward(samples) / self._gradient(samples, self.model)
        computed = self.trained_samples + self.scored_samples * share
        return computed / samples_per_second + self.updates * update_seconds

    def least_seconds(self, samples: int, flops_per_second: float) -> float:
        """Seconds of the run if all of it ran at the speed of a large matrix product."""
        return self._total(samples, self.model) / flops_per_second

    def relative_cost(self, trainable_layers: int, samples: int) -> float:
        """Cost of the run with only these top layers trained, as a fraction of its cost now."""
        cheap = dataclasses.replace(self.model, trainable_layers=trainable_layers)
        return self._total(samples, cheap) / self._total(samples, self.model)

    def _total(self, samples: int, model: config.ModelConfig) -> float:
        trained = self.trained_samples * self._gradient(samples, model)
        return (trained + self.scored_samples * self._forward(samples)) / samples

    def _forward(self, samples: int) -> int:
        return sum(flops.forward(self.model_config, 1, samples).values())

    def _gradient(self, samples: int, model: config.ModelConfig) -> int:
        layers = self.model_config.num_hidden_layers
        is_trained = optim.trainable(model, self.model_config)
        lower_layers = optim.first_trained_layer(model, layers) if self.cached else None
        counted = flops.gradient(self.model_config, 1, samples, is_trained, lower_layers)
        return sum(counted.values())


def histogram(
    values: Int[np.ndarray, " values"] | Float64[np.ndarray, " values"], edges: Sequence[float]
) -> list[int]:
    """How many values lie from each edge to the next; the last bin is open."""
    places = np.searchsorted(np.asarray(edges), values, side="right") - 1
    return np.bincount(np.clip(places, 0, None), minlength=len(edges)).tolist()
