"""The right to write under a URL, which one run at a time holds.

A bucket has no locks that end with their process. So the run that writes there says so in an
object, and renews it every few seconds. Another run that finds the object watches it: if it
changes, its owner is alive, and the other run is refused; if not, the owner is dead, and the other
run takes over. A run that wakes up after that notices it at its next renewal, and stops.
"""

import datetime
import json
import logging
import os
import platform
import threading
import time
import uuid
from typing import Any

from flax_asr import errors
from flax_asr.bucket import store

logger = logging.getLogger(__name__)

FILE = "owner.json"
RENEW_SECONDS = 20.0
PATIENCE_SECONDS = 75.0
"""More than three renewals: an owner that is silent for so long is dead."""
SETTLE_SECONDS = 2.0
"""If two runs take over at once, both see the later one's entry by then: the other gives up."""


_KEYS = frozenset("run disk host pid since renewals released".split())


class Lease:
    """Takes the right to write, which may need `PATIENCE_SECONDS` after a kill.

    Args:
        place: the store.
        disk: name of the local copy; None if it is incomplete. The copy's own lock keeps out a
            second run on this machine, so a lease with the same name belongs to a dead one.

    Attributes:
        continues: whether this local copy was the last to write here.
        disk: the name of the local copy from now on.

    Raises:
        CheckpointError: another run is at work there.
        TrainingError: the object there was not written by such a run.
    """

    def __init__(self, place: store.Store, disk: str | None):
        self._store = place
        found = self._read()
        self.continues = found is not None and found["disk"] == disk
        self.disk = disk if self.continues else uuid.uuid4().hex
        self._word = {
            "run": uuid.uuid4().hex,
            "disk": self.disk,
            "host": platform.node(),
            "pid": os.getpid(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "renewals": 0,
            "released": False,
        }
        if found is not None and not found["released"] and not self.continues:
            self._watch(found)
        self._write()
        time.sleep(SETTLE_SECONDS)
        stands = self._read()
        if stands is None or stands["run"] != self._word["run"]:
            raise self._refusal(stands or self._word)
        self._turn, self._closing = threading.Lock(), threading.Event()
        self._lost: errors.TrainingError | None = None
        self._answers = True
        # A separate thread: uploading a large file takes longer than another run would wait.
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `TrainingError` if another run is known to have taken over."""
        if self._lost is not None:
            raise self._lost

    def renew(self) -> None:
        """Renews the lease.

        Raises:
            TrainingError: another run has taken over.
            StoreError: the store cannot be read or written.
        """
        with self._turn:
            stands = self._read()
            if stands is None or stands["run"] != self._word["run"]:
                whose = "nobody" if stands is None else f"{stands['host']}, process {stands['pid']}"
                self._lost = errors.TrainingError(
                    f"{self._store.url} belongs to another run now ({whose}): this one was silent"
                    " for too long, and stops. What it saved last may be on its own disk only."
                )
                raise self._lost
            self._word["renewals"] += 1
            self._write()

    def close(self) -> None:
        """Releases the lease if the store can be written, so that the next run need not wait."""
        self.stop()
        self._word["released"] = True
        if self._answers and not self._thread.is_alive():
            try:
                self.check()
                self.renew()
            except (errors.StoreError, errors.TrainingError) as error:
                logger.warning("warning: %s", error)

    def stop(self) -> None:
        """Ends the renewals."""
        self._closing.set()
        self._thread.join(PATIENCE_SECONDS)

    def _keep(self) -> None:
        while self._lost is None and not self._closing.wait(RENEW_SECONDS):
            try:
                self.renew()
                self._answers = True
            except errors.StoreError as error:
                self._answers = False
                logger.warning("warning: %s", error)
            except errors.TrainingError:
                return

    def _watch(self, found: dict[str, Any]) -> None:
        logger.info(
            "%s was not released by the last run (%s, process %s, since %s): watching for up to"
            " %.0f s whether that is still alive",
            self._store.url,
            found["host"],
            found["pid"],
            found["since"],
            PATIENCE_SECONDS,
        )
        limit = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < limit:
            time.sleep(PATIENCE_SECONDS / 25)
            now = self._read()
            if now is None or now["released"]:
                return
            if now != found:
                raise self._refusal(now)

    def _refusal(self, found: dict[str, Any]) -> errors.CheckpointError:
        return errors.CheckpointError(
            f"another run is at work in {self._store.url} ({found['host']}, process"
            f" {found['pid']}, since {found['since']}): wait for it, or give another --output_dir."
        )

    def _read(self) -> dict[str, Any] | None:
        content = self._store.read(FILE)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not found.keys() >= _KEYS:
            raise errors.TrainingError(
                f"{self._store.url}/{FILE} was not written by a run of flax_asr: remove it if no"
                " run is at work there, or give another --output_dir."
            )
        return found

    def _write(self) -> None:
        self._store.write(FILE, json.dumps(self._word, indent=1).encode())
