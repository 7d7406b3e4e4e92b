"""`python -m flax_asr.torch_logits FOLDER INPUT.npz OUTPUT.npy`: PyTorch's logits of an export.

A separate process, as training needs no torch, and the two would compete for cores and memory.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

import flax_asr
from flax_asr import errors


def of(
    folder: Path, samples: Float[np.ndarray, "batch samples"], lengths: Int[np.ndarray, " batch"]
) -> Float[np.ndarray, "batch frames vocab"]:
    """Logits of transformers' Wav2Vec2ForCTC in fp32 on the CPU; torch must be installed.

    Raises:
        ModelError: PyTorch cannot load or run the folder; the message has its last line.
    """
    root = str(Path(flax_asr.__file__).parent.parent)
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "input.npz", Path(scratch) / "logits.npy"
        np.savez(given, samples=samples, lengths=lengths)
        done = subprocess.run(
            [sys.executable, "-m", "flax_asr.torch_logits", str(folder), str(given), str(made)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise errors.ModelError(
                f"PyTorch cannot run {folder}: {' '.join(done.stderr.split()[-40:])}"
            )
        return np.load(made, allow_pickle=False)


def _main(folder: str, given: str, made: str) -> None:
    import torch
    import transformers

    inputs = np.load(given, allow_pickle=False)
    samples, lengths = inputs["samples"], inputs["lengths"]
    mask = np.arange(samples.shape[1]) < lengths[:, None]
    with torch.inference_mode():
        model = transformers.Wav2Vec2ForCTC.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        logits = model(torch.tensor(samples), torch.tensor(mask.astype(np.int64))).logits
    np.save(made, logits.numpy(), allow_pickle=False)


if __name__ == "__main__":
    _main(*sys.argv[1:])
