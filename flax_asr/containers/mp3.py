"""How many samples an MP3 file holds, from its frame headers alone.

A decoder trusts the file's size or its first header; only a walk over all frames shows that a file
without a frame count has a variable bit rate, or that it ends in the middle of a frame.

Source: ISO/IEC 11172-3 section 2.4.1.3 and 13818-3 section 2.4.1.3, layer III.
"""

import dataclasses

# Kilobits a second by index, MPEG-1 and MPEG-2/2.5; index 0 is "free", 15 is forbidden.
_KILOBITS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_RATES_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


@dataclasses.dataclass(frozen=True)
class Extent:
    """What a walk over the frames found.

    Attributes:
        samples: of all whole frames, a frame that only carries tags included.
        missing_bytes: how many bytes the last frame lacks; 0 for a whole file.
    """

    samples: int
    missing_bytes: int


def extent(data: bytes) -> Extent | None:
    """Walks from frame to frame; None where they do not follow each other to the end.

    Tags before and after the frames are passed over. Junk between frames ends the walk without a
    result, for a decoder may find its way where this does not.
    """
    place = 0
    while data[place : place + 3] == b"ID3" and len(data) >= place + 10:
        size = data[place + 6 : place + 10]
        place += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
    samples = 0
    while place + 4 <= len(data):
        header = int.from_bytes(data[place : place + 4], "big")
        version, bitrate, rate = header >> 19 & 3, header >> 12 & 15, header >> 10 & 3
        is_frame = header >> 21 == 0x7FF and header >> 17 & 3 == 1 and version != 1
        if not is_frame or bitrate in (0, 15) or rate == 3:
            is_tag = data[place : place + 3] == b"TAG" or data[place : place + 8] == b"APETAGEX"
            return Extent(samples, 0) if is_tag or not data[place:].strip(b"\0") else None
        first_version = version == 3
        bits = 1000 * _KILOBITS[not first_version][bitrate]
        length = (144 if first_version else 72) * bits // _RATES_HZ[version][rate]
        length += header >> 9 & 1
        if place + length > len(data):
            return Extent(samples, place + length - len(data))
        samples += 1152 if first_version else 576
        place += length
    return Extent(samples, 0)
