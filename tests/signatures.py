"""To be imported before the package: every signature of it is checked from then on.

What a function is given and gives back must be of the types, and arrays of the shapes, that it
says, in this process; those that tests start run as users run them.
"""

from collections.abc import Callable

import beartype
import jax
import jaxtyping
import numpy as np

_ARRAY = jax.Array | np.ndarray
jaxtyping.Array = _ARRAY

_TREES = ("LossScale", "Sums", "TrainState")
"""jax fills them with placeholders, shapes and numpy arrays too."""

_check = beartype.beartype(
    # An int may stand for a float, numpy's numbers for Python's, its arrays for jax's.
    conf=beartype.BeartypeConf(
        is_pep484_tower=True,
        hint_overrides=beartype.FrozenDict({int: int | np.integer, jax.Array: _ARRAY}),
    )
)


def check(function: Callable) -> Callable:
    if function.__qualname__ in [f"{tree}.__init__" for tree in _TREES]:
        return function
    return _check(function)


jaxtyping.install_import_hook("flax_asr", "signatures.check")
