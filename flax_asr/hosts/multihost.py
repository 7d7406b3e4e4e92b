"""The hosts of a run: they agree, wait for one another, stop together, and end together.

Messages go through JAX's coordination service, which the first host runs, as strings under keys;
never tensors. With one host there are no messages and no waiting.
"""

import atexit
import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from flax_asr import errors
from flax_asr.console import terminal
from flax_asr.hosts import cluster, stopping

_Result = TypeVar("_Result")

LOST_SECONDS = 60.0
"""A host that has been silent for so long is lost."""

WAITING_SECONDS = 3600.0
"""How long the others wait at most for one host's work: an export, reading a checkpoint."""

PREPARING_SECONDS = 7 * 24 * 3600.0
"""The same for decoding a corpus."""

_BEAT_SECONDS = 1.0
_GRACE_SECONDS = 3.0  # for a host to end by itself, with its own message
_FAREWELL_SECONDS = 10.0
_LOST = (
    "not heard of for {:.0f} seconds: stopped. Run the same command on all hosts to go on from the"
    " newest checkpoint."
)
_ALIVE, _END, _LEFT, _STOP = (f"flax_asr/{name}" for name in ("alive", "end", "left", "stop"))


class Hosts:
    """All hosts of one run, for a `with` statement; all must make the same calls in order.

    An error on one host ends all of them, with its message; so does a lost host.

    Attributes:
        index: the number of this host.
        count: number of hosts.
        is_first: whether this is host 0, which writes the files.
    """

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self.is_first = self.index == 0
        self._calls = 0
        self._over = threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> "Hosts":
        if self.count > 1:
            self._watch = threading.Thread(target=self._listen, name="hosts", daemon=True)
            self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch is None:
            return
        if error is None or isinstance(error, errors.Interrupted):
            self.wait()
        elif isinstance(error, jax.errors.JaxRuntimeError) and "EXHAUSTED" not in str(error):
            # Most likely another host died in a collective: the watch will find out which.
            self._watch.join(LOST_SECONDS + cluster.LOST_SECONDS)
        self._over.set()
        self._watch.join()
        if error is None or isinstance(error, errors.Interrupted):
            jax.distributed.shutdown()
        else:
            mendable = isinstance(error, errors.FlaxAsrError)
            status = errors.STATUS if mendable else 1
            self._say_end(status, self.index, str(error) if mendable else repr(error))
            # At exit JAX would wait for the others, which are still at work.
            atexit.register(self._exit, status)

    def first_only(self, context: contextlib.AbstractContextManager) -> Any:
        """The context on the first host, nothing on the others."""
        return context if self.is_first else contextlib.nullcontext()

    def gather(self, value: Any, limit_seconds: float = WAITING_SECONDS) -> list[Any]:
        """The values of all hosts, by index, as JSON keeps them.

        Raises:
            TrainingError: a host has not called this within the limit.
        """
        if self.count == 1:
            return [value]
        self._calls += 1
        name = f"flax_asr/gather/{self._calls}"
        _service().key_value_set(f"{name}/{self.index}", json.dumps(value))
        limit, pause = time.monotonic() + limit_seconds, 0.002
        # Not the service's own barrier, during which no signal is handled.
        while len(said := _read_all(name)) < self.count:
            if time.monotonic() > limit:
                absent = ", ".join(str(i) for i in range(self.count) if i not in said)
                raise errors.TrainingError(
                    f"host {absent} did not reach the others within {limit_seconds:.0f} seconds."
                    " Look at its log, and run the same command on all hosts again."
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        return [json.loads(said[index]) for index in range(self.count)]

    def wait(self, limit_seconds: float = WAITING_SECONDS) -> None:
        """Returns when all hosts have called this."""
        self.gather(None, limit_seconds)

    def any(self, value: bool) -> bool:
        """Whether `value` is true on at least one host."""
        return any(self.gather(value))

    def decided(self, decide: Callable[[], _Result]) -> _Result:
        """The result of `decide` on the first host, as JSON keeps it; the others do not call it."""
        return self.gather(decide() if self.is_first else None)[0]

    def agree(self, what: str, facts: Mapping[str, Any]) -> None:
        """Compares named facts of all hosts.

        Raises:
            ConfigError: some differ; names them, with their values.
        """
        first, *others = self.gather(facts)
        for index, theirs in enumerate(others, 1):
            different = [
                f"\n  {name}: {first.get(name)!r} on host 0, {theirs.get(name)!r} on host {index}"
                for name in sorted(first.keys() | theirs.keys())
                if first.get(name) != theirs.get(name)
            ]
            if different:
                raise errors.ConfigError(
                    f"the hosts do not have the same {what}:{''.join(different)}\nStart the same"
                    " command on all of them, with the same files."
                )

    def share(self, folder: Path) -> bool:
        """Whether this host sees the first one's folder; False if the first cannot write there."""
        mark = self.decided(lambda: _mark(folder))
        seen = mark is not None and (folder / mark).exists()
        self.wait()
        if self.is_first and seen:
            (folder / mark).unlink()
        return seen

    def work_ahead(self, folder: Path, work: Callable[[], Any], for_all: bool = False) -> None:
        """Does the work that each host needs done in its folder, once for each disk.

        Hosts that see the first one's folder wait for it; the others work at the same time.

        Args:
            folder: where the result is written.
            work: does the work.
            for_all: the first host's result reaches all hosts, wherever their folder is.
        """
        if self.count == 1:
            return
        shared = for_all or self.share(folder)
        if self.is_first or not shared:
            work()
        self.wait(PREPARING_SECONDS)

    def leave(self, status: int, message: str) -> NoReturn:
        """Ends this process at once, and tells the others to end as well."""
        self._over.set()
        self._say_end(status, self.index, message)
        self._exit(status)

    def _say_end(self, status: int, host: int, message: str) -> None:
        if self.count > 1:
            end = json.dumps({"status": status, "host": host, "message": message})
            with contextlib.suppress(RuntimeError):  # another host was first, or no service
                _service().key_value_set(f"{_END}/0", end)

    def _exit(self, status: int) -> NoReturn:
        """The first host exits last: its service goes with it, and JAX then aborts the others."""
        if self.count > 1:
            limit = time.monotonic() + _FAREWELL_SECONDS
            with contextlib.suppress(RuntimeError):
                _service().key_value_set(f"{_LEFT}/{self.index}", "", True)
                while self.is_first and len(_read_all(_LEFT)) < self.count:
                    if time.monotonic() > limit:
                        break
                    time.sleep(0.05)
        terminal.leave(sys.stdout)
        terminal.leave(sys.stderr)
        os._exit(status)

    def _listen(self) -> None:
        """Sends signs of life and checks those of the others, until one of them ends."""
        beats = 0
        heard = dict.fromkeys(range(self.count), ("", time.monotonic()))
        while not self._over.wait(_BEAT_SECONDS):
            beats += 1
            try:
                _service().key_value_set(f"{_ALIVE}/{self.index}", str(beats), True)
                signs, said = _read_all(_ALIVE), _read_all(_END)
            except RuntimeError:
                continue  # The first host is gone with its service: JAX ends this process.
            if said:
                if not self._over.wait(_GRACE_SECONDS):
                    end = json.loads(said[0])
                    stopping.say(f"host {end['host']}: {end['message']}")
                    self._exit(end["status"])
                return
            now = time.monotonic()
            for index, (sign, since) in heard.items():
                if signs.get(index, "") != sign:
                    heard[index] = signs[index], now
                elif now - since > LOST_SECONDS:
                    self._say_end(stopping.STATUS, index, _LOST.format(LOST_SECONDS))


class SharedStop:
    """Makes all hosts stop at the same point if one of them is asked to.

    A point is passed with every step that all hosts compute together. A host that is asked to stop
    announces, before it passes point n, that all stop at n + 2. No host can be there yet: it first
    needs the result of point n + 1, which needs all hosts to have begun it.

    Args:
        hosts: all hosts of the run.
        stop: the signals of this host.
    """

    def __init__(self, hosts: Hosts, stop: stopping.Stop):
        self._hosts, self._stop = hosts, stop
        self._point = 0
        self._at: int | None = None

    def passed(self) -> None:
        """A step that all hosts compute together was handed to the devices."""
        self._point += 1

    @property
    def asked(self) -> bool:
        """Whether to stop here; the same answer on all hosts that have passed the same points."""
        if self._hosts.count == 1:
            return self._stop.asked
        if self._at is None:
            if self._stop.asked:
                with contextlib.suppress(RuntimeError):  # another host was first
                    _service().key_value_set(f"{_STOP}/0", str(self._point + 2))
            said = _read_all(_STOP)
            self._at = int(said[0]) if said else None
        return self._at is not None and self._point >= self._at

    def asked_by_any(self) -> bool:
        """Whether any host is asked to stop, where no points follow; waits for all hosts."""
        return self._hosts.any(self._stop.asked)


def _mark(folder: Path) -> str | None:
    """The name of a new empty file in the folder; None if it cannot be written."""
    name = f".hosts-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError:
        return None
    return name


def digest(tree: PyTree) -> str:
    """A hash of a tree of arrays and strings: twelve hexadecimal digits."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(str(path).encode())
        found.update(leaf.encode() if isinstance(leaf, str) else np.asarray(leaf).tobytes())
    return found.hexdigest()[:12]


def _service() -> Any:
    # Private: the client that JAX's own barriers use.
    return jax._src.distributed.global_state.client


def _read_all(name: str) -> dict[int, str]:
    """The messages under a name, by the number at the end of their key."""
    said = _service().key_value_dir_get(f"{name}/")
    return {int(key.rpartition("/")[2]): value for key, value in said}
