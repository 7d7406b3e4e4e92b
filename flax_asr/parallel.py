"""Devices: where arrays live and how steps are compiled. The only file that names pmap.

The state is an ordinary tree, replicated by its sharding; a batch has the rows of this host, which
are split over its devices, and in time where a group is larger than the devices take at once.
"""

import concurrent.futures
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from flax_asr import criterion, errors, partition, step
from flax_asr.data import loader, pool
from flax_asr.hosts import cluster
from flax_asr.models import wav2vec2

jax.config.update("jax_threefry_partitionable", True)


_TPU_OPTIONS = {
    # Equal operations of all layers share their code. Without, every layer has a copy: a quarter
    # of a gigabyte for each program of XLS-R 300M, and all programs of a run stay on the device.
    "xla_tpu_enable_deduplicated_calls": "ENABLED",
    # Blocks of a product that reach this share of the speed of the best will do. Code for the best
    # ones is long, too long for the compiler itself where frames are many: it has to write it twice
    # or three times. Half a per cent more cycles at 15 s of audio for a third less time to compile.
    "xla_jf_convolution_performance_target": "0.985",
}

_OPTIONS_BY_KIND = {
    "TPU v5 lite": {"xla_tpu_scoped_vmem_limit_kib": "24576"},
}
"""A v5e has 128 MiB on the chip, of which an operation may take 16 by default
for its blocks: too little for good ones where its operands are there already. With 24 the compiler
expects 3 % fewer cycles of an update of XLS-R 300M; with 32 not as few."""


def _compiler_options(device: Any) -> dict[str, str] | None:
    if device.platform != "tpu":
        return None
    return _TPU_OPTIONS | _OPTIONS_BY_KIND.get(device.device_kind, {})


class Devices:
    """All devices of the run, over all hosts.

    Attributes:
        count: devices over all hosts.
        platform: "tpu", "gpu" or "cpu".
        compiler_options: what XLA is told beyond its defaults for such devices.
        local_count: devices of this host.
        host_index: which host this is; host 0 writes the files.
        host_count: how many there are.
    """

    def __init__(self, devices: Sequence[Any] | None = None):
        # Host by host, so that the rows of a host are one piece of the group.
        self.devices = sorted(
            cluster.devices() if devices is None else devices,
            key=lambda device: device.process_index,
        )
        self.host_index = jax.process_index()
        self.host_count = jax.process_count()
        local = [d for d in self.devices if d.process_index == self.host_index]
        self.count = len(self.devices)
        self.platform = self.devices[0].platform
        self.compiler_options = _compiler_options(self.devices[0])
        self.local_count = len(local)
        self._mesh = Mesh(np.array(self.devices), (partition.AXIS,))
        self._replicated = self._along(None)
        self._split = self._along(0)

    def replicate(self, tree: PyTree) -> PyTree:
        """Puts the same numpy arrays on every device."""
        return jax.tree.map(lambda leaf: self._put(leaf, None), tree)

    def place(self, tree: PyTree, axes: PyTree) -> PyTree:
        """Puts numpy arrays on the devices: slices along these axes, or all where it is None."""
        return jax.tree.map(self._put, tree, axes)

    def split(self, tree: PyTree) -> PyTree:
        """Puts numpy arrays [local devices, ...] on this host's devices, one slice each."""
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self._split, leaf), tree
        )

    def micro_batches(
        self, batch: PyTree, per_device: int
    ) -> Iterator[criterion.Batch | criterion.CachedBatch]:
        """This host's rows of a group, in device-sized pieces, placed."""
        kind = criterion.CachedBatch if isinstance(batch, loader.CachedBatch) else criterion.Batch
        at_once = self.local_count * per_device
        rows = len(batch.weights)
        if rows % at_once:
            raise errors.ConfigError(
                f"a group has {rows} rows on this host, which {self.local_count} devices cannot"
                f" take {per_device} at a time each."
            )
        for start in range(0, rows, at_once):
            piece = kind(*(a[start : start + at_once] for a in batch))
            yield self.split(
                jax.tree.map(lambda a: a.reshape(self.local_count, per_device, *a.shape[1:]), piece)
            )

    def zero_sums(self, trainable: step.Parameters) -> step.Sums:
        """Empty sums, one a device."""
        shapes = jax.eval_shape(step.Sums.zeros, trainable)
        return self.split(
            jax.tree.map(lambda s: np.zeros((self.local_count, *s.shape), s.dtype), shapes)
        )

    def replicated_shapes(self, tree: PyTree) -> PyTree:
        """Shapes of `replicate`, for compilation."""
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._replicated), tree
        )

    def placed_shapes(self, tree: PyTree, axes: PyTree) -> PyTree:
        """Shapes of `place`, for compilation."""
        return jax.tree.map(
            lambda leaf, axis: jax.ShapeDtypeStruct(
                partition.cut(leaf.shape, axis, self.count), leaf.dtype, sharding=self._along(axis)
            ),
            tree,
            axes,
        )

    def sum_shapes(self, trainable: step.Parameters) -> step.Sums:
        """Shapes of the sums over all devices, for compilation."""
        return self._split_shapes(jax.eval_shape(step.Sums.zeros, trainable))

    def batch_shapes(self, per_device: int, samples: int, tokens: int) -> criterion.Batch:
        """Shapes of a placed micro-batch over all devices, for compilation."""
        shape = jax.ShapeDtypeStruct
        return self._split_shapes(
            criterion.Batch(
                audio=shape((per_device, samples), np.int16),
                gains=shape((per_device,), np.float32),
                sample_lengths=shape((per_device,), np.int32),
                labels=shape((per_device, tokens), np.int32),
                label_lengths=shape((per_device,), np.int32),
                weights=shape((per_device,), np.float32),
            )
        )

    def train_batch_shapes(
        self, objective: criterion.Objective, per_device: int, samples: int, tokens: int
    ) -> criterion.Batch | criterion.CachedBatch:
        """The same as training takes it: audio, or the lower layers' output."""
        batch = self.batch_shapes(per_device, samples, tokens)
        if objective.lower_layers is None:
            return batch
        frames = int(wav2vec2.frame_lengths(objective.config, samples))
        shape = (self.count, per_device, frames, objective.config.hidden_size)
        kept = {name: getattr(batch, name) for name in criterion.CachedBatch._fields[1:]}
        return criterion.CachedBatch(
            jax.ShapeDtypeStruct(shape, objective.module.dtype, sharding=self._split), **kept
        )

    def _along(self, axis: int | None) -> NamedSharding:
        """One slice a device along an axis, or everything everywhere."""
        spec = () if axis is None else (*[None] * axis, partition.AXIS)
        return NamedSharding(self._mesh, PartitionSpec(*spec))

    def _put(self, leaf: Any, axis: int | None) -> jax.Array:
        array = np.asarray(leaf)
        array = array.reshape(partition.cut(array.shape, axis, self.count))
        return jax.make_array_from_callback(array.shape, self._along(axis), array.__getitem__)

    def _split_shapes(self, tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((self.count, *s.shape), s.dtype, sharding=self._split),
            tree,
        )


def accumulate(
    objective: criterion.Objective,
    devices: Devices,
    layout: partition.Layout = partition.REPLICATED,
    head_only: bool = False,
) -> Callable:
    """`step.accumulate(state, sums, batch) -> sums` over all devices; the sums are donated."""
    return jax.pmap(
        functools.partial(step.accumulate, objective.on(devices.platform), head_only),
        axis_name=partition.AXIS,
        in_axes=(layout.mapped, 0, 0),
        out_axes=0,
        donate_argnums=(1,),
        devices=devices.devices,
    )


def update(
    rule: step.Rule, devices: Devices, layout: partition.Layout = partition.REPLICATED
) -> Callable:
    """`step.update(state, sums) -> (state, sums, metrics)` over all devices; both are donated."""
    return jax.pmap(
        functools.partial(step.update, rule, layout.axes),
        axis_name=partition.AXIS,
        in_axes=(layout.mapped, 0),
        out_axes=(layout.mapped, 0, None),
        donate_argnums=(0, 1),
        devices=devices.devices,
    )


def update_from(
    objective: criterion.Objective,
    rule: step.Rule,
    devices: Devices,
    layout: partition.Layout = partition.REPLICATED,
) -> Callable:
    """`step.update_from(state, batch) -> (state, metrics)` over all devices; state is donated."""
    return jax.pmap(
        functools.partial(step.update_from, objective.on(devices.platform), rule, layout.axes),
        axis_name=partition.AXIS,
        in_axes=(layout.mapped, 0),
        out_axes=(layout.mapped, None),
        donate_argnums=(0,),
        devices=devices.devices,
    )


def evaluate(
    objective: criterion.Objective,
    devices: Devices,
    layout: partition.Layout = partition.REPLICATED,
) -> Callable:
    """`step.evaluate(params, batch) -> (losses, symbols, frames)` of the whole group."""
    return jax.pmap(
        functools.partial(step.evaluate, objective.on(devices.platform), layout.scored),
        axis_name=partition.AXIS,
        in_axes=(layout.state.scored if layout.scored else None, 0),
        out_axes=None,
        devices=devices.devices,
    )


def lower(objective: criterion.Objective, devices: Devices) -> Callable:
    """`criterion.lower(params, batch) -> hidden states` of every device's rows."""
    return jax.pmap(
        functools.partial(criterion.lower, objective.on(devices.platform)),
        axis_name=partition.AXIS,
        in_axes=(None, 0),
        out_axes=0,
        devices=devices.devices,
    )


def gather(devices: Devices, axis: int) -> Callable:
    """An array that is cut along the axis -> all of it, everywhere."""
    return jax.pmap(
        lambda own: jax.lax.all_gather(own, partition.AXIS, axis=axis, tiled=True),
        axis_name=partition.AXIS,
        in_axes=axis,
        out_axes=None,
        devices=devices.devices,
    )


def gather_jobs(state: step.TrainState, devices: Devices) -> dict[Any, tuple]:
    """What `whole` needs of `compile_all`: nothing on one host, which has every slice."""
    if devices.host_count == 1:
        return {}
    return {
        ("gather", axis, leaf.shape): (gather(devices, axis), (leaf,))
        for leaf in jax.tree.leaves(state)
        if (axis := partition.axis_of(leaf.sharding)) is not None
    }


def whole(
    programs: dict[Any, Callable],
    state: step.TrainState,
    layout: partition.Layout,
    devices: Devices,
) -> step.TrainState:
    """The state for a checkpoint: what was cut as numpy arrays in the shape of the parameters.

    Slices of other hosts come array by array: there is no room for all of them on a device. Every
    host is to call this at the same time.
    """

    def one(leaf, axis):
        if axis is None:
            return leaf
        if devices.host_count > 1:
            return np.asarray(programs["gather", axis, leaf.shape](leaf).addressable_data(0))
        return np.asarray(leaf).reshape(partition.merged(leaf.shape, axis))

    if devices.host_count == 1:
        for leaf in jax.tree.leaves(state):
            leaf.copy_to_host_async()
    return jax.tree.map(one, state, layout.state)


def forward(
    programs: dict[Any, Callable], params: step.Parameters, devices: Devices, per_device: int
) -> Callable[[Any], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Scores this host's rows of a group; gives (losses, symbols, frames) of the whole group.

    Args:
        programs: what `compile_all` gave; the one for ("evaluate", padded samples) is called.
        params: placed parameters.
        devices: where they are.
        per_device: rows that a device takes.
    """

    def score(batch):
        (placed,) = devices.micro_batches(batch, per_device)
        return jax.device_get(programs["evaluate", batch.audio.shape[1]](params, placed))

    return score


class Compilations:
    """How many programs XLA has compiled since this was made; the persistent cache counts too."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1


def keep_compiled(folder: str | os.PathLike) -> None:
    """Keeps compiled programs in a folder, so that a resumed run does not compile them again."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def compile_all(
    jobs: dict[Any, tuple[Callable, tuple]],
    devices: Devices,
    report: Callable[[Any, float], None] = lambda key, seconds: None,
) -> dict[Any, Callable]:
    """Compiles every (pmapped function, shapes of its arguments), the first ones first.

    What comes back takes these shapes and no others: a shape nobody planned is an error, not a
    compilation in the middle of a run. XLA compiles outside the interpreter's lock, so one thread
    a core that this process may use keeps them busy.

    Args:
        jobs: by any keys.
        devices: what is compiled for.
        report: called with the key and the seconds of each program that is compiled.
    """

    def one(key):
        started = time.monotonic()
        function, arguments = jobs[key]
        compiled = function.lower(*_lowerable(arguments)).compile(devices.compiler_options)
        report(key, time.monotonic() - started)
        return _one_at_a_time(compiled)

    with concurrent.futures.ThreadPoolExecutor(pool.available_cores()) as threads:
        return dict(zip(jobs, threads.map(one, jobs), strict=True))


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
