"""Placement of arrays on devices, and the steps over all of them. The only file that names pmap.

The state is an ordinary tree, replicated by its sharding. A batch has the rows of this host, which
are split among its devices, and into several micro-batches if a group is larger than the devices
take at once.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from flax_asr import compilation, criterion, errors, partition, step
from flax_asr.data import loader
from flax_asr.hosts import cluster
from flax_asr.models import wav2vec2

jax.config.update("jax_threefry_partitionable", True)


class Devices:
    """All devices of the run, over all hosts.

    Attributes:
        count: devices over all hosts.
        platform: "tpu", "gpu" or "cpu".
        local_count: devices of this host.
        host_index: the number of this host; host 0 writes the files.
        host_count: number of hosts.
    """

    def __init__(self, devices: Sequence[Any] | None = None):
        # Host by host, so that the rows of a host are contiguous in the group.
        self.devices = sorted(
            cluster.devices() if devices is None else devices,
            key=lambda device: device.process_index,
        )
        self.host_index = jax.process_index()
        self.host_count = jax.process_count()
        local = [d for d in self.devices if d.process_index == self.host_index]
        self.count = len(self.devices)
        self.platform = self.devices[0].platform
        self.local_count = len(local)
        self._mesh = Mesh(np.array(self.devices), (partition.AXIS,))
        self._replicated = self._along(None)
        self._split = self._along(0)

    def replicate(self, tree: PyTree) -> PyTree:
        """Places numpy arrays, replicated on every device."""
        return jax.tree.map(lambda leaf: self._put(leaf, None), tree)

    def place(self, tree: PyTree, axes: PyTree) -> PyTree:
        """Places numpy arrays: sliced along these axes, or replicated where the axis is None."""
        return jax.tree.map(self._put, tree, axes)

    def split(self, tree: PyTree) -> PyTree:
        """Places numpy arrays [local devices, ...] on this host's devices, one slice on each."""
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self._split, leaf), tree
        )

    def micro_batches(
        self, batch: PyTree, per_device: int
    ) -> Iterator[criterion.Batch | criterion.CachedBatch]:
        """This host's rows of a group, placed, as micro-batches that the devices take at once."""
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
        """Empty sums on every device."""
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
        """Shapes of a placed training micro-batch: of audio, or of the lower layers' output."""
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
        """A sharding along an axis, or a replicated one for None."""
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
) -> compilation.Compilable:
    """`step.accumulate(state, sums, batch) -> sums` over all devices; the sums are donated."""
    return _over(
        devices,
        functools.partial(step.accumulate, objective.on(devices.platform), head_only),
        in_axes=(layout.mapped, 0, 0),
        out_axes=0,
        donate_argnums=(1,),
    )


def update(
    rule: step.Rule, devices: Devices, layout: partition.Layout = partition.REPLICATED
) -> compilation.Compilable:
    """`step.update(state, sums) -> (state, sums, metrics)` over all devices; both are donated."""
    return _over(
        devices,
        functools.partial(step.update, rule, layout.axes),
        in_axes=(layout.mapped, 0),
        out_axes=(layout.mapped, 0, None),
        donate_argnums=(0, 1),
    )


def update_from(
    objective: criterion.Objective,
    rule: step.Rule,
    devices: Devices,
    layout: partition.Layout = partition.REPLICATED,
) -> compilation.Compilable:
    """`step.update_from(state, batch) -> (state, metrics)` over all devices; state is donated."""
    # By itself a function of JAX, which is traced once for the programs of all batch shapes.
    apply = jax.jit(functools.partial(step.update, rule, layout.axes, fresh=True))
    return _over(
        devices,
        functools.partial(step.update_from, objective.on(devices.platform), apply),
        in_axes=(layout.mapped, 0),
        out_axes=(layout.mapped, None),
        donate_argnums=(0,),
    )


def evaluate(
    objective: criterion.Objective,
    devices: Devices,
    layout: partition.Layout = partition.REPLICATED,
) -> compilation.Compilable:
    """`step.evaluate(params, batch) -> (losses, symbols, frames)` for the whole group."""
    return _over(
        devices,
        functools.partial(step.evaluate, objective.on(devices.platform), layout.scored),
        in_axes=(layout.state.scored if layout.scored else None, 0),
        out_axes=None,
        forward_only=True,
    )


def lower(objective: criterion.Objective, devices: Devices) -> compilation.Compilable:
    """`criterion.lower(params, batch) -> hidden states` for every device's rows."""
    return _over(
        devices,
        functools.partial(criterion.lower, objective.on(devices.platform)),
        in_axes=(None, 0),
        out_axes=0,
        forward_only=True,
    )


def gather(devices: Devices, axis: int) -> compilation.Compilable:
    """Gathers an array that is sliced along the axis to every device."""
    return _over(
        devices,
        lambda own: jax.lax.all_gather(own, partition.AXIS, axis=axis, tiled=True),
        in_axes=axis,
        out_axes=None,
    )


def _over(
    devices: Devices, function: Callable, *, forward_only: bool = False, **axes: Any
) -> compilation.Compilable:
    """`jax.pmap` of the function, with these axes."""
    mapped = jax.pmap(function, axis_name=partition.AXIS, devices=devices.devices, **axes)
    return compilation.Compilable(
        mapped, compilation.options(devices.devices[0], forward_only=forward_only)
    )


def gather_jobs(state: step.TrainState, devices: Devices) -> dict[Any, compilation.Job]:
    """The compilation jobs for `whole`; none on one host, which has every slice."""
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
    """The state for a checkpoint: sliced arrays as numpy arrays in the shape of the parameters.

    Slices of other hosts are fetched array by array, as a device has no room for all of them. Every
    host must call this at the same time.
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
    """Scores this host's rows of a group; returns (losses, symbols, frames) of the whole group.

    Args:
        programs: compiled; the one for ("evaluate", padded samples) is called.
        params: placed parameters.
        devices: where they are.
        per_device: rows that a device takes.
    """

    def score(batch):
        (placed,) = devices.micro_batches(batch, per_device)
        return jax.device_get(programs["evaluate", batch.audio.shape[1]](params, placed))

    return score
