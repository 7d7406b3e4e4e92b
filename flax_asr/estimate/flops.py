"""Floating-point operations of the model, counted from its configuration.

Only matrix products and convolutions count, two operations a multiply-add; what gradient
checkpointing computes a second time does not, as is usual for "share of peak". XLA's own count sees
the body of a loop once and no kernel at all. Oracle: XLA's count of an unrolled model,
tests/estimate/test_flops.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax_asr.models import wav2vec2


class Product(NamedTuple):
    """A matrix product or convolution of the forward pass, in the order of computation.

    `weight` is the path of its parameter, or None where both factors are activations. Layer norms
    are listed with no operations, as their parameters can need a gradient.
    """

    part: str
    flops: int
    weight: str | None


def products(config: Any, rows: int, samples: int) -> list[Product]:
    """All products of a forward pass over `rows` clips padded to `samples`.

    Args:
        config: a transformers.Wav2Vec2Config.
        rows: clips.
        samples: padded length at 16 kHz.
    """
    found: list[Product] = []
    times, channels = samples, 1
    for layer, (taps, stride, features) in enumerate(
        zip(config.conv_kernel, config.conv_stride, config.conv_dim, strict=True)
    ):
        times = (times - taps) // stride + 1
        path = f"wav2vec2/feature_extractor/conv_layers/{layer}/conv/kernel"
        flops = 2 * rows * times * taps * channels * features
        found.append(Product("feature encoder", flops, path))
        channels = features
    frames = int(wav2vec2.frame_lengths(config, samples))
    hidden, wide = config.hidden_size, config.intermediate_size
    tokens = rows * frames

    def dense(part: str, inputs: int, outputs: int, path: str) -> Product:
        return Product(part, 2 * tokens * inputs * outputs, path)

    def norm(path: str) -> Product:
        return Product("layer norms", 0, path)

    projection = "wav2vec2/feature_projection"
    found += [
        norm(f"{projection}/layer_norm/scale"),
        dense("feature projection", channels, hidden, f"{projection}/projection/kernel"),
    ]
    found.append(
        Product(
            "positional convolution",
            2
            * tokens
            * config.num_conv_pos_embeddings
            * hidden
            * (hidden // config.num_conv_pos_embedding_groups),
            "wav2vec2/encoder/pos_conv_embed/conv/weight_v",
        )
    )
    own_norm = norm("wav2vec2/encoder/layer_norm/scale")
    if not config.do_stable_layer_norm:
        found.append(own_norm)
    for layer in range(config.num_hidden_layers):
        path = f"wav2vec2/encoder/layers/{layer}"
        found += [
            norm(f"{path}/layer_norm/scale"),
            *(
                dense("attention projections", hidden, hidden, f"{path}/attention/{name}/kernel")
                for name in ("q_proj", "k_proj", "v_proj")
            ),
            Product("attention", 2 * 2 * tokens * frames * hidden, None),
            dense("attention projections", hidden, hidden, f"{path}/attention/out_proj/kernel"),
            norm(f"{path}/final_layer_norm/scale"),
            dense("feed-forward", hidden, wide, f"{path}/feed_forward/intermediate_dense/kernel"),
            dense("feed-forward", wide, hidden, f"{path}/feed_forward/output_dense/kernel"),
        ]
    if config.do_stable_layer_norm:
        found.append(own_norm)
    found.append(dense("head", hidden, config.vocab_size, "lm_head/kernel"))
    return found


def forward(config: Any, rows: int, samples: int) -> dict[str, int]:
    """Operations of a forward pass, by part of the model; arguments as in `products`."""
    return _by_part((product.part, product.flops) for product in products(config, rows, samples))


def gradient(
    config: Any,
    rows: int,
    samples: int,
    is_trained: Callable[[str], bool],
    lower_layers: int | None = None,
) -> dict[str, int]:
    """Operations of a forward and a backward pass, by part of the model.

    The gradient of a trained weight costs as much as its product, and so does that of an input
    below which something is trained.

    Args:
        config: a transformers.Wav2Vec2Config.
        rows: clips.
        samples: padded length at 16 kHz.
        is_trained: whether the parameter of this path gets a gradient.
        lower_layers: number of frozen layers whose cached output is the input; None: audio is.
    """
    counted = []
    reached = False  # whether something below this product is trained
    for product in _above(products(config, rows, samples), lower_layers):
        trained = product.weight is not None and is_trained(product.weight)
        factors = 2 * reached if product.weight is None else reached + trained
        counted.append((product.part, product.flops * (1 + factors)))
        reached = reached or trained
    return _by_part(counted)


def _above(found: list[Product], lower_layers: int | None) -> list[Product]:
    """The products above so many layers: above all of them, the head alone."""
    if lower_layers is None:
        return found
    layer = f"wav2vec2/encoder/layers/{lower_layers}/"
    starts = (n for n, product in enumerate(found) if (product.weight or "").startswith(layer))
    return found[next(starts, len(found) - 1) :]


def _by_part(counted) -> dict[str, int]:
    total: dict[str, int] = {}
    for part, flops in counted:
        if flops:
            total[part] = total.get(part, 0) + flops
    return total
