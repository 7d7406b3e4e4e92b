"""Whether an Ogg file is cut off within its last page, which decoders do not report.

Source: RFC 3533, section 6.
"""

_HEADER_BYTES = 27
# Bytes of a page: its header, and 255 segments of 255 bytes.
_LONGEST_PAGE = 65_307


def missing_bytes(data: bytes) -> int:
    """The number of bytes that the last page lacks; 0 if it is whole.

    A cut exactly between two pages is not noticed.
    """
    place = data.rfind(b"OggS", max(0, len(data) - _LONGEST_PAGE))
    if place < 0:
        return 0
    segments = place + _HEADER_BYTES
    if segments > len(data):
        return segments - len(data)
    count = data[segments - 1]
    lengths = data[segments : segments + count]
    return max(0, segments + count + sum(lengths) - len(data))
