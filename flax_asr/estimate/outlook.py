"""What compiled programs mean: cycles by part, memory by kind, the time of an update and a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from flax_asr import config
from flax_asr.estimate import chips, flops, hlo, workload

NO_ESTIMATE = " (bound)"
"""Ends the name of a part that the compiler gives no estimate of."""


@dataclass(frozen=True)
class Program:
    """A compiled function, or one that was refused for want of memory.

    Attributes:
        function: `accumulate` and `update`, or `update_from`; `evaluate`.
        rows: clips a device, 0 for `update`.
        samples: padded length, 0 for `update`.
        flops: of a device, counted analytically.
        by_part: cycles; names that end in "(bound)" are ours, the others the compiler's.
        argument_bytes: what goes in, by our count of the shapes, all of the state included.
        temporary_bytes: what it needs besides while it runs.
        code_bytes: the program itself.
        refused: the compiler's words if it did not fit.
        compile_seconds: lowering included.
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

    @property
    def cycles(self) -> float:
        """Of one call, bounds included."""
        return sum(self.by_part.values())

    @property
    def peak_bytes(self) -> int:
        """Of a device while it runs: everything that is there then."""
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
    """Cycles by part, the largest first; what has no estimate at a pessimistic bound.

    Args:
        found: the operations of a program.
        described: what they run on.
        rest: the part of operations whose origin says nothing.
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
    """Time that an operation without an estimate should not exceed.

    A collective: all its bytes around a ring, over one link in one direction. Anything else: all
    its bytes through the memory, and then what it says it computes at half the peak.
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
        held_bytes: of a device, by kind, while the largest train step runs.
        zero_sharding_bytes: of a device, what train.zero_sharding saves or would save.
        largest_rows: clips a device that should fit, by a linear estimate.
        update_seconds: mean over the shapes of the run.
        peak_share: FLOPs of an update over what the slice could do in its time.
        audio_seconds: real audio of an update, or padded audio where there is no data.
        updates: of the whole run, None where the number of clips is unknown.
        evaluation_seconds: of the whole run.
        programs: how many a run compiles.
        compile_seconds: of what was compiled here.
        refused: whether the compiler refused one of them.
    """

    described: chips.Slice
    held_bytes: dict[str, int]
    zero_sharding_bytes: int
    largest_rows: int
    update_seconds: float | None
    peak_share: float | None
    audio_seconds: float
    updates: int | None
    evaluation_seconds: float | None
    programs: int
    compile_seconds: float
    refused: bool

    @classmethod
    def of(
        cls,
        cfg: config.Config,
        work: workload.Workload,
        programs: Sequence[Program],
        described: chips.Slice,
        device_count: int,
    ) -> "Outlook":
        """Everything from the compiled programs; other shapes cost in proportion to FLOPs."""
        named = {program.function: program for program in programs}
        at_once = "update_from" in named
        learn = named["update_from" if at_once else "accumulate"]
        scoring = named.get("evaluate")
        held = _held_bytes(work, programs)
        fixed = sum(held.values()) - held["batch and activations"]
        a_row = (learn.peak_bytes - learn.code_bytes - fixed + held["programs"]) / learn.rows
        refused = any(program.refused for program in programs)
        clock = described.chip.clock_hz
        seconds = share = scored = None
        if not refused:
            micro_batches = cfg.train.global_batch_size // (device_count * learn.rows)
            costs = _train_costs(work)
            mean = float(np.dot(costs, work.train_portions)) / costs[-1]
            # What moves the parameters costs the same in every shape.
            move = learn.by_part.get("optimiser", 0) if at_once else named["update"].cycles
            gradient = learn.cycles - move if at_once else learn.cycles
            seconds = (micro_batches * gradient * mean + move) / clock
            share = micro_batches * learn.flops * mean / seconds / described.flops
            scored = _evaluation_seconds(cfg, work, scoring, clock)
        return cls(
            described=described,
            held_bytes=held,
            zero_sharding_bytes=work.zero_sharding_bytes,
            largest_rows=max(0, int((described.hbm_bytes - fixed) / a_row)),
            update_seconds=seconds,
            peak_share=share,
            audio_seconds=work.audio_seconds,
            updates=work.updates,
            evaluation_seconds=scored,
            programs=len(work.train_shapes.samples) + 1 + len(work.eval_shapes.samples),
            compile_seconds=sum(program.compile_seconds for program in programs),
            refused=refused,
        )

    @property
    def peak_bytes(self) -> int:
        """Of a device."""
        return sum(self.held_bytes.values())

    @property
    def fits(self) -> bool:
        """Whether the compiler took every program and all of it fits together."""
        return not self.refused and self.peak_bytes <= self.described.hbm_bytes

    @property
    def hours(self) -> float | None:
        """Of the whole run on the device, evaluation included."""
        if self.updates is None or self.update_seconds is None:
            return None
        return (self.updates * self.update_seconds + (self.evaluation_seconds or 0)) / 3600

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
        }


def _held_bytes(work: workload.Workload, programs: Sequence[Program]) -> dict[str, int]:
    """What is on a device while the hungriest program runs; all programs stay loaded.

    Where the sums do not outlive a program, its gradients are among its activations.
    """
    named = {program.function: program for program in programs}
    sums = named["update"].argument_bytes - work.state_bytes if "update" in named else 0
    held = work.state_bytes + sums
    numbers = {
        "accumulate": len(work.train_shapes.samples),
        "update_from": len(work.train_shapes.samples),
        "update": 1,
        "evaluate": len(work.eval_shapes.samples),
    }
    return {
        "parameters": work.state_bytes - work.moment_bytes,
        "optimiser moments": work.moment_bytes,
        "gradient sums": sums,
        "batch and activations": max(
            program.peak_bytes - program.code_bytes - held for program in programs
        ),
        "programs": sum(program.code_bytes * numbers[program.function] for program in programs),
    }


def _train_costs(work: workload.Workload) -> list[int]:
    """Operations of a clip in each train shape."""
    config, lower_layers = work.objective.config, work.objective.lower_layers
    return [
        sum(flops.gradient(config, 1, samples, work.is_trained, lower_layers).values())
        for samples in work.train_shapes.samples
    ]


def _evaluation_seconds(
    cfg: config.Config, work: workload.Workload, scoring: Program | None, clock_hz: float
) -> float | None:
    if scoring is None or work.updates is None or work.scored_groups is None:
        return None
    costs = [
        sum(flops.forward(work.objective.config, 1, samples).values())
        for samples in work.eval_shapes.samples
    ]
    passes = {"eval": -(-work.updates // cfg.train.eval_steps), "test": 1}
    largest_shapes = sum(
        passes[name] * float(np.dot(costs, groups)) / costs[-1]
        for name, groups in work.scored_groups.items()
    )
    return largest_shapes * scoring.cycles / clock_hz


def tree_bytes(tree: PyTree) -> int:
    return sum(
        int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "shape")
    )
