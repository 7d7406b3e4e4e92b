"""Export of a checkpoint as a folder for PyTorch and transformers, verified before it is kept."""

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree
from transformers import Wav2Vec2Config

from flax_asr import (
    atomic,
    audio,
    card,
    checkpoint,
    config,
    errors,
    inventory,
    json_object,
    run_folder,
    torch_logits,
    vocabulary,
)
from flax_asr.bucket import copies, store
from flax_asr.console import terminal
from flax_asr.hosts import cluster
from flax_asr.models import convert, wav2vec2, weights
from flax_asr.record import lineage, runlog

TOLERANCE = 1e-4
"""Largest allowed difference between a logit and PyTorch's: absolute, or relative above 1."""


@dataclass(frozen=True)
class Verification:
    """Result of comparing an export with its checkpoint.

    Attributes:
        tensors: number of tensors that were read back bit for bit.
        logits: the largest difference to PyTorch's logits; None if torch is not installed.
    """

    tensors: int
    logits: float | None

    def __str__(self) -> str:
        read = f"{self.tensors} tensors read back bit for bit"
        if self.logits is None:
            return f"{read}; torch is not installed, so logits were not compared"
        return f"{read}; logits in PyTorch differ by at most {self.logits:.1e}"


def command(run: str, out: str, step: int | None = None) -> None:
    """`flax-asr export`: exports a run's best checkpoint, or that of a step, to a folder.

    Raises:
        CheckpointError: there is no such run or step.
        ModelError: the folder holds something else, or the export fails its verification.
        ConfigError: JAX cannot use its devices.
    """
    folder = copies.model(run, step) if store.is_remote(run) else Path(run)
    if not inventory.is_run(folder):
        raise errors.CheckpointError(
            f"{run} is not a run folder with checkpoints: give the output_dir of `flax-asr train`."
        )
    target = Path(out)
    foreign = target.exists() and not (target / lineage.FILE).is_file()
    if foreign and (not target.is_dir() or any(target.iterdir())):
        raise errors.ModelError(f"{out} holds something else: name a new folder.")
    cluster.devices()
    saved = checkpoint.load_model(folder, step)
    name = run.rstrip("/").rpartition("/")[2] if store.is_remote(run) else folder.resolve().name
    described = card.render(name, saved, runlog.read(folder), is_export=True)
    run_config = inventory.meta_config(saved.meta)
    done = write_folder(target, saved, run_config, saved.meta.facts, described)
    terminal.show(f"step {saved.step} of {run} is in {out}: {done}")


def write_folder(
    folder: Path,
    saved: checkpoint.SavedModel,
    run: config.Config,
    facts: Mapping[str, Any],
    described: str | None = None,
) -> Verification:
    """Writes a temporary folder, verifies it, and renames it.

    Args:
        folder: the final path.
        saved: the checkpoint.
        run: the configuration of its run.
        facts: data and origin of the run, for flax_asr.json.
        described: the model card, which the hub shows as README.md.

    Raises:
        ModelError: it cannot be written, or differs from the checkpoint.
    """
    # A link is kept and its target replaced; the temporary folder is beside the target, as that
    # may be on another disk.
    folder = folder.resolve()
    model_config = _config(saved)
    unfinished = atomic.unfinished(folder, shared=True)
    try:
        unfinished.mkdir(parents=True)
        model_config.to_json_file(unfinished / "config.json", use_diff=False)
        weights.write(unfinished, convert.torch_from_params(saved.params, model_config))
        saved.vocabulary.write(unfinished)
        _write_json(unfinished / "preprocessor_config.json", _preprocessor(saved.meta))
        _write_json(unfinished / lineage.FILE, _facts(saved, run, facts))
        if described is not None:
            (unfinished / run_folder.CARD).write_text(described, encoding="utf-8")
        done = _verify(unfinished, saved, model_config)
        _replace(unfinished, folder)
    except OSError as error:
        raise errors.ModelError(f"{folder} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return done


def _config(saved: checkpoint.SavedModel) -> Wav2Vec2Config:
    found = saved.vocabulary
    return Wav2Vec2Config(
        **saved.model_config.to_dict()
        | {
            "architectures": ["Wav2Vec2ForCTC"],
            "vocab_size": found.size,
            "pad_token_id": found.blank,
            "bos_token_id": found.bos,
            "eos_token_id": found.eos,
            "dtype": "float32",
        }
    )


def _preprocessor(meta: inventory.Meta) -> dict[str, Any]:
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": audio.SAMPLE_RATE_HZ,
        "padding_side": "right",
        "padding_value": 0.0,
        "do_normalize": meta.do_normalize,
        "return_attention_mask": meta.use_attention_mask,
    }


def _facts(
    saved: checkpoint.SavedModel, run: config.Config, facts: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        **facts,
        "language": run.data.language,
        "normalization": saved.normalization,
        "step": saved.step,
        "metrics": saved.metrics,
        "versions": card.versions(),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    written = json.dumps(json_object.readable(content), ensure_ascii=False, indent=2)
    path.write_text(written + "\n", encoding="utf-8")


def _replace(unfinished: Path, folder: Path) -> None:
    """Two renames: a kill between them leaves complete folders, never half of one."""
    for path in unfinished.iterdir():
        atomic.sync(path)
    old = unfinished.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    try:
        unfinished.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    atomic.sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _verify(
    folder: Path, saved: checkpoint.SavedModel, model_config: Wav2Vec2Config
) -> Verification:
    """Reads everything back and compares it with the checkpoint.

    Raises:
        ModelError: something differs; names it.
    """
    reread_config = Wav2Vec2Config.from_json_file(folder / "config.json")
    if reread_config.to_dict() != model_config.to_dict():
        raise _different("config.json")
    if vocabulary.Vocabulary.from_folder(folder) != saved.vocabulary:
        raise _different("the vocabulary")
    tensors = weights.read(folder)
    reread = flax.traverse_util.flatten_dict(
        convert.params_from_torch(tensors, reread_config, head=True), sep="/"
    )
    ours = flax.traverse_util.flatten_dict(saved.params, sep="/")
    if not any(name.endswith(convert.MASK_EMBEDDING) for name in tensors):
        # torch's class has no such vector for models trained without masks.
        for parameters in (reread, ours):
            del parameters[f"wav2vec2/{convert.MASK_EMBEDDING}"]
    for name in sorted(ours.keys() | reread.keys()):
        if name not in ours or name not in reread or not _equal(ours[name], reread[name]):
            raise _different(f"the parameter {name}")
    return Verification(
        tensors=len(tensors), logits=_compare_logits(folder, saved.params, reread_config)
    )


def _equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    # As bytes: NaN then equals itself, and minus zero differs from zero.
    ours = np.ascontiguousarray(ours, np.float32)
    return ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def _different(what: str) -> errors.ModelError:
    return errors.ModelError(
        f"the exported folder is not kept: {what} read back differs from the checkpoint. The disk"
        " may be at fault; run `flax-asr export` again."
    )


def _compare_logits(folder: Path, params: PyTree, model_config: Wav2Vec2Config) -> float | None:
    """The largest difference from PyTorch's logits on noise, fp32 on the CPU; None without torch.

    Raises:
        ModelError: it is above the tolerance.
    """
    if not _torch_is_installed():
        return None
    samples, lengths = _noise()
    ours = _jax_logits(params, model_config, samples, lengths)
    theirs = torch_logits.of(folder, samples, lengths)
    frames = wav2vec2.frame_lengths(model_config, lengths)
    real = np.arange(ours.shape[1]) < frames[:, None]
    differences = np.abs(ours - theirs)[real]
    difference = float(differences.max())
    # Each logit has its own tolerance, as one large logit must not excuse the others. NaN fails.
    if not (differences <= TOLERANCE * np.maximum(1.0, np.abs(theirs[real]))).all():
        raise errors.ModelError(
            f"the exported folder is not kept: its logits in PyTorch differ by {difference:.2e}."
            " Please report this, with the versions of transformers and torch."
        )
    return difference


def _torch_is_installed() -> bool:
    # Not find_spec, as the commands keep torch out of their own process.
    try:
        importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _noise() -> tuple[Float[np.ndarray, "batch samples"], Int[np.ndarray, " batch"]]:
    rng = np.random.default_rng(0)
    lengths = np.array([16_000, 11_111])
    samples = rng.standard_normal((2, 16_000)).astype(np.float32)
    return samples * (np.arange(16_000) < lengths[:, None]), lengths


def _jax_logits(
    params: PyTree,
    model_config: Wav2Vec2Config,
    samples: Float[np.ndarray, "batch samples"],
    lengths: Int[np.ndarray, " batch"],
) -> Float[np.ndarray, "batch frames vocab"]:
    module = wav2vec2.Wav2Vec2ForCTCModule(model_config, dtype=jnp.float32, platform="cpu")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(
            jax.jit(module.apply)(
                {"params": params}, samples, np.arange(samples.shape[1]) < lengths[:, None]
            ).logits
        )
