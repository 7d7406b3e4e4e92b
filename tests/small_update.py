"""Updates without a model: parameters that run after a moving target, and nothing to compile but
`step.update`."""

import flax.traverse_util
import jax
import numpy as np
from transformers import Wav2Vec2Config

from flax_asr import config, experiment, parallel, step

SHAPES = {
    "lm_head/kernel": (16, 11),
    "lm_head/bias": (11,),
    "wav2vec2/encoder/layer_norm/scale": (16,),
    "wav2vec2/encoder/layers/0/feed_forward/intermediate_dense/kernel": (16, 24),
    "wav2vec2/encoder/layers/0/feed_forward/intermediate_dense/bias": (24,),
    "wav2vec2/encoder/odd/kernel": (5, 7),
    "wav2vec2/encoder/pos_conv_embed/kernel": (3, 8, 16),
    "wav2vec2/feature_extractor/kernel": (8, 8),
}


class Updates:
    """A state on some fake devices, and its compiled update.

    Args:
        devices: how many.
        zero_sharding: whether moments are cut.
        mixed_precision: fp16 has a loss scale.
        freeze_encoder_steps: in so many updates at first only the head moves.
        **optimiser: options of `optim`.
    """

    def __init__(
        self,
        devices,
        zero_sharding,
        mixed_precision="fp32",
        freeze_encoder_steps=0,
        **optimiser,
    ):
        options = {"learning_rate": 3e-2, "warmup_steps": 3, "weight_decay": 0.1} | optimiser
        cfg = config.Config(
            optim=config.OptimConfig(**options),
            model=config.ModelConfig(freeze_encoder_steps=freeze_encoder_steps),
            train=config.TrainConfig(mixed_precision=mixed_precision, zero_sharding=zero_sharding),
        )
        self.devices = parallel.Devices(jax.devices()[:devices])
        rule = experiment.rule(cfg, 40)
        rng = np.random.default_rng(0)
        params = {path: rng.standard_normal(s, np.float32) for path, s in SHAPES.items()}
        fresh = experiment.fresh_state(
            cfg,
            Wav2Vec2Config(),
            flax.traverse_util.unflatten_dict(params, sep="/"),
            rule.optimiser,
        )
        self.layout = experiment.layout(cfg, fresh, devices)
        self.shapes = self.devices.placed_shapes(fresh, self.layout.state)
        self.state = self.devices.place(jax.device_get(fresh), self.layout.state)
        sums = self.devices.sum_shapes(self.shapes.trainable)
        update = parallel.update(rule, self.devices, self.layout)
        self.update = update.compile(self.shapes, sums)

    def run(self, first: int, last: int, bad: int | None = None) -> list[step.Metrics]:
        """Updates of these numbers, one of them with a gradient that is not finite."""
        return [self._one(number, number == bad) for number in range(first, last)]

    def _one(self, number: int, bad: bool) -> step.Metrics:
        count, clips = self.devices.count, 12.0
        zero = jax.device_get(self.devices.zero_sums(self.state.trainable))
        scale = float(self.state.loss_scale.value)
        gradients = {}
        for path, value in self.params.items():
            # The same sum over the devices, however many they are.
            rng = np.random.default_rng([number, len(path)])
            noise = rng.standard_normal((8, *value.shape), np.float32)
            noise = noise.reshape(count, 8 // count, *value.shape).sum(axis=1)
            gradients[path] = scale * (noise + clips / count * (value - np.sin(number)))
        if bad:
            gradients["lm_head/kernel"][-1, -1, -1] = np.inf
        made = zero.replace(
            gradients={path: g.astype(np.float32) for path, g in gradients.items()},
            loss=np.full(count, number / count, np.float32),
            clips=np.full(count, clips / count, np.float32),
        )
        self.state, _, metrics = self.update(self.state, self.devices.split(made))
        return jax.device_get(metrics)

    @property
    def params(self) -> dict[str, np.ndarray]:
        return jax.device_get(self.state.trainable)

    @property
    def whole(self) -> dict[str, np.ndarray]:
        """Every array of the state by name, in the shape that it has where nothing is cut."""
        named = {}
        for (path, leaf), axis in zip(
            jax.tree_util.tree_leaves_with_path(self.state),
            jax.tree.leaves(self.layout.state, is_leaf=lambda axis: axis is None),
            strict=True,
        ):
            array = np.asarray(leaf)
            if axis is not None:
                assert array.shape[axis] == self.devices.count
                array = np.concatenate(np.moveaxis(array, axis, 0), axis=axis)
            named[jax.tree_util.keystr(path)] = array
        return named
