"""From compiled programs to a run: cycles by part, memory by kind, time of an update and a run."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flax_asr import config
from flax_asr.estimate import chips, hlo, workload

NO_ESTIMATE = " (bound)"
"""Suffix of parts for which the compiler gives no estimate."""


@dataclass(frozen=True)
class Program:
    """A compiled function, or one that the compiler refused because it needs too much memory.

    Attributes:
        function: as in `programs.Key`.
        rows: clips on each device, 0 for `update`.
        samples: padded length, 0 for `update`.
        flops: operations on each device, counted analytically.
        by_part: cycles by part; estimates of the compiler, or our upper bounds where the name ends
            in "(bound)".
        argument_bytes: size of the arguments, counted from their shapes, with the whole state.
        temporary_bytes: memory needed besides the arguments while it runs.
        code_bytes: size of the program itself.
        refused: the compiler's message if the program did not fit, else None.
        compile_seconds: wall-clock time of lowering and compiling.
        compile_cpu_seconds: the same in processor time of all cores.
    """

    function: str
    rows: int
    samples: int
    flops: int
    by_part: dict[str, float] = field(default_factory=dict)
    argument_bytes: int = 0
    temporary_bytes: int = 0
    code_bytes: int = 0
    refused: str | None = None
    compile_seconds: float = 0.0
    compile_cpu_seconds: float = 0.0

    @property
    def cycles(self) -> float:
        """Cycles of one call, bounds included."""
        return sum(self.by_part.values())

    @property
    def peak_bytes(self) -> int:
        """Memory in use on a device while it runs."""
        return self.argument_bytes + self.temporary_bytes + self.code_bytes

    def as_json(self) -> dict[str, Any]:
        """One line of `--json`; cycles are null for a program that was refused."""
        return {
            "function": self.function,
            "rows": self.rows,
            "samples": self.samples,
            "cycles": None if self.refused else round(self.cycles),
            "flops": self.flops,
            "peak_bytes": self.peak_bytes,
            "compile_seconds": round(self.compile_seconds, 1),
            "by_part": {name: round(cycles) for name, cycles in self.by_part.items()},
        }


def priced(
    found: Sequence[hlo.Operation], described: chips.Slice, rest: str = "other"
) -> dict[str, float]:
    """Cycles by part, the largest first; operations without an estimate count at an upper bound.

    Args:
        found: the operations of a program.
        described: the slice that they run on.
        rest: the part that operations of unknown origin are counted in.
    """
    total: dict[str, float] = {}
    for operation in found:
        name, cycles = hlo.part(operation, rest), operation.cycles
        if cycles is None:
            name = _unestimated(operation) + NO_ESTIMATE
            cycles = bound_seconds(operation, described) * described.chip.clock_hz
        total[name] = total.get(name, 0.0) + cycles * operation.times
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _unestimated(operation: hlo.Operation) -> str:
    if operation.is_collective:
        return "collectives"
    return "custom calls" if operation.kind == "custom-call" else "not estimated"


def bound_seconds(operation: hlo.Operation, described: chips.Slice) -> float:
    """An upper bound for the time of an operation without an estimate.

    A collective: all its bytes around a ring, over one link in one direction. Anything else: all
    its bytes to and from memory, then the operations that it states at half the peak.
    """
    if operation.is_collective:
        share = (operation.group - 1) / operation.group
        moved = max(operation.operand_bytes, operation.result_bytes) * share
        rounds = 2 if operation.kind.startswith("all-reduce") else 1
        return rounds * moved / described.chip.link_bandwidth
    moved = operation.operand_bytes + operation.result_bytes
    return moved / described.hbm_bandwidth + 2 * (operation.flops or 0) / described.flops


@dataclass(frozen=True)
class Outlook:
    """What the programs mean for the run.

    Attributes:
        described: the slice.
        held_bytes: memory in use on a device while the largest training program runs, by kind.
        zero_sharding_bytes: memory that train.zero_sharding saves, or would save, on a device.
        largest_rows: clips on a device that should fit, by a linear estimate.
        update_seconds: mean time of an update of the whole model, over the shapes of the run.
        head_update_seconds: the same for updates of the head only (`model.freeze_encoder_steps`).
        head_updates: number of updates of the head only.
        peak_share: operations of an update over what the slice could do at peak in its time.
        audio_seconds: real audio in an update, or padded audio if there is no data.
        updates: updates of the run, None if the number of clips is unknown.
        evaluation_seconds: time of all evaluations of the run.
        programs: number of programs that the run compiles.
        compile_seconds: wall-clock time of what was compiled here.
        compile_cpu_seconds: the same in processor time of all cores.
        refused: whether the compiler refused one of the programs.
    """

    described: chips.Slice
    held_bytes: dict[str, int]
    zero_sharding_bytes: int
    largest_rows: int
    update_seconds: float | None
    head_update_seconds: float | None
    head_updates: int
    peak_share: float | None
    audio_seconds: float
    updates: int | None
    evaluation_seconds: float | None
    programs: int
    compile_seconds: float
    compile_cpu_seconds: float
    refused: bool

    @classmethod
    def of(
        cls,
        cfg: config.Config,
        work: workload.Workload,
        programs: Sequence[Program],
        described: chips.Slice,
    ) -> "Outlook":
        """The outlook from compiled programs; other shapes cost in proportion to FLOPs."""
        times = _Times(cfg, work, programs, described)
        kinds = ("update_from", "accumulate", "accumulate_head")
        learn = next(program for kind in kinds if (program := times.largest(kind)))
        held = _held_bytes(work, programs)
        fixed = sum(held.values()) - held["batch and activations"]
        a_row = (learn.peak_bytes - learn.code_bytes - fixed + held["programs"]) / learn.rows
        refused = any(program.refused for program in programs)
        seconds = head_seconds = share = scored = None
        if not refused:
            seconds = times.update_seconds(learn.function)
            share = times.update_flops(learn.function) / seconds / described.flops
            if times.largest("accumulate_head"):
                head_seconds = times.update_seconds("accumulate_head")
            scored = times.evaluation_seconds()
        return cls(
            described=described,
            held_bytes=held,
            zero_sharding_bytes=work.zero_sharding_bytes,
            largest_rows=max(0, int((described.hbm_bytes - fixed) / a_row)),
            update_seconds=seconds,
            head_update_seconds=head_seconds,
            head_updates=cfg.model.freeze_encoder_steps,
            peak_share=share,
            audio_seconds=work.data.audio_seconds,
            updates=work.data.updates,
            evaluation_seconds=scored,
            programs=sum(_shapes(work, name) for name in {p.function for p in programs}),
            compile_seconds=sum(program.compile_seconds for program in programs),
            compile_cpu_seconds=sum(program.compile_cpu_seconds for program in programs),
            refused=refused,
        )

    @property
    def peak_bytes(self) -> int:
        """Memory in use on a device."""
        return sum(self.held_bytes.values())

    @property
    def fits(self) -> bool:
        """Whether the compiler accepted every program and all of them fit in memory together."""
        return not self.refused and self.peak_bytes <= self.described.hbm_bytes

    @property
    def hours(self) -> float | None:
        """Hours of the run on the devices, evaluation included; None if unknown."""
        if self.updates is None or self.update_seconds is None:
            return None
        waiting = min(self.head_updates, self.updates)
        head = waiting * (self.head_update_seconds or 0.0)
        whole = (self.updates - waiting) * self.update_seconds
        return (head + whole + (self.evaluation_seconds or 0.0)) / 3600

    def as_json(self) -> dict[str, Any]:
        """The last line of `--json`."""
        seconds = self.update_seconds
        return {
            "function": "run",
            "topology": self.described.name,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "hbm_bytes": self.described.hbm_bytes,
            "bytes_by_kind": self.held_bytes,
            "zero_sharding_bytes": self.zero_sharding_bytes,
            "largest_rows": self.largest_rows,
            "update_seconds": None if seconds is None else round(seconds, 4),
            "share_of_peak": None if self.peak_share is None else round(self.peak_share, 4),
            "audio_hours_per_hour": (
                None if seconds is None else round(self.audio_seconds / seconds, 1)
            ),
            "updates": self.updates,
            "hours": None if self.hours is None else round(self.hours, 3),
            "programs": self.programs,
            "compile_seconds": round(self.compile_seconds, 1),
            "compile_cpu_seconds": round(self.compile_cpu_seconds, 1),
        }


def _held_bytes(work: workload.Workload, programs: Sequence[Program]) -> dict[str, int]:
    """What is on a device while the program with the highest peak runs; all programs stay loaded.

    Where one program does the whole update, its gradients are counted among its activations.
    """
    named = {program.function: program for program in programs}
    sums = named["update"].argument_bytes - work.state_bytes if "update" in named else 0
    held = work.state_bytes + sums
    code = collections.defaultdict(list)
    for program in programs:
        code[program.function].append(program.code_bytes)
    return {
        "parameters": work.state_bytes - work.moment_bytes,
        "optimiser moments": work.moment_bytes,
        "gradient sums": sums,
        "batch and activations": max(
            program.peak_bytes - program.code_bytes - held for program in programs
        ),
        # If only the largest shape was compiled, the others are assumed to be as large.
        "programs": sum(
            int(np.mean(sizes)) * _shapes(work, function) for function, sizes in code.items()
        ),
    }


def _shapes(work: workload.Workload, function: str) -> int:
    """Number of shapes in which a run compiles this function."""
    if function == "update":
        return 1
    data = work.data
    return len((data.eval_shapes if function == "evaluate" else data.train_shapes).samples)


class _Times:
    """Time of updates and evaluations, averaged over the shapes of the run by their frequency."""

    def __init__(
        self,
        cfg: config.Config,
        work: workload.Workload,
        programs: Sequence[Program],
        described: chips.Slice,
    ) -> None:
        self._cfg, self._work, self._described = cfg, work, described
        self._programs = {(program.function, program.samples): program for program in programs}

    def largest(self, function: str) -> Program | None:
        """The program of its largest shape; None if the run has no such function."""
        samples = max((n for name, n in self._programs if name == function), default=None)
        return None if samples is None else self._programs[function, samples]

    def update_seconds(self, function: str) -> float:
        """Seconds of an update whose micro-batches this function takes."""
        largest = self.largest(function)
        if function == "update_from":
            # The optimiser costs the same in every shape.
            move = largest.by_part.get("optimiser", 0.0)
        else:
            move = self._programs["update", 0].cycles
        data = self._work.data
        mean = np.dot(self._cycles(function, data.train_shapes.samples, move), data.train_portions)
        return float(self._micro_batches(largest) * mean + move) / self._described.chip.clock_hz

    def update_flops(self, function: str) -> float:
        """Operations of such an update on a device."""
        largest, data = self.largest(function), self._work.data
        shares = [self._share(largest, samples) for samples in data.train_shapes.samples]
        mean = np.dot(shares, data.train_portions)
        return self._micro_batches(largest) * largest.flops * float(mean)

    def evaluation_seconds(self) -> float | None:
        """Seconds of all evaluations of the run; None if their number or the data are not known."""
        data = self._work.data
        if self.largest("evaluate") is None or None in (data.updates, data.scored_groups):
            return None
        passes = {"eval": -(-data.updates // self._cfg.train.eval_steps), "test": 1}
        cycles = self._cycles("evaluate", data.eval_shapes.samples)
        total = sum(
            passes[name] * float(np.dot(cycles, groups))
            for name, groups in data.scored_groups.items()
        )
        return total / self._described.chip.clock_hz

    def _micro_batches(self, program: Program) -> int:
        return self._cfg.train.global_batch_size // (self._work.device_count * program.rows)

    def _cycles(self, function: str, shapes: Sequence[int], move: float = 0.0) -> list[float]:
        """Cycles of a call in each of these shapes, without the optimiser."""
        largest = self.largest(function)
        inside = move if function == "update_from" else 0.0
        return [
            program.cycles - inside
            if (program := self._programs.get((function, samples)))
            else self._share(largest, samples) * (largest.cycles - inside)
            for samples in shapes
        ]

    def _share(self, largest: Program, samples: int) -> float:
        """FLOPs of this function in another shape, relative to its largest shape."""
        of_shape, whole = (
            self._work.flops(largest.function, largest.rows, n) for n in (samples, largest.samples)
        )
        return of_shape / whole
