"""Conversion between Hugging Face's tensors and our parameter tree: names and layouts.

The tree is that of the Flax classes that transformers 4 had: `wav2vec2/encoder/layers/0/attention/
q_proj/kernel`. A linear kernel is torch's weight transposed, a convolution kernel is torch's weight
with its axes reversed; the weight-normed positional convolution keeps torch's layout. Only layouts
change, not values, so torch -> ours -> torch is exact to the bit.

Source: transformers, models/wav2vec2/modeling_wav2vec2.py (names and shapes on torch's side) and
modeling_flax_wav2vec2.py of its version 4.57 (ours).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flax_asr import errors

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config

Tree = dict[str, Any]

PREFIX = "wav2vec2."
MASK_EMBEDDING = "masked_spec_embed"
POSITIONAL = "encoder.pos_conv_embed.conv."

# The positional convolution's weight norm: torch.nn.utils.weight_norm's names before the
# parametrizations of torch 2 and after them.
OLD_WEIGHT_NORM = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}

# What Wav2Vec2ForPreTraining has besides the encoder, not needed for fine-tuning.
PRETRAINING_ONLY = ("quantizer.", "project_q.", "project_hid.")

# What classifiers have besides the encoder (Wav2Vec2ForSequenceClassification, ...ForXVector and
# ...ForAudioFrameClassification), whose names all begin with PREFIX there.
CLASSIFIERS_ONLY = (
    "classifier.",
    "projector.",
    "layer_weights",
    "tdnn.",
    "feature_extractor.",
    "objective.",
)

_OF_FAIRSEQ = (".self_attn.", "w2v_encoder.", "w2v_model.")

_logger = logging.getLogger("flax_asr")


class _Parameter(NamedTuple):
    """One tensor on both sides.

    `axes` is the permutation between the two layouts, which is its own inverse in every case.
    """

    torch_name: str
    path: tuple[str, ...]
    torch_shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.torch_shape[axis] for axis in self.axes)


def _parameter(module: str, ours: str, torch_name: str, shape: tuple[int, ...]) -> _Parameter:
    axes = tuple(reversed(range(len(shape)))) if ours == "kernel" else tuple(range(len(shape)))
    return _Parameter(f"{module}.{torch_name}", (*module.split("."), ours), shape, axes)


def _linear(module: str, inputs: int, outputs: int) -> Iterator[_Parameter]:
    yield _parameter(module, "kernel", "weight", (outputs, inputs))
    yield _parameter(module, "bias", "bias", (outputs,))


def _norm(module: str, features: int) -> Iterator[_Parameter]:
    yield _parameter(module, "scale", "weight", (features,))
    yield _parameter(module, "bias", "bias", (features,))


def _feature_extractor(config: "Wav2Vec2Config") -> Iterator[_Parameter]:
    inputs = 1
    for layer, (features, kernel) in enumerate(
        zip(config.conv_dim, config.conv_kernel, strict=True)
    ):
        name = f"feature_extractor.conv_layers.{layer}"
        yield _parameter(f"{name}.conv", "kernel", "weight", (features, inputs, kernel))
        if config.conv_bias:
            yield _parameter(f"{name}.conv", "bias", "bias", (features,))
        # Group-norm encoders normalise after their first convolution only.
        if config.feat_extract_norm == "layer" or layer == 0:
            yield from _norm(f"{name}.layer_norm", features)
        inputs = features


def _encoder_layer(config: "Wav2Vec2Config", name: str) -> Iterator[_Parameter]:
    hidden = config.hidden_size
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _linear(f"{name}.attention.{projection}", hidden, hidden)
    yield from _norm(f"{name}.layer_norm", hidden)
    dense = f"{name}.feed_forward"
    yield from _linear(f"{dense}.intermediate_dense", hidden, config.intermediate_size)
    yield from _linear(f"{dense}.output_dense", config.intermediate_size, hidden)
    yield from _norm(f"{name}.final_layer_norm", hidden)


def _encoder(config: "Wav2Vec2Config") -> Iterator[_Parameter]:
    """Every tensor of a Wav2Vec2Model, with names without the prefix `wav2vec2.`."""
    hidden = config.hidden_size
    yield _Parameter(MASK_EMBEDDING, (MASK_EMBEDDING,), (hidden,), (0,))
    yield from _feature_extractor(config)
    yield from _norm("feature_projection.layer_norm", config.conv_dim[-1])
    yield from _linear("feature_projection.projection", config.conv_dim[-1], hidden)

    taps, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
    conv = POSITIONAL.removesuffix(".")
    yield _parameter(conv, "bias", "bias", (hidden,))
    yield _parameter(conv, "weight_g", OLD_WEIGHT_NORM["weight_g"], (1, 1, taps))
    weight_v = (hidden, hidden // groups, taps)
    yield _parameter(conv, "weight_v", OLD_WEIGHT_NORM["weight_v"], weight_v)

    yield from _norm("encoder.layer_norm", hidden)
    for layer in range(config.num_hidden_layers):
        yield from _encoder_layer(config, f"encoder.layers.{layer}")


def _parameters(config: "Wav2Vec2Config", *, head: bool) -> list[_Parameter]:
    """Every tensor of Wav2Vec2ForCTC (`head`) or of Wav2Vec2Model."""
    encoder = list(_encoder(config))
    if not head:
        return encoder
    nested = [
        _Parameter(PREFIX + entry.torch_name, ("wav2vec2", *entry.path), *entry[2:])
        for entry in encoder
    ]
    return [*nested, *_linear("lm_head", config.hidden_size, config.vocab_size)]


def shapes(config: "Wav2Vec2Config", *, head: bool) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path in our tree -> shape, for every parameter of the model that `config` describes."""
    return {entry.path: entry.shape for entry in _parameters(config, head=head)}


def has_head(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a checkpoint carries a CTC head; encoders and pre-training checkpoints do not."""
    return "lm_head.weight" in tensors


def _canonical_name(name: str, *, prefixed: bool) -> str:
    """The name that transformers 5 gives this tensor in Wav2Vec2ForCTC."""
    if not prefixed and not name.startswith(("lm_head.", *PRETRAINING_ONLY)):
        name = PREFIX + name
    positional = PREFIX + POSITIONAL
    if name.startswith(positional):
        last = name.removeprefix(positional)
        name = positional + OLD_WEIGHT_NORM.get(last, last)
    return name


def _canonical(tensors: Mapping[str, np.ndarray], *, head: bool) -> dict[str, np.ndarray]:
    """The tensors that a model needs, with or without `head`, under Wav2Vec2ForCTC's names."""
    prefixed = any(name.startswith(PREFIX) for name in tensors)
    unwanted = (*PRETRAINING_ONLY, *CLASSIFIERS_ONLY, *(() if head else ("lm_head.",)))
    result = {}
    for name, tensor in tensors.items():
        canonical = _canonical_name(name, prefixed=prefixed)
        if canonical.startswith(unwanted):
            continue
        if canonical in result:
            raise errors.ModelError(f"The checkpoint has the tensor {name!r} under two names.")
        result[canonical] = tensor
    return result


def _fresh_mask_embedding(config: "Wav2Vec2Config") -> np.ndarray:
    """Uniform in [0, 1), as in torch's class, but always the same numbers."""
    masks = config.apply_spec_augment and max(config.mask_time_prob, config.mask_feature_prob) > 0
    _logger.log(
        logging.WARNING if masks else logging.DEBUG,
        "The checkpoint has no %s (the vector for masked frames): it starts from random numbers.",
        MASK_EMBEDDING,
    )
    return np.random.default_rng(0).uniform(size=config.hidden_size).astype(np.float32)


def _check(name: str, tensor: np.ndarray, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise errors.ModelError(
            f"The tensor {name!r} has shape {tuple(tensor.shape)} in the checkpoint, but "
            f"{expected} by its configuration (config.json and model.config)."
        )
    # ml_dtypes' bfloat16 has the kind "V": only its name says that it is a float.
    if "float" not in tensor.dtype.name:
        raise errors.ModelError(
            f"The tensor {name!r} holds {tensor.dtype.name}, not floating-point numbers: "
            "quantised checkpoints are not supported."
        )


def _listed(names: list[str]) -> str:
    # repr: a name from a file may contain control characters.
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _refuse_differences(present: set[str], expected: set[str], what: str) -> None:
    missing, left_over = sorted(expected - present), sorted(present - expected)
    if missing or left_over:
        parts = [f"missing: {_listed(missing)}"] if missing else []
        parts += [f"left over: {_listed(left_over)}"] if left_over else []
        raise errors.ModelError(
            f"{what} not those that the configuration (config.json and model.config) describes; "
            f"{'; '.join(parts)}."
        )


def params_from_torch(
    tensors: Mapping[str, np.ndarray], config: "Wav2Vec2Config", *, head: bool
) -> Tree:
    """Our parameter tree, float32, from a Hugging Face checkpoint's tensors.

    Accepts the names of Wav2Vec2Model, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining and transformers'
    classifiers, either spelling of the weight norm, and any float type. Drops a stored head without
    `head`, and always what only pre-training or classification needs. A missing
    `masked_spec_embed` is drawn at random, and the log says so.

    Raises:
        ModelError: a tensor is missing, left over, of the wrong shape, or not of floats.
    """
    entries = _parameters(config, head=head)
    found = _canonical(tensors, head=head)
    if any(mark in name for name in found for mark in _OF_FAIRSEQ):
        raise errors.ModelError(
            "The checkpoint's tensors have fairseq's names: convert it with transformers' "
            "convert_wav2vec2_original_pytorch_checkpoint_to_pytorch.py and give what that writes."
        )
    prefix, mask_embedding = "" if head else PREFIX, PREFIX + MASK_EMBEDDING
    expected = {prefix + entry.torch_name for entry in entries}
    _refuse_differences({*found, mask_embedding}, expected, "The checkpoint's tensors are")
    if mask_embedding not in found:
        found[mask_embedding] = _fresh_mask_embedding(config)

    params: Tree = {}
    for entry in entries:
        name = prefix + entry.torch_name
        _check(name, found[name], entry.torch_shape)
        branch = params
        for key in entry.path[:-1]:
            branch = branch.setdefault(key, {})
        # A copy: `tensors` may be views of a mapped file, which may change or go.
        branch[entry.path[-1]] = np.array(found[name].transpose(entry.axes), np.float32, order="C")
    return params


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def torch_from_params(params: Mapping[str, Any], config: "Wav2Vec2Config") -> dict[str, np.ndarray]:
    """Torch's tensors, contiguous and in the parameters' types, with transformers 5's names.

    The tree of a model with a head gives Wav2Vec2ForCTC's tensors, one without a head
    Wav2Vec2Model's. `masked_spec_embed` is written if torch's class has it: with a mask
    probability above zero.

    Raises:
        ModelError: a parameter is missing, left over or of the wrong shape.
    """
    head = "lm_head" in params
    entries = {entry.path: entry for entry in _parameters(config, head=head)}
    leaves = dict(_leaves(params))
    present, expected = ({"/".join(path) for path in paths} for paths in (leaves, entries))
    _refuse_differences(present, expected, "The parameters are")

    keeps_mask_embedding = config.mask_time_prob > 0 or config.mask_feature_prob > 0
    tensors = {}
    for path, entry in entries.items():
        if path[-1] == MASK_EMBEDDING and not keeps_mask_embedding:
            continue
        values = np.asarray(leaves[path])
        _check("/".join(path), values, entry.shape)
        # safetensors writes the buffer as it is in memory: a view would be scrambled.
        tensors[entry.torch_name] = np.ascontiguousarray(values.transpose(entry.axes))
    return tensors


def torch_names(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A transformers 4 Flax checkpoint's tensors under torch's names and layouts, unchecked."""
    tensors = {}
    for path, leaf in _leaves(tree):
        values = np.asarray(leaf)
        tensors[torch_name(path)] = values.transpose() if path[-1] == "kernel" else values
    return tensors


def torch_name(path: Sequence[str]) -> str:
    """Torch's name of the parameter with this path."""
    *parents, last = path
    return ".".join((*parents, "weight" if last in ("kernel", "scale") else last))
