"""How long it takes until something happens, what waits for what, and what is installed.

    python benchmarks/startup.py [--updates 60] [--json FILE]

`flax-asr --help`: processor time of the whole process, and of one that does nothing. The quick
start's command is started, stopped by SIGTERM after some updates and started again, which is the
same with prepared audio and compiled programs: time to the end of compilation and to the first
update, share of the updates' time spent waiting for data, compilations after the warm-up. Installed
size: files of the packages that an installation brings, extras left out.
"""

import argparse
import importlib.metadata
import json
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tomllib

import sidebyside
from packaging.requirements import Requirement

REPOSITORY = pathlib.Path(__file__).parents[1]
LARGEST = 8


def help_seconds(runs: int) -> dict[str, float]:
    """Median processor seconds of `flax-asr --help` and of a Python that ends at once."""

    def run(*arguments: str):
        return lambda: subprocess.run(
            [sys.executable, *arguments], check=True, capture_output=True, cwd=REPOSITORY
        )

    ways = {"help": run("-m", "flax_asr", "--help"), "python": run("-c", "")}
    return sidebyside.medians(ways, runs, clock=processor_seconds)


def start(folder: pathlib.Path, until: int) -> dict[str, float]:
    """Runs the quick start until so many updates are in its log, then stops it.

    Returns:
        Seconds by the clock from the command to the end of compilation and to the first update, and
        of processor in all; what the log says about waiting and compiling.
    """
    log = folder / "run" / "log.jsonl"
    before = len(read(log))
    output = folder / "output.txt"
    used = processor_seconds()
    with open(output, "w") as stream:
        started = time.monotonic()
        process = subprocess.Popen(
            [
                *(sys.executable, "train.py", "--config", "configs/quickstart.yaml"),
                *(f"--output_dir={folder / 'run'}", "--train.logging_steps=1"),
                *("--train.eval_steps=1000", "--train.save_steps=1000"),
            ],
            cwd=REPOSITORY,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            while not re.search(r"compiling: (\d+)/\1 ", output.read_text()):
                wait(process, output)
            compiled = time.monotonic()
            while len(read(log)) == before:
                wait(process, output)
            first = time.monotonic()
            while len(read(log)) < before + until:
                wait(process, output)
            process.send_signal(signal.SIGTERM)
            process.wait()
        finally:
            process.kill()
    events = read(log)[before:]
    # The first update waits for the first batches, which nothing could load before.
    spent = events[-1]["time"] - events[0]["time"]
    waited = sum(event["data_wait_seconds"] for event in events[1:])
    return {
        "compiled_seconds": round(compiled - started, 1),
        "first_update_seconds": round(first - started, 1),
        "processor_seconds": round(processor_seconds() - used, 1),
        "update_seconds": round(spent / (len(events) - 1), 3),
        "waiting_for_data": round(waited / spent, 4),
        "compilations_after_warm_up": events[-1]["compilations"],
    }


def read(log: pathlib.Path) -> list[dict]:
    """The updates of a log, however far it is written."""
    text = log.read_text() if log.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if "data_wait_seconds" in line]


def wait(process: subprocess.Popen, output: pathlib.Path) -> None:
    if process.poll() is not None:
        raise SystemExit(output.read_text())
    time.sleep(0.05)


def processor_seconds() -> float:
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def installed() -> dict[str, int]:
    """Bytes of every package that the package's own requirements bring, the largest first."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    sizes: dict[str, int] = {}
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in sizes:
            continue
        found = importlib.metadata.distribution(name)
        paths = (found.locate_file(file) for file in found.files or ())
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file())
        for text in found.requires or ():
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(needed)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--runs", type=int, default=10, help="of --help")
    parser.add_argument("--json", metavar="FILE", help="also write the result as an object there")
    arguments = parser.parse_args()
    commands = help_seconds(arguments.runs)
    print(f"flax-asr --help {commands['help']:.3f} s, an empty Python {commands['python']:.3f} s")
    sizes = installed()
    largest = ", ".join(f"{n} {size / 1e6:.0f}" for n, size in list(sizes.items())[:LARGEST])
    print(f"installed {sum(sizes.values()) / 1e6:.0f} MB in {len(sizes)} packages: {largest}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        starts = {way: start(folder, arguments.updates) for way in ("cold", "warm")}
    print(f"the quick start, {arguments.updates} updates; warm: prepared and compiled before")
    print(f"{'':28s}" + "".join(f"{way:>10s}" for way in starts))
    for figure in starts["cold"]:
        print(f"{figure:28s}" + "".join(f"{found[figure]:10}" for found in starts.values()))
    row = {"help_seconds": commands["help"], "installed_bytes": sum(sizes.values())}
    sidebyside.write_json(arguments.json, [row | starts])


if __name__ == "__main__":
    main()
