"""How steps are compiled: what XLA is told, and all of them before the first one runs."""

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from flax_asr.console import progress
from flax_asr.data import pool

logger = logging.getLogger(__name__)

_TPU_OPTIONS = {
    # Equal operations of all layers share their code. Without, every layer has a copy: a quarter
    # of a gigabyte for each program of XLS-R 300M, and all programs of a run stay on the device.
    "xla_tpu_enable_deduplicated_calls": "ENABLED",
    # Blocks of a product that reach this share of the speed of the best will do. Code for the best
    # ones is long, too long for the compiler itself where frames are many: it has to write it twice
    # or three times. Half a per cent more cycles at 15 s of audio for a third less time to compile.
    "xla_jf_convolution_performance_target": "0.985",
}

_FORWARD_TPU_OPTIONS = {
    # Scoring a clip takes a third of the time of training on it, and fewer are scored. Six per
    # cent more cycles, a quarter of a minute of the whole zh-HK recipe on one chip, for half of the
    # time to compile.
    "xla_jf_convolution_performance_target": "0.96",
}

_OPTIONS_BY_KIND = {
    "TPU v5 lite": {"xla_tpu_scoped_vmem_limit_kib": "24576"},
}
"""A v5e has 128 MiB on the chip, of which an operation may take 16 by default
for its blocks: too little for good ones where its operands are there already. With 24 the compiler
expects 3 % fewer cycles of an update of XLS-R 300M; with 32 not as few."""


def options(device: Any, forward_only: bool = False) -> dict[str, str] | None:
    """What XLA is told beyond its defaults; None for nothing.

    Args:
        device: one of those that the program is for.
        forward_only: the program has no gradient: it scores.
    """
    if device.platform != "tpu":
        return None
    forward = _FORWARD_TPU_OPTIONS if forward_only else {}
    return _TPU_OPTIONS | forward | _OPTIONS_BY_KIND.get(device.device_kind, {})


class Compilable:
    """A function over all devices, and what XLA is told about it.

    Attributes:
        options: beyond XLA's defaults; None for nothing.
    """

    def __init__(self, mapped: Any, options: dict[str, str] | None):
        self.options = options
        self._mapped = mapped

    def __call__(self, *arguments: PyTree) -> Any:
        return self._mapped(*arguments)

    def compile(self, *arguments: PyTree) -> jax.stages.Compiled:
        """The program for arguments of these shapes, which may be arrays.

        An option that this release of the compiler does not know is left out, with a warning.
        """
        lowered = self._mapped.lower(*_lowerable(arguments))
        while True:
            options = _REFUSED.without(self.options)
            try:
                return lowered.compile(options)
            except jax.errors.JaxRuntimeError as error:
                if not _REFUSED.note(options, error):
                    raise


class _Refused:
    """Options that the compiler refuses, known to all threads once one of them has met it."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def without(self, options: dict[str, str] | None) -> dict[str, str] | None:
        return options and {name: to for name, to in options.items() if name not in self._names}

    def note(self, options: dict[str, str] | None, error: Exception) -> bool:
        """Whether the error is about one of the options, which are meant to save time only."""
        reason = str(error)
        name = next((name for name in options or () if name in reason), None)
        if name is None or "INVALID_ARGUMENT" not in reason:
            return False
        with self._lock:
            if name not in self._names:
                self._names.add(name)
                logger.warning(
                    "warning: the compiler does without %s, which this release of it refuses: %s",
                    name,
                    reason,
                )
        return True


_REFUSED = _Refused()


Job = tuple[Compilable, tuple]
"""A function to compile, and the shapes of its arguments."""


class Compilations:
    """How many programs XLA compiles in a `with` statement; the persistent cache counts too."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1


def compile_all(
    jobs: dict[Any, Job],
    report: Callable[[Any, float], None] = lambda key, seconds: None,
) -> dict[Any, Callable]:
    """Compiles every job, the first ones first.

    What comes back takes these shapes and no others: a shape nobody planned is an error, not a
    compilation in the middle of a run. XLA compiles outside the interpreter's lock, so one thread
    a core that this process may use keeps them busy.

    Args:
        jobs: by any keys.
        report: called with the key and the seconds of each program that is compiled.
    """

    def one(key):
        started = time.monotonic()
        function, arguments = jobs[key]
        compiled = function.compile(*arguments)
        report(key, time.monotonic() - started)
        return _one_at_a_time(compiled)

    with concurrent.futures.ThreadPoolExecutor(pool.available_cores()) as threads:
        return dict(zip(jobs, threads.map(one, jobs), strict=True))


def compile_shown(jobs: dict[Any, Job], what: str = "compiling") -> dict[Any, Callable]:
    """As `compile_all`, with progress on standard error; `what` says what is going on."""
    with progress.Progress(len(jobs), what, "programs") as bar:
        return compile_all(jobs, lambda key, seconds: bar.advance(1))


def _lowerable(arguments: PyTree) -> PyTree:
    """Shapes as pmap lowers them: on several hosts it takes those over all devices only as such."""
    if jax.process_count() == 1:
        return arguments
    return jax.tree.map(lambda s: jax.core.ShapedArray(s.shape, s.dtype), arguments)


def _one_at_a_time(compiled: Callable) -> Callable:
    """On CPUs of several hosts, waits for every result: steps in flight may block one another."""
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return compiled
    return lambda *arguments: jax.block_until_ready(compiled(*arguments))
