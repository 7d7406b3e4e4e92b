"""Objects of a bucket, under gs://BUCKET/PATH. The only file that names gcsfs, which does the I/O.

Transient failures (the network, 429, 5xx) are retried for some minutes. All others become one
`StoreError`, which says what is wrong with the bucket, the rights or the network.
"""

import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flax_asr import atomic, errors

logger = logging.getLogger(__name__)

PAUSES_SECONDS = (5.0, 20.0)
"""Between tries; each is up to six tries of gcsfs, with pauses of 1 to 16 seconds."""

_AT_ONCE = 4
_CHUNK_BYTES = 16 * 2**20
_SILENCE_SECONDS = 60.0
_URL = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])((?:/[^/]+)+)/?")
_Result = TypeVar("_Result")


def is_remote(place: str) -> bool:
    """Whether this is a URL rather than a folder."""
    return "://" in place


def cache_folder() -> Path:
    """The folder of local copies: flax_asr in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flax_asr"


def local_folder(place: str, kind: str) -> Path:
    """The folder itself, or the local copy of a URL.

    Args:
        place: a folder or a URL.
        kind: purpose of the copy; each has its own folder.

    Raises:
        ConfigError: a URL other than gs://BUCKET/PATH.
    """
    if not is_remote(place):
        return Path(place)
    bucket, path = _parse(place)
    return cache_folder() / kind / bucket / path


def _parse(url: str) -> tuple[str, str]:
    match = _URL.fullmatch(url)
    if match is None or {".", ".."} & set(match[2].split("/")):
        raise errors.ConfigError(
            f"{url} is neither a folder nor gs://BUCKET/PATH: only Google's buckets are supported,"
            " and a run or a data set needs its own path in one."
        )
    return match[1], match[2].strip("/")


@dataclass(frozen=True)
class Entry:
    """Size and hash of an object.

    Attributes:
        bytes: its size.
        md5: its MD5 in base64; None for an object composed of parts.
    """

    bytes: int
    md5: str | None

    def same_as(self, path: Path) -> bool:
        """Whether a local file has this content; False if there is no hash."""
        if not path.is_file() or path.stat().st_size != self.bytes:
            return False
        if self.md5 is None:
            return False
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "md5").digest()
        return base64.b64encode(digest).decode() == self.md5


class Store:
    """The objects under a URL, by their names after it.

    Args:
        url: gs://BUCKET/PATH.

    Raises:
        ConfigError: the URL is not gs://BUCKET/PATH.
        StoreError: gcsfs or credentials are missing.
    """

    def __init__(self, url: str):
        self.bucket, path = _parse(url)
        self.url = f"gs://{self.bucket}/{path}"
        self._root = f"{self.bucket}/{path}"
        self._files = _file_system()

    def list(self, under: str = "") -> dict[str, Entry]:
        """All objects in the folder `under`, by name."""

        def entries():
            found = self._files.find(self._path(under), detail=True)
            return {
                name.removeprefix(f"{self._root}/"): Entry(info["size"], info.get("md5Hash"))
                for name, info in found.items()
            }

        return self._tried(f"cannot list {self.url}", entries)

    def read(self, name: str) -> bytes | None:
        """An object's content; None if it does not exist."""

        def content():
            try:
                return self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

        return self._tried(f"cannot read {self.url}/{name}", content)

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, or replaces it."""
        put = functools.partial(self._files.pipe_file, self._path(name), content)
        self._tried(f"cannot write {self.url}/{name}", put)

    def upload(self, files: Mapping[str, Path]) -> None:
        """Uploads files, given by the names of their objects, in no particular order."""

        def one(name: str) -> None:
            put = functools.partial(
                self._files.put_file,
                str(files[name]),
                self._path(name),
                chunksize=_CHUNK_BYTES,
                consistency="md5",
            )
            self._tried(f"cannot write {self.url}/{name}", put)

        _each(one, files)

    def download(self, files: Mapping[str, Path]) -> None:
        """Downloads objects, given by name, to these files, in no particular order."""

        def one(name: str) -> None:
            def get():
                files[name].parent.mkdir(parents=True, exist_ok=True)
                with atomic.replacing(files[name], shared=True, lasting=False) as unfinished:
                    self._files.get_file(self._path(name), str(unfinished))

            self._tried(f"cannot copy {self.url}/{name} to {files[name]}", get)

        _each(one, files)

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; missing ones are ignored."""

        def one(name: str) -> None:
            def remove():
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(self._path(name))

            self._tried(f"cannot remove {self.url}/{name}", remove)

        _each(one, names)

    def copy(self, names: Iterable[str], url: str) -> None:
        """Copies objects to another URL in the same bucket."""
        _, path = _parse(url)

        def one(name: str) -> None:
            copy = functools.partial(
                self._files.cp_file, self._path(name), f"{self.bucket}/{path}/{name}"
            )
            self._tried(f"cannot copy {self.url}/{name} to {url}", copy)

        _each(one, names)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _tried(self, what: str, action: Callable[[], _Result]) -> _Result:
        """The action's result, after retries if needed.

        Raises:
            StoreError: `what` went wrong, why, and what to do.
        """
        for pause in (*PAUSES_SECONDS, None):
            try:
                return action()
            except _failures() as error:
                if pause is None or not _may_pass(error):
                    raise errors.StoreError(f"{what}: {self._reason(error)}") from error
                logger.warning("%s: %s; trying again", what, _first_line(error))
                time.sleep(pause)
        raise AssertionError("the last pause is None")

    def _reason(self, error: Exception) -> str:
        import google.auth.exceptions

        text = _first_line(error)
        if isinstance(error, google.auth.exceptions.GoogleAuthError):
            return _NO_CREDENTIALS.format(text)
        if isinstance(error, FileNotFoundError) and error.errno is None:
            return (
                f"there is no such object, or no bucket {self.bucket}. Create it with `gcloud"
                f" storage buckets create gs://{self.bucket}`, or give another URL."
            )
        if _code(error) in (401, 403):
            return (
                f"access is denied ({text}). Give the account that this machine runs as the role"
                f" Storage Object User on the bucket {self.bucket}."
            )
        if _is_local(error):
            return f"{errors.why(error)}."
        return f"{text}. The bucket or the network does not answer properly; try again later."


_NO_CREDENTIALS = (
    "there are no Google credentials ({}). On a Google machine give it a service account with the"
    " scope cloud-platform; elsewhere run `gcloud auth application-default login`, or set"
    " GOOGLE_APPLICATION_CREDENTIALS."
)


@functools.cache
def _file_system() -> Any:
    if importlib.util.find_spec("gcsfs") is None:
        raise errors.StoreError("gs:// needs the package gcsfs: pip install gcsfs.")
    import aiohttp
    import google.auth.exceptions
    from gcsfs import core

    # It logs tracebacks for errors that become one message here.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    emulated = "STORAGE_EMULATOR_HOST" in os.environ
    try:
        return core.GCSFileSystem(
            # Not its other ways: a pickled cache of tokens, or going on without any.
            token="anon" if emulated else "google_default",
            requests_timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS
            ),
            use_listings_cache=False,
            skip_instance_cache=True,
        )
    except google.auth.exceptions.GoogleAuthError as error:
        raise errors.StoreError(
            f"gs:// cannot be used: {_NO_CREDENTIALS.format(_first_line(error))}"
        ) from error


@functools.cache
def _failures() -> tuple[type[Exception], ...]:
    """Exceptions that gcsfs raises: its own, those of the libraries below it, and built-in ones."""
    import aiohttp
    import gcsfs.retry
    import google.auth.exceptions
    import requests

    return (
        gcsfs.retry.HttpError,
        gcsfs.retry.ChecksumError,
        aiohttp.ClientError,
        google.auth.exceptions.GoogleAuthError,
        requests.RequestException,
        OSError,  # 403 and 404; the time-outs; and the local disk
        ValueError,  # 400
        RuntimeError,
    )


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    import aiohttp
    import gcsfs.retry
    import google.auth.exceptions
    import requests

    code = _code(error)
    if code is not None:
        return code in (408, 429) or code >= 500
    network = (
        TimeoutError,
        ConnectionError,
        aiohttp.ClientError,
        requests.RequestException,
        gcsfs.retry.ChecksumError,
        google.auth.exceptions.TransportError,
    )
    return isinstance(error, network)


def _is_local(error: Exception) -> bool:
    """Whether the local disk failed."""
    return isinstance(error, OSError) and error.errno is not None and not _may_pass(error)


def _code(error: Exception) -> int | None:
    """The HTTP status; None if unknown."""
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        return 403
    code = getattr(error, "code", None)
    return int(code) if str(code).isdigit() else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _each(action: Callable[[str], None], names: Iterable[str]) -> None:
    """Calls the action for each name, some at once; all have ended when this returns or raises."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(action, name) for name in names]:
            done.result()
