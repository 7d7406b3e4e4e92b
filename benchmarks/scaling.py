"""How cost grows: with batch, seconds, layers, vocabulary, devices, hours of data, TPU chips.

    python benchmarks/scaling.py [--runs 5] [--hours 1,10,100] [--json FILE]

A tiny model on one CPU core, one thing changed at a time: processor time of an update and the
memory that the compiler reports for it. Devices are fake ones that share the core, so that they say
what an update needs in all and on each device, nothing about speed. Hours of data: a prepared split
of so many hours, its files linked from one hour, is opened, encoded, planned and read from the
first to the last batch of an epoch, in a process of its own; memory is what the process allocates,
without the files that it maps. Chips: on paper, a time for the update of a chip (RESULTS.md) and
the bytes that a ring moves to add up the gradients.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import sidebyside

from flax_asr.data import shard_writer

BASE = {"rows": 2, "seconds": 4, "layers": 2, "symbols": 1000}
CHANGES = {
    "rows": (1, 2, 4, 8),
    "seconds": (2, 4, 8, 16),
    "layers": (1, 2, 4, 8),
    "symbols": (100, 1000, 4000, 9000),
}
DEVICES, GLOBAL_ROWS = (1, 2, 4, 8), 8
CHIPS = (8, 16, 32, 64, 128, 256)
CLIP_SECONDS, HOUR_SHARD = 4.0, "audio-{:05d}.bin"


def update_cost(rows: int, seconds: float, layers: int, symbols: int, runs: int, devices: int = 1):
    """Processor seconds of an update, and bytes of a device while its gradients are computed."""
    import jax
    import train_step

    from flax_asr import config, parallel
    from flax_asr.models import pretrained

    model = train_step.model_config(
        **train_step.SMALL | {"num_hidden_layers": layers, "vocab_size": symbols}
    )
    cfg = config.build({"train": {"mixed_precision": "fp32", "max_steps": 1000}})
    placed = parallel.Devices(jax.devices()[:devices])
    ours = train_step.Ours(cfg, model, pretrained.fresh(model, 0), placed)
    batch = train_step.full_batch(rows * devices, seconds, symbols)
    program = ours.compile(rows, batch.audio.shape[1], batch.labels.shape[1])
    clock = time.process_time
    timed = sidebyside.medians({"update": lambda: ours.update(batch)}, runs, clock=clock)
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {
        "processor_seconds": round(timed["update"], 4),
        "device_bytes": held,
        "gradient_bytes": 4 * sum(leaf.size for leaf in ours.state.trainable.values()),
    }


def repeated_hours(folder: pathlib.Path, hours: int) -> None:
    """A prepared split of so many hours whose audio files are one hour's, linked.

    The manifest is written anew for them: index, text and sizes are those of a split that long.
    """
    from flax_asr import seals
    from flax_asr.data import shards

    rng = np.random.default_rng(0)
    clips = round(3600 / CLIP_SECONDS)
    pcm = rng.integers(-9000, 9000, int(CLIP_SECONDS * 16_000)).astype(np.int16)
    with shard_writer.ShardWriter(folder) as writer:
        for clip in range(clips):
            sentence = "".join(rng.choice(list("abcdefghijklmnopqrst"), 16))
            facts = shards.ClipFacts(f"clip-{clip:08d}", sentence, f"speaker {clip % 50}")
            writer.add(facts, pcm[: -(clip % 97) * 320 or None], 2.0**-15, str(clip))
        writer.finish(source="noise", release="none", split="train")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    index = {name: np.load(folder / f"{name}.npy") for name in ("samples", "gains", "offsets")}
    shard_of = np.load(folder / "shards.npy")
    count = int(shard_of.max()) + 1
    for name, values in index.items():
        np.save(folder / f"{name}.npy", np.tile(values, hours))
    tiled = [shard_of + hour * count for hour in range(hours)]
    np.save(folder / "shards.npy", np.concatenate(tiled).astype(shard_of.dtype))
    lines = (folder / "clips.jsonl").read_text().splitlines()
    with open(folder / "clips.jsonl", "w") as file:
        for hour in range(hours):
            file.writelines(line.replace("clip-", f"{hour}-") + "\n" for line in lines)
    files = {}
    for hour in range(hours):
        for shard in range(count):
            name = HOUR_SHARD.format(hour * count + shard)
            if hour:
                os.link(folder / HOUR_SHARD.format(shard), folder / name)
            files[name] = manifest["files"][HOUR_SHARD.format(shard)]
    for name in ("samples.npy", "gains.npy", "shards.npy", "offsets.npy", "clips.jsonl"):
        path = folder / name
        files[name] = {"bytes": path.stat().st_size, "sha256": seals.sha256(path)}
    files["left_out.jsonl"] = manifest["files"]["left_out.jsonl"]
    manifest |= {"files": files, "clips": clips * hours, "seconds": manifest["seconds"] * hours}
    manifest["checksum"] = shards.checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def reading_cost(folder: pathlib.Path) -> dict[str, float]:
    """Opens, encodes, plans and reads an epoch; seconds, and bytes that the process allocates."""
    from flax_asr import vocabulary
    from flax_asr.data import buckets, examples, loader, shards

    # Imported and started before anything is measured.
    before = allocated_bytes()
    started = time.process_time()
    split = shards.PreparedSplit.open(folder)
    data = examples.build(
        [split],
        normalize=str,
        vocabulary=vocabulary.Vocabulary.from_transcripts(split.sentences),
        frame_lengths=lambda lengths: (lengths - 80) // 320,
    )
    shapes = buckets.choose_shapes(data.samples, 12)
    widths = loader.label_widths(data, shapes)
    plan = buckets.TrainPlan(data.samples, shapes, 32, 1, seed=0)
    plan.update(0)
    ready = time.process_time() - started
    most = allocated_bytes()
    for step in range(min(plan.updates_per_epoch, 300)):
        (group,) = plan.update(step)
        loader.assemble(data, group.rows, shapes[group.shape], widths[group.shape])
        most = max(most, allocated_bytes())
    return {"clips": len(data), "ready_seconds": round(ready, 2), "bytes": most - before}


def allocated_bytes() -> int:
    """Memory of this process that no file stands behind."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def all_reduce_seconds(gradient_bytes: int, chips: int, link_bytes_per_second: float) -> float:
    """Time to add up gradients over a ring of chips, each sending to one neighbour.

    Source: a reduce-scatter and an all-gather each move (chips - 1) / chips of the bytes (Patarasuk
    and Yuan 2009). One link in one direction is the slowest way; a torus has more.
    """
    return 2 * gradient_bytes * (chips - 1) / chips / link_bytes_per_second


def on_paper(gradient_bytes: int, micro_batch_seconds: float, micro_batches: int) -> list[dict]:
    """Share of the time that is left for computing where each chip has the same work."""
    from flax_asr.estimate import chips

    link = chips.CHIPS["v5e"].link_bandwidth
    rows = []
    for count in CHIPS:
        moving = all_reduce_seconds(gradient_bytes, count, link)
        computing = micro_batches * micro_batch_seconds
        rows.append({"chips": count, "moving": moving, "share": computing / (computing + moving)})
    return rows


def child(*arguments: str) -> dict:
    """Runs this script for one measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "row.json"
        command = [sys.executable, __file__, *arguments, f"--json={file}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--hours", default="1,10,100")
    parser.add_argument("--points", type=int, default=4, help="of each row of the table")
    parser.add_argument("--update-milliseconds", type=float, default=72.1)
    parser.add_argument("--gradient-millions", type=float, default=315.3)
    parser.add_argument("--json", metavar="FILE", help="also write one object a measurement there")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    if arguments.devices:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.devices}"
        work = BASE | {"rows": GLOBAL_ROWS // arguments.devices, "runs": arguments.runs}
        cost = update_cost(**work, devices=arguments.devices)
        sidebyside.write_json(arguments.json, [cost])
        return
    if arguments.read:
        sidebyside.write_json(arguments.json, [reading_cost(pathlib.Path(arguments.read))])
        return

    rows: list[dict] = []
    print(f"one update of a tiny model, {BASE}; one of them changed")
    print("what         value  processor ms  device MB")
    for what, values in CHANGES.items():
        for value in values[: arguments.points]:
            cost = update_cost(**BASE | {what: value}, runs=arguments.runs)
            rows.append({"what": what, "value": value, **cost})
            print(
                f"{what:10s} {value:7d} {1e3 * cost['processor_seconds']:13.1f}"
                f" {cost['device_bytes'] / 1e6:10.1f}",
                flush=True,
            )
    for devices in DEVICES[: arguments.points]:
        cost = child(f"--devices={devices}", f"--runs={arguments.runs}")
        moved = 2 * cost["gradient_bytes"] * (devices - 1) / devices
        rows.append({"what": "devices", "value": devices, **cost, "moved_bytes": moved})
        print(
            f"devices    {devices:7d} {1e3 * cost['processor_seconds']:13.1f}"
            f" {cost['device_bytes'] / 1e6:10.1f}   {moved / 1e6:.1f} MB sent by each",
            flush=True,
        )
    print("hours of data    clips  ready s  allocated MB")
    for hours in map(int, arguments.hours.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            repeated_hours(pathlib.Path(folder), hours)
            cost = child(f"--read={folder}")
        rows.append({"what": "hours", "value": hours, **cost})
        print(
            f"{hours:13d} {cost['clips']:8d} {cost['ready_seconds']:8.2f}"
            f" {cost['bytes'] / 1e6:13.1f}",
            flush=True,
        )
    gradient_bytes = math.ceil(arguments.gradient_millions * 4e6)
    print(
        f"v5e on paper: {gradient_bytes / 1e9:.2f} GB of gradients an update,"
        f" {arguments.update_milliseconds:g} ms a micro-batch"
    )
    for micro_batches in (1, 4):
        found = on_paper(gradient_bytes, arguments.update_milliseconds / 1e3, micro_batches)
        rows += [{"what": "v5e", "micro_batches": micro_batches, **row} for row in found]
        shares = ", ".join(f"{row['chips']}: {row['share']:.1%}" for row in found)
        print(
            f"  {micro_batches} micro-batches an update: all-reduce"
            f" {1e3 * found[0]['moving']:.1f} to {1e3 * found[-1]['moving']:.1f} ms;"
            f" share left for computing by chips: {shares}"
        )
    sidebyside.write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
