"""The static shapes of a run: how many samples and label tokens its batches are padded to."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import Wav2Vec2Config

from flax_asr import config
from flax_asr.data import buckets, examples, loader


@dataclass(frozen=True)
class Shapes:
    """The static shapes of a run: padded samples and label tokens of each bucket, ascending."""

    samples: tuple[int, ...]
    tokens: tuple[int, ...]

    def __iter__(self):
        return iter(zip(self.samples, self.tokens, strict=True))

    @property
    def largest(self) -> tuple[int, int]:
        """Samples and tokens of the largest shape."""
        return self.samples[-1], self.tokens[-1]


def training(
    cfg: config.Config,
    model_config: Wav2Vec2Config,
    train: examples.Examples,
) -> Shapes:
    """At most `num_buckets` shapes for training on these examples.

    Augmentation makes no clip longer than the largest shape. Labels of clips that it shortens fit
    the smaller shapes.
    """
    return _shapes(cfg.data.num_buckets, model_config, [train], cfg.data.augment.fastest)


def scoring(
    cfg: config.Config, model_config: Wav2Vec2Config, sets: Sequence[examples.Examples]
) -> Shapes:
    """At most `scoring_buckets` shapes for scoring all of these sets; none for no sets."""
    if not sets:
        return Shapes((), ())
    return _shapes(scoring_buckets(cfg.data.num_buckets), model_config, sets)


def scoring_buckets(num_buckets: int) -> int:
    """The number of shapes for scoring: half as many as for training.

    Clips are scored a few times but trained on for many epochs, so less compilation is worth more
    padding.
    """
    return math.ceil(num_buckets / 2)


def _shapes(
    count: int,
    model_config: Wav2Vec2Config,
    sets: Sequence[examples.Examples],
    fastest: float = 1.0,
) -> Shapes:
    samples = buckets.choose_shapes(
        np.concatenate([data.samples for data in sets]),
        count,
        frame_samples=frame_samples(model_config),
    )
    widths = [loader.label_widths(data, samples, fastest=fastest) for data in sets]
    return Shapes(samples, tuple(max(column) for column in zip(*widths, strict=True)))


def frame_samples(model_config: Wav2Vec2Config) -> Callable[[int], int]:
    """A function that gives the fewest samples from which the model makes so many frames."""
    return functools.partial(
        buckets.smallest_samples,
        kernels=model_config.conv_kernel,
        strides=model_config.conv_stride,
    )
