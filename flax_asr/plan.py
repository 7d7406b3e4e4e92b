"""`flax-asr plan`: compile the real steps for a TPU that is not here, and say what came of it.

libtpu compiles for a described slice without one. It says how much memory a program takes and, of
most operations, how many cycles it expects; nothing runs. Collectives and custom calls have no
estimate: they are priced here, pessimistically, from their bytes and operations. All of it is an
estimate, and the text that is printed says so.
"""

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax

from flax_asr import config, errors, experiment, parallel, run_folder
from flax_asr.console import results
from flax_asr.estimate import chips, flops, hlo, outlook, workload

GIB = 2**30

# libtpu asks for a TPU machine's metadata, complains at length without, and lets one process in at
# a time; nothing of that matters to compilation.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def command(cfg: config.Config, topology: str, json_file: str | None) -> None:
    """Compiles the largest shapes of a run for a described slice and prints what to expect.

    Args:
        cfg: the run. Prepared data are used where they are; without, shapes are guessed and said
            to be.
        topology: a chip and the shape of the slice, `v5e:2x4`.
        json_file: where an object for each compiled function goes, one a line, and one for the run.

    Raises:
        ConfigError: the slice is unknown, libtpu is not installed, or the configuration is bad.
    """
    described = chips.parse(topology)
    devices = describe(described)
    cfg = run_folder.resolve(cfg, devices.count)
    work = workload.of(cfg, devices.count)
    people = results.people(json_file)
    print(_opening(described, devices, work), file=people, flush=True)
    with results.writer(json_file) as write:
        programs: list[outlook.Program] = []
        for job in jobs(cfg, work, devices):
            programs.append(job.compile(described))
            write(programs[-1].as_json())
            print(describe_program(programs[-1], described), file=people, flush=True)
        seen = outlook.Outlook.of(cfg, work, programs, described, devices.count)
        write(seen.as_json())
        _close(seen, programs, people, cfg.train.zero_sharding)


def describe(described: chips.Slice) -> parallel.Devices:
    """Devices of a slice that one can compile for.

    Raises:
        ConfigError: libtpu is not installed, or it knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise errors.ConfigError(
            "plan compiles with libtpu, the TPU compiler, which is not installed:"
            " pip install 'jax[tpu]' (it needs no TPU)."
        )
    # jax must not take hold of a TPU that may be here and at work.
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
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
    """What is to be compiled.

    Attributes:
        options: the compiler's, beyond its defaults.
        resident: bytes that are on a device whichever program runs.
    """

    function: str
    rows: int
    samples: int
    flops: int
    pmapped: Callable
    arguments: tuple
    options: dict[str, str] | None
    resident: int

    def compile(self, described: chips.Slice) -> outlook.Program:
        """Compiles it for the slice; takes minutes for a large model."""
        program = outlook.Program(self.function, self.rows, self.samples, self.flops)
        started = time.monotonic()
        try:
            compiled = self.pmapped.lower(*self.arguments).compile(self.options)
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
        )


def _wanted_bytes(message: str) -> int:
    """What the compiler says that it lacked memory for."""
    sizes = [
        float(number) * 1024 ** (" KMGT".index(unit))
        for number, unit in re.findall(r"([\d.]+)([KMGT])\b", message)
    ]
    return int(max(sizes, default=0))


def jobs(cfg: config.Config, work: workload.Workload, devices: parallel.Devices) -> Iterator[Job]:
    """The pmapped functions of the run in their largest shapes."""
    state = devices.placed_shapes(work.state, work.layout.state)
    sums = devices.sum_shapes(state.trainable)
    at_once = experiment.updates_at_once(cfg, devices.count)
    held = work.state_bytes + (0 if at_once else outlook.tree_bytes(sums) // devices.count)
    train, model_config = cfg.train, work.objective.config

    def job(function, rows, samples, count, pmapped, *arguments, batch=None) -> Job:
        own = 0 if batch is None else outlook.tree_bytes(batch) // devices.count
        options = devices.compiler_options
        return Job(function, rows, samples, count, pmapped, arguments, options, held + own)

    rows, (samples, tokens) = train.per_device_train_batch_size, work.train_shapes.largest
    batch = devices.train_batch_shapes(work.objective, rows, samples, tokens)
    lower_layers = work.objective.lower_layers
    counted = flops.gradient(model_config, rows, samples, work.is_trained, lower_layers)
    count = sum(counted.values())
    if at_once:
        both = parallel.update_from(work.objective, work.rule, devices, work.layout)
        yield job("update_from", rows, samples, count, both, state, batch, batch=batch)
    else:
        accumulate = parallel.accumulate(work.objective, devices, work.layout)
        yield job("accumulate", rows, samples, count, accumulate, state, sums, batch, batch=batch)
        update = parallel.update(work.rule, devices, work.layout)
        yield job("update", 0, 0, 0, update, state, sums)
    if work.eval_shapes.samples:
        rows, (samples, tokens) = train.per_device_eval_batch_size, work.eval_shapes.largest
        batch = devices.batch_shapes(rows, samples, tokens)
        count = sum(flops.forward(model_config, rows, samples).values())
        params = state.scored
        evaluate = parallel.evaluate(work.objective, devices, work.layout)
        yield job("evaluate", rows, samples, count, evaluate, params, batch, batch=batch)


def _opening(described, devices: parallel.Devices, work: workload.Workload) -> str:
    chip = described.chip
    lines = [
        f"{described.name}: {described.chips} chips, {devices.count} devices of"
        f" {described.hbm_bytes / GIB:.2f} GiB and {described.flops / 1e12:.0f} TFLOP/s in bf16.",
        "Compiled with the real TPU compiler, never run: what follows is an estimate.",
        *(f"guessed: {guess}" for guess in work.guesses),
        f"train shapes (seconds): {_seconds(work.train_shapes.samples)}; the largest is compiled.",
    ]
    if chip.devices > 1:
        lines.append(f"A {chip.name} machine may show its {chip.devices} cores as one device.")
    return "\n".join(lines)


def _seconds(samples: Sequence[int]) -> str:
    return " ".join(f"{n / 16_000:.1f}" for n in samples)


def describe_program(program: outlook.Program, described: chips.Slice) -> str:
    """A few lines for people: cycles, time, share of peak, parts of half a percent and more."""
    title = program.function
    if program.rows:
        title += f", {program.rows} x {program.samples / 16_000:.1f} s a device"
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


def _close(
    seen: outlook.Outlook,
    programs: Sequence[outlook.Program],
    people: io.TextIOBase,
    zero_sharding: bool,
) -> None:
    with contextlib.redirect_stdout(people):
        print("\nmemory of a device:")
        for name, size in seen.held_bytes.items():
            print(f"  {name:36s} {size / GIB:7.2f} GiB")
        total, there = seen.peak_bytes / GIB, seen.described.hbm_bytes / GIB
        verdict = "fits" if seen.fits else "DOES NOT FIT"
        print(f"  together {total:.2f} of {there:.2f} GiB: {verdict}")
        spared = f"train.zero_sharding {{}} {seen.zero_sharding_bytes / GIB:.2f} GiB of a device"
        if seen.zero_sharding_bytes:
            print(f"  {spared.format('saves' if zero_sharding else 'would save')}")
        print(
            f"  largest train.per_device_train_batch_size: about {seen.largest_rows}"
            " (linear in the batch, not compiled)"
        )
        if not seen.fits:
            print(
                "  ways out: a smaller train.per_device_train_batch_size,"
                " train.gradient_checkpointing true, a lower data.max_seconds, a larger slice"
            )
        if seen.update_seconds is None:
            return
        print(
            f"\nan update: {1e3 * seen.update_seconds:.1f} ms on average,"
            f" {100 * seen.peak_share:.0f} % of peak,"
            f" {seen.audio_seconds / seen.update_seconds:.0f} hours of audio an hour"
        )
        if seen.hours is None:
            print("the run: no estimate of its hours, the number of clips is not known")
        else:
            print(f"the run: {seen.updates} updates, {seen.hours:.2f} hours on the TPU")
        print(
            f"compilation: {seen.compile_seconds:.0f} s here for {len(programs)} programs;"
            f" a run compiles {seen.programs}"
        )
        print(
            "Not counted: saving, waiting for data, the pass of data.cache_features, what runs"
            f" beside the arithmetic. Parts that end in{outlook.NO_ESTIMATE} are upper bounds of"
            " ours, the others the compiler's guess;"
            " other shapes are taken to cost in proportion to their FLOPs."
        )
