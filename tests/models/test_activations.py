"""Activations against PyTorch's, compiled as users have them: tanh is not the same in all ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import activations as torch_activations

from flax_asr.models import activations


@pytest.mark.parametrize("name", activations.NAMES)
def test_activations_equal_pytorchs(name):
    x = np.linspace(-12, 12, 998, dtype=np.float32)  # no point on a kink, at 0, 3, 6 or 10
    tensor = torch.tensor(x, requires_grad=True)
    theirs = torch_activations.ACT2FN[name](tensor)
    theirs.sum().backward()
    function = activations.activation(name, "hidden_act")
    np.testing.assert_allclose(function(x), theirs.detach(), atol=2e-6)
    gradient = jax.vmap(jax.grad(function))(x)
    np.testing.assert_allclose(gradient, tensor.grad, atol=5e-6)


def test_gelu_of_bfloat16_is_the_exact_one_but_for_rounding():
    # every bfloat16 number but infinities and NaN
    bits = np.arange(2**16, dtype=np.uint16)
    x = bits.view(jnp.bfloat16)
    x = x[np.isfinite(x.astype(np.float32))]
    exact = torch.tensor(x.astype(np.float64)).requires_grad_()
    y = torch.nn.functional.gelu(exact)
    y.sum().backward()
    found, slope = jax.vmap(jax.value_and_grad(activations.gelu))(jnp.asarray(x))
    assert found.dtype == slope.dtype == jnp.bfloat16
    for ours, right, tolerance in (found, y.detach(), 3e-5), (slope, exact.grad, 1.1e-4):
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), right.numpy(), rtol=2**-8, atol=tolerance
        )


def test_the_gradient_of_gelu_in_bfloat16_keeps_its_argument_alone():
    # its tanh, had XLA one for both passes, would be kept as float32 until the backward pass
    def loss(x):
        return activations.gelu(x).astype(jnp.float32).sum()

    x = jnp.zeros((64, 128), jnp.bfloat16)
    assert jax.jit(loss).lower(x).compile().as_text().count(" tanh(") == 1
    assert jax.jit(jax.value_and_grad(loss)).lower(x).compile().as_text().count(" tanh(") == 2
