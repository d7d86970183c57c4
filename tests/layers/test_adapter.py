"""What an adapter adds to a product, and its gradients, are those of the papers' equations in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.layers.adapter import Adapter, magnitudes, merged
from stack.layers.linear import Linear, linears, use_adapters
from stack.parallel.rules import ONE_DEVICE

INPUTS, OUTPUTS, RANK = (2, 3), (5, 4), 3
NAMES = ("batch", "length", "heads", "head_dim")


class One(nnx.Module):
    """A model of one matrix."""

    def __init__(self) -> None:
        axes = (
            tuple(zip(("kv_heads", "head_dim"), INPUTS, strict=True)),
            tuple(zip(("heads", "mlp"), OUTPUTS, strict=True)),
        )
        self.up: Any = Linear(*axes, bias=True, std=0.5, rngs=nnx.Rngs(0))


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def adapted(kind: str) -> One:
    """With an adapter that has been trained."""
    model = One()
    use_adapters(model, {"up": Adapter(rank=RANK, alpha=6.0, has_magnitude=kind == "dora")}, seed=1)
    model.up.bias = model.up.bias.replace(jnp.asarray(random(*OUTPUTS, seed=5), jnp.float32))
    b = 0.3 * random(RANK, *OUTPUTS, seed=2)
    model.up.lora_b = model.up.lora_b.replace(jnp.asarray(b, jnp.float32))
    if kind == "dora":
        longer = magnitudes(np.asarray(model.up.kernel[...]), (0, 1)) * (1 + 0.2 * random(*OUTPUTS, seed=3))
        model.up.dora_magnitude = model.up.dora_magnitude.replace(jnp.asarray(longer, jnp.float32))
    return model


def flat(model: One) -> dict[str, np.ndarray]:
    """Inputs and outputs as one axis each, in float64."""
    up, (ins, outs) = model.up, (int(np.prod(INPUTS)), int(np.prod(OUTPUTS)))
    shapes = {
        "kernel": (ins, outs),
        "bias": (outs,),
        "lora_a": (ins, RANK),
        "lora_b": (RANK, outs),
        "dora_magnitude": (outs,),
    }
    return {
        name: np.asarray(getattr(up, name)[...], np.float64).reshape(shape)
        for name, shape in shapes.items()
        if getattr(up, name) is not None
    }


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_result_and_all_gradients_are_those_of_numpy_in_float64(kind) -> None:
    model = adapted(kind)
    x, c = random(2, 7, *INPUTS, seed=6), random(2, 7, *OUTPUTS, seed=7)

    def loss(model: One, x: jax.Array) -> jax.Array:
        return (model.up(x, ONE_DEVICE, NAMES) * c).sum()

    value, (gradient, to_x) = jax.value_and_grad(loss, argnums=(0, 1))(model, jnp.asarray(x, jnp.float32))
    w, s = flat(model), 6.0 / RANK
    rows, cotangent = x.reshape(14, -1), c.reshape(14, -1)
    whole = w["kernel"] + s * w["lora_a"] @ w["lora_b"]
    want = {}
    scaled = cotangent
    factor = np.ones(whole.shape[1])
    if kind == "dora":  # The length is a constant to the gradient (section 4.3).
        length = np.sqrt((whole**2).sum(0))
        factor = w["dora_magnitude"] / length
        scaled = cotangent * factor
        want["dora_magnitude"] = ((rows @ whole) * cotangent).sum(0) / length
    want |= {
        "kernel": rows.T @ scaled,
        "bias": cotangent.sum(0),
        "lora_a": s * rows.T @ scaled @ w["lora_b"].T,
        "lora_b": s * (rows @ w["lora_a"]).T @ scaled,
    }
    assert float(value) == pytest.approx((((rows @ whole) * factor + w["bias"]) * cotangent).sum(), rel=1e-5)
    np.testing.assert_allclose(to_x.reshape(14, -1), scaled @ whole.T, rtol=1e-5, atol=1e-5)
    found = flat(gradient)
    assert found.keys() == want.keys()
    for name, leaf in want.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_one_matrix_does_what_both_do(kind) -> None:
    model, x = adapted(kind), jnp.asarray(random(2, 7, *INPUTS, seed=6), jnp.float32)
    up = model.up
    kernel, a, b = (np.asarray(leaf[...]) for leaf in (up.kernel, up.lora_a, up.lora_b))
    magnitude = None if up.dora_magnitude is None else np.asarray(up.dora_magnitude[...])
    whole = One()
    whole.up.kernel = whole.up.kernel.replace(jnp.asarray(merged(kernel, a, b, magnitude, up.adapter.scale)))
    whole.up.bias = up.bias
    y, unmerged = whole.up(x, ONE_DEVICE, NAMES), up(x, ONE_DEVICE, NAMES)
    np.testing.assert_allclose(y, unmerged, rtol=1e-5, atol=1e-5)
    plain = One()
    plain.up.bias = up.bias
    assert float(jnp.abs(plain.up(x, ONE_DEVICE, NAMES) - unmerged).max()) > 0.1, "it is no longer the base"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_new_one_changes_nothing_and_draws_by_its_name_alone(kind) -> None:
    model, plain, x = One(), One(), jnp.asarray(random(2, 7, *INPUTS, seed=6), jnp.float32)
    adapter = Adapter(rank=RANK, alpha=6.0, has_magnitude=kind == "dora")
    use_adapters(model, {"up": adapter, "down": adapter}, seed=1)
    if kind == "dora":
        length = magnitudes(np.asarray(model.up.kernel[...]), (0, 1))
        model.up.dora_magnitude = model.up.dora_magnitude.replace(jnp.asarray(length))
    y, before = (one.up(x, ONE_DEVICE, NAMES) for one in (model, plain))
    np.testing.assert_allclose(y, before, rtol=0 if kind == "lora" else 1e-6, atol=0)
    assert [name for name, _ in linears(model)] == ["up"]
    a = np.asarray(model.up.lora_a[...])
    np.testing.assert_array_equal(a, adapted(kind).up.lora_a[...])
    assert a.std() == pytest.approx(1 / np.sqrt(6), rel=0.5)
    other = One()
    use_adapters(other, {"up": adapter}, seed=2)
    assert (np.asarray(other.up.lora_a[...]) != a).all()
