"""Decoding against librosa, and a word for everything that is wrong with a file."""

import io
import os
import re
import struct

import lameenc
import librosa
import numpy as np
import pytest
import soundfile

from flax_asr import audio
from flax_asr.containers import mp3, ogg, riff
from flax_asr.errors import AudioError


def tone(rate_hz=48_000, seconds=1.0, channels=1, seed=0):
    generator = np.random.default_rng(seed)
    time = np.arange(int(rate_hz * seconds)) / rate_hz
    clean = 0.3 * np.sin(2 * np.pi * 220 * time) * np.sin(np.pi * time / seconds)
    noisy = clean[:, None] + generator.normal(0, 0.01, (len(time), channels))
    return (noisy if channels > 1 else noisy[:, 0]).astype(np.float32)


def written(samples, rate_hz=48_000, format="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=format, subtype=subtype)
    return buffer.getvalue()


def lame(samples, rate_hz, variable=False, kilobits=64):
    encoder = lameenc.Encoder()
    encoder.set_in_sample_rate(rate_hz)
    encoder.set_out_sample_rate(rate_hz)
    encoder.set_channels(1)
    encoder.silence()
    if variable:
        encoder.set_vbr(4)
        encoder.set_vbr_quality(4)
    else:
        encoder.set_bit_rate(kilobits)
    pcm = (samples * 32767).astype("<i2").tobytes()
    return bytes(encoder.encode(pcm)) + bytes(encoder.flush())


def in_wav(content, rate_hz=48_000):
    """MP3 in a WAV file, with a chunk of odd length before it."""
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, rate_hz, 8_000, 1, 0, 12, 1, 2, 141, 1, 1393)
    chunks = ((b"fmt ", form), (b"LIST", b"INFOx"), (b"data", content))
    body = b"WAVE" + b"".join(
        name + struct.pack("<I", len(chunk)) + chunk + bytes(len(chunk) % 2)
        for name, chunk in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def refusal(source, **options):
    with pytest.raises(AudioError) as caught:
        audio.decode(source, **options)
    assert caught.value.reason in audio.REASONS
    return caught.value.reason


@pytest.mark.parametrize("format", ["WAV", "MP3", "FLAC", "OGG"])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_decoding_equals_librosa_bit_for_bit(tmp_path, format, rate_hz, channels):
    # Longer than one block, so that blocks must join without a seam.
    content = written(tone(rate_hz, 3.1, channels), rate_hz, format)
    file = tmp_path / f"clip.{format.lower()}"
    file.write_bytes(content)
    expected, _ = librosa.load(file, sr=16_000)
    for source in (file, str(file), content):
        samples = audio.decode(source)
        assert samples.dtype == np.float32
        np.testing.assert_array_equal(samples, expected)


@pytest.mark.parametrize("channels", [3, 6])
def test_more_channels_are_averaged_in_librosas_order(tmp_path, channels):
    file = tmp_path / "clip.wav"
    file.write_bytes(written(tone(16_000, 0.2, channels), 16_000, subtype="FLOAT"))
    np.testing.assert_array_equal(audio.decode(file), librosa.load(file, sr=16_000)[0])


def test_a_stray_extension_does_not_matter(tmp_path):
    content = written(tone(), format="MP3")
    for name in ("clip", "clip.raw", "clip.wav", "名前.mp3"):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(audio.decode(tmp_path / name), audio.decode(content))


def test_what_is_no_audio_is_named(tmp_path):
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20
    with pytest.raises(AudioError, match="<!DOCTYPE html>"):
        audio.decode(page)
    (tmp_path / "empty.mp3").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.mp3")
    assert refusal(page) == "damaged"
    assert refusal(b"") == "empty"
    assert refusal(tmp_path / "empty.mp3") == "empty"
    assert refusal(written(np.zeros(0, np.float32))) == "empty"
    assert refusal(tmp_path) == "damaged"
    with pytest.raises(AudioError, match="is a folder: name its files"):
        audio.decode(tmp_path)
    assert refusal(tmp_path / "pipe.mp3") == "damaged"
    assert refusal(tmp_path / "absent.mp3") == "missing"
    assert refusal(tmp_path / ("x" * 5000)) == "missing"
    assert refusal("a\0b") == "missing"
    assert refusal(None) == "missing"


@pytest.mark.parametrize(
    ("beginning", "name"),
    [
        (b"\0\0\0\x1cftypM4A ", "MP4"),
        (b"\x1a\x45\xdf\xa3\x9f", "Matroska"),
        (b"#!AMR\n", "AMR"),
        (b"\x30\x26\xb2\x75\x8e\x66", "ASF"),
    ],
)
def test_recordings_of_a_form_that_is_not_read_are_called_by_it(beginning, name):
    with pytest.raises(AudioError, match=f"damaged: it is {name}.*convert it before"):
        audio.decode(beginning + bytes(1000))


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.3])
def test_a_cut_file_is_noticed(kept):
    samples = tone(seconds=3)
    for content in (written(samples, format=f) for f in ("MP3", "WAV", "OGG")):
        assert refusal(content[: int(len(content) * kept)]) == "truncated"
    flac = written(samples, format="FLAC")
    assert refusal(flac[: int(len(flac) * kept)]) in ("truncated", "damaged")
    plain = lame(samples, 48_000)
    assert len(audio.decode(plain)) >= 48_000
    assert refusal(plain[: int(len(plain) * kept) // 192 * 192 + 100]) == "truncated"


def test_an_ogg_file_must_end_with_its_last_page():
    content = written(tone(16_000), 16_000, format="OGG")
    assert ogg.missing_bytes(content) == 0
    assert ogg.missing_bytes(content + b"junk") == 0
    assert ogg.missing_bytes(b"") == 0
    pages = [found.start() for found in re.finditer(b"OggS", content)]
    for end in range(pages[-1] + 27 + content[pages[-1] + 26], len(content)):
        assert ogg.missing_bytes(content[:end]) == len(content) - end
    for end in range(pages[-1] + 4, pages[-1] + 27 + content[pages[-1] + 26]):
        assert ogg.missing_bytes(content[:end]) > 0


def test_a_variable_bit_rate_without_a_frame_count_is_refused_not_shortened():
    content = lame(tone(seconds=3), 48_000, variable=True)
    assert len(soundfile.read(io.BytesIO(content))[0]) < 120_000
    assert refusal(content) == "damaged"


@pytest.mark.parametrize("in_file", [False, True])
def test_a_small_first_frame_without_a_frame_count_does_not_make_the_file_longer(tmp_path, in_file):
    """libsndfile guesses four times as many samples, and those are neither missing nor too many."""
    low, usual = (lame(tone(seconds=3), 48_000, kilobits=kilobits) for kilobits in (32, 128))
    content = low[:96] + usual[384:]
    assert soundfile.info(io.BytesIO(content)).frames > 12 * 48_000
    source = content
    if in_file:
        source = tmp_path / "clip.mp3"
        source.write_bytes(content)
    assert len(audio.decode(source)) == len(audio.decode(usual))
    assert len(audio.decode(source, max_seconds=4)) == len(audio.decode(usual))
    assert refusal(source, max_seconds=2) == "too_long"
    assert refusal(content[:-100]) == "truncated"


def test_a_frame_count_is_believed_though_the_last_frame_is_whole():
    counted = written(tone(seconds=3), format="MP3")
    whole = mp3.extent(counted)
    assert whole.counted
    # The walk alone does not miss frames that are not there at all.
    cut = next(
        n for n in range(len(counted) // 2, 0, -1) if mp3.extent(counted[:n]).missing_bytes == 0
    )
    assert refusal(counted[:cut]) == "truncated"
    assert refusal(counted, max_seconds=2) == "too_long"


@pytest.mark.parametrize("rate_hz", [48_000, 16_000])
def test_mp3_in_a_wav_file_is_mp3(rate_hz):
    """libsndfile takes its header for sound, and counts samples that are not there."""
    plain, tagged = lame(tone(rate_hz, 3), rate_hz), written(tone(rate_hz, 3), rate_hz, "MP3")
    for content in (plain, tagged):
        np.testing.assert_array_equal(audio.decode(in_wav(content, rate_hz)), audio.decode(content))
        assert refusal(in_wav(content[:-10], rate_hz)) == "truncated"
        assert refusal(in_wav(content, rate_hz)[:-10]) == "truncated"
    variable = lame(tone(rate_hz, 3), rate_hz, variable=True)
    with pytest.raises(AudioError, match="damaged: a variable bit rate without a frame count"):
        audio.decode(in_wav(variable, rate_hz))


def test_the_content_of_a_wav_file_is_its_chunk_of_data():
    assert riff.content(in_wav(b"abc")) == b"abc"
    assert riff.content(in_wav(b"abc")[:-2]) == b"ab"
    assert riff.content(in_wav(b"abc").replace(b"data", b"more")) == b""
    assert riff.content(b"abc") == b"abc"
    assert riff.content(b"RIFF") == b""


@pytest.mark.parametrize(("rate_hz", "frame"), [(48_000, 1152), (16_000, 576), (8_000, 576)])
def test_the_walk_over_frames_counts_what_the_decoder_decodes(rate_hz, frame):
    content = lame(tone(rate_hz, 2), rate_hz)
    decoded = len(soundfile.read(io.BytesIO(content))[0])
    assert mp3.extent(content) == mp3.Extent(decoded, 0, False)
    tagged = b"ID3\x04\0\0\0\0\0\x05-----" + content + b"TAG" + bytes(125)
    assert mp3.extent(tagged) == mp3.Extent(decoded, 0, False)
    assert mp3.extent(content[:-1]) == mp3.Extent(decoded - frame, 1, False)
    assert mp3.extent(content + b"junk") is None


def test_one_nan_refuses_the_clip():
    samples = tone()
    samples[1000] = np.nan
    assert refusal(written(samples, subtype="FLOAT")) == "not_finite"
    samples[1000] = np.inf
    assert refusal(written(samples, subtype="FLOAT")) == "not_finite"
    samples[:] = 3e38
    assert refusal(written(np.stack([samples, samples], 1), subtype="FLOAT")) == "not_finite"
    for rate_hz in (8_000, 16_000, 44_100, 96_000):
        for place in (0, -1):
            samples = tone()
            samples[place] = np.nan
            assert refusal(written(samples, rate_hz, subtype="FLOAT")) == "not_finite"


def test_silence_is_refused_and_a_whisper_is_not():
    assert refusal(written(np.zeros(48_000, np.float32))) == "silent"
    assert refusal(written(tone() * 1e-5, subtype="FLOAT")) == "silent"
    assert len(audio.decode(written(tone() * 2e-3))) == 16_000


@pytest.mark.parametrize("format", ["WAV", "MP3"])
def test_channels_that_cancel_each_other_leave_the_first(format):
    left = tone(16_000)
    content = written(np.stack([left, -left], axis=1), 16_000, format)
    samples = audio.decode(content)
    assert np.corrcoef(samples[:15_000], left[:15_000])[0, 1] > 0.9


def test_too_long_is_refused_by_the_header_and_by_what_is_decoded():
    content = written(tone(16_000, 2), 16_000)
    assert refusal(content, max_seconds=1) == "too_long"
    assert refusal(content, max_seconds=1.999) == "too_long"
    assert len(audio.decode(content, max_seconds=2)) == 32_000


def flac_claiming(frames):
    content = bytearray(written(tone(seconds=0.5), format="FLAC"))
    # STREAMINFO: the low 36 bits of bytes 10..17 after the 8 bytes of marker and block header.
    content[21] = content[21] & 0xF0 | frames >> 32 & 0xF
    content[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(content)


def test_a_header_that_claims_terabytes_takes_no_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(flac_claiming(2**36 - 1)) == "damaged"
    assert refusal(flac_claiming(2**33), max_seconds=20) in ("damaged", "too_long")
    assert refusal(flac_claiming(48_000 * 3600)) in ("damaged", "truncated")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_absurd_rates_are_refused():
    content = bytearray(written(tone(16_000, 0.1), 16_000))
    content[24:28] = (2**31 - 1).to_bytes(4, "little")
    assert refusal(bytes(content)) == "damaged"
    content[24:28] = (1).to_bytes(4, "little")
    assert refusal(bytes(content)) == "damaged"


def verdict(content):
    try:
        samples = audio.decode(content, max_seconds=20)
    except AudioError as error:
        return error.reason
    assert np.isfinite(samples).all()
    assert 0 < len(samples) <= 20 * audio.SAMPLE_RATE_HZ
    return samples.tobytes()


def test_damaged_files_give_audio_or_a_reason_and_the_same_one_each_time():
    originals = [written(tone(16_000, 0.3), 16_000, f) for f in ("WAV", "MP3", "FLAC", "OGG")]
    verdicts = []
    for _ in range(2):
        generator = np.random.default_rng(0)
        verdicts.append([])
        for trial in range(200):
            content = bytearray(originals[trial % 4])
            places = generator.integers(len(content), size=generator.integers(1, 30))
            if trial % 3 == 0:
                places %= 64
            for place in places:
                content[place] = generator.integers(256)
            if trial % 5 == 0:
                del content[generator.integers(len(content)) :]
            verdicts[-1].append(verdict(bytes(content)))
    assert verdicts[0] == verdicts[1]
    reasons = {verdict for verdict in verdicts[0] if isinstance(verdict, str)}
    assert {"damaged", "truncated"} <= reasons <= set(audio.REASONS)


def test_int16_is_within_half_a_gain_and_keeps_16_bits_of_a_whisper():
    for scale in (1.0, 1e-3, 7.5):
        samples = tone(16_000) * np.float32(scale)
        integers, gain = audio.encode_int16(samples)
        assert integers.dtype == np.int16
        assert np.abs(integers).max() == 32767
        assert np.abs(integers * gain - samples).max() <= gain * (0.5 + 1e-3)


def test_what_was_16_bits_comes_back_exactly():
    pcm = np.array([-32768, 32767, 0, 1, -5], np.int16)
    integers, gain = audio.encode_int16((pcm / 32768).astype(np.float32))
    np.testing.assert_array_equal(integers, pcm)
    assert np.float32(gain) == 1 / 32768


def test_trimming_takes_silence_and_keeps_speech():
    speech = tone(16_000)
    padded = np.concatenate([np.zeros(16_000, np.float32), speech, np.zeros(8_000, np.float32)])
    trimmed = audio.trim_silence(padded)
    assert 16_000 - 1_000 < len(trimmed) < 16_000 + 2 * 1_600 + 2_048
    assert np.abs(trimmed).max() == np.abs(speech).max()
    quiet = np.zeros(5_000, np.float32)
    np.testing.assert_array_equal(audio.trim_silence(quiet), quiet)
