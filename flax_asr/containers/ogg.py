"""Whether an Ogg file ends where its last page does; decoders do not say so.

Source: RFC 3533, section 6.
"""

_HEADER_BYTES = 27
# Of a page, its header with 255 segments of 255 bytes included.
_LONGEST_PAGE = 65_307


def missing_bytes(data: bytes) -> int:
    """How many bytes the last page lacks; 0 where it is whole.

    Only a cut between two pages is not seen.
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
