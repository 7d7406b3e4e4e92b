"""Small torch models of every supported architecture: the oracles of the tests in this folder."""

import torch
import transformers

ARCHITECTURES = {
    "xls-r": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False},
    "layer-post": {"feat_extract_norm": "layer", "do_stable_layer_norm": False, "conv_bias": False},
    "group-stable": {"feat_extract_norm": "group", "do_stable_layer_norm": True, "conv_bias": True},
}


def config(architecture: str = "xls-r", **changes) -> transformers.Wav2Vec2Config:
    """No two sizes are equal, so that a transposed or swapped tensor cannot fit by chance."""
    return transformers.Wav2Vec2Config(
        **{
            "vocab_size": 11,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "conv_dim": [6, 10, 14],
            "conv_kernel": [10, 3, 2],
            "conv_stride": [5, 2, 2],
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 3,
            "codevector_dim": 8,
            "proj_codevector_dim": 8,
            "num_codevectors_per_group": 5,
            "pad_token_id": 0,
            **ARCHITECTURES[architecture],
            **changes,
        }
    )


def model(name: str, config: transformers.Wav2Vec2Config, seed: int = 0) -> torch.nn.Module:
    """transformers' torch class `name`, every parameter random (biases and norms too)."""
    torch.manual_seed(seed)
    built = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


def tensors(built: torch.nn.Module) -> dict:
    return {key: value.numpy() for key, value in built.state_dict().items()}
