"""Fine-tune wav2vec 2.0 / XLS-R with CTC in JAX, and hand the result to PyTorch.

`import flax_asr` imports neither jax nor torch; the public names below load when first used.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "FlaxWav2Vec2ForCTC": "flax_asr.models.api",
    "FlaxWav2Vec2Model": "flax_asr.models.api",
    "ctc_loss": "flax_asr.ctc",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'flax_asr' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
