"""A .tar or .tar.gz read from front to end, with nothing written and bounded memory.

Only regular files are returned; links and devices are skipped. The standard library's reader would
keep a record of every member and load headers of any size, so headers are parsed here.
"""

import contextlib
import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator

from flax_asr import errors

_BLOCK = 512
_PIECE = 2**20
_MOST_HEADER_BYTES = 2**16
_MOST_MEMBERS = 50_000_000
# Tables shrink to about a quarter and MP3 not at all; deflate can reach 1032.
_MOST_RATIO = 100
_FREE_BYTES = 64 * 2**20


class _Counted:
    """A decompressed stream that is refused if it grows out of proportion to its file."""

    def __init__(self, stream: gzip.GzipFile | io.BufferedReader, name: str, file_bytes: int):
        self._stream = stream
        self._name = name
        self._most = _FREE_BYTES + _MOST_RATIO * file_bytes
        self._count = 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, or fewer at the end."""
        try:
            data = self._stream.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise errors.DataError(
                f"{self._name}: damaged or cut after {self._count} bytes of content ({error}); "
                "download it again"
            ) from None
        self._count += len(data)
        if self._count > self._most:
            raise errors.DataError(
                f"{self._name}: unpacks to more than {_MOST_RATIO} times its size; refused"
            )
        return data

    def exactly(self, size: int) -> bytes:
        data = self.read(size)
        if len(data) < size:
            raise errors.DataError(
                f"{self._name}: cut after {self._count} bytes of content; download it again"
            )
        return data


class Body:
    """The content of one member, which can be read once.

    Attributes:
        left: bytes that have not been read yet.
    """

    def __init__(self, stream: _Counted, size: int):
        self._stream = stream
        self.left = size

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, or fewer at the end; all of them by default."""
        size = self.left if size < 0 else min(size, self.left)
        self.left -= size
        return self._stream.exactly(size)

    def skip(self, padding: int) -> None:
        """Skips what is left, and the padding after it."""
        self.left += padding
        while self.left:
            self.read(_PIECE)


def _pax_path(data: bytes, name: str) -> str | None:
    """The path in a pax header: records of "LENGTH key=value\\n"."""
    path = None
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits) <= len(data):
            raise errors.DataError(f"{name}: a damaged pax header")
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if key == b"path":
            path = value.decode("utf-8", "surrogateescape")
        if key == b"size":
            raise errors.DataError(f"{name}: a member of more than 8 GiB; this is not a corpus")
        data = data[int(digits) :]
    return path


def members(file: str | os.PathLike) -> Iterator[tuple[str, int, Body]]:
    """Name, size and content of each regular file, in the archive's order.

    A content must be read before the next member is requested; unread content is skipped.

    Raises:
        errors.DataError: the file is not a tar archive, damaged, truncated, or out of proportion.
    """
    name = os.fspath(file)
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(file, "rb"))
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = stack.enter_context(gzip.GzipFile(fileobj=raw)) if zipped else raw
        yield from _walk(_Counted(stream, name, os.fstat(raw.fileno()).st_size), name)


def _walk(stream: _Counted, name: str) -> Iterator[tuple[str, int, Body]]:
    long_name = None
    for count in range(_MOST_MEMBERS):
        header = stream.read(_BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):
            return
        except tarfile.HeaderError as error:
            what = "is damaged" if count else "is not a tar archive"
            raise errors.DataError(f"{name}: {what} at member {count} ({error})") from None
        if info.size < 0:
            raise errors.DataError(f"{name}: is damaged at member {count} (negative size)")
        padding = -info.size % _BLOCK
        # Links carry no content, whatever their header says.
        body = Body(stream, 0 if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE) else info.size)
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if info.size > _MOST_HEADER_BYTES:
                raise errors.DataError(f"{name}: a header of {info.size} bytes at member {count}")
            data = body.read()
            if info.type == tarfile.XHDTYPE:
                long_name = _pax_path(data, name) or long_name
            else:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.isreg() and not info.issparse():
            yield long_name or info.name, info.size, body
            long_name = None
        elif info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            long_name = None
        body.skip(padding if info.type not in (tarfile.LNKTYPE, tarfile.SYMTYPE) else 0)
    raise errors.DataError(f"{name}: more than {_MOST_MEMBERS} members; refused")
