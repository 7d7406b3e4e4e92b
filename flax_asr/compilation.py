"""Compiling the steps: options for XLA, and all programs before the first one runs."""

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
    # Equal layers share their code. Otherwise every layer has a copy: a quarter of a gigabyte for
    # each program of XLS-R 300M, and all programs of a run stay on the device.
    "xla_tpu_enable_deduplicated_calls": "ENABLED",
    # Accept blocks of a product that reach this share of the best speed. Code for the best ones is
    # so long with many frames that the compiler has to generate it two or three times. At 15 s of
    # audio this costs half a per cent more cycles and saves a third of the compile time.
    "xla_jf_convolution_performance_target": "0.985",
}

_FORWARD_TPU_OPTIONS = {
    # Scoring a clip takes a third of the time of training on it, and fewer clips are scored. This
    # costs six per cent more cycles, a quarter of a minute in the whole zh-HK recipe on one chip,
    # and halves the compile time.
    "xla_jf_convolution_performance_target": "0.96",
}

_OPTIONS_BY_KIND = {
    "TPU v5 lite": {"xla_tpu_scoped_vmem_limit_kib": "24576"},
}
"""A v5e has 128 MiB on the chip, of which an operation may take 16 by default
for its blocks: too little for good ones where its operands are there already. With 24 the compiler
expects 3 % fewer cycles of an update of XLS-R 300M; with 32 not as few."""


def options(device: Any, forward_only: bool = False) -> dict[str, str] | None:
    """Options for XLA beyond its defaults, or None.

    Args:
        device: one of the devices to compile for.
        forward_only: whether the program only scores, without a gradient.
    """
    if device.platform != "tpu":
        return None
    forward = _FORWARD_TPU_OPTIONS if forward_only else {}
    return _TPU_OPTIONS | forward | _OPTIONS_BY_KIND.get(device.device_kind, {})


class Compilable:
    """A function over all devices, with options for XLA.

    Attributes:
        options: options beyond XLA's defaults, or None.
    """

    def __init__(self, mapped: Any, options: dict[str, str] | None):
        self.options = options
        self._mapped = mapped

    def __call__(self, *arguments: PyTree) -> Any:
        return self._mapped(*arguments)

    def lower(self, *arguments: PyTree) -> jax.stages.Lowered:
        """What is given to the compiler, or looked up in its cache."""
        return self._mapped.lower(*_lowerable(arguments))

    def compile(self, *arguments: PyTree) -> jax.stages.Compiled:
        """The program for arguments of these shapes, which may be arrays.

        An option that this version of the compiler does not know is dropped with a warning.
        """
        lowered = self.lower(*arguments)
        while True:
            options = _REFUSED.without(self.options)
            try:
                return lowered.compile(options)
            except jax.errors.JaxRuntimeError as error:
                if not _REFUSED.note(options, error):
                    raise


class _Refused:
    """Options that the compiler refuses, shared by all threads."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def without(self, options: dict[str, str] | None) -> dict[str, str] | None:
        return options and {name: to for name, to in options.items() if name not in self._names}

    def note(self, options: dict[str, str] | None, error: Exception) -> bool:
        """Whether the error is about one of the options, which can be dropped."""
        reason = str(error)
        name = next((name for name in options or () if name in reason), None)
        if name is None or "INVALID_ARGUMENT" not in reason:
            return False
        with self._lock:
            if name not in self._names:
                self._names.add(name)
                logger.warning(
                    "warning: compiling without %s, which this version of the compiler refuses: %s",
                    name,
                    reason,
                )
        return True


_REFUSED = _Refused()


Job = tuple[Compilable, tuple]
"""A function to compile, and the shapes of its arguments."""


class Compilations:
    """Counts the programs compiled inside a `with` block, including those from the cache."""

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

    The programs take these shapes and no others: an unplanned shape is an error, not a compilation
    in the middle of a run. XLA compiles outside the interpreter's lock, so one thread for each core
    keeps all cores busy.

    Args:
        jobs: the functions to compile, by any keys.
        report: called with the key and the compile time in seconds of each program.
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
    """`compile_all` with progress on standard error, described by `what`."""
    with progress.Progress(len(jobs), what, "programs") as bar:
        return compile_all(jobs, lambda key, seconds: bar.advance(1))


def _lowerable(arguments: PyTree) -> PyTree:
    """Shapes in the form that pmap can lower: on several hosts it takes global shapes only so."""
    if jax.process_count() == 1:
        return arguments
    return jax.tree.map(lambda s: jax.core.ShapedArray(s.shape, s.dtype), arguments)


def _one_at_a_time(compiled: Callable) -> Callable:
    """On CPUs of several hosts, waits for every result: concurrent steps may block each other."""
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return compiled
    return lambda *arguments: jax.block_until_ready(compiled(*arguments))
