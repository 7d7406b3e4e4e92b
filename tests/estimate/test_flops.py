"""The analytic count of operations, against XLA's own count of an unrolled model."""

import functools

import jax
import jax.numpy as jnp
import pytest
from transformers import Wav2Vec2Config

from flax_asr import config as configuration
from flax_asr import optim
from flax_asr import step as steps
from flax_asr.estimate import flops
from flax_asr.models import positional, wav2vec2

ROWS, FRAMES = 2, 144


def model(**changes) -> Wav2Vec2Config:
    # wide enough for products to outweigh everything else that XLA counts
    sizes = {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "conv_dim": (192,) * 3,
        "conv_kernel": (10, 8, 4),
        "conv_stride": (5, 8, 8),
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "vocab_size": 512,
    }
    quiet = dict.fromkeys(
        "hidden_dropout attention_dropout activation_dropout feat_proj_dropout final_dropout"
        " layerdrop".split(),
        0.0,
    )
    return Wav2Vec2Config(**{**sizes, **quiet, **changes})


SAMPLES = 5 * (8 * (8 * (FRAMES - 1) + 4 - 1) + 8 - 1) + 10


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """The positional convolution as accelerators run it; the form for CPUs is another sum."""
    monkeypatch.setattr(positional, "grouped_convolution", positional.direct_convolution)


def xla_count(config, is_trained=None) -> float:
    """What XLA counts in a forward pass, or in a gradient of what is trained."""
    module = wav2vec2.Wav2Vec2ForCTCModule(config)
    audio = jax.ShapeDtypeStruct((ROWS, SAMPLES), jnp.float32)
    params = jax.eval_shape(lambda a: module.init(jax.random.key(0), a), audio)["params"]
    trained, frozen = steps.split(params, is_trained or (lambda path: True))

    def loss(trained, frozen, audio):
        logits = module.apply({"params": steps.merge(trained, frozen)}, audio).logits
        return jnp.square(logits).sum()  # a plain sum has a gradient that XLA simplifies

    function = loss if is_trained is None else jax.grad(loss)
    compiled = jax.jit(function).lower(trained, frozen, audio).compile()
    return compiled.cost_analysis()["flops"]


def trainable(**options):
    return optim.trainable(configuration.ModelConfig(**options), model())


def total(counted) -> int:
    return sum(counted.values())


def test_the_shape_is_what_the_count_assumes():
    assert wav2vec2.frame_lengths(model(), SAMPLES) == FRAMES


def test_a_forward_pass_has_the_operations_that_xla_counts():
    assert total(flops.forward(model(), ROWS, SAMPLES)) == pytest.approx(
        xla_count(model()), rel=0.06
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze_feature_encoder": False},
        {"trainable_layers": 1},
        {"trainable_layers": 0},
    ],
    ids=str,
)
def test_a_gradient_has_the_operations_that_xla_counts(options):
    is_trained = trainable(**options)
    ours = total(flops.gradient(model(), ROWS, SAMPLES, is_trained))
    assert ours == pytest.approx(xla_count(model(), is_trained), rel=0.06)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("feed-forward", {"intermediate_size": 2048}),
        ("head", {"vocab_size": 4096}),
        ("positional convolution", {"num_conv_pos_embedding_groups": 1}),
    ],
)
def test_each_part_grows_as_xla_says(part, changes):
    count = functools.partial(flops.gradient, rows=ROWS, samples=SAMPLES, is_trained=trainable())
    before, after = count(model()), count(model(**changes))
    assert {name for name in after if after[name] != before[name]} == {part}
    grown = xla_count(model(**changes), trainable()) - xla_count(model(), trainable())
    assert after[part] - before[part] == pytest.approx(grown, rel=0.06)


def test_a_frozen_feature_encoder_is_not_differentiated():
    frozen = flops.gradient(model(), ROWS, SAMPLES, trainable())
    assert frozen["feature encoder"] == flops.forward(model(), ROWS, SAMPLES)["feature encoder"]


def test_xls_r_300m_costs_what_is_known_of_it():
    """Another count, of the same work in another implementation, is 8.7e12."""
    config = Wav2Vec2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        vocab_size=4000,
    )
    counted = total(flops.gradient(config, 8, 160_000, trainable()))
    assert counted == pytest.approx(8.7e12, rel=0.03)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_a_batch_with_layers_behind_it_costs_what_is_above_them(trained):
    config = model()
    is_trained = optim.trainable(configuration.ModelConfig(trainable_layers=trained), config)
    lower = config.num_hidden_layers - trained
    whole = flops.gradient(config, 2, 4000, is_trained)
    above = flops.gradient(config, 2, 4000, is_trained, lower)
    forward = flops.forward(config, 2, 4000)
    layers = "attention", "attention projections", "feed-forward"
    for part in whole:
        share = lower / config.num_hidden_layers if part in layers else part != "head"
        assert whole[part] - above.get(part, 0) == share * forward[part], part
