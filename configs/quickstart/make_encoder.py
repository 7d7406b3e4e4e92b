"""Makes `encoder`: a small wav2vec 2.0 encoder that knows Cantonese syllables, without a head.

pip install espeakng-loader==0.2.4 pycantonese==5.0.0 lameenc==1.9.0 soxr==1.1.0 numpy
python configs/quickstart/make_encoder.py speak /tmp/encoder-corpus
"""

import argparse
import collections
import csv
import pathlib
from collections.abc import Iterator, Sequence

import make_corpus
import numpy as np
import speech

SEED = 21
LETTERS = range(3, 15)
SNR_DB = (15.0, 40.0)
HERE = pathlib.Path(__file__).parent


def corpus_sentences(folder: pathlib.Path) -> list[str]:
    """Every sentence of the quick start's corpus, whatever its split."""
    with (folder / "validated.tsv").open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [line["sentence"] for line in table]


def pieces(sentence: str) -> Iterator[str]:
    """A short sentence whole, a long one clause by clause."""
    if len(speech.han(sentence)) in LETTERS:
        yield sentence
        return
    yield from (part for part in make_corpus.clauses(sentence) if len(part) in LETTERS)


def other_sentences(prompts: Sequence[str], known: Sequence[str]) -> list[str]:
    """Sentences that neither contain nor are part of one of the quick start's."""
    known_letters = [speech.han(text) for text in known]
    long = "\n".join(known_letters)
    texts: dict[str, str] = {}
    for text in (piece for sentence in prompts for piece in pieces(sentence)):
        letters = speech.han(text)
        if letters in long or any(other in letters for other in known_letters):
            continue
        texts.setdefault(letters, text)
    return list(texts.values())


def assign_speakers(
    texts: Sequence[str], rng: np.random.Generator, repeats: int
) -> dict[str, list[speech.Line]]:
    """Every text `repeats` times, each time by another voice, pace, pitch and size of the head."""
    voices = speech.VOICES["train"]
    lines: dict[str, list[speech.Line]] = {voice: [] for voice in voices}
    for number, text in enumerate(texts):
        for repeat, voice in enumerate(rng.choice(len(voices), repeats, replace=False)):
            lines[voices[voice]].append(
                speech.Line(
                    file_name=f"{number:05d}-{repeat}.mp3",
                    text=text,
                    words_a_minute=int(rng.integers(115, 190)),
                    pitch=int(rng.integers(20, 81)),
                    pitch_range=int(rng.integers(35, 71)),
                    stretch=float(rng.uniform(0.88, 1.14)),
                )
            )
    return lines


def speak(arguments: argparse.Namespace) -> None:
    """Records the corpus and writes its manifest: clip, jyutping, one character a syllable."""
    known = corpus_sentences(make_corpus.RELEASE / "yue")
    texts = other_sentences(speech.prompts(), known)
    rng = np.random.default_rng(SEED)
    texts = [texts[i] for i in rng.permutation(len(texts))][: arguments.sentences]
    lines = assign_speakers(texts, rng, arguments.repeats)
    text_of = {line.file_name: line.text for own in lines.values() for line in own}
    clips = [
        clip
        for _, own in speech.record(
            arguments.folder / "clips", lines, seed=SEED, snr_db=SNR_DB, workers=arguments.workers
        )
        for clip in own
        if len(clip.syllables) == len(speech.han(text_of[clip.file_name]))
    ]
    written_as = syllable_characters(
        (speech.han(text_of[clip.file_name]), clip.syllables) for clip in clips
    )
    with (arguments.folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "sentence", "syllables"))
        for clip in clips:
            writer.writerow(
                (
                    f"clips/{clip.file_name}",
                    "".join(clip.syllables),
                    "".join(written_as[syllable] for syllable in clip.syllables),
                )
            )
    hours = sum(clip.milliseconds for clip in clips) / 3.6e6
    print(
        f"{len(clips)} of {len(text_of)} clips, {hours:.2f} h, {len(texts)} sentences, "
        f"{len(written_as)} syllables"
    )


def syllable_characters(readings) -> dict[str, str]:
    """For each syllable the character that is read so most often: one symbol a syllable."""
    counts = collections.Counter(
        pair for letters, syllables in readings for pair in zip(syllables, letters, strict=True)
    )
    written_as: dict[str, str] = {}
    for (syllable, character), _ in counts.most_common():
        written_as.setdefault(syllable, character)
    return written_as


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speak", help="record the training corpus into a folder")
    command.add_argument("folder", type=pathlib.Path)
    command.add_argument("--sentences", type=int, default=None)
    command.add_argument("--repeats", type=int, default=1)
    command.add_argument("--workers", type=int, default=2)
    command.set_defaults(run=speak)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
