"""What a WAV file holds, whatever it is encoded as.

Source: Multimedia Programming Interface and Data Specifications 1.0, IBM and Microsoft 1991,
chapter 2.
"""

_HEADER_BYTES = 8
"""Of a chunk: its name and size. The file itself is one, with a name of its content behind it."""


def content(data: bytes) -> bytes:
    """The content of the chunk `data`, as far as it is there; of no RIFF file all of it."""
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
