import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.config import DecoderConfig
from stack.layers.mlp import Mlp
from stack.parallel.rules import ONE_DEVICE

erf = np.vectorize(math.erf)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("kind", "activation"), [("gelu", gelu), ("gelu_tanh", gelu_tanh), ("swiglu", silu), ("geglu", gelu_tanh)]
)
def test_mlp_is_the_published_formula(kind, activation):
    config = DecoderConfig(embed_dim=12, num_heads=2, mlp_dim=20, mlp=kind, init_std=0.5)
    mlp = Mlp(config, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 12))

    def linear(x, layer):
        return x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])

    for number, layer in enumerate(filter(None, (mlp.gate, mlp.up, mlp.down))):
        width = layer.kernel.shape[-1:]
        bias = np.random.default_rng(number).normal(size=width)
        layer.bias = nnx.Param(jnp.asarray(bias, jnp.float32), axes=layer.kernel.axes[-1:])
    inside = linear(x, mlp.up)
    inside = activation(inside) if mlp.gate is None else activation(linear(x, mlp.gate)) * inside
    actual = mlp(jnp.asarray(x, jnp.float32), ONE_DEVICE)
    np.testing.assert_allclose(actual, linear(inside, mlp.down), atol=2e-5)


@pytest.mark.parametrize(("kind", "count"), [("gelu", 1), ("gelu_tanh", 1), ("swiglu", 2), ("geglu", 2)])
def test_the_backward_pass_is_given_the_products_alone(kind, count):
    mlp = Mlp(DecoderConfig(embed_dim=12, num_heads=2, mlp_dim=20, mlp=kind), rngs=nnx.Rngs(0))
    backward = jax.make_jaxpr(lambda *given: jax.vjp(lambda mlp, x: mlp(x, ONE_DEVICE), *given)[1])
    kept: list[Any] = backward(mlp, jnp.ones((3, 5, 12))).jaxpr.outvars
    wide = {variable for variable in kept if variable.aval.shape == (3, 5, 20)}
    assert len(wide) == count, "up and gate"


def test_only_gated_kinds_have_a_gate():
    kinds = ("gelu", "gelu_tanh", "swiglu", "geglu")
    configs = [DecoderConfig(embed_dim=12, num_heads=2, mlp=kind) for kind in kinds]
    assert [Mlp(config, rngs=nnx.Rngs(0)).gate is not None for config in configs] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(("scaled", "divisor"), [(True, math.sqrt(2 * 8)), (False, 1.0)])
def test_what_writes_to_the_residual_stream_starts_smaller(scaled, divisor):
    config = DecoderConfig(embed_dim=256, num_heads=2, num_layers=8, scale_residual_init=scaled)
    mlp = Mlp(config, rngs=nnx.Rngs(0))
    assert np.std(mlp.up.kernel[...]) == pytest.approx(0.02, rel=0.02)
    assert np.std(mlp.down.kernel[...]) == pytest.approx(0.02 / divisor, rel=0.02)
