"""Makes `corpus`: a small Cantonese corpus in the form of a Common Voice release.

    pip install espeakng-loader==0.2.4 pycantonese==5.0.0 lameenc==1.9.0 soxr==1.1.0 numpy
    python configs/quickstart/make_corpus.py

Sentences and clauses of 5-14 characters out of the 150 commonest, each spoken once. No sentence
and no speaker of one split is heard in another. Takes half a minute; ORIGIN.md says what it is
made from and under which licences.
"""

import argparse
import collections
import csv
import hashlib
import pathlib
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import speech

RELEASE = pathlib.Path(__file__).parent / "corpus" / "cv-corpus-synthetic-1.0"
SEED = 20
CLIPS = {"test": 110, "dev": 70, "train": 510}
COMMONEST = 150
LETTERS = range(5, 15)  # characters in a sentence, punctuation not counted
TRAIN_OCCURRENCES = 4  # of every character, or nobody could learn it
SNR_DB = (25.0, 40.0)

# The columns and tables of a release, as of Common Voice 25.
COLUMNS = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents "
    "variant locale segment"
).split()
REPORT_COLUMNS = "sentence_id sentence locale reason".split()
AGES = ("", "twenties", "thirties", "fourties", "fifties")


def clauses(sentence: str) -> list[str]:
    """The parts of a sentence between its punctuation marks."""
    return [part for part in re.split(r"\W+", sentence) if part]


def candidates(prompts: Sequence[str]) -> list[str]:
    """Sentences and clauses that are short and made of common characters, no two alike."""
    counts = collections.Counter(c for text in prompts for c in text if "\u3400" <= c <= "\u9fff")
    common = {character for character, _ in counts.most_common(COMMONEST)}
    short: dict[str, str] = {}
    for text in [*prompts, *(part for sentence in prompts for part in clauses(sentence))]:
        letters = speech.han(text)
        if len(letters) in LETTERS and common.issuperset(letters):
            short.setdefault(letters, text)
    return list(short.values())


def overlaps(text: str, others: Iterable[str]) -> bool:
    """Whether one of the others says the text, or is said in it."""
    letters = speech.han(text)
    return any(letters in other or other in letters for other in map(speech.han, others))


def split_sentences(texts: Sequence[str], rng: np.random.Generator) -> dict[str, list[str]]:
    """Draws the sentences of each split; none contains a sentence of another split.

    Source: as Common Voice's own splits, where a sentence belongs to one split only.
    """
    remaining = [texts[i] for i in rng.permutation(len(texts))]
    chosen: dict[str, list[str]] = {}
    for split, wanted in CLIPS.items():
        taken = [text for own in chosen.values() for text in own]
        free = [text for text in remaining if not overlaps(text, taken)]
        if len(free) < wanted:
            raise ValueError(f"{split}: {wanted} sentences wanted, {len(free)} left")
        chosen[split] = free[:wanted]
        remaining = free[wanted:]
    return chosen


def rare_characters(splits: Mapping[str, Sequence[str]]) -> set[str]:
    """Characters that training hears too seldom."""
    train = collections.Counter("".join(map(speech.han, splits["train"])))
    everything = {c for own in splits.values() for text in own for c in speech.han(text)}
    return {character for character in everything if train[character] < TRAIN_OCCURRENCES}


def choose_sentences(texts: Sequence[str]) -> dict[str, list[str]]:
    """Splits in which every character is common enough in training."""
    texts = list(texts)
    while rare := rare_characters(splits := split_sentences(texts, np.random.default_rng(SEED))):
        texts = [text for text in texts if not rare & set(text)]
    return splits


def file_name(text: str) -> str:
    return f"common_voice_yue_{zlib.crc32(speech.han(text).encode()) % 10**8:08d}.mp3"


def assign_speakers(
    split: str, texts: Sequence[str], rng: np.random.Generator
) -> dict[str, list[speech.Line]]:
    """Every voice of the split says about as much as the others, at a pace and pitch of its own."""
    lines: dict[str, list[speech.Line]] = {}
    for number, text in enumerate(texts):
        voices = speech.VOICES[split]
        lines.setdefault(voices[number % len(voices)], []).append(text)
    for voice, own in lines.items():
        pace, pitch = int(rng.integers(135, 166)), int(rng.integers(35, 66))
        lines[voice] = [
            speech.Line(
                file_name=file_name(text),
                text=text,
                words_a_minute=pace + int(rng.integers(-8, 9)),
                pitch=pitch + int(rng.integers(-4, 5)),
                pitch_range=80,
            )
            for text in own
        ]
    return lines


def row(voice: str, line: speech.Line, rng: np.random.Generator) -> dict[str, object]:
    """One line of a split's table. Votes and ages are made up, as the speakers are."""
    return {
        "client_id": hashlib.sha512(f"eSpeak NG yue+{voice}".encode()).hexdigest(),
        "path": line.file_name,
        "sentence_id": hashlib.sha256(line.text.encode()).hexdigest(),
        "sentence": line.text,
        "sentence_domain": "",
        "up_votes": int(rng.integers(2, 4)),
        "down_votes": int(rng.random() < 0.1),
        "age": AGES[zlib.crc32(voice.encode()) % len(AGES)],
        "gender": "female_feminine" if voice in speech.FEMALE else "male_masculine",
        "accents": "",
        "variant": "",
        "locale": "yue",
        "segment": "",
    }


def write_table(path: pathlib.Path, columns: Sequence[str], rows: Iterable[Mapping]) -> None:
    """A TSV as Common Voice writes it: no quoting."""
    with path.open("w", encoding="utf-8", newline="") as file:
        unquoted = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        writer = csv.DictWriter(file, columns, lineterminator="\n", **unquoted)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RELEASE / "yue")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    rng = np.random.default_rng(SEED)
    splits = choose_sentences(candidates(speech.prompts()))
    tables, durations = {}, {}
    for split, texts in splits.items():
        lines = assign_speakers(split, texts, rng)
        tables[split] = [row(voice, line, rng) for voice, own in lines.items() for line in own]
        spoken = speech.record(
            arguments.out / "clips", lines, seed=SEED, snr_db=SNR_DB, workers=arguments.workers
        )
        durations[split] = {clip.file_name: clip.milliseconds for _, own in spoken for clip in own}

    tables["validated"] = [line for split in splits for line in tables[split]]
    for split in (*splits, "validated", "invalidated", "other"):
        write_table(arguments.out / f"{split}.tsv", COLUMNS, tables.get(split, ()))
    write_table(arguments.out / "reported.tsv", REPORT_COLUMNS, ())
    write_table(
        arguments.out / "clip_durations.tsv",
        ("clip", "duration[ms]"),
        (
            {"clip": clip, "duration[ms]": milliseconds}
            for own in durations.values()
            for clip, milliseconds in own.items()
        ),
    )
    for split, own in durations.items():
        speakers = len({line["client_id"] for line in tables[split]})
        print(f"{split}: {len(own)} clips, {sum(own.values()) / 60e3:.1f} min, {speakers} speakers")


if __name__ == "__main__":
    main()
