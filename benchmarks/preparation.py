"""Time and bytes of preparing 48 kHz MP3, against datasets.map doing the same.

    python benchmarks/preparation.py [--clips 1500] [--runs 3] [--json FILE]

A release in Common Voice's form: clips of noise, 48 kHz mono MP3 of 64 kbit/s. `map`: a dataset of
paths, `Audio(decode=False)`, and the function of Hugging Face's CTC example: soundfile decodes,
soxr resamples to 16 kHz, the feature extractor normalises, floats are stored. `ours`: the function
of `flax-asr prepare`, checks, hashes and the start of its decoding process included; normalisation
is left to the device.

On one core both are compared by processor time, children included, in turns. By the clock both
have one process and then two, on all cores, of which the process that starts them has a share too;
that says little where the machine has other work.
"""

import argparse
import math
import os
import pathlib
import resource
import shutil
import tempfile
import time

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import datasets
import lameenc
import numpy as np
import sidebyside
import soundfile
import soxr
import transformers

from flax_asr import audio, config
from flax_asr.data import prepare

MP3_RATE_HZ, KILOBITS, LANGUAGE = 48_000, 64, "cy"


def encoded(rng: np.random.Generator, seconds: float) -> bytes:
    samples = int(seconds * MP3_RATE_HZ)
    loudness = 3000 * (1 + np.sin(np.arange(samples) * 2e-4))
    noise = (loudness * rng.standard_normal(samples)).clip(-32768, 32767).astype(np.int16)
    encoder = lameenc.Encoder()
    encoder.set_bit_rate(KILOBITS)
    encoder.set_in_sample_rate(MP3_RATE_HZ)
    encoder.set_channels(1)
    encoder.set_quality(7)  # of the encoder's search, not of what a decoder has to do
    encoder.silence()
    return bytes(encoder.encode(noise.tobytes()) + encoder.flush())


def release(folder: pathlib.Path, clips: int) -> None:
    """Writes `clips` clips, each of two streams out of a few: encoding is the slow part."""
    rng = np.random.default_rng(0)
    halves = math.isqrt(clips - 1) + 1
    lengths = np.clip(rng.gamma(4.5, 4.15 / 9.0, halves), 0.5, 5.25)
    streams = [encoded(rng, length) for length in lengths]
    home = folder / LANGUAGE / "clips"
    home.mkdir(parents=True)
    rows = ["client_id\tpath\tsentence"]
    for number in range(clips):
        first, second = divmod(number, halves)
        (home / f"{number}.mp3").write_bytes(streams[first] + streams[second])
        rows.append(f"speaker\t{number}.mp3\tbrawddeg {number}")
    (folder / LANGUAGE / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def ours(source: pathlib.Path, out: pathlib.Path, workers: int) -> float:
    """Prepares; gives the seconds of audio."""
    shutil.rmtree(out, ignore_errors=True)
    found = prepare.prepare(
        config.build(
            {
                "data": {
                    "source": str(source),
                    "language": LANGUAGE,
                    "train_splits": ["train"],
                    "eval_splits": [],
                    "test_splits": [],
                    "prepared_dir": str(out),
                    "num_workers": workers,
                }
            }
        )
    )
    if found["train"].left_out:
        raise SystemExit(f"left out: {found['train'].left_out[:3]}")
    return found["train"].seconds


def decoded(row: dict, extractor: transformers.Wav2Vec2FeatureExtractor) -> dict:
    samples, rate_hz = soundfile.read(row["audio"]["path"], dtype="float32")
    samples = soxr.resample(samples, rate_hz, audio.SAMPLE_RATE_HZ, quality="HQ")
    values = extractor(samples, sampling_rate=audio.SAMPLE_RATE_HZ, return_tensors="np")
    return {"input_values": values.input_values[0]}


def theirs(source: pathlib.Path, out: pathlib.Path, workers: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    paths = sorted(str(path) for path in (source / LANGUAGE / "clips").iterdir())
    dataset = datasets.Dataset.from_dict({"audio": paths, "sentence": [""] * len(paths)})
    dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
    dataset.map(
        decoded,
        fn_kwargs={"extractor": transformers.Wav2Vec2FeatureExtractor()},
        remove_columns=["audio"],
        cache_file_name=str(out / "cache.arrow"),
        num_proc=None if workers == 1 else workers,
    )


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=1500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="also write the result as an object there")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        release(folder / "release", arguments.clips)
        os.sched_setaffinity(0, cores[-1:])
        one_core = {
            "ours": lambda: ours(folder / "release", folder / "ours", 1),
            "map": lambda: theirs(folder / "release", folder / "map", 1),
        }
        used = sidebyside.medians(one_core, arguments.runs, warm_up=1, clock=processor_seconds)
        seconds = one_core["ours"]()
        sizes = {name: size(folder / name) for name in one_core}
        os.sched_setaffinity(0, cores)
        by_workers = {
            (way, workers): lambda prepare_all=prepare_all, way=way, workers=workers: prepare_all(
                folder / "release", folder / way, workers
            )
            for way, prepare_all in (("ours", ours), ("map", theirs))
            for workers in (1, 2)
        }
        clock = sidebyside.medians(by_workers, arguments.runs, warm_up=0, clock=time.perf_counter)
    print(f"{arguments.clips} clips, {seconds:.0f} s of audio, one core")
    print("way    processor s  audio s a second        MB")
    for way, value in used.items():
        print(f"{way:6s} {value:11.2f} {seconds / value:17.0f} {sizes[way] / 1e6:9.1f}")
    row = {
        "times_map": round(used["map"] / used["ours"], 2),
        "bytes_of_map": round(sizes["ours"] / sizes["map"], 3),
        "two_processes": round(clock["ours", 1] / clock["ours", 2], 2),
        "two_processes_of_map": round(clock["map", 1] / clock["map", 2], 2),
        "two_processes_times_map": round(clock["map", 1] / clock["ours", 2], 2),
        "two_processes_times_map_in_two": round(clock["map", 2] / clock["ours", 2], 2),
    }
    print(f"{row['times_map']} x map, {row['bytes_of_map']} of its bytes")
    print(
        f"by the clock, {len(cores)} cores: two processes {row['two_processes']} x one (map's"
        f" {row['two_processes_of_map']}), {row['two_processes_times_map']} x map in one,"
        f" {row['two_processes_times_map_in_two']} x map in two"
    )
    sidebyside.write_json(arguments.json, [row])


if __name__ == "__main__":
    main()
