"""Modules computed as a run computes them: operation by operation takes seconds to compile."""

import functools

import jax


def outputs(module, params, *inputs, **options):
    """What `module.apply` gives."""
    return jax.jit(functools.partial(module.apply, **options))(params, *inputs)
