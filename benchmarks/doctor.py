"""How long `flax-asr doctor` takes on a release of the size of Common Voice 25.0 zh-HK.

    python benchmarks/doctor.py [--clips 8450] [--json FILE]

The release is made of hard links to the quick start's recordings under other names: train, dev and
test of 8450, 5604 and 5604 clips (in proportion with another `--clips`), 94 118 rows in
validated.tsv, 3110 speakers, sentences of Chinese characters without spaces. The model is a small
one with random weights, so that what is timed is the data's part, and the compilation.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
RECORDINGS = ROOT / "configs" / "quickstart" / "corpus"
SPLITS = {"train": (8450, 0, 600), "dev": (5604, 600, 1500), "test": (5604, 1500, 3110)}
"""Clips, and which of the speakers."""
VALIDATED = 94118
MODEL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": [32] * 7,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def make(release: pathlib.Path, share: float) -> None:
    """Writes tables and clips; `share` of their numbers."""
    rng = random.Random(0)
    language = release / "zh-HK"
    (language / "clips").mkdir(parents=True)
    recordings = sorted(RECORDINGS.rglob("*.mp3"))
    characters = [chr(0x4E00 + i) for i in range(3500)]
    weights = [1 / (i + 3) for i in range(3500)]
    header, rows = "client_id\tpath\tsentence\tlocale", []

    def row(speaker: int) -> str:
        name = f"common_voice_zh-HK_{20_000_000 + len(rows)}.mp3"
        sentence = "".join(rng.choices(characters, weights, k=rng.randint(4, 18)))
        rows.append(f"{speaker:064x}\t{name}\t{sentence}\tzh-HK")
        return name

    for split, (clips, first, end) in SPLITS.items():
        begin = len(rows)
        for _ in range(round(clips * share)):
            name = row(rng.randrange(first, end))
            os.link(rng.choice(recordings), language / "clips" / name)
        lines = [header, *rows[begin:]]
        (language / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    while len(rows) < VALIDATED * share:
        row(rng.randrange(3110))
    (language / "validated.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=SPLITS["train"][0], help="of train")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    # Hard links need the recordings' own disk.
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".release-") as folder:
        release = pathlib.Path(folder) / "cv-corpus-25.0-2026-03-09"
        make(release, arguments.clips / SPLITS["train"][0])
        command = [sys.executable, "-m", "flax_asr", "doctor"]
        command += ["--config", str(ROOT / "configs" / "xls_r_300m_zh_hk.yaml")]
        command += [f"--data.source={release}", f"--output_dir={folder}/run"]
        command += ["--model.pretrained=null"]
        command += [f"--model.config.{n}={json.dumps(value)}" for n, value in MODEL.items()]
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {
        "clips": arguments.clips,
        "status": done.returncode,
        "seconds": round(seconds, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
    }
    print(row)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(row) + "\n", encoding="utf-8")
    if done.returncode:
        print(done.stderr[-2000:])
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
