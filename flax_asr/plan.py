"""`flax-asr plan`: compiles the real steps for a TPU that is not present, and reports the result.

libtpu can compile for a described slice without a TPU. It reports how much memory a program needs
and how many cycles it expects for most operations; nothing is executed. Collectives and custom
calls have no estimate: their upper bounds are computed here from their bytes and operations. All of
it is an estimate, and the printed text says so.
"""

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax

from flax_asr import (
    audio,
    batch_size,
    compilation,
    config,
    early_stopping,
    errors,
    parallel,
    partition,
    programs,
)
from flax_asr.console import results, terminal
from flax_asr.estimate import chips, hlo, outlook, workload
from flax_asr.hosts import cluster

GIB = 2**30

# libtpu asks for a TPU VM's metadata, complains at length without, and admits one process at a
# time; none of that matters for compilation.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def command(
    cfg: config.Config, topology: str, json_file: str | None, every_shape: bool = False
) -> None:
    """Compiles a run for a described slice and prints what to expect.

    Args:
        cfg: the configuration of the run. Without prepared data, shapes are guessed, and the report
            says so.
        topology: a chip and the shape of the slice, for example `v5e:2x4`.
        json_file: file for JSON lines, one object for each compiled function and one for the run.
        every_shape: compile every program of the run, not only those of the largest shapes.

    Raises:
        ConfigError: the slice is unknown, libtpu is not installed, or the configuration is wrong.
    """
    described = chips.parse(topology)
    devices = describe(described)
    early_stopping.check(cfg)
    cfg = batch_size.resolve(cfg, devices.count)
    work = workload.of(cfg, devices.count)
    people = results.people(json_file)
    terminal.show(_opening(described, devices, work, every_shape), people)
    with results.writer(json_file) as write:
        compiled: list[outlook.Program] = []
        for job in jobs(cfg, work, devices, every_shape):
            compiled.append(job.compile(described))
            write(compiled[-1].as_json())
            terminal.show(describe_program(compiled[-1], described), people)
        seen = outlook.Outlook.of(cfg, work, compiled, described)
        write(seen.as_json())
        terminal.show(_describe_outlook(seen, compiled, cfg.train.zero_sharding), people)


def describe(described: chips.Slice) -> parallel.Devices:
    """Devices of a described slice, to compile for.

    Raises:
        ConfigError: libtpu is not installed, or it knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise errors.ConfigError(
            "plan compiles with libtpu, the TPU compiler, which is not installed:"
            " pip install 'jax[tpu]' (it needs no TPU)."
        )
    # jax must not seize a TPU of this machine, which may be in use.
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cluster.spare_threads_for_libtpu()
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    hosts = {"chips_per_host_bounds": (1, 1, 1)} if described.chips == 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=described.name, **hosts
        ).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise errors.ConfigError(
            f"--topology {described.name}: the TPU compiler knows no such slice ({reason})."
        ) from error
    return parallel.Devices(found)


@dataclass(frozen=True)
class Job:
    """A program to compile.

    Attributes:
        resident: bytes that are on a device whichever program runs.
    """

    function: str
    rows: int
    samples: int
    flops: int
    pmapped: compilation.Compilable
    arguments: tuple
    resident: int

    def compile(self, described: chips.Slice) -> outlook.Program:
        """Compiles the program for the slice, which takes minutes for a large model."""
        program = outlook.Program(self.function, self.rows, self.samples, self.flops)
        started, used = time.monotonic(), time.process_time()
        try:
            compiled = self.pmapped.compile(*self.arguments)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = str(error).strip().splitlines()[0]
            return dataclasses.replace(
                program,
                argument_bytes=self.resident,
                temporary_bytes=_wanted_bytes(message),
                refused=message,
                compile_seconds=time.monotonic() - started,
                compile_cpu_seconds=time.process_time() - used,
            )
        memory = compiled.memory_analysis()
        temporary = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
        return dataclasses.replace(
            program,
            by_part=outlook.priced(
                hlo.operations(compiled.as_text()),
                described,
                rest="optimiser" if self.function == "update" else "other",
            ),
            argument_bytes=self.resident,
            temporary_bytes=max(temporary, 0),
            code_bytes=memory.generated_code_size_in_bytes,
            compile_seconds=time.monotonic() - started,
            compile_cpu_seconds=time.process_time() - used,
        )


def _wanted_bytes(message: str) -> int:
    """The memory in bytes that the program needs, from the compiler's message."""
    sizes = [
        float(number) * 1024 ** (" KMGT".index(unit))
        for number, unit in re.findall(r"([\d.]+)([KMGT])\b", message)
    ]
    return int(max(sizes, default=0))


def jobs(
    cfg: config.Config,
    work: workload.Workload,
    devices: parallel.Devices,
    every_shape: bool = False,
) -> Iterator[Job]:
    """The pmapped functions of the run, in every shape or in their largest ones."""
    found = programs.jobs(work.steps(cfg), devices, (0, work.data.planned_updates - 1))
    held = work.state_bytes
    if ("update", 0) in found:  # which the sums outlive the micro-batches for
        held += partition.tree_bytes(devices.sum_shapes(work.state.trainable)) // devices.count
    largest = {name: max(n for other, n in found if other == name) for name, _ in found}
    for (name, samples), (pmapped, arguments) in found.items():
        if not every_shape and samples < largest[name]:
            continue
        rows = batch_bytes = 0
        if name != "update":
            evaluates = name == "evaluate"
            train = cfg.train
            rows = (
                train.per_device_eval_batch_size if evaluates else train.per_device_train_batch_size
            )
            batch_bytes = partition.tree_bytes(arguments[-1]) // devices.count
        yield Job(
            name,
            rows,
            samples,
            work.flops(name, rows, samples),
            pmapped,
            arguments,
            held + batch_bytes,
        )


def _opening(
    described: chips.Slice,
    devices: parallel.Devices,
    work: workload.Workload,
    every_shape: bool,
) -> str:
    chip = described.chip
    what = "all of them are" if every_shape else "the largest is"
    lines = [
        f"{described.name}: {described.chips} chips, {devices.count} devices of"
        f" {described.hbm_bytes / GIB:.2f} GiB and {described.flops / 1e12:.0f} TFLOP/s in bf16.",
        "Compiled with the real TPU compiler, never run: what follows is an estimate.",
        *(f"guessed: {guess}" for guess in work.data.guesses),
        f"train shapes (seconds): {_seconds(work.data.train_shapes.samples)}; {what} compiled.",
    ]
    if chip.devices > 1:
        lines.append(f"A {chip.name} machine may show its {chip.devices} cores as one device.")
    return "\n".join(lines)


def _seconds(samples: Sequence[int]) -> str:
    return " ".join(f"{n / audio.SAMPLE_RATE_HZ:.1f}" for n in samples)


def describe_program(program: outlook.Program, described: chips.Slice) -> str:
    """A description as text: cycles, time, share of peak, and parts of at least half a percent."""
    title = program.function
    if program.rows:
        title += f", {program.rows} x {program.samples / audio.SAMPLE_RATE_HZ:.1f} s a device"
    if program.refused:
        return f"\n{title}: DOES NOT FIT. {program.refused}"
    clock = described.chip.clock_hz
    lines = [
        f"\n{title}: {program.cycles / 1e6:.2f} M cycles,"
        f" {1e3 * program.cycles / clock:.1f} ms at {clock / 1e9:.2f} GHz"
        f" (compiled in {program.compile_seconds:.0f} s)"
    ]
    if program.flops:
        share = program.flops / (program.cycles / clock) / described.flops
        lines.append(f"  {program.flops:.3g} FLOPs, {100 * share:.0f} % of peak")
    lines += [
        f"  {name:30s} {cycles / 1e6:8.2f} M  {100 * cycles / program.cycles:3.0f} %"
        for name, cycles in program.by_part.items()
        if cycles >= program.cycles / 200
    ]
    return "\n".join(lines)


def _describe_outlook(
    seen: outlook.Outlook, compiled: Sequence[outlook.Program], zero_sharding: bool
) -> str:
    total, there = seen.peak_bytes / GIB, seen.described.hbm_bytes / GIB
    verdict = "fits" if seen.fits else "DOES NOT FIT"
    lines = [
        "\nmemory of a device:",
        *(f"  {name:36s} {size / GIB:7.2f} GiB" for name, size in seen.held_bytes.items()),
        f"  together {total:.2f} of {there:.2f} GiB: {verdict}",
    ]
    if seen.zero_sharding_bytes:
        saves = "saves" if zero_sharding else "would save"
        size = seen.zero_sharding_bytes / GIB
        lines.append(f"  train.zero_sharding {saves} {size:.2f} GiB of a device")
    lines.append(
        f"  largest train.per_device_train_batch_size: about {seen.largest_rows}"
        " (linear in the batch, not compiled)"
    )
    if not seen.fits:
        lines.append(
            "  ways out: a smaller train.per_device_train_batch_size,"
            " train.gradient_checkpointing true, a lower data.max_seconds, a larger slice"
        )
    if seen.update_seconds is None:
        return "\n".join(lines)
    lines.append(
        f"\nan update: {1e3 * seen.update_seconds:.1f} ms on average,"
        f" {100 * seen.peak_share:.0f} % of peak,"
        f" {seen.audio_seconds / seen.update_seconds:.0f} hours of audio an hour"
    )
    if seen.hours is None:
        lines.append("the run: no estimate of its hours, the number of clips is not known")
    else:
        lines.append(f"the run: {seen.updates} updates, {seen.hours:.2f} hours on the TPU")
    lines += [
        f"compilation: {seen.compile_seconds:.0f} s here, {seen.compile_cpu_seconds:.0f} s of"
        f" processor time, for {len(compiled)} programs; a run compiles {seen.programs}",
        "Not counted: saving, waiting for data, the pass of data.cache_features, what runs"
        f" beside the arithmetic. Parts that end in{outlook.NO_ESTIMATE} are upper bounds of"
        " ours, the others the compiler's guess;"
        " shapes that were not compiled are taken to cost in proportion to their FLOPs.",
    ]
    return "\n".join(lines)
