"""A backward pass in two halves is the whole one, and no product of a weight's gradient is in the first."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stack.step.pipeline.split import Split


def pull(again, dy):
    """Of a recomputed layer: what its input's gradient is, and its weights'."""
    weights, x = again

    @jax.checkpoint
    def layer(weights, x):
        return x + jnp.tanh(x @ weights[0]) @ weights[1]

    dweights, dx = jax.vjp(layer, weights, x)[1](dy)
    return dx, dweights


def test_both_halves_make_the_gradients_of_the_whole():
    rng = np.random.default_rng(0)
    first, second, x, dy = (rng.normal(size=size) for size in ((4, 6), (6, 4), (3, 4), (3, 4)))
    again = (jnp.array(first), jnp.array(second)), jnp.array(x)
    split = Split.of(pull, again, jnp.array(dy))
    dx, held = split.begin(again, jnp.array(dy))
    dfirst, dsecond = split.finish(again, held)
    hidden = np.tanh(x @ first)
    inner = (dy @ second.T) * (1 - hidden**2)
    np.testing.assert_allclose(dx, dy + inner @ first.T, rtol=1e-4)
    np.testing.assert_allclose(dfirst, x.T @ inner, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dsecond, hidden.T @ dy, rtol=1e-4, atol=1e-6)


def test_what_waits_is_little_and_the_products_wait():
    again = (jnp.ones((4, 6)), jnp.ones((6, 4))), jnp.ones((3, 4))
    split = Split.of(pull, again, jnp.ones((3, 4)))
    products = [
        sum(eqn.primitive.name == "dot_general" for eqn in half) for half in (split.early, split.late)
    ]
    # Forward again (of which the sum is not needed), through both weights backwards; and the two gradients.
    assert products == [3, 2] or products == [4, 2]
    # The hidden values and the gradients of both products' results; the input is given again.
    held: list[Any] = [var.aval for var in split.held]
    assert sorted(one.shape for one in held) == [(3, 4), (3, 6), (3, 6)]
