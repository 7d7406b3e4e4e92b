"""Damaged recordings and tables: the same number gives the same damage, so it can be seen again."""

import csv
import functools
import io
import json
import os
import pathlib
import struct
from collections.abc import Callable

import numpy as np
import soundfile

from flax_asr import common_voice, errors

FORMATS = ("WAV", "MP3", "FLAC", "OGG")
RATES_HZ = (8_000, 16_000, 32_000, 44_100, 48_000)
HOUR_SECONDS = 3600
SENTENCE = "一句話"


def tone(rate_hz: int, seconds: float, channels: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(int(rate_hz * seconds)) / rate_hz
    clean = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 400) * time)
    return (clean[:, None] + rng.normal(0, 0.02, (len(time), channels))).astype(np.float32)


def encoded(samples: np.ndarray, rate_hz: int, format: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=format, subtype=subtype)
    return buffer.getvalue()


@functools.cache
def recordings() -> tuple[bytes, ...]:
    """Whole ones: every format at every rate, one and two channels."""
    return tuple(
        encoded(tone(rate_hz, 0.4 + 0.1 * place, channels, place), rate_hz, format)
        for place, rate_hz in enumerate(RATES_HZ)
        for channels in (1, 2)
        for format in FORMATS
    )


def whole(content: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(content)


def flipped_bits(content: bytearray, rng: np.random.Generator) -> bytes:
    for place in rng.integers(len(content), size=rng.integers(1, 64)):
        content[place] ^= 1 << rng.integers(8)
    return bytes(content)


def damaged_header(content: bytearray, rng: np.random.Generator) -> bytes:
    for place in rng.integers(min(64, len(content)), size=rng.integers(1, 12)):
        content[place] = rng.integers(256)
    return bytes(content)


def cut(content: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(content[: rng.integers(1, len(content))])


def beheaded(content: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(content[rng.integers(1, len(content)) :])


def with_hole(content: bytearray, rng: np.random.Generator) -> bytes:
    start = rng.integers(len(content))
    end = min(len(content), start + rng.integers(1, 4096))
    content[start:end] = bytes(end - start)
    return bytes(content)


def stuttering(content: bytearray, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(len(content), size=2))
    return bytes(content[:end]) + bytes(content[start:end]) * 3 + bytes(content[end:])


def spliced(content: bytearray, rng: np.random.Generator) -> bytes:
    other = recordings()[rng.integers(len(recordings()))]
    return bytes(content[: rng.integers(len(content))]) + other[rng.integers(len(other)) :]


def bomb(content: bytearray, rng: np.random.Generator) -> bytes:
    """Sizes and counts in the header claim as much as their fields can hold."""
    huge = int(rng.choice([2**31 - 1, 2**32 - 1, 2**30, 2**27]))
    if content.startswith(b"RIFF"):
        field = rng.choice([4, 16, 24, 28, 40])
        content[field : field + 4] = struct.pack("<I", huge)
        content[22:24] = struct.pack("<H", rng.choice([1, 2, 255, 65535]))
    elif content.startswith(b"fLaC"):
        content[21] |= 0xF
        content[22:26] = struct.pack(">I", huge)
    elif content.startswith(b"OggS"):
        last = content.rindex(b"OggS")
        content[last + 6 : last + 14] = struct.pack("<q", huge * 2**20)
    else:
        tag = content.find(b"Xing") if b"Xing" in content else content.find(b"Info")
        if tag >= 0:
            content[tag + 8 : tag + 12] = struct.pack(">I", huge)
        content[:0] = b"ID3\x04\0\0" + rng.choice([b"\x7f\x7f\x7f\x7f", b"\0\0\0\0"])
    return bytes(content)


def page(content: bytearray, rng: np.random.Generator) -> bytes:
    return b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * int(rng.integers(1, 99))


def noise(content: bytearray, rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(1, 5000)))


def empty(content: bytearray, rng: np.random.Generator) -> bytes:
    return b""


def not_finite(content: bytearray, rng: np.random.Generator) -> bytes:
    samples = tone(16_000, 0.3, 1, 0)
    samples[rng.integers(len(samples))] = rng.choice([np.nan, np.inf, -np.inf])
    return encoded(samples, 16_000, "WAV", "FLOAT")


def antiphase(content: bytearray, rng: np.random.Generator) -> bytes:
    left = tone(16_000, 0.3, 1, int(rng.integers(2**31)))
    return encoded(np.concatenate([left, -left], axis=1), 16_000, str(rng.choice(FORMATS)))


def silence(content: bytearray, rng: np.random.Generator) -> bytes:
    return encoded(np.zeros((4_800, 1), np.float32), 48_000, str(rng.choice(FORMATS)))


def at_8_khz(content: bytearray, rng: np.random.Generator) -> bytes:
    samples = tone(8_000, rng.uniform(0.2, 2), 1, int(rng.integers(2**31)))
    return encoded(samples, 8_000, str(rng.choice(FORMATS)))


DAMAGES: tuple[Callable[[bytearray, np.random.Generator], bytes], ...] = (
    whole,
    flipped_bits,
    damaged_header,
    cut,
    beheaded,
    with_hole,
    stuttering,
    spliced,
    bomb,
    flipped_bits,
    cut,
    bomb,
    page,
    noise,
    empty,
    not_finite,
    antiphase,
    silence,
    at_8_khz,
)

PROMISED = {
    "whole": "decoded",
    "page": "damaged",
    "empty": "empty",
    "not_finite": "not_finite",
    "antiphase": "decoded",
    "silence": "silent",
    "at_8_khz": "decoded",
    "directory": "damaged",
    "absent": "missing",
    "dangling": "missing",
    "loop": "missing",
    "endless": "damaged",
    "pipe": "damaged",
    "hour.flac": "too_long",
    "hour.wav": "too_long",
    "hour.mp3": "too_long",
    "lying.flac": "silent",
    "lying.mp3": "damaged",
}
"""What `audio.decode` must say of these, whatever their number."""


def damaged(number: int) -> tuple[str, bytes]:
    """What was done, and the content of file `number`."""
    rng = np.random.default_rng(number)
    damage = DAMAGES[number % len(DAMAGES)]
    original = recordings()[rng.integers(len(recordings()))]
    return damage.__name__, damage(bytearray(original), rng)


def write(folder: pathlib.Path, count: int, hours: bool = True) -> list[tuple[str, pathlib.Path]]:
    """Damaged files and paths that are not files: (what each is, path), `count` of them."""
    found = _strange(folder)
    if hours:
        found += _hours(folder)
    for number in range(count - len(found)):
        kind, content = damaged(number)
        path = folder / f"{number}-{kind}.{FORMATS[number % 4].lower()}"
        path.write_bytes(content)
        found.append((kind, path))
    return found


def _strange(folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    (folder / "directory.mp3").mkdir()
    (folder / "dangling.mp3").symlink_to(folder / "nowhere.mp3")
    (folder / "loop.mp3").symlink_to(folder / "loop.mp3")
    (folder / "endless.mp3").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.mp3")
    names = ("directory", "absent", "dangling", "loop", "endless", "pipe")
    return [(name, folder / f"{name}.mp3") for name in names]


def _hours(folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """An hour of silence, by its header or in spite of it."""
    for name, rate_hz in (("hour.flac", 48_000), ("hour.mp3", 8_000), ("hour.wav", 8_000)):
        with soundfile.SoundFile(folder / name, "w", samplerate=rate_hz, channels=1) as file:
            for _ in range(HOUR_SECONDS // 60):
                file.write(np.zeros(60 * rate_hz, np.float32))
    flac = bytearray((folder / "hour.flac").read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = struct.pack(">I", 10 * 48_000)
    (folder / "lying.flac").write_bytes(flac)
    mp3 = bytearray((folder / "hour.mp3").read_bytes())
    tag = mp3.find(b"Xing") if b"Xing" in mp3[:200] else mp3.find(b"Info")
    mp3[tag + 8 : tag + 12] = struct.pack(">I", 10 * 8_000 // 576)
    (folder / "lying.mp3").write_bytes(mp3)
    names = ("hour.flac", "hour.mp3", "hour.wav", "lying.flac", "lying.mp3")
    return [(name, folder / name) for name in names]


# Tables

ROWS = [
    ("a.wav", SENTENCE),
    ("b.wav", 'he said "yes'),
    ("c.wav", "NA"),
    ("d.wav", "null"),
    ("e.wav", "\u200fשלום\u200e \u202eevil\u202c"),
    ("f.wav", "zero\u200bwidth\u200d\ufeff"),
    ("g.wav", "長" * 20_000),
    ("h.wav", "a\0b"),
    ("i.wav", "\x1b[2J\x07bell"),
    ("j.wav", ""),
    ("k.wav", "e\u0301 \U0002070e \ud7ff"),
    ("../l.wav", "out"),
    ("/etc/passwd", "absolute"),
    ("..\\..\\m.wav", "backslashes"),
    ("sub/../../n.wav", "out again"),
    ("a.wav", "the same clip"),
    ("", "no path"),
]

SUFFIXES = (".tsv", ".csv", ".jsonl")


def _written(suffix: str) -> bytes:
    columns = ("client_id", "path", "sentence", "age", "accents")
    rows = [("speaker", path, sentence, "", "") for path, sentence in ROWS]
    out = io.StringIO()
    if suffix == ".jsonl":
        for row in rows:
            out.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")
    elif suffix == ".csv":
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([columns, *rows])
    else:
        out.write("\n".join("\t".join(row) for row in [columns, *rows]) + "\n")
    return out.getvalue().encode()


def table(number: int) -> tuple[str, str, bytes]:
    """What was done, the suffix, and the content of table `number`."""
    rng = np.random.default_rng(number)
    suffix = SUFFIXES[number % len(SUFFIXES)]
    content = _written(suffix)
    damages = {
        "whole": lambda: content,
        "byte order mark": lambda: b"\xef\xbb\xbf" + content,
        "windows lines": lambda: content.replace(b"\n", b"\r\n"),
        "utf-16": lambda: content.decode().encode("utf-16"),
        "cp1252": lambda: content.replace(b"speaker", "spéaker".encode("cp1252")),
        "no path column": lambda: content.replace(b"path", b"file"),
        "no sentence column": lambda: content.replace(b"sentence", b"text"),
        "columns twice": lambda: content.replace(b"accents", b"path", 1),
        "empty": lambda: b"",
        "header only": lambda: content.split(b"\n")[0] + b"\n",
        "cut": lambda: content[: rng.integers(len(content))],
        "random bytes": lambda: rng.bytes(int(rng.integers(1, 3000))),
        "flipped": lambda: flipped_bits(bytearray(content), rng),
        "endless line": lambda: content + b"x" * (3 * 2**20),
        "surplus fields": lambda: content.replace(b"NA", b"NA\tb\tc\td\te\tf\tg"),
        "stray quotes": lambda: content.replace(b"NA", b'"N"A"\'"'),
        "html": lambda: page(bytearray(), rng),
        "deep": lambda: b"[" * 100_000 + b"\n",
    }
    name = list(damages)[number // len(SUFFIXES) % len(damages)]
    return name, suffix, damages[name]()


def read_table(folder: pathlib.Path, number: int) -> tuple[str, str]:
    """What was done to a table, and what came of it: a refusal, or its clips as JSON."""
    kind, suffix, content = table(number)
    folder = folder / str(number)
    (folder / "clips").mkdir(parents=True)
    file = folder / f"train{suffix}"
    file.write_bytes(content)
    source = folder if suffix == ".tsv" else file
    try:
        split = common_voice.open_source(str(source), language="zh-HK").read("train")
        clips = [(clip.id, clip.sentence, clip.refused) for clip in split]
    except errors.DataError as error:
        return kind, f"refused: {error}".replace(str(folder), "")
    return kind, json.dumps(clips)
