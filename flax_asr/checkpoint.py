"""Checkpoints: the whole state with the metadata to use it. The only file that names orbax.

`RUN/checkpoints/STEP` holds `state` (orbax), `meta.json` and `seal.json`. A checkpoint is written
under a hidden name, sealed, and only then renamed: a folder with a step's name was once complete.
orbax does not notice a flipped bit; the seal does, and a checkpoint that differs is not used.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
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

from flax_asr import atomic, errors, inventory, loose_ends, partition, seals
from flax_asr import vocabulary as vocabularies

logger = logging.getLogger(__name__)

_WRITE_ERRORS = (OSError, ValueError, RuntimeError)
"""The errors that orbax and tensorstore raise if the disk is full or the folder is gone."""


@dataclass(frozen=True)
class SavedModel:
    """The model of one checkpoint, on the host."""

    model_config: Wav2Vec2Config
    params: PyTree
    vocabulary: vocabularies.Vocabulary
    meta: inventory.Meta

    @property
    def normalization(self) -> Any:
        """The normalisation steps that made the transcripts."""
        return self.meta.normalization

    @property
    def language(self) -> str:
        """The language code, as Common Voice writes it."""
        return self.meta.run["data"]["language"]

    @property
    def step(self) -> int:
        """The number of updates done."""
        return self.meta.step

    @property
    def metrics(self) -> dict[str, float | str]:
        """The scores of this step; empty if it was not scored."""
        return self.meta.metrics


class Checkpoints:
    """Writes the checkpoints of one run and keeps the latest ones and the best one.

    Args:
        run: the run folder.
        keep: how many of the latest to keep.
        writes: whether this host writes; one is enough, as all have the same state.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def __init__(self, run: Path, keep: int, writes: bool = True):
        self._run, self._folder = run, run / inventory.FOLDER
        self._keep, self._writes = keep, writes
        self._publishing: threading.Thread | None = None
        self._failure: Exception | None = None
        self._told = False
        self._opened = contextlib.ExitStack()
        if not writes:
            return
        try:
            self._folder.mkdir(exist_ok=True)
            self._sweep()
        except OSError as error:
            raise self._cannot_write(error) from error
        with contextlib.ExitStack() as opened:
            opened.enter_context(loose_ends.hidden(_WRITE_ERRORS))
            self._reachable = opened.enter_context(inventory.reachable(self._folder))
            self._writer = _writer()
            opened.callback(lambda: _close(self._writer))  # not bound: it may be replaced
            self._opened = opened.pop_all()

    def save(self, state: PyTree, meta: inventory.Meta) -> None:
        """Starts to save; returns as soon as the state is on the host.

        Args:
            state: whole arrays, not cut over devices, on the devices or the host.
            meta: the metadata.

        Raises:
            CheckpointError: this checkpoint or the previous one cannot be written.
        """
        if not self._writes:
            return
        self.wait()
        unfinished = inventory.unfinished(self._run, meta.step)
        arrays = _on_host(flax.serialization.to_state_dict(state))
        try:
            self._make_room(arrays)
            unfinished = inventory.spare(unfinished)
            unfinished.mkdir()
            content = json.dumps(dataclasses.asdict(meta), indent=1, default=str)
            (unfinished / inventory.META).write_text(content + "\n", encoding="utf-8")
            self._writer.save(
                self._reachable / unfinished.name / inventory.STATE,
                args=ocp.args.StandardSave(arrays),
            )
        except _WRITE_ERRORS as error:
            self._give_up(unfinished, error)
            raise self._cannot_write(error) from error
        arguments = unfinished, self._folder / str(meta.step)
        self._publishing = threading.Thread(target=self._publish, args=arguments, daemon=True)
        self._publishing.start()

    def wait(self) -> None:
        """Returns when the checkpoint that was started is on the disk under its name.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._publishing is not None:
            self._publishing.join()
        self.check()

    def check(self) -> None:
        """Raises the error that `wait` would raise, if it has happened by now."""
        if self._publishing is not None and self._publishing.is_alive():
            return
        if self._failure is not None:
            failure, self._failure = self._failure, None
            if not isinstance(failure, _WRITE_ERRORS):
                raise failure
            raise self._cannot_write(failure) from failure

    def close(self) -> None:
        """Waits, then ends orbax's threads."""
        try:
            self.wait()
        finally:
            self._opened.close()

    def _publish(self, unfinished: Path, folder: Path) -> None:
        try:
            self._writer.wait_until_finished()
            seals.write(unfinished)
            if folder.exists():
                folder.rename(self._replaced(folder))
            unfinished.rename(folder)
            atomic.sync_folder(self._folder)  # before older ones are removed
            self._remove_superfluous()
        except Exception as error:  # of any kind: a run must not continue as if this were saved
            self._failure = error
            self._give_up(unfinished, error)

    def _remove_superfluous(self) -> None:
        self._sweep()
        for old in inventory.superfluous(
            inventory.steps(self._run), inventory.scores(self._run), self._keep
        ):
            path = self._folder / str(old)
            with self._removing(path):
                # Renamed first: half of a checkpoint never has a step's name.
                shutil.rmtree(path.rename(self._replaced(path)))

    def _replaced(self, saved: Path) -> Path:
        return inventory.spare(self._folder / f"{inventory.REPLACED}{saved.name}")

    def _sweep(self) -> None:
        """Removes unfinished and discarded checkpoints, also those of killed runs."""
        for path in self._folder.iterdir():
            if path.name.startswith((inventory.UNFINISHED, inventory.REPLACED)):
                with self._removing(path):
                    shutil.rmtree(path)

    @contextlib.contextmanager
    def _removing(self, path: Path) -> Iterator[None]:
        """A context in which a failed removal does not stop the run; the first one is warned of."""
        try:
            yield
        except OSError as error:
            if not self._told:
                self._told = True
                logger.warning(
                    "warning: %s is not needed any more and cannot be removed: %s. It takes room"
                    " beside what train.save_total_limit keeps, as others may that come after it:"
                    " fix the folder or delete it by hand. The run goes on.",
                    path,
                    errors.why(error),
                )

    def _make_room(self, arrays: PyTree) -> None:
        """Raises `OSError` if the arrays do not fit, before anything is written.

        orbax would find out half-way, and leave what it has written on the full disk.
        """
        for path in self._folder.glob(f"{inventory.UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        disk = shutil.disk_usage(self._folder)
        # Some file systems do not know their size.
        if disk.total > 0 and needed > disk.free:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: it takes up to {needed / 1e6:,.1f} MB,"
                f" {disk.free / 1e6:,.1f} MB are free",
            )

    def _give_up(self, unfinished: Path, error: Exception) -> None:
        """Removes the unfinished checkpoint, and gives the next save a new writer.

        An orbax writer that has failed raises the same error again at every later call.
        """
        _close(self._writer)
        self._writer = _writer()
        _remove(unfinished)
        loose_ends.drop(error)

    def _cannot_write(self, error: Exception) -> errors.CheckpointError:
        kept = ", ".join(map(str, inventory.steps(self._run))) or "none"
        # tensorstore appends its whole specification to the reason.
        reason = errors.why(error).partition(" [")[0].partition("\n")[0]
        return errors.CheckpointError(
            f"cannot write a checkpoint in {self._folder}: {reason}. Make room or fix the folder,"
            f" then run the same command again. Checkpoints there: {kept}."
        )


def _writer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(
        ocp.StandardCheckpointHandler(multiprocessing_options=_alone()),
        multiprocessing_options=_alone(),
    )


def _close(writer: ocp.AsyncCheckpointer) -> None:
    """Ends its threads; their failures were reported before."""
    with contextlib.suppress(Exception):
        writer.close()


def restore(run: Path, step: int, like: PyTree) -> PyTree:
    """The state of a step, placed as `like` says, whatever devices it was saved from.

    Args:
        run: the run folder.
        step: a step whose seal was verified.
        like: a state of `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        CheckpointError: the state is of another model or optimiser; names the difference.
    """
    template = flax.serialization.to_state_dict(like)
    saved = run / inventory.FOLDER / str(step)
    with _reader() as checkpointer, inventory.reachable(saved) as folder:
        state = folder / inventory.STATE
        shapes = jax.tree.map(_as_stored, template)
        _check_same(saved, _kinds(shapes), _kinds(_stored(checkpointer, state)))
        restored = jax.tree.map(_placed, template, checkpointer.restore(state, shapes))
    return flax.serialization.from_state_dict(like, restored)


def _as_stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Arrays that are cut over the devices are whole on the disk, and are read through the host."""
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
    """The model of a checkpoint: that of a step, or of the best one that is sound.

    Raises:
        CheckpointError: there is no such step, or its files are damaged.
    """
    if step is None:
        ranked = inventory.by_merit(inventory.scores(run))
        # Checkpoints that cannot be ranked come first, so that they are named.
        return _read_model(
            run, inventory.first_sound(run, [*(set(inventory.steps(run)) - set(ranked)), *ranked])
        )
    if step not in inventory.steps(run):
        there = ", ".join(map(str, inventory.steps(run))) or "none"
        raise errors.CheckpointError(f"{run} has no checkpoint of step {step}; there: {there}.")
    seals.verify(run / inventory.FOLDER / str(step))
    return _read_model(run, step)


def _remove(folder: Path) -> None:
    """Removes a folder into which orbax may still be writing after one of its threads failed."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


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
    meta = inventory.read_meta(run, step)
    saved = run / inventory.FOLDER / str(step)
    with _reader() as checkpointer, inventory.reachable(saved) as folder:
        place = folder / inventory.STATE
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_host()),
            _stored(checkpointer, place),
        )
        state = checkpointer.restore(place, shapes)
    # As `TrainState.scored`; without an average the state has no such entry.
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
            f"{folder} is of another model or optimiser: {'; '.join(differing[:3])}{more}."
            " Use another --output_dir, or --restart."
        )
