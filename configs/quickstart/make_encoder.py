"""Makes `encoder`: a small wav2vec 2.0 encoder that knows the sounds of Cantonese, without a head.

    pip install . espeakng-loader==0.2.4 pycantonese==5.0.0 lameenc==1.9.0
    python configs/quickstart/make_encoder.py speak /tmp/encoder-corpus
    python configs/quickstart/make_encoder.py train /tmp/encoder-corpus

`speak` records five hours of synthetic speech in three minutes. `train` runs `flax-asr train` three
times on their jyutping, letters and tone digits: from random weights, then twice on from there with
another warm-up, in the end under SpecAugment. Run again, it goes on where it stopped. ORIGIN.md
says what the speech is made from.
"""

import argparse
import csv
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import make_corpus
import numpy as np
import speech

SEED = 21
LETTERS = range(3, 15)
SNR_DB = (20.0, 40.0)
DEV_SENTENCES = 150
MASKS = {
    "apply_spec_augment": "true",
    "mask_time_prob": 0.1,
    "mask_time_length": 5,
    "mask_feature_prob": 0.1,
    "mask_feature_length": 12,
}
STAGES = {
    "first": (1500, "2e-3", 200, {}),
    "second": (1800, "1.5e-3", 100, {}),
    "third": (2500, "2e-3", 100, MASKS),
}
"""Updates, learning rate, warm-up and masks of three runs; each starts from the one before."""
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
                    file_name=f"{number:05d}-{repeat}.mp3",  # read by sentence_number
                    text=text,
                    words_a_minute=int(rng.integers(115, 190)),
                    pitch=int(rng.integers(30, 71)),
                    pitch_range=int(rng.integers(65, 91)),
                    stretch=float(rng.uniform(0.9, 1.12)),
                )
            )
    return lines


def sentence_number(file_name: str) -> int:
    return int(file_name.split("-")[0])


def speak(arguments: argparse.Namespace) -> None:
    """Records the corpus and writes its manifest: clip and jyutping."""
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
    with (arguments.folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "sentence", "split"))
        for clip in clips:
            letters = "".join(clip.syllables)
            split = "dev" if sentence_number(clip.file_name) < DEV_SENTENCES else "train"
            writer.writerow((f"clips/{clip.file_name}", letters, split))
    hours = sum(clip.milliseconds for clip in clips) / 3.6e6
    print(f"{len(clips)} of {len(text_of)} clips, {hours:.2f} h, {len(texts)} sentences")


def train(arguments: argparse.Namespace) -> None:
    """Pre-trains in a folder for each stage below FOLDER, and keeps the encoder of the last."""
    start: list[str] = []
    for name, (steps, rate, warmup, masks) in STAGES.items():
        run = arguments.folder / name
        options = {
            "--data.source": arguments.folder / "manifest.csv",
            "--output_dir": run,
            "--train.max_steps": steps,
            "--optim.learning_rate": rate,
            "--optim.warmup_steps": warmup,
            **{f"--model.config.{field}": value for field, value in masks.items()},
        }
        words = [str(word) for option in options.items() for word in option]
        command = [sys.executable, "-m", "flax_asr", "train", "--config", HERE / "encoder.yaml"]
        subprocess.run([*command, *words, *start], check=True)
        start = ["--model.pretrained", str(run)]
    keep_encoder(run / "export", HERE / "encoder")


def keep_encoder(model: pathlib.Path, encoder: pathlib.Path) -> None:
    """Writes a model's encoder without its head, in half precision: half the bytes."""
    from flax_asr.models import weights

    prefix = "wav2vec2."
    tensors = {
        name.removeprefix(prefix): values.astype(np.float16)
        for name, values in weights.read(model).items()
        if name.startswith(prefix)
    }
    weights.write(encoder, tensors)
    settings = json.loads((model / "config.json").read_text("utf-8"))
    # Whether fine-tuning masks anything is its own choice.
    own = {"architectures": ["Wav2Vec2Model"], "dtype": "float16", "apply_spec_augment": False}
    settings |= own
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (encoder / "config.json").write_text(text, "utf-8")
    shutil.copy(model / "preprocessor_config.json", encoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speak", help="record the training corpus into a folder")
    command.add_argument("folder", type=pathlib.Path)
    command.add_argument("--sentences", type=int, default=None, help="default: all there are")
    command.add_argument("--repeats", type=int, default=1, help="voices that say each sentence")
    command.add_argument("--workers", type=int, default=2)
    command.set_defaults(run=speak)
    command = commands.add_parser("train", help="pre-train on it and write configs/.../encoder")
    command.add_argument("folder", type=pathlib.Path)
    command.set_defaults(run=train)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
