"""The number of samples in an MP3 file, from its frame headers alone.

A decoder trusts the file's size or its first header; only a walk over all frames shows that a file
without a frame count has a variable bit rate, or that it ends in the middle of a frame.

Source: ISO/IEC 11172-3 section 2.4.1.3 and 13818-3 section 2.4.1.3, layer III. Frame counts: the
Xing tag (LAME's "Info" is one) and Fraunhofer's VBRI, as libmpg123 looks for them.
"""

import dataclasses
import functools

# Kilobits a second by index, MPEG-1 and MPEG-2/2.5; index 0 is "free", 15 is forbidden.
_KILOBITS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
# Offsets of a tag in the first frame: after the side information of mono or stereo.
_TAG_PLACES = (13, 21, 36)
_COUNTS_FRAMES = 1  # a flag of a Xing tag
_RATES_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


@dataclasses.dataclass(frozen=True)
class Extent:
    """The length of an MP3 file, from a walk over its frames.

    Attributes:
        samples: samples per channel in all whole frames, including a frame that only holds tags.
        missing_bytes: number of bytes that the last frame lacks; 0 for a whole file.
        counted: whether the first frame states the number of frames. If not, a decoder assumes that
            all frames have the size of the first.
    """

    samples: int
    missing_bytes: int
    counted: bool


def extent(data: bytes) -> Extent | None:
    """Walks from frame to frame; None if they do not follow each other to the end.

    Tags before and after the frames are skipped. Junk between frames ends the walk without a
    result, as a decoder may be able to skip it.
    """
    place = 0
    while data[place : place + 3] == b"ID3" and len(data) >= place + 10:
        size = data[place + 6 : place + 10]
        place += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
    samples, end, counted = 0, len(data), _is_counted(data[place : place + 44])
    while place + 4 <= end:
        frame = _frame(data[place : place + 3])
        if frame is None:
            is_tag = data[place : place + 3] == b"TAG" or data[place : place + 8] == b"APETAGEX"
            return Extent(samples, 0, counted) if is_tag or not data[place:].strip(b"\0") else None
        length, frame_samples = frame
        if place + length > end:
            return Extent(samples, place + length - end, counted)
        samples += frame_samples
        place += length
    return Extent(samples, 0, counted)


def _is_counted(frame: bytes) -> bool:
    """Whether this first frame of a file states the number of frames."""
    tags = [frame[place : place + 8] for place in _TAG_PLACES]
    return frame[36:40] == b"VBRI" or any(
        tag[:4] in (b"Xing", b"Info") and tag[-1] & _COUNTS_FRAMES for tag in tags
    )


@functools.lru_cache(maxsize=1024)  # a file has few kinds of frames, and thousands of them
def _frame(header: bytes) -> tuple[int, int] | None:
    """(Bytes, samples) of the frame that begins with these three bytes; None if none does."""
    bits = int.from_bytes(header, "big")
    version, bitrate, rate = bits >> 11 & 3, bits >> 4 & 15, bits >> 2 & 3
    is_frame = bits >> 13 == 0x7FF and bits >> 9 & 3 == 1 and version != 1
    if not is_frame or bitrate in (0, 15) or rate == 3:
        return None
    first_version = version == 3
    bits_a_second = 1000 * _KILOBITS[not first_version][bitrate]
    length = (144 if first_version else 72) * bits_a_second // _RATES_HZ[version][rate]
    return length + (bits >> 1 & 1), 1152 if first_version else 576
