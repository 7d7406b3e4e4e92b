"""Checkpoints: the whole state and what is needed to understand it. The only file that names orbax.

`RUN/checkpoints/STEP` holds `state` (orbax), `meta.json` and `seal.json`. A checkpoint is written
under a hidden name, sealed, and only then renamed: what has a step's name was complete once. orbax
does not notice a flipped bit; the seal does, and what it does not hold for is not used.
"""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from transformers import Wav2Vec2Config

from flax_asr import config, errors, partition, seals
from flax_asr import vocabulary as vocabularies

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE, META = "state", "meta.json"
_UNFINISHED, _REPLACED, _DAMAGED = ".unfinished-", ".replaced-", "damaged-"
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)
"""What orbax and tensorstore raise where the disk is full or the folder is gone."""


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
        facts: what the card says about data and origin; `updates` of the whole run.
        metrics: the scores of this step, empty where it was not scored.
        window: figures since the last line of the log.
        log_events: how many events the log had.
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
    metrics: dict[str, float | str]
    window: dict[str, Any]
    log_events: int = 0


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
    def metrics(self) -> dict[str, float | str]:
        return self.meta.metrics


class Checkpoints:
    """Writes the checkpoints of one run and keeps the latest ones and the best one.

    Args:
        run: the run folder.
        keep: how many of the latest.
        writes: whether this host writes: the state is the same on all of them.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def __init__(self, run: Path, keep: int, writes: bool = True):
        self._run, self._folder, self._keep, self._writes = run, run / FOLDER, keep, writes
        self._publishing: threading.Thread | None = None
        self._failure: Exception | None = None
        if not writes:
            return
        try:
            self._folder.mkdir(exist_ok=True)
            for path in self._folder.iterdir():
                if path.name.startswith((_UNFINISHED, _REPLACED)):
                    shutil.rmtree(path)
        except OSError as error:
            raise self._cannot_write(error) from error
        # What fails is raised here as one message; orbax would print tracebacks of it as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._writer = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=_alone()),
            multiprocessing_options=_alone(),
        )

    def save(self, state: PyTree, meta: Meta) -> None:
        """Begins to save; returns as soon as the state is on the host.

        Args:
            state: of arrays that nothing is cut of, on the devices or the host.
            meta: what stands beside them.

        Raises:
            CheckpointError: this one or the one before cannot be written.
        """
        if not self._writes:
            return
        self.wait()
        unfinished = self._folder / f"{_UNFINISHED}{meta.step}"
        arrays = _on_host(flax.serialization.to_state_dict(state))
        try:
            unfinished.mkdir()
            content = json.dumps(dataclasses.asdict(meta), indent=1, default=str)
            (unfinished / META).write_text(content + "\n", encoding="utf-8")
            self._writer.save((unfinished / STATE).absolute(), args=ocp.args.StandardSave(arrays))
        except _WRITE_ERRORS as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise self._cannot_write(error) from error
        self._publishing = threading.Thread(target=self._publish, args=(meta.step,), daemon=True)
        self._publishing.start()

    def wait(self) -> None:
        """Returns when what was begun is on the disk under its name.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._publishing is not None:
            self._publishing.join()
        self.check()

    def check(self) -> None:
        """Raises what `wait` would, where that is known by now."""
        if self._publishing is not None and self._publishing.is_alive():
            return
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise self._cannot_write(failure) from failure

    def close(self) -> None:
        """Waits and lets go of orbax's threads."""
        try:
            self.wait()
        finally:
            if self._writes:
                self._writer.close()

    def _publish(self, step: int) -> None:
        unfinished, folder = self._folder / f"{_UNFINISHED}{step}", self._folder / str(step)
        try:
            self._writer.wait_until_finished()
            seals.write(unfinished)
            replaced = self._folder / f"{_REPLACED}{step}"
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
            for old in superfluous(steps(self._run), scores(self._run), self._keep):
                # Renamed first: half of a checkpoint never has a step's name.
                going = (self._folder / str(old)).rename(self._folder / f"{_REPLACED}{old}")
                shutil.rmtree(going)
        except _WRITE_ERRORS as error:
            self._failure = error
            _remove(unfinished)

    def _cannot_write(self, error: Exception) -> errors.CheckpointError:
        kept = ", ".join(map(str, steps(self._run))) or "none"
        reason = str(error).splitlines()[0]
        return errors.CheckpointError(
            f"cannot write a checkpoint in {self._folder}: {reason}. Make room or mend the folder,"
            f" then run the same command again. Checkpoints there: {kept}."
        )


def restore(run: Path, step: int, like: PyTree) -> PyTree:
    """The state of a step, placed as `like` says, however it was cut over devices.

    Args:
        run: the run folder.
        step: a step whose seal was verified.
        like: a state of `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        CheckpointError: it is the state of another model or optimiser; names the difference.
    """
    template = flax.serialization.to_state_dict(like)
    folder = (run / FOLDER / str(step) / STATE).absolute()
    with _reader() as checkpointer:
        shapes = jax.tree.map(_as_stored, template)
        _check_same(folder, _kinds(shapes), _kinds(_stored(checkpointer, folder)))
        restored = jax.tree.map(_placed, template, checkpointer.restore(folder, shapes))
    return flax.serialization.from_state_dict(like, restored)


def _as_stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What is cut over the devices is whole on the disk, and read by way of the host."""
    axis = partition.axis_of(leaf.sharding)
    if axis is None:
        return leaf
    return jax.ShapeDtypeStruct(partition.merged(leaf.shape, axis), leaf.dtype, sharding=_host())


def _placed(leaf: jax.ShapeDtypeStruct, array: jax.Array) -> jax.Array:
    if partition.axis_of(leaf.sharding) is None:
        return array
    values = np.asarray(array).reshape(leaf.shape)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, values.__getitem__)


def load_model(run: Path, step: int | None = None) -> SavedModel:
    """The model of a checkpoint, by default of the best one that is sound.

    Raises:
        CheckpointError: there is no such step, or its files are damaged.
    """
    if step is None:
        ranked = by_merit(scores(run))
        # Those that cannot be ranked come first, so that they are named.
        return _read_model(run, _first_sound(run, [*(set(steps(run)) - set(ranked)), *ranked]))
    if step not in steps(run):
        there = ", ".join(map(str, steps(run))) or "none"
        raise errors.CheckpointError(f"{run} has no checkpoint of step {step}; there: {there}.")
    seals.verify(run / FOLDER / str(step))
    return _read_model(run, step)


def _remove(folder: Path, tries: int = 20) -> None:
    """Removes a folder in which orbax, one of whose threads has failed, may still be writing."""
    for _ in range(tries):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def unfinished(run: Path, step: int) -> Path:
    """Where a checkpoint is until it is whole; what a kill leaves there is swept away."""
    return run / FOLDER / f"{_UNFINISHED}{step}"


def steps(run: Path) -> list[int]:
    """The steps that were saved, newest first, sound or not."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), reverse=True)


def newest_sound(run: Path) -> int | None:
    """The newest step whose seal holds; None where nothing was saved.

    Raises:
        CheckpointError: there are checkpoints, and none is sound.
    """
    return _first_sound(run, steps(run)) if steps(run) else None


def set_aside(run: Path, newer_than: int) -> None:
    """Moves newer, unsound checkpoints out of the way: the run will write these steps again."""
    for step in steps(run):
        if step > newer_than:
            damaged = run / FOLDER / f"{_DAMAGED}{step}"
            shutil.rmtree(damaged, ignore_errors=True)
            (run / FOLDER / str(step)).rename(damaged)
            logger.warning("the damaged checkpoint is kept as %s", damaged)


def is_run(folder: Path) -> bool:
    """Whether this is a run folder with checkpoints."""
    return (folder / "config.yaml").is_file() and bool(steps(folder))


def read_meta(run: Path, step: int) -> Meta:
    """What stands beside the arrays of a step.

    Raises:
        CheckpointError: it is damaged, of another version of this program, or of another step.
    """
    folder = run / FOLDER / str(step)
    seals.verify(folder, META)
    try:
        meta = Meta(**json.loads((folder / META).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise errors.CheckpointError(
            f"{folder / META} was not written by this version of flax_asr: {error}"
        ) from error
    if meta.step != step:
        raise errors.CheckpointError(f"{folder} is the checkpoint of step {meta.step}, renamed")
    return meta


def meta_config(meta: Meta) -> config.Config:
    """The configuration that a checkpoint was made with."""
    return config.build(meta.run)


def check_vocabulary(meta: Meta, ours: vocabularies.Vocabulary) -> None:
    """Raises `CheckpointError` where a checkpoint writes other symbols than `ours`."""
    theirs = vocabularies.Vocabulary.from_json(meta.vocabulary)
    if theirs != ours:
        only_there = "".join(sorted(set(theirs.characters) - set(ours.characters)))
        only_here = "".join(sorted(set(ours.characters) - set(theirs.characters)))
        raise errors.CheckpointError(
            f"the checkpoint of step {meta.step} writes another vocabulary ({theirs.size} symbols,"
            f" here {ours.size}; only there: {only_there!r}, only here: {only_here!r}). The data or"
            " their normalisation have changed: use another --output_dir, or --restart."
        )


def _on_host(state: PyTree) -> PyTree:
    """numpy arrays: orbax copies them before it returns, and slices (compiles) nothing."""
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return jax.tree.map(
        lambda leaf: np.asarray(leaf.addressable_data(0)) if isinstance(leaf, jax.Array) else leaf,
        state,
    )


def _host() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def _read_model(run: Path, step: int) -> SavedModel:
    meta = read_meta(run, step)
    folder = (run / FOLDER / str(step) / STATE).absolute()
    with _reader() as checkpointer:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_host()),
            _stored(checkpointer, folder),
        )
        state = checkpointer.restore(folder, shapes)
    # As `TrainState.scored`; without an average there is nothing under its name.
    averaged = state.get("average", {})
    flat = {**state["trainable"], **state["frozen"], **averaged}
    return SavedModel(
        model_config=Wav2Vec2Config(**meta.model_config),
        params=flax.traverse_util.unflatten_dict(
            {path: np.asarray(leaf) for path, leaf in flat.items()}, sep="/"
        ),
        vocabulary=vocabularies.Vocabulary.from_json(meta.vocabulary),
        meta=meta,
    )


def _first_sound(run: Path, candidates: list[int]) -> int:
    problems = []
    for step in candidates:
        try:
            seals.verify(run / FOLDER / str(step))
            read_meta(run, step)
        except errors.CheckpointError as error:
            problems.append(str(error))
            logger.warning("the checkpoint of step %d is not used: %s", step, error)
        else:
            return step
    if problems:
        raise errors.CheckpointError(
            f"no checkpoint in {run / FOLDER} is sound: {'; '.join(problems)}. Begin again with"
            " --restart, or restore the folder from a copy."
        )
    raise errors.CheckpointError(f"there is no checkpoint in {run / FOLDER}.")


def score(meta: Meta) -> float | None:
    """What the best checkpoint is chosen by; None where the step was not scored."""
    name = f"eval_{meta.run['train']['metric_for_best_model']}"
    if name in meta.metrics and math.isfinite(meta.metrics[name]):
        return meta.metrics[name]
    return None


def scores(run: Path) -> dict[int, float | None]:
    """The score of every step that says it undamaged."""
    found = {}
    for step in steps(run):
        with contextlib.suppress(errors.CheckpointError):
            found[step] = score(read_meta(run, step))
    return found


def by_merit(scores: Mapping[int, float | None]) -> list[int]:
    """Scored steps, best first, the earliest of equals; then the others, newest first."""
    scored = sorted((value, step) for step, value in scores.items() if value is not None)
    others = sorted((step for step, value in scores.items() if value is None), reverse=True)
    return [step for _, step in scored] + others


def superfluous(saved: Collection[int], scores: Mapping[int, float | None], keep: int) -> list[int]:
    """The steps that are neither among the latest `keep` nor the best one."""
    kept = {*sorted(saved, reverse=True)[:keep], *by_merit(scores)[:1]}
    return [step for step in saved if step not in kept]


def _alone() -> ocp.options.MultiprocessingOptions:
    """Each host reads by itself and the first writes by itself: orbax waits for no other."""
    host = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix=f"host-{host}"
    )


def _reader() -> ocp.StandardCheckpointer:
    return ocp.StandardCheckpointer(multiprocessing_options=_alone())


def _stored(checkpointer: ocp.StandardCheckpointer, folder: Path) -> PyTree:
    return checkpointer.metadata(folder).item_metadata.tree


def _kinds(tree: PyTree) -> dict[str, str]:
    """The type and shape of every array, by its name."""
    return {
        "/".join(str(key.key) for key in path): f"{np.dtype(leaf.dtype)} {tuple(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_same(folder: Path, ours: dict[str, str], theirs: dict[str, str]) -> None:
    """Refuses a checkpoint of another architecture, vocabulary or optimiser."""
    differing = [
        f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        more = f"; {len(differing) - 3} more" if len(differing) > 3 else ""
        raise errors.CheckpointError(
            f"{folder.parent} is of another model or optimiser: {'; '.join(differing[:3])}{more}."
            " Use another --output_dir, or --restart."
        )
