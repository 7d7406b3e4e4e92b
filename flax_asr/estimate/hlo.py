"""The TPU compiler's estimates for a program that it compiled, operation by operation.

Reads the text of an optimised program (`compiled.as_text()`); pure. Most operations there carry
`"estimated_cycles"`. Collectives and custom calls carry none and are returned without, for
`outlook.priced` to estimate. An operation is counted under the module that it comes from; a fused
one under that of its root, so the borders between parts are not exact.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = frozenset(
    "all-reduce all-gather reduce-scatter all-to-all collective-permute".split()
)
"""Operations between devices; their names may also end in `-start`."""

_WORK = frozenset(
    "fusion sort gather scatter reduce-window select-and-scatter convolution dot custom-call"
    " rng-bit-generator cholesky triangular-solve fft".split()
)
"""Operations that take time, estimated or not. Without an estimate, the others are scalar
arithmetic, bookkeeping, and copies that run beside the arithmetic."""

_FREE_CALLS = frozenset("AllocateBuffer ConcatBitcast SliceBitcast Sharding".split())
"""The compiler's custom calls that do nothing when the program runs."""

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Operation:
    """An operation of the program.

    Attributes:
        kind: its name in HLO, for example `fusion`.
        path: the modules and the primitive that it comes from.
        files: source files that it comes from, the innermost first.
        cycles: cycles of one execution, None where the compiler gives no estimate.
        times: executions in one run of the program.
        operand_bytes: bytes read by one execution.
        result_bytes: bytes written by one execution.
        flops: operations of one execution, where a custom call states them.
        target: name of the custom call.
        group: number of devices that a collective connects.
    """

    kind: str
    path: str = ""
    files: tuple[str, ...] = ()
    cycles: int | None = None
    times: int = 1
    operand_bytes: int = 0
    result_bytes: int = 0
    flops: float | None = None
    target: str | None = None
    group: int = 1

    @property
    def is_collective(self) -> bool:
        """Whether it waits for other devices."""
        return self.kind.removesuffix("-start") in COLLECTIVES


def operations(text: str) -> list[Operation]:
    """Every operation that takes time in an optimised program.

    The body of a loop counts as often as the loop runs (once, if the text does not say how often);
    of several branches only the one with the most cycles counts.

    Raises:
        ValueError: the text is not that of a program.
    """
    program = _Program(text)
    return list(program.run(program.entry, 1))


def part(operation: Operation, rest: str = "other") -> str:
    """The part of the step that an operation belongs to; `rest` if its origin does not say."""
    if operation.is_collective:
        return "collectives"
    for word, name in _BY_PATH:
        if re.search(word, operation.path):
            return name
    for file in operation.files:
        if file in _BY_FILE:
            return _BY_FILE[file]
    return rest


# The first that matches counts.
_BY_PATH = (
    (r"/feature_extractor/", "feature encoder"),
    (r"/feature_projection/", "feature projection"),
    (r"/pos_conv_embed/", "positional convolution"),
    (r"/(q|k|v|out)_proj/", "attention projections"),
    (r"/attention/", "attention"),
    (r"/feed_forward/", "feed-forward"),
    (r"/(final_)?layer_norm/", "layer norms"),
    (r"/lm_head/", "head"),
    (r"/optimiser/", "optimiser"),
)
_BY_FILE = {
    "ctc.py": "CTC",
    "masking.py": "SpecAugment",
    "optim.py": "optimiser",
}


class _Program:
    def __init__(self, text: str):
        self._computations: dict[str, list[str]] = {}
        self._files = _Files(text)
        self.entry = ""
        lines: list[str] | None = None
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                lines = self._computations.setdefault(found[2], [])
                self.entry = found[2] if found[1] else self.entry
            elif line.startswith("}"):
                lines = None
            elif lines is not None:
                lines.append(line)
        if not self.entry:
            raise ValueError("no ENTRY computation: this is not the text of an HLO program")

    def run(self, computation: str, times: int) -> Iterator[Operation]:
        """The operations of a computation that runs `times` times, and of those that it calls."""
        results: dict[str, str] = {}
        for line in self._computations[computation]:
            found = _OPERATION.match(line)
            if found is None:
                continue
            name, result, kind, rest = found.groups()
            results[name] = result
            if kind == "while":
                trips = self._trips(rest)
                for called in re.findall(r"(?:condition|body)=%?([\w.\-]+)", rest):
                    yield from self.run(called, times * trips)
            elif kind == "conditional":
                yield from self._longest_branch(rest, times)
            elif kind in ("call", "async-start"):
                (called,) = re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", rest)
                yield from self.run(called, times)
            else:
                yield from self._single(kind, result, rest, results, times)

    def _single(self, kind, result, rest, results, times) -> Iterator[Operation]:
        cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        flops = re.search(r'cost_estimate"?\s*[:=]\s*\{[^}]*?flops"?\s*[:=]\s*"?(\d+)', rest)
        path = re.search(r'op_name="([^"]*)"', rest)
        operation = Operation(
            kind=kind,
            path=path[1] if path else "",
            files=self._files.of(rest),
            cycles=int(cycles[1]) if cycles else None,
            times=times,
            operand_bytes=sum(
                _size(results[name])
                for name in re.findall(r"%([\w.\-]+)", _arguments(rest))
                if name in results
            ),
            result_bytes=_size(result),
            flops=float(flops[1]) if flops else None,
            target=target[1] if target else None,
            group=_group(rest),
        )
        if operation.is_collective or operation.cycles is not None:
            yield operation
        elif kind == "fusion":
            yield from self._inside_fusion(operation, rest)
        elif kind in _WORK and operation.target not in _FREE_CALLS:
            yield operation

    def _inside_fusion(self, fusion: Operation, rest: str) -> Iterator[Operation]:
        """A fusion without an estimate may be a collective in disguise."""
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        inner = [
            operation
            for operation in (self.run(called[1], fusion.times) if called else ())
            if operation.is_collective
        ]
        yield from inner or [fusion]

    def _longest_branch(self, rest: str, times: int) -> Iterator[Operation]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
        names = (
            re.findall(r"[\w.\-]+", listed[1])
            if listed
            else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
        )
        branches = [list(self.run(name, times)) for name in names]
        yield from max(branches, key=lambda branch: sum((o.cycles or 0) * o.times for o in branch))

    def _trips(self, rest: str) -> int:
        """How often a loop runs: as stated, or the only constant in its condition; else 1."""
        stated = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', rest)
        if stated:
            return int(stated[1])
        condition = re.search(r"condition=%?([\w.\-]+)", rest)
        text = "\n".join(self._computations[condition[1]])
        if "direction=LT" not in text:
            return 1
        bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
        return int(bounds[0]) if len(bounds) == 1 else 1


class _Files:
    """The tables at the start of a program that map operations to source files."""

    def __init__(self, text: str):
        names = dict(re.findall(r'^(\d+) "(.*\.py)"$', text, re.MULTILINE))
        locations = dict(
            re.findall(r"^(\d+) \{file_name_id=(\d+) function_name_id=", text, re.MULTILINE)
        )
        self._frames = {
            frame: (locations[location], parent)
            for frame, location, parent in re.findall(
                r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", text, re.MULTILINE
            )
        }
        self._names = {number: name.rpartition("/")[2] for number, name in names.items()}
        self._known: dict[str, tuple[str, ...]] = {}

    def of(self, rest: str) -> tuple[str, ...]:
        found = re.search(r"stack_frame_id=(\d+)", rest)
        if found is None:
            return ()
        if found[1] not in self._known:
            self._known[found[1]] = tuple(dict.fromkeys(self._walk(found[1])))
        return self._known[found[1]]

    def _walk(self, frame: str) -> Iterator[str]:
        seen = set()
        while frame in self._frames and frame not in seen:
            seen.add(frame)
            file, frame = self._frames[frame]
            if file in self._names:
                yield self._names[file]


def _arguments(rest: str) -> str:
    """The text between the parentheses of an operation."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place]
    return rest


def _size(result: str) -> int:
    """Bytes of an array, or of all arrays in a tuple."""
    total = 0.0
    for dtype, dims in _SHAPE.findall(result):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        bits = re.search(r"\d+", dtype)
        total += count * (_BYTES[dtype] if dtype in _BYTES else int(bits[0]) / 8)
    return int(total)


def _group(rest: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed[1].split(","))
    shaped = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    return int(shaped[2]) if shaped else 1
