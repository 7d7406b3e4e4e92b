"""Checkpoints: the whole state and what is needed to understand it. The only file that names orbax.

`RUN/checkpoints/STEP` holds the arrays (orbax), `meta` (our JSON) and `seal.json`: size and sha256
of every file, written after orbax has committed. orbax commits atomically but does not notice a
flipped bit; a checkpoint whose seal is missing or does not hold is not used.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import preservation_policy
from transformers import Wav2Vec2Config

from flax_asr import config, errors
from flax_asr import vocabulary as vocabularies

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
SEAL = "seal.json"


@dataclass(frozen=True)
class Meta:
    """What stands beside the arrays.

    Attributes:
        step: updates done.
        run: the configuration, as `config.as_dict` gives it.
        model_config: `Wav2Vec2Config.to_dict()`.
        vocabulary: `Vocabulary.to_json()`.
        normalization: the resolved steps.
        do_normalize: whether clips are brought to zero mean and unit variance.
        use_attention_mask: whether the model is told where clips end.
        group_rows: rows of a batch group over all devices; fixed when the run starts.
        facts: what the card says about data and origin.
        metrics: the scores of this step, empty where it was not scored.
        window: figures since the last line of the log.
    """

    step: int
    run: dict[str, Any]
    model_config: dict[str, Any]
    vocabulary: str
    normalization: Any
    do_normalize: bool
    use_attention_mask: bool
    group_rows: int
    facts: dict[str, Any]
    metrics: dict[str, float]
    window: dict[str, Any]


@dataclass(frozen=True)
class SavedModel:
    """The model of one checkpoint, on the host."""

    model_config: Wav2Vec2Config
    params: PyTree
    vocabulary: vocabularies.Vocabulary
    meta: Meta

    @property
    def normalization(self) -> Any:
        return self.meta.normalization

    @property
    def language(self) -> str:
        return self.meta.run["data"]["language"]

    @property
    def step(self) -> int:
        return self.meta.step

    @property
    def metrics(self) -> dict[str, float]:
        return self.meta.metrics


class Checkpoints:
    """The checkpoints of one run: the latest ones and the best one are kept.

    Args:
        run: the run folder.
        keep: how many of the latest.
        metric: the score that says which is best; lower is better.
    """

    def __init__(self, run: Path, keep: int, metric: str):
        self._folder = run / FOLDER
        self._metric = f"eval_{metric}"
        self._seal: threading.Thread | None = None
        self._failure: BaseException | None = None

        def score(metrics):
            return metrics[self._metric]

        self._manager = ocp.CheckpointManager(
            self._folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(
                    [
                        preservation_policy.LatestN(keep),
                        preservation_policy.BestN(get_metric_fn=score, reverse=True, n=1),
                    ]
                ),
                best_fn=score,
                best_mode="min",
                create=True,
            ),
            item_names=("state", "meta"),
        )

    def save(self, state: PyTree, meta: Meta) -> None:
        """Begins to save; returns as soon as the state is on the host."""
        self.wait()
        self._manager.save(
            meta.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(flax.serialization.to_state_dict(state)),
                meta=ocp.args.JsonSave(dataclasses.asdict(meta)),
            ),
            metrics=meta.metrics or None,
            force=True,
        )
        self._seal = threading.Thread(target=self._finish, args=(meta.step,), daemon=True)
        self._seal.start()

    def wait(self) -> None:
        """Returns when what was begun is on the disk and sealed.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._seal is not None:
            self._seal.join()
            self._seal = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise errors.CheckpointError(
                f"cannot write a checkpoint in {self._folder}: {failure}. Free some space or mend"
                " the folder, then run the same command again."
            ) from failure

    def restore(self, step: int, state: PyTree) -> PyTree:
        """The state of a step, placed as `state` is."""
        template = flax.serialization.to_state_dict(state)
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), template
        )
        _check_tree(self._manager.directory / str(step), shapes)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        )
        return flax.serialization.from_state_dict(state, restored["state"])

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                seal(self._folder / str(step))
        except (OSError, ValueError, RuntimeError) as error:
            self._failure = error


def seal(folder: Path) -> None:
    """Writes the sizes and hashes of a committed checkpoint, atomically."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    unfinished = folder / (SEAL + ".unfinished")
    unfinished.write_text(json.dumps(files, indent=1))
    unfinished.replace(folder / SEAL)


def verify(folder: Path) -> None:
    """Raises `CheckpointError` naming the first file that is not as it was sealed."""
    try:
        files = json.loads((folder / SEAL).read_text())
    except (OSError, ValueError) as error:
        raise errors.CheckpointError(f"{folder / SEAL} cannot be read: {error}") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise errors.CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise errors.CheckpointError(
                f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            )
        if _sha256(path) != expected["sha256"]:
            raise errors.CheckpointError(f"{path} has changed since it was written (sha256)")


def steps(run: Path) -> list[int]:
    """The steps that were saved, newest first, sound or not."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)


def newest_sound(run: Path) -> int | None:
    """The newest step whose seal holds; damaged ones are named in the log and set aside.

    Raises:
        CheckpointError: there are checkpoints, and none is sound.
    """
    problems = []
    for step in steps(run):
        try:
            verify(run / FOLDER / str(step))
        except errors.CheckpointError as error:
            problems.append(str(error))
            logger.warning("the checkpoint of step %d is not used: %s", step, error)
        else:
            set_aside(run, newer_than=step)
            return step
    if problems:
        raise errors.CheckpointError(
            f"no checkpoint in {run / FOLDER} is sound: {'; '.join(problems)}. Begin again with"
            " --restart, or restore the folder from a copy."
        )
    return None


def set_aside(run: Path, newer_than: int) -> None:
    """Moves newer, unsound checkpoints out of the way: the run will write these steps again."""
    for step in steps(run):
        if step > newer_than:
            damaged = run / FOLDER / f"damaged-{step}"
            shutil.rmtree(damaged, ignore_errors=True)
            (run / FOLDER / str(step)).rename(damaged)


def is_run(folder: Path) -> bool:
    """Whether this is a run folder with checkpoints."""
    return (folder / "config.yaml").is_file() and bool(steps(folder))


def read_meta(run: Path, step: int) -> Meta:
    """What stands beside the arrays of a step."""
    path = run / FOLDER / str(step) / "meta" / "metadata"
    try:
        return Meta(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise errors.CheckpointError(f"{path} cannot be read: {error}") from error


def best_step(run: Path) -> int:
    """The step with the lowest score; the newest one where none was scored."""
    scored = []
    for step in steps(run):
        meta = read_meta(run, step)
        name = f"eval_{meta.run['train']['metric_for_best_model']}"
        if name in meta.metrics:
            scored.append((meta.metrics[name], step))
    if scored:
        return min(scored)[1]
    if not steps(run):
        raise errors.CheckpointError(f"there is no checkpoint in {run / FOLDER}.")
    return steps(run)[0]


def load_model(run: Path, step: int | None = None) -> SavedModel:
    """The model of a checkpoint, by default of the best one.

    Raises:
        CheckpointError: there is no such step, or its files are damaged.
    """
    saved = steps(run)
    if step is None:
        step = best_step(run)
    elif step not in saved:
        raise errors.CheckpointError(
            f"{run} has no checkpoint of step {step}: it has {', '.join(map(str, saved))}."
        )
    folder = run / FOLDER / str(step)
    verify(folder)
    meta = read_meta(run, step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata((folder / "state").absolute()).item_metadata.tree
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored
        )
        state = checkpointer.restore((folder / "state").absolute(), shapes)
    flat = {**state["trainable"], **state["frozen"]}
    params = flax.traverse_util.unflatten_dict(
        {path: np.asarray(leaf) for path, leaf in flat.items()}, sep="/"
    )
    return SavedModel(
        model_config=Wav2Vec2Config(**meta.model_config),
        params=params,
        vocabulary=vocabularies.Vocabulary.from_json(meta.vocabulary),
        meta=meta,
    )


def meta_config(meta: Meta) -> config.Config:
    """The configuration that a checkpoint was made with."""
    return config.build(meta.run)


def _check_tree(folder: Path, shapes: PyTree) -> None:
    """Refuses a checkpoint of another architecture, vocabulary or optimiser; names the difference."""
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder / "state").item_metadata.tree

    def flat(tree):
        return {
            "/".join(str(getattr(k, "key", k)) for k in path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    ours, theirs = flat(shapes), flat(stored)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise errors.CheckpointError(
                f"{folder} is of another model: {name} is {theirs.get(name, 'absent')} there and"
                f" {ours.get(name, 'absent')} here. Use another output_dir, or --restart."
            )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
