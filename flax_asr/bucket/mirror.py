"""A run folder mirrored to gs://BUCKET/PATH, for machines that vanish with their disks.

The run works in a local folder as usual. A thread watches it and uploads what changes:

1. the log before its checkpoints, and the files of a checkpoint before its seal: a checkpoint with
   a seal in the store is complete, and the log there reaches at least as far;
2. the newest checkpoint first; then it removes those that the run itself would remove, their seals
   first;
3. everything else, as it changes; the mark of a finished run last.

When a run starts, it resumes from its local folder if that was the last to write to the store: then
it is as new or newer. Any other local folder is put aside, and what is needed is fetched from the
store.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from flax_asr import config, errors, inventory, run_folder, seals
from flax_asr.bucket import follower, lease, store
from flax_asr.hosts import multihost
from flax_asr.record import runlog

logger = logging.getLogger(__name__)

LOOK_SECONDS = 3.0
PATIENCE_SECONDS = 60.0
"""How long a run that ends by an error waits for the thread's current upload."""
_NEEDED = (run_folder.CONFIG, runlog.FILE, run_folder.CARD, run_folder.FINISHED)
_NEEDED_OF_EXPORT = f"{run_folder.EXPORT}/config.json"


class Mirror:
    """Owns the URL and mirrors the folder to it until closed.

    Args:
        url: gs://BUCKET/PATH.
        folder: the local run folder, whose lock this process holds.
        keep: number of latest checkpoints to keep.
        restart: put the run in the store aside under a dated name, and start anew.

    Raises:
        CheckpointError: another run is at work there, or no checkpoint there is sound.
        StoreError: the store cannot be read or written.
    """

    def __init__(self, url: str, folder: Path, keep: int, restart: bool = False):
        self._store, self._folder, self._keep = store.Store(url), folder, keep
        logger.info("%s is mirrored to %s", folder, self._store.url)
        disk = _disk(folder)
        self._lease = lease.Lease(self._store, disk)
        with contextlib.ExitStack() as undo:
            undo.callback(self._lease.close)
            if restart:
                _put_aside(self._store, run_folder.dated(self._store.url))
            if restart or not self._lease.continues:
                _clear(folder, whose=disk)
            self._listed = self._store.list()
            self._sealed = _sealed(self._store, self._listed)
            self._fetch()
            (folder / run_folder.LOCK).write_text(self._lease.disk, encoding="ascii")
            self._scores = {step: self._score(step) for step in self._sealed}
            undo.pop_all()
        self._sent: dict[str, tuple[int, int]] = {}
        self._turn = threading.Lock()
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._look, name="mirror", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the error since the last call, if any.

        Raises:
            StoreError: the store could not be written; the thread keeps trying.
            TrainingError: the store belongs to another run now.
        """
        failure, self._failure = self._failure, None
        if isinstance(failure, errors.StoreError):
            raise self._explained(failure) from failure
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Returns when everything in the folder is in the store.

        Raises:
            StoreError: it could not be written.
            TrainingError: it belongs to another run now.
        """
        with self._turn:
            try:
                self._lease.renew()
                self._send()
            except errors.StoreError as error:
                raise self._explained(error) from error
            self._failure = None

    def bring(self, step: int | None) -> None:
        """Does nothing: this host has everything already."""

    def close(self) -> None:
        """Ends the thread and releases the URL, even if not everything is uploaded."""
        self._closing.set()
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():  # it may write until the process ends
            self._lease.stop()
        else:
            self._lease.close()

    def _look(self) -> None:
        while not self._closing.wait(LOOK_SECONDS):
            with self._turn:
                try:
                    self._send()
                except errors.TrainingError as lost:
                    self._failure = lost
                    return
                except errors.StoreError as error:
                    self._failure = error
                except OSError as error:
                    self._failure = errors.StoreError(f"cannot read {self._folder}: {error}.")

    def _explained(self, error: errors.StoreError) -> errors.StoreError:
        return errors.StoreError(
            f"{error} What was not uploaded is in {self._folder}: the same command on this machine"
            " goes on from there."
        )

    # What is in the store, and what comes from it.

    def _fetch(self) -> None:
        """Fetches what is needed and not here; removes the seals of damaged checkpoints."""
        wanted = [name for name in self._listed if name in _NEEDED or name == _NEEDED_OF_EXPORT]
        absent = {n: self._folder / n for n in wanted if not (self._folder / n).exists()}
        self._store.download(absent)
        follower.fetch_compiled(self._store, self._listed, self._folder)
        here = follower.newest(self._folder)
        problems = {}
        for step in sorted(self._sealed, reverse=True):
            if here is None or step > here:
                try:
                    follower.fetch_checkpoint(self._store, self._listed, self._folder, step)
                    # The local log may end before this step.
                    self._store.download({runlog.FILE: self._folder / runlog.FILE})
                except errors.CheckpointError as error:
                    logger.warning("the checkpoint of step %d is not used: %s", step, error)
                    problems[step] = error
        if problems and follower.newest(self._folder) is None:
            told = "; ".join(str(error) for error in problems.values())
            raise errors.CheckpointError(
                f"no checkpoint in {self._store.url} is sound: {told}. Begin again with --restart."
            )
        self._store.remove([follower.seal(step) for step in problems])
        for step in problems:
            del self._sealed[step]

    def _score(self, step: int) -> float | None:
        """The score of a checkpoint in the store."""
        content = self._store.read(f"{inventory.FOLDER}/{step}/{inventory.META}")
        try:
            return inventory.score(inventory.Meta(**json.loads(content)))
        except (TypeError, ValueError, KeyError):
            return None

    # What goes to the store.

    def _send(self) -> None:
        """Brings the store up to date with the folder, once."""
        self._lease.check()
        saved = inventory.steps(self._folder)
        files = sorted(self._plain_files(), key=_order)
        self._send_log()
        for step in self._worth_keeping(saved):
            self._send_checkpoint(step)
        for step in inventory.superfluous(self._sealed, self._scores, self._keep):
            self._unseal(step)
            self._store.remove(self._store.list(f"{inventory.FOLDER}/{step}"))
        finished = [name for name in files if name == run_folder.FINISHED]
        self._send_changed([n for n in files if n not in (run_folder.FINISHED, runlog.FILE)])
        self._send_changed(finished)

    def _worth_keeping(self, saved: list[int]) -> list[int]:
        """The saved steps, without those that a killed run should have removed."""
        if set(saved) <= self._sealed.keys():
            return saved
        scores = {**self._scores, **inventory.scores(self._folder)}
        superfluous = inventory.superfluous({*saved, *self._sealed}, scores, self._keep)
        return [step for step in saved if step not in superfluous]

    def _send_log(self) -> None:
        # The run may be appending to it: upload the complete lines.
        state = self._state(runlog.FILE)
        if state is not None and state != self._sent.get(runlog.FILE):
            content = (self._folder / runlog.FILE).read_bytes()
            self._store.write(runlog.FILE, content[: content.rfind(b"\n") + 1])
            self._sent[runlog.FILE] = state

    def _send_checkpoint(self, step: int) -> None:
        folder = self._folder / inventory.FOLDER / str(step)
        try:
            seal = (folder / seals.FILE).read_bytes()
            if self._sealed.get(step) == seal:
                return
            meta = inventory.read_meta(self._folder, step)
        except (OSError, errors.CheckpointError):
            return  # just removed or replaced, or damaged
        self._unseal(step)
        begin = f"{inventory.FOLDER}/{step}/"
        names = [name for name in json.loads(seal) if name != seals.FILE]
        try:
            self._store.upload({f"{begin}{name}": folder / name for name in names})
            unchanged = (folder / seals.FILE).read_bytes() == seal
        except (OSError, errors.StoreError):
            if folder.is_dir() and all((folder / name).is_file() for name in names):
                raise
            unchanged = False
        self._lease.check()
        if not unchanged:  # the run has removed or replaced it in the meantime
            self._store.remove(f"{begin}{name}" for name in names)
            return
        self._store.write(follower.seal(step), seal)
        self._sealed[step] = seal
        self._scores[step] = inventory.score(meta)

    def _unseal(self, step: int) -> None:
        """Removes the seal of a step, so that the store no longer has this checkpoint."""
        if step in self._sealed:
            self._store.remove([follower.seal(step)])
            del self._sealed[step], self._scores[step]

    def _send_changed(self, names: list[str]) -> None:
        states = {name: self._state(name) for name in names}
        changed = {
            name: state
            for name, state in states.items()
            if state is not None and self._sent.get(name) != state
        }
        for name in list(changed):
            entry = self._listed.pop(name, None)  # as listed when this process started
            if entry is not None and entry.same_as(self._folder / name):
                self._sent[name] = changed.pop(name)
        try:
            self._store.upload({name: self._folder / name for name in changed})
        except (OSError, errors.StoreError):
            if all(self._state(name) is not None for name in changed):
                raise
            return  # a file was just replaced: it is uploaded next time
        self._sent |= changed

    def _state(self, name: str) -> tuple[int, int] | None:
        try:
            status = (self._folder / name).stat()
        except OSError:
            return None
        return status.st_size, status.st_mtime_ns

    def _plain_files(self) -> Iterator[str]:
        """Names of files that are neither hidden nor part of a checkpoint."""
        # Not rglob, which fails if a folder is removed meanwhile.
        for root, folders, files in os.walk(self._folder):
            folders[:] = [f for f in folders if f != inventory.FOLDER and not f.startswith(".")]
            for name in files:
                if not name.startswith(".") or name == run_folder.FINISHED:
                    yield (Path(root) / name).relative_to(self._folder).as_posix()


def _order(name: str) -> tuple[bool, str]:
    return name != run_folder.CONFIG, name


def _sealed(place: store.Store, listed: dict[str, store.Entry]) -> dict[int, bytes]:
    """The seal of every checkpoint in the store; checkpoints without one are removed."""
    steps: dict[int, list[str]] = {}
    for name in listed:
        parts = name.split("/")
        if parts[0] == inventory.FOLDER and len(parts) > 2 and parts[1].isdecimal():
            steps.setdefault(int(parts[1]), []).append(name)
    found = {}
    for step, names in steps.items():
        if follower.seal(step) in names:
            found[step] = place.read(follower.seal(step))
        else:
            place.remove(names)
    return found


def _disk(folder: Path) -> str | None:
    """The name of this local copy; None if it is incomplete."""
    return (folder / run_folder.LOCK).read_text(encoding="ascii") or None


def _clear(folder: Path, whose: str | None) -> None:
    """Empties the local folder, to be filled from the store.

    A copy with a name may hold what the store lacks, and is put aside. One without was incomplete,
    so everything in it came from the store.
    """
    if whose is not None:
        run_folder.put_aside(folder)
    (folder / run_folder.LOCK).write_text("")
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != run_folder.LOCK:
            path.unlink()


def _put_aside(place: store.Store, url: str) -> None:
    """Moves everything to another URL; seals are removed first, so no partial run is left."""
    names = [name for name in place.list() if name != lease.FILE]
    if names:
        place.copy(names, url)
        place.remove([name for name in names if name.endswith(f"/{seals.FILE}")])
        place.remove(names)
        logger.info("the old run is kept in %s", url)


class Nowhere:
    """The mirror of a run in a folder that all hosts see: does nothing."""

    def check(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def bring(self, step: int | None) -> None:
        pass

    def close(self) -> None:
        pass


Mirrored = Mirror | follower.Follower | Nowhere
"""What connects `output_dir` with its local folder."""


def attached(cfg: config.Config, folder: Path, restart: bool, hosts: multihost.Hosts) -> Mirrored:
    """The mirror for this run and host: with a bucket, only the first host writes.

    Raises:
        ConfigError: `output_dir` is in a bucket on one host and not on another.
    """
    url = cfg.output_dir
    hosts.agree("bucket", {"output_dir": url} if store.is_remote(url) else {})
    if not store.is_remote(url):
        return Nowhere()
    shared = hosts.share(folder)
    if hosts.is_first:
        return Mirror(url, folder, cfg.train.save_total_limit, restart)
    return Nowhere() if shared else follower.Follower(url, folder)
