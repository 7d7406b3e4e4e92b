"""Damaged recordings and tables: does anything crash, hang, grow or differ between two runs?

    python benchmarks/fuzz_audio.py [--files 3000] [--tables 600] [--json FILE]

Makes damaged WAV, MP3, FLAC and Ogg files (flipped bits, cuts, headers that claim terabytes, HTML,
NaN, an hour of silence, folders, pipes, links), and decodes them as `prepare` does, in worker
processes; then damaged TSV, CSV and JSON-lines tables, which are read as `prepare` reads them. All
of it twice, with one worker and with two. Prints how each kind of damage ended; exit status 1 if a
process died or hung, memory grew by 500 MB, a file that must be refused was not, or the two runs
differ.
"""

import argparse
import collections
import json
import pathlib
import re
import sys
import tempfile
import time
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import damaged_files

from flax_asr.data import decoding, pool, prepare, shards

MOST_GROWTH_BYTES = 500e6
MAX_SECONDS = 20.0


class Verdict(NamedTuple):
    """How a file ended, and the memory of its worker at its worst until then."""

    reason: str
    digest: str
    peak_bytes: int
    seconds: float


def decode(task: decoding.Task) -> Verdict:
    began = time.monotonic()
    result = decoding.decode(task)
    # getrusage would give the parent's peak where that is higher.
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    seconds = time.monotonic() - began
    if isinstance(result, shards.LeftOut):
        return Verdict(result.reason, result.detail, peak, seconds)
    return Verdict("decoded", result.digest, peak, seconds)


def listen(files: list[tuple[str, pathlib.Path]], workers: int) -> list[Any]:
    tasks = ((kind, decoding.Task(p.name, str(p), 0.0, MAX_SECONDS, False)) for kind, p in files)
    limit = prepare.CLIP_LIMIT_SECONDS
    return list(pool.run_ordered(decode, tasks, workers=workers, limit_seconds=limit))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--tables", type=int, default=600)
    parser.add_argument("--json", metavar="FILE", help="also write one object a file there")
    arguments = parser.parse_args()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="flax-asr-fuzz-") as name:
        folder = pathlib.Path(name)
        files = damaged_files.write(folder, arguments.files)
        runs = [listen(files, workers) for workers in (1, 2)]
        tables = []
        for run in ("first", "second"):
            (folder / run).mkdir()
            tables.append(
                [damaged_files.read_table(folder / run, n) for n in range(arguments.tables)]
            )

    ends: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for (kind, first), (_, second) in zip(*runs, strict=True):
        ends[kind][first.reason] += 1
        if isinstance(first, pool.Failure) or isinstance(second, pool.Failure):
            wrong.append(f"{kind}: {first} {second}")
        elif first[:2] != second[:2]:
            wrong.append(f"{kind}: two runs differ: {first} {second}")
        allowed = damaged_files.PROMISED.get(kind, first.reason)
        if first.reason not in ([allowed] if isinstance(allowed, str) else allowed):
            wrong.append(f"{kind}: {first.reason} where {allowed} is due")
    verdicts = [verdict for run in runs for _, verdict in run if isinstance(verdict, Verdict)]
    peaks = [verdict.peak_bytes for verdict in verdicts]
    growth = max(peaks) - min(peaks)
    if growth >= MOST_GROWTH_BYTES:
        wrong.append(f"a worker grew by {growth / 1e6:.0f} MB")
    if tables[0] != tables[1]:
        wrong.append("the tables end differently the second time")

    for kind, counts in sorted(ends.items()):
        said = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        print(f"{kind:14s} {said}")
    refused = collections.Counter(
        kind for kind, outcome in tables[0] if outcome.startswith("refused")
    )
    for kind, count in sorted(collections.Counter(kind for kind, _ in tables[0]).items()):
        print(f"table, {kind:18s} {refused[kind]} of {count} refused")
    heard = sum(counts["decoded"] for counts in ends.values())
    failures = sum(isinstance(result, pool.Failure) for run in runs for _, result in run)
    print(
        f"{len(files)} files twice, {heard} of them heard; {len(tables[0])} tables twice:"
        f" {failures} crashes and hangs,"
        f" {growth / 1e6:.0f} MB growth, slowest {max(v.seconds for v in verdicts):.2f} s,"
        f" {len(wrong)} surprises"
    )
    print(*wrong, sep="\n", end="")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            for (kind, path), (_, result) in zip(files, runs[0], strict=True):
                row = {"kind": kind, "file": path.name, "reason": result.reason}
                file.write(json.dumps(row) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    import fuzz_audio  # by this name the workers find `decode`: they do not run the script

    sys.exit(fuzz_audio.main())
