"""A bucket on this machine: Google's storage, emulated, and a run's clockwork made faster."""

import contextlib
import logging
import socket

from gcp_storage_emulator import server

NAME = "some-bucket"


@contextlib.contextmanager
def running():
    """Serves an empty bucket from a thread; gives what processes must have in their environment."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket=NAME)
    emulator.start()
    try:
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
    finally:
        emulator.stop()


def hasten(set_attribute=setattr) -> None:
    """Waits of a fraction of a second where there would be many seconds."""
    from flax_asr.bucket import lease, mirror, store

    for module, name, seconds in (
        (lease, "RENEW_SECONDS", 0.1),
        (lease, "PATIENCE_SECONDS", 1.0),
        (lease, "SETTLE_SECONDS", 0.0),
        (mirror, "LOOK_SECONDS", 0.1),
        (store, "PAUSES_SECONDS", (0.01, 0.01)),
    ):
        set_attribute(module, name, seconds)
