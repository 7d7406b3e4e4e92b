"""Audio files to 16 kHz mono. The only file that uses soundfile, soxr and librosa.

The result is bit-identical to `librosa.load(path, sr=16000)`, without librosa's import, which takes
seconds and hundreds of megabytes in every process. Headers are not trusted: memory grows with what
is decoded, not with what a header claims.
"""

import io
import os
import re
import stat
from math import ceil, isfinite

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

from flax_asr import errors
from flax_asr.containers import mp3, ogg, riff

SAMPLE_RATE_HZ = 16_000
# The reasons of `decode`, in the order of its checks.
REASONS = (
    "missing",
    "empty",
    "damaged",
    "too_long",
    "truncated",
    "not_finite",
    "silent",
)
# About three steps of 16 bits.
SILENT_PEAK = 1e-4
LONGEST_SECONDS = 12 * 3600.0

_RATES_HZ = range(1000, 768_001)
_CHANNELS = range(1, 33)
_BLOCK_FRAMES = 2**17
# The most samples that a byte of MP3 or Ogg reasonably encodes (8 kbit/s at up to 48 kHz).
_FRAMES_A_BYTE = 64
# Unsupported formats: signature, its offset, name.
_FOREIGN = (
    (b"ftyp", 4, "MP4 (M4A, AAC)"),
    (b"\x1a\x45\xdf\xa3", 0, "Matroska (WebM)"),
    (b"#!AMR", 0, "AMR"),
    (b"\x30\x26\xb2\x75", 0, "ASF (WMA)"),
)
# A header's count may include the encoder's delay and padding.
_MP3_SLACK_FRAMES = 3 * 1152
# Channels cancel each other if their mean is quieter than the first one by this factor.
_CANCELLED = 0.01
_GLANCE_SAMPLES = 4096
# Quieter than the loudest moment by this much counts as silence at the ends.
_QUIET_DB = 40.0
# 64 ms, for voices.
_VOCODER_SAMPLES = 1024


def decode(
    source: str | os.PathLike | bytes | None, *, max_seconds: float | int | None = None
) -> Float32[np.ndarray, " samples"]:
    """Decodes, mixes down to one channel and resamples to 16 kHz.

    Channels are averaged; if they cancel each other (one is the inverse of the other), the first is
    taken instead.

    Args:
        source: the path or the content of a file, in any format that libsndfile reads.
        max_seconds: longer recordings are refused, if possible by their header. Without it the
            limit is `LONGEST_SECONDS`.

    Raises:
        errors.AudioError: its `reason` is one of `REASONS`. A truncated file is noticed if its
            header states its length (MP3, FLAC, WAV); an Ogg file unless cut between two pages.
    """
    longest = LONGEST_SECONDS if max_seconds is None else float(max_seconds)
    if isinstance(source, bytes):
        if not source:
            raise errors.AudioError("empty", "no bytes")
        return _decode(io.BytesIO(source), longest)
    if source is None:
        raise errors.AudioError("missing", "the corpus gives no audio for this clip")
    with _open(source) as file:
        return _decode(file, longest)


def _open(path: str | os.PathLike) -> io.BufferedReader:
    try:
        # Not opened first, as opening a pipe would block.
        information = os.stat(path)
        if not stat.S_ISREG(information.st_mode):
            kind = "a folder: name its files" if stat.S_ISDIR(information.st_mode) else "no file"
            raise errors.AudioError("damaged", f"{os.fspath(path)} is {kind}")
        if information.st_size == 0:
            raise errors.AudioError("empty", f"{os.fspath(path)} has no bytes")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise errors.AudioError("missing", str(error)) from None


def _decode(
    file: io.BytesIO | io.BufferedReader, longest: float
) -> Float32[np.ndarray, " samples"]:
    try:
        # libsndfile reads a descriptor itself, and does not go by the file's extension.
        with soundfile.SoundFile(
            file if isinstance(file, io.BytesIO) else file.fileno(), closefd=False
        ) as sound:
            _check_header(sound, longest, file)
            rate_hz, channels = sound.samplerate, _channels(sound, _size(file))
            _check_length(sound, len(channels[0]), file)
    except soundfile.LibsndfileError as error:
        file.seek(0)
        raise errors.AudioError("damaged", _undecoded(error.error_string, file.read(16))) from None
    except MemoryError:
        raise errors.AudioError("damaged", "decoding it takes more memory than there is") from None
    recorded = _uncancelled(*channels)
    mono = _resample(recorded, rate_hz)
    peak = _peak(mono)  # not finite also if resampling overflowed
    if not isfinite(peak):
        if isfinite(_peak(recorded)):
            raise errors.AudioError("not_finite", "its samples are too large to resample")
        raise errors.AudioError("not_finite", "it holds NaN or infinity")
    if len(mono) > longest * SAMPLE_RATE_HZ:
        raise errors.AudioError(
            "too_long", f"{len(mono) / SAMPLE_RATE_HZ:.2f} s, more than {longest:g} s"
        )
    if peak < SILENT_PEAK:
        raise errors.AudioError("silent", f"its loudest sample is {peak:.1e}")
    return mono


def _undecoded(why: str, beginning: bytes) -> str:
    for mark, place, name in _FOREIGN:
        if beginning[place : place + len(mark)] == mark:
            return (
                f"it is {name}, which libsndfile does not read: convert it before, for example with"
                " `ffmpeg -i FILE FILE.flac`"
            )
    return f"{why} It begins with {beginning!r}"


def _check_header(
    sound: soundfile.SoundFile, longest: float, file: io.BytesIO | io.BufferedReader
) -> None:
    if sound.samplerate not in _RATES_HZ or sound.channels not in _CHANNELS:
        raise errors.AudioError(
            "damaged", f"its header claims {sound.samplerate} Hz and {sound.channels} channels"
        )
    if sound.frames <= 0:
        raise errors.AudioError("empty", "its header counts no samples")
    seconds, slack = sound.frames / sound.samplerate, _MP3_SLACK_FRAMES / sound.samplerate
    if seconds > longest + slack and _is_mp3(sound):
        # Without a frame count, the header's length is a guess from the first frame's size.
        extent = mp3.extent(riff.content(_content(file)))
        if extent is not None:
            seconds = extent.samples / sound.samplerate
    if seconds > LONGEST_SECONDS:
        raise errors.AudioError("damaged", f"its header claims {seconds / 3600:.0f} hours")
    if seconds > longest + slack:
        raise errors.AudioError("too_long", f"{seconds:.2f} s, more than {longest:g} s")


def _size(file: io.BytesIO | io.BufferedReader) -> int:
    return (
        file.getbuffer().nbytes if isinstance(file, io.BytesIO) else os.fstat(file.fileno()).st_size
    )


def _content(file: io.BytesIO | io.BufferedReader) -> bytes:
    """The whole content, without moving the position, which a decoder may be using."""
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    return os.pread(file.fileno(), _size(file), 0)


def _is_mp3(sound: soundfile.SoundFile) -> bool:
    """Whether it is MP3, which some recorders and ffmpeg also write inside a WAV file."""
    return sound.subtype.startswith("MPEG_LAYER")


def _channels(
    sound: soundfile.SoundFile, file_bytes: int
) -> tuple[Float32[np.ndarray, " frames"], Float32[np.ndarray, " frames"]]:
    """The mean of all channels, and the first channel, read in pieces."""
    frames = _BLOCK_FRAMES
    if _is_mp3(sound) or sound.format == "OGG":
        # soundfile seeks after every read, which changes the last bits that such a decoder returns.
        frames = max(frames, min(sound.frames, _FRAMES_A_BYTE * file_bytes))
    means, firsts = [], []
    left = sound.frames
    while left > 0 and len(block := sound.read(min(frames, left), dtype="float32")):
        left -= len(block)
        if block.ndim == 1:
            means.append(block)
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            # Transposed, so that sums are in librosa's order.
            means.append(np.mean(block.T, axis=0))
        firsts.append(block[:, 0].copy())
    if not means:
        raise errors.AudioError("damaged", "nothing in it can be decoded")
    mean = means[0] if len(means) == 1 else np.concatenate(means)
    return mean, np.concatenate(firsts) if firsts else mean


def _check_length(
    sound: soundfile.SoundFile, decoded: int, file: io.BytesIO | io.BufferedReader
) -> None:
    """Compares the decoded length with the length that the file states."""
    is_mp3 = _is_mp3(sound)
    extent = mp3.extent(riff.content(_content(file))) if is_mp3 else None
    slack = _MP3_SLACK_FRAMES if is_mp3 else 0
    # Without a frame count, `sound.frames` is a guess from the first frame's size.
    if (extent is None or extent.counted) and decoded < sound.frames - slack:
        raise errors.AudioError("truncated", f"{decoded} of {sound.frames} samples are there")
    if is_mp3:
        if extent is None:
            return
        if extent.missing_bytes:
            raise errors.AudioError(
                "truncated", f"the last {extent.missing_bytes} bytes are missing"
            )
        if decoded < extent.samples - slack:
            raise errors.AudioError(
                "damaged",
                f"a variable bit rate without a frame count: only {decoded} of {extent.samples} "
                "samples would be heard; encode it again",
            )
    if sound.format == "OGG":
        file.seek(0)
        missing = ogg.missing_bytes(file.read())
        if missing:
            raise errors.AudioError("truncated", f"the last {missing} bytes are missing")
    # libsndfile counts what is there and logs a note. Streamed files state 2 or 4 GiB here.
    note = re.search(r"^data : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if note and int(note[2]) < int(note[1]) < 2**31 - 2**16:
        raise errors.AudioError("truncated", f"{note[2]} of {note[1]} bytes are there")


def _uncancelled(
    mean: Float32[np.ndarray, " frames"], first: Float32[np.ndarray, " frames"]
) -> Float32[np.ndarray, " frames"]:
    if first is mean:
        return mean
    return first if _peak(mean) < _CANCELLED * _peak(first) else mean


def _peak(samples: Float32[np.ndarray, " samples"]) -> float:
    return float(max(samples.max(), -samples.min()))


def _resample(
    samples: Float32[np.ndarray, " frames"], rate_hz: int
) -> Float32[np.ndarray, " samples"]:
    """Like librosa.resample(res_type="soxr_hq"): the length is rounded up."""
    if rate_hz == SAMPLE_RATE_HZ:
        return samples
    size = ceil(len(samples) * (SAMPLE_RATE_HZ / rate_hz))
    resampled = soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ, quality="HQ")[:size]
    return _lengthened(resampled, size)


def _lengthened(
    samples: Float32[np.ndarray, " samples"], size: int
) -> Float32[np.ndarray, " size"]:
    """The samples padded with zeros; not a copy if they are long enough."""
    return samples if len(samples) == size else np.pad(samples, (0, size - len(samples)))


def encode_int16(
    samples: Float32[np.ndarray, " samples"],
) -> tuple[Int16[np.ndarray, " samples"], float]:
    """Integers and a gain: `integers * gain` equals the samples to within half a gain and float32's
    rounding.

    The gain makes the loudest sample 32767, so that quiet recordings keep 16 bits. Samples that
    were 16-bit already are restored exactly.
    """
    low, high = samples.min(initial=0), samples.max(initial=0)
    if low >= -1 and high < 1:
        # A power of two rounds nothing; a few samples are enough to rule out most recordings.
        for part in (samples[:_GLANCE_SAMPLES], samples):
            scaled = part * np.float32(32768)
            if not np.array_equal(scaled, np.rint(scaled)):
                break
        else:
            return scaled.astype(np.int16), 1 / 32768
    gain = float(np.float32(max(-low, high) / 32767)) or 1.0
    integers = samples / np.float32(gain)
    np.rint(integers, out=integers)
    np.clip(integers, -32767, 32767, out=integers)
    return integers.astype(np.int16), gain


def trim_silence(samples: Float32[np.ndarray, " samples"]) -> Float32[np.ndarray, " kept"]:
    """Trims quiet ends to a tenth of a second; an entirely quiet recording is not changed."""
    import librosa

    _, (start, end) = librosa.effects.trim(samples, top_db=_QUIET_DB)
    margin = SAMPLE_RATE_HZ // 10
    return samples[max(0, start - margin) : end + margin] if end > start else samples


def mel_decibels(
    samples: Float32[np.ndarray, " samples"],
) -> Float32[np.ndarray, "bands frames"]:
    """80 mel bands every 10 ms, in decibels relative to the loudest value, at least -80."""
    import librosa

    power = librosa.feature.melspectrogram(
        y=samples, sr=SAMPLE_RATE_HZ, n_fft=400, hop_length=160, n_mels=80
    )
    return librosa.power_to_db(power, ref=np.max, top_db=80.0)


def stretch(
    samples: Float32[np.ndarray, " samples"], length: int
) -> Float32[np.ndarray, " length"]:
    """The samples played faster or slower, to a length of `length`; pitch changes with it."""
    if length == len(samples):
        return samples
    played = soxr.resample(samples, len(samples), length, quality="HQ")[:length]
    return _lengthened(played, length)


def shift_pitch(
    samples: Float32[np.ndarray, " samples"], semitones: float
) -> Float32[np.ndarray, " samples"]:
    """The samples at another pitch and of the same length, by a phase vocoder."""
    import librosa

    # A recording shorter than the vocoder's window is padded.
    whole = np.pad(samples, (0, max(0, _VOCODER_SAMPLES - len(samples))))
    shifted = librosa.effects.pitch_shift(
        whole, sr=SAMPLE_RATE_HZ, n_steps=semitones, n_fft=_VOCODER_SAMPLES, res_type="soxr_hq"
    )
    return shifted[: len(samples)].astype(np.float32, copy=False)
