"""What `flax-asr doctor` found, as text for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax_asr import audio
from flax_asr.diagnosis import findings, suspects

_BAR = 40
_MOST_BARS = 24
_MOST_CHANGES = 12
_MOST_CHARACTERS = 16


def report(facts: Mapping[str, Any], found: Sequence[findings.Finding]) -> str:
    """The report: a section for each known fact, then the findings."""
    sections = {
        "machine": ("Machine", _machine),
        "splits": ("Data", _splits),
        "durations": ("Training clips by seconds", _durations),
        "text": ("Text", _text),
        "label_lengths": ("Training clips by labels", _labels),
        "losses": ("Losses to expect, in nats", _losses),
        "batches": ("Batches", _batches),
        "time": ("Time on this machine", _time),
        "room": ("Room", _room),
    }
    lines: list[str] = []
    for name, (title, write) in sections.items():
        if name in facts:
            lines += [title, *(f"  {line}" for line in write(facts)), ""]
    return "\n".join([*lines, *_findings(found)])


def _machine(facts: Mapping[str, Any]) -> Iterator[str]:
    machine = facts["machine"]
    yield ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    if "devices" in machine:
        device = machine["devices"]
        memory = device["memory_bytes"]
        yield (
            f"{device['count']} x {device['platform']} ({device['kind']})"
            + (f", {findings.gigabytes(memory)} each" if memory is not None else "")
            + f", {device['flops_per_second'] / 1e9:,.0f} GFLOP/s in a matrix product"
        )
    free = machine["memory_bytes"]
    memory = findings.gigabytes(free) if free is not None else "unknown"
    yield f"{machine['cores']} cores, {memory} of memory free"
    for place in {place["path"]: place for place in machine["disk"].values()}.values():
        free = place["free_bytes"]
        room = findings.gigabytes(free) if free is not None else "not known"
        yield f"free disk at {place['path']}: {room}"


def _splits(facts: Mapping[str, Any]) -> Iterator[str]:
    for name, split in facts["splits"].items():
        whole = "" if split["complete"] else " read in time (there are more)"
        source = split["lengths_from"]
        seen = "prepared" if source == "prepared" else f"{split['decoded']} decoded"
        known = f", lengths from {source}" if source != "prepared" else ""
        gone = ", ".join(f"{count} {reason}" for reason, count in split["left_out"].items())
        yield (
            f"{name}: {split['clips']} clips{whole}, {split['speakers']} speakers, {seen}{known}"
            + (f"; unusable: {gone}" if gone else "")
        )
    for name, counts in facts["shared_with_train"].items():
        shared = ", ".join(f"{what} {count}" for what, count in counts.items())
        yield f"clips of {name} shared with training, by what is shared: {shared}"
    for clip in facts.get("suspects", ()):
        odd = suspects.Odd(**clip)
        yield f"suspect: {ascii(odd.id)[1:-1]} has {odd.describe()}"
    for path in facts.get("spectrograms", ()):
        yield f"spectrogram: {path}"


def _durations(facts: Mapping[str, Any]) -> Iterator[str]:
    durations = facts["durations"]
    yield f"mean {durations['mean_seconds']:.2f}, longest {durations['longest_seconds']:.2f}"
    yield from bars([f"{edge:g}" for edge in durations["edges_seconds"]], durations["clips"])


def _labels(facts: Mapping[str, Any]) -> Iterator[str]:
    lengths = facts["label_lengths"]
    yield f"mean {lengths['mean']:.1f}"
    yield from bars([f"{edge:g}" for edge in lengths["edges"]], lengths["clips"])


def _text(facts: Mapping[str, Any]) -> Iterator[str]:
    text = facts["text"]
    yield f"normalisation: {text['normalization']}"
    changes = text["changes"]
    if changes:
        yield f"of {text['sentences_reported']} training sentences it changes:"
        yield from (f"  {change['text']}" for change in changes[:_MOST_CHANGES])
        if len(changes) > _MOST_CHANGES:
            yield f"  and {len(changes) - _MOST_CHANGES} more (--json has all)"
    characters = text["characters"]
    yield f"{text['vocabulary']} symbols; {len(characters)} characters, the most frequent:"
    commonest = list(characters.items())[:_MOST_CHARACTERS]
    yield from bars(
        [c if c.isprintable() and c != " " else ascii(c) for c, _ in commonest],
        [count for _, count in commonest],
    )
    once = sum(count == 1 for count in characters.values())
    yield f"{once} of them occur only once"


def _losses(facts: Mapping[str, Any]) -> Iterator[str]:
    losses = facts["losses"]
    unit = "per token" if losses["reduction"] == "mean" else "per clip"
    if losses["fresh_head"]:
        yield f"first: about {losses['first']:.2f} {unit}, from a fresh head"
    else:
        yield "first: that of the pretrained head, which is kept"
    yield (
        f"plateau: about {losses['plateau']:.2f} {unit}, before the model uses the audio"
        f" (entropy of a character: {losses['unigram_entropy']:.2f})"
    )


def _batches(facts: Mapping[str, Any]) -> Iterator[str]:
    batches = facts["batches"]
    micro_batches = batches["micro_batches_an_update"]
    yield f"{batches['train_clips']} clips, {batches['train_hours']:.2f} h to train on"
    for shape in facts["shapes"]:
        seconds = shape["samples"] / audio.SAMPLE_RATE_HZ
        yield f"shape {seconds:6.2f} s x {shape['tokens']:3d} labels: {shape['clips']} clips"
    yield f"padding {batches['padding']:.1%}"
    yield (
        f"{batches['updates_per_epoch']} updates an epoch of {batches['global_batch_size']} clips"
        f" ({micro_batches} micro-batch{'es' * (micro_batches > 1)} each);"
        f" {batches['updates']} updates in all, {batches['epochs']:.1f} epochs"
    )


def _time(facts: Mapping[str, Any]) -> Iterator[str]:
    time = facts["time"]
    if time["measured"]:
        trial = time["trial"]
        yield (
            f"micro-batch of the most frequent shape {trial['accumulate_seconds']:.3g} s, update"
            f" {trial['update_seconds']:.3g} s, compiled in {trial['compile_seconds']:.1f} s"
        )
        if not time["whole_model"]:
            yield (
                "(the whole model did not fit into the time limit of `doctor`: extrapolated from"
                f" a model of {trial['layers']} layers)"
            )
        yield f"the run: about {findings.duration_text(time['seconds'])}, scoring included"
    else:
        yield (
            "an update did not finish within the time limit of `doctor`, so nothing was"
            " measured; from the speed of a matrix product,"
        )
        yield f"the run: at least {findings.duration_text(time['seconds'])}"
    if time["cheap_days"] is not None:
        yield (
            f"with --model.trainable_layers {time['cheap_trainable_layers']}:"
            f" {findings.duration_text(time['cheap_days'] * 86400)}, by its operations"
        )


def _room(facts: Mapping[str, Any]) -> Iterator[str]:
    room = facts["room"]
    yield (
        f"{room['parameters'] / 1e6:.2f} million parameters,"
        f" {room['trained_parameters'] / 1e6:.2f} million trained"
    )
    yield (
        f"a checkpoint {findings.gigabytes(room['checkpoint_bytes'])}, all checkpoints"
        f" {findings.gigabytes(room['checkpoints_bytes'])}, the export"
        f" {findings.gigabytes(room['export_bytes'])}"
    )
    if room["prepared_bytes"]:
        yield f"decoded audio {findings.gigabytes(room['prepared_bytes'])}"
    if room["features_bytes"]:
        yield f"cached features {findings.gigabytes(room['features_bytes'])}"
    yield f"memory of a device: about {findings.gigabytes(room['device_bytes'])} and the batch"


def _findings(found: Sequence[findings.Finding]) -> Iterator[str]:
    if not found:
        yield "No problems found."
        return
    yield "Problems, the costliest first (with the share of the run that each spoils)"
    for finding in found:
        cost = "  STOP" if finding.fatal else f"{finding.cost:6.1%}"
        yield f"{cost}  {finding.message}"


def bars(labels: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
    """A histogram, one bar a line; many bins are joined, so that it fits a screen."""
    join = -(-len(labels) // _MOST_BARS)
    rows = [(labels[i], sum(counts[i : i + join])) for i in range(0, len(labels), join)]
    widest = max(len(label) for label, _ in rows)
    largest = max(1, *(count for _, count in rows), 1)
    for label, count in rows:
        bar = "█" * max(round(_BAR * count / largest), int(count > 0))
        yield f"{label:>{widest}} {bar} {count}"
