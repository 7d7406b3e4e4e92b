"""A bucket on this machine: Google's storage, emulated, and a run's clockwork made faster."""

import contextlib
import json
import logging
import re
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
    server._read_data = _read_whole
    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket=NAME)
    emulator.start()
    try:
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
    finally:
        emulator.stop()


_emulators_own = server._read_data


def _read_whole(request, query):
    """The emulator reads files as mail, and takes a carriage return at the end for a line's."""
    kind = request.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return _emulators_own(request, query)
    sent = server._decode_raw_data(server._read_raw_data(request), request)
    border = b"--" + re.search('boundary="?([^";]+)', kind)[1].encode()
    _, about, file = sent[: sent.rindex(b"\n" + border)].split(border + b"\n", 2)
    head, content = file.split(b"\n\n", 1)
    return {
        "meta": json.loads(about.split(b"\n\n", 1)[1]),
        "content": content,
        "content-type": head.partition(b": ")[2].decode(),
    }


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
