"""Synthetic Cantonese speakers: text in, MP3 out. Shared by make_corpus.py and make_encoder.py.

    pip install espeakng-loader==0.2.4 pycantonese==5.0.0 lameenc==1.9.0

eSpeak NG (GPL-3.0) is run as a program that makes recordings; nothing of it lies here. It keeps a
hidden state between sentences, so a speaker's clips are made in order by one fresh process: the
bytes do not depend on how many workers share the work.
"""

import concurrent.futures
import ctypes
import json
import multiprocessing
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# The voices of eSpeak NG that speak Cantonese clearly, by the part they play. Voices that sound
# almost alike (f3 f4 aunty linda; steph steph2; michel miguel; ...) are all on the training side,
# so that a voice of dev or test has no twin there. (The voice rob crashes the library.)
VOICES = {
    "train": tuple(
        "f1 f3 f4 aunty linda Alicia steph steph2 quincy grandma zac "
        "m2 m4 m5 m6 m7 m8 Alex Andy Denis Diogo Gene Henrique Hugo Jacky Lee Mario Mike Reed adam "
        "benjamin edward grandpa gustave ian iven3 iven4 john klatt3 klatt4 marcelo max michel "
        "miguel mike2 norbert pablo paul robert sandro victor".split()
    ),
    "dev": ("f2", "belinda", "m3", "Michael", "boris"),
    "test": ("f5", "Annie", "shelby", "m1", "david", "travis", "Nguyen"),
}
FEMALE = frozenset(
    "f1 f2 f3 f4 f5 aunty linda Alicia Annie steph steph2 quincy grandma belinda shelby".split()
)

MP3_RATE_HZ = 24_000
MP3_KILOBITS = 24

# Source: espeak_PARAMETER, espeak_AUDIO_OUTPUT and espeakCHARS_* in eSpeak NG's speak_lib.h.
_SYNCHRONOUS = 2
_RATE, _PITCH, _RANGE = 1, 3, 4
_UTF8, _BY_CHARACTER = 1, 1

# One syllable as eSpeak writes it, the tone after the vowel: `k'eoi5_|`, `j'a4n_|`, `'ng4_|`.
_SYLLABLE = re.compile(r"([A-Za-z]*)'([a-z]+)([1-7])([a-z]*)_\|")


class Line(NamedTuple):
    """One clip to be spoken: words a minute, pitch and its range on eSpeak's scale of 0-99.

    eSpeak's usual range of 50 gives tones over four semitones, 80 over seven, as people have them.
    `stretch` above 1 makes the speaker smaller: faster, higher, formants and all.
    """

    file_name: str
    text: str
    words_a_minute: int
    pitch: int
    pitch_range: int
    stretch: float = 1.0


class Spoken(NamedTuple):
    """What became of a Line: its MP3 file, its length, and what was said, syllable by syllable."""

    file_name: str
    milliseconds: int
    syllables: tuple[str, ...]


class Synthesiser:
    """eSpeak NG reading Cantonese with one voice."""

    def __init__(self, voice: str, seed: int):
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        data = espeakng_loader.get_data_path().encode()
        self.rate_hz = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._pieces: list[np.ndarray] = []
        receiver = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._receiver = receiver(self._receive)  # the library keeps a bare pointer to it
        self._library.espeak_SetSynthCallback(self._receiver)
        if self._library.espeak_SetVoiceByName(f"yue+{voice}".encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}")

    def _receive(self, samples, count, _events) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, line: Line) -> np.ndarray:
        """Speech as float32 samples in [-1, 1] at `rate_hz`."""
        self._pieces.clear()
        settings = (_RATE, line.words_a_minute), (_PITCH, line.pitch), (_RANGE, line.pitch_range)
        for parameter, value in settings:
            self._library.espeak_SetParameter(parameter, value, 0)
        text = line.text.encode()
        size = ctypes.c_size_t(len(text) + 1)
        self._library.espeak_Synth(text, size, 0, _BY_CHARACTER, 0, _UTF8, None, None)
        return np.concatenate(self._pieces).astype(np.float32) / 32768

    def syllables(self, text: str) -> tuple[str, ...]:
        """How the text is read, in jyutping; empty if a part of it is not Cantonese syllables."""
        buffer = ctypes.create_string_buffer(text.encode())
        position = ctypes.c_void_p(ctypes.addressof(buffer))
        clauses = []
        while position.value:
            clause = self._library.espeak_TextToPhonemes(ctypes.byref(position), _UTF8, 0)
            clauses.append(clause.decode())
        phonemes = "".join(clauses).replace(" ", "")
        if _SYLLABLE.sub("", phonemes):
            return ()
        return tuple(
            (onset.replace("N", "ng") + vowel + coda) + tone
            for onset, vowel, tone, coda in _SYLLABLE.findall(phonemes)
        )


def prompts() -> list[str]:
    """The sentences of Common Voice's Cantonese sentence collector, as pycantonese carries them."""
    import pycantonese

    package = pathlib.Path(pycantonese.__file__).parent
    return json.loads((package / "data/common_voice/sents.json").read_text("utf-8"))


def han(text: str) -> str:
    """The letters of a sentence: its punctuation and spaces taken out."""
    return "".join(character for character in text if character.isalnum())


def in_a_room(
    speech: np.ndarray, rate_hz: int, rng: np.random.Generator, *, snr_db: tuple[float, float]
) -> np.ndarray:
    """Adds silence at both ends, sometimes a short echo, a level and coloured noise."""
    ends = [np.zeros(int(rate_hz * rng.uniform(0.05, 0.25)), np.float32) for _ in range(2)]
    sound = np.concatenate([ends[0], speech, ends[1]])
    size = 1 << (len(sound) + rate_hz // 8).bit_length()
    if rng.random() < 0.4:
        tail = np.arange(rate_hz // 10) / rate_hz
        echo = rng.standard_normal(len(tail)) * np.exp(-tail / rng.uniform(0.005, 0.02))
        echo *= rng.uniform(0.05, 0.15)
        echo[0] = 1.0
        sound = np.fft.irfft(np.fft.rfft(sound, size) * np.fft.rfft(echo, size), size)[: len(sound)]
    sound *= 10 ** (rng.uniform(-14, -2) / 20) / np.abs(sound).max()
    spectrum = np.fft.rfft(rng.standard_normal(size))
    slope = (1 + np.linspace(0, 40, len(spectrum))) ** -rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum * slope, size)[: len(sound)]
    noise *= np.sqrt(np.mean(sound**2) / np.mean(noise**2)) * 10 ** (-rng.uniform(*snr_db) / 20)
    return np.clip(sound + noise, -1, 1).astype(np.float32)


def mp3(sound: np.ndarray) -> bytes:
    """Mono float32 samples at MP3_RATE_HZ as an MP3 file."""
    import lameenc

    encoder = lameenc.Encoder()
    encoder.set_in_sample_rate(MP3_RATE_HZ)
    encoder.set_out_sample_rate(MP3_RATE_HZ)  # LAME would halve it at this bit rate
    encoder.set_channels(1)
    encoder.set_bit_rate(MP3_KILOBITS)
    encoder.set_quality(2)
    encoder.silence()
    samples = np.round(sound * 32767).astype("<i2")
    return bytes(encoder.encode(samples.tobytes())) + bytes(encoder.flush())


def record(
    folder: pathlib.Path,
    lines: dict[str, Sequence[Line]],
    *,
    seed: int,
    snr_db: tuple[float, float],
    workers: int,
) -> Iterable[tuple[str, list[Spoken]]]:
    """Speaks each voice's lines into MP3 files in `folder`; yields (voice, what it said)."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, voice, tuple(own), seed, snr_db) for voice, own in lines.items()]
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        yield from pool.map(_record_voice, jobs)


def _record_voice(
    job: tuple[pathlib.Path, str, tuple[Line, ...], int, tuple[float, float]],
) -> tuple[str, list[Spoken]]:
    import soxr

    folder, voice, lines, seed, snr_db = job
    synthesiser = Synthesiser(voice, seed)
    rng = np.random.default_rng([seed, *voice.encode()])
    spoken = []
    for line in lines:
        speech = soxr.resample(
            synthesiser.say(line), synthesiser.rate_hz * line.stretch, MP3_RATE_HZ, "HQ"
        )
        sound = in_a_room(speech, MP3_RATE_HZ, rng, snr_db=snr_db)
        (folder / line.file_name).write_bytes(mp3(sound))
        milliseconds = round(1000 * len(sound) / MP3_RATE_HZ)
        spoken.append(Spoken(line.file_name, milliseconds, synthesiser.syllables(line.text)))
    return voice, spoken
