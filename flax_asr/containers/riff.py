"""The audio data inside a WAV file, whatever their encoding.

Source: Multimedia Programming Interface and Data Specifications 1.0, IBM and Microsoft 1991,
chapter 2.
"""

_HEADER_BYTES = 8
"""A chunk's header: name and size. The file itself is a chunk; the type of its content follows."""


def content(data: bytes) -> bytes:
    """The content of the chunk `data`, as far as it is there; all of a file that is not RIFF."""
    if data[:4] != b"RIFF":
        return data
    place = _HEADER_BYTES + 4
    while place + _HEADER_BYTES <= len(data):
        size = int.from_bytes(data[place + 4 : place + _HEADER_BYTES], "little")
        start = place + _HEADER_BYTES
        if data[place : place + 4] == b"data":
            return data[start : start + size]
        place = start + size + size % 2
    return b""
