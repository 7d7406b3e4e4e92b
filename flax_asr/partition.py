"""ZeRO stage 1: the optimiser's moments and the moving average, divided among the devices.

A matrix is cut along one axis. In its moments and its average that axis becomes two, devices and
slice, so that pmap can split it; merging the two is a reshape without a copy. A device updates its
own slice: gradients are reduce-scattered to the slices, and the new parameters gathered from them,
which moves the same bytes as one all-reduce.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", section 5.1.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

AXIS = "devices"
"""Name of the axis of devices, over which gradients are averaged and moments are divided."""

Axes = Mapping[str, int]
"""The axis along which each parameter is cut, by path; parameters not listed stay whole."""

Arrays = dict[str, Array]

_READ_AT_ONCE = 8


class Layout(NamedTuple):
    """Which arrays of a state are cut, and along which axis.

    Attributes:
        axes: the axes of the trainable parameters.
        state: the axis of every array of the state, None if it is not cut.
    """

    axes: Axes
    state: PyTree

    @property
    def mapped(self) -> PyTree:
        """The axes of a state for pmap: a single None if nothing is cut."""
        return self.state if self.axes else None

    @property
    def scored(self) -> Axes:
        """The axes of the parameters that are scored: an average is cut, others are not."""
        average = self.state.average if self.axes else {}
        return {path: axis for path, axis in average.items() if axis is not None}


REPLICATED = Layout({}, None)
"""The layout in which every device has the whole state."""


def axes(parameters: Mapping[str, Any], devices: int) -> Axes:
    """The axis along which each parameter is cut: the first that the number of devices divides.

    Slices along the first axis are contiguous. Vectors stay whole: they are a thousandth of a
    model, and each would need its own collective.

    Args:
        parameters: arrays or shapes by path.
        devices: number of devices; with one, nothing is cut.
    """
    if devices == 1:
        return {}
    fitting = {
        path: [axis for axis, size in enumerate(p.shape) if size % devices == 0]
        for path, p in parameters.items()
        if len(p.shape) > 1
    }
    return {path: found[0] for path, found in fitting.items() if found}


def layout(state: PyTree, devices: int) -> Layout:
    """The layout of a `step.TrainState` (of arrays or shapes) on so many devices."""
    found = axes(state.trainable, devices)
    whole = jax.tree.map(lambda leaf: None, state)
    mirrors = {name: _mirrored(getattr(state, name), found) for name in ("optimiser", "average")}
    return Layout(found, whole.replace(**mirrors))


def _mirrored(tree: PyTree, axes: Axes) -> PyTree:
    """The axes of arrays that are stored by the paths of parameters, at any depth."""

    def axis(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return next((axes[name] for name in names if name in axes), None)

    return jax.tree_util.tree_map_with_path(axis, tree)


def tree_bytes(tree: PyTree) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(tree: PyTree, axes: PyTree, devices: int) -> int:
    """Bytes on a device of a tree of arrays or shapes with the axes of a `Layout.state`."""
    sizes = jax.tree.map(
        lambda leaf, axis: (
            math.prod(leaf.shape) * leaf.dtype.itemsize // (1 if axis is None else devices)
        ),
        tree,
        axes,
    )
    return sum(jax.tree.leaves(sizes))


def cut(shape: tuple[int, ...], axis: int | None, devices: int) -> tuple[int, ...]:
    """The shape with its axis split into two: devices, and the slice of each."""
    if axis is None:
        return tuple(shape)
    return (*shape[:axis], devices, shape[axis] // devices, *shape[axis + 1 :])


def merged(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape that was `cut` along the axis."""
    return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def axis_of(sharding: jax.sharding.NamedSharding) -> int | None:
    """The axis along which an array with this sharding is cut."""
    spec = tuple(sharding.spec)
    return spec.index(AXIS) if AXIS in spec else None


def summed(sums: PyTree, axes: Axes) -> PyTree:
    """A `step.Sums` summed over the devices; gradients that are cut become this device's slices."""
    # With one device there is nothing to sum, but XLA on a CPU would copy it.
    if jax.lax.axis_size(AXIS) == 1:
        return sums
    total = jax.lax.psum(sums.replace(gradients=_without(sums.gradients, axes)), AXIS)
    own = {
        path: jax.lax.psum_scatter(sums.gradients[path], AXIS, scatter_dimension=axis, tiled=True)
        for path, axis in axes.items()
    }
    return total.replace(gradients=total.gradients | own)


def slices(parameters: Arrays, axes: Axes) -> Arrays:
    """The parameters, those that are cut as this device's slices."""

    def own(parameter, axis):
        size = parameter.shape[axis] // jax.lax.axis_size(AXIS)
        start = jax.lax.axis_index(AXIS) * size
        return jax.lax.dynamic_slice_in_dim(parameter, start, size, axis)

    return parameters | {path: own(parameters[path], axis) for path, axis in axes.items()}


def gathered(own: Arrays, axes: Axes) -> Arrays:
    """The whole arrays, gathered from the `slices` of all devices."""
    return own | {
        path: jax.lax.all_gather(own[path], AXIS, axis=axis, tiled=True)
        for path, axis in axes.items()
    }


def norm(own: Arrays, axes: Axes, fresh: bool = False) -> Float[Array, ""]:
    """The norm of the whole arrays, from `slices`.

    `fresh` means that the arrays are computed in the same program: on a single device, each matrix
    is then squared where it is computed, and need not be read again. A vector is too short for a
    separate pass.
    """
    if fresh and jax.lax.axis_size(AXIS) == 1:
        vectors = {path: array for path, array in own.items() if array.ndim < 2}
        matrices = _without(own, vectors)
        squares = sum(jnp.sum(jnp.square(array)) for array in matrices.values())
        return jnp.sqrt(squares + _squares(vectors))
    if not axes:
        return jnp.sqrt(_squares(own))
    cut_squares = _squares({path: own[path] for path in axes})
    return jnp.sqrt(jax.lax.psum(cut_squares, AXIS) + _squares(_without(own, axes)))


def _squares(arrays: Arrays) -> Float[Array, ""]:
    """The sum of all squares.

    Arrays of the same shape are squared together, as a TPU reads a single one too slowly; and so
    are all vectors, as each takes less time than starting a pass.
    """
    by_shape: dict[tuple[int, ...], list[Array]] = {}
    for array in arrays.values():
        by_shape.setdefault(array.shape, []).append(array)
    return sum(
        jnp.sum(sum(jnp.square(array) for array in alike[first : first + at_once]))
        for shape, alike in by_shape.items()
        for at_once in [_READ_AT_ONCE if len(shape) > 1 else len(alike)]
        for first in range(0, len(alike), at_once)
    )


def _without(arrays: Arrays, others: Iterable[str]) -> Arrays:
    return {path: array for path, array in arrays.items() if path not in others}
