import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.layers.norm import Norm

WIDTH = 48


def norm(kind, epsilon=1e-5):
    random = np.random.default_rng(0)
    module = Norm(kind, ("embed", WIDTH), epsilon)
    module.scale = nnx.Param(jnp.asarray(random.normal(1, 0.3, WIDTH), jnp.float32), axes=("embed",))
    if kind == "layernorm":
        module.bias = nnx.Param(jnp.asarray(random.normal(0, 0.3, WIDTH), jnp.float32), axes=("embed",))
    return module


def reference(x, module, epsilon):
    x, scale = np.float64(x), np.float64(module.scale[...])
    if module.bias is None:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale
    standard = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return standard * scale + np.float64(module.bias[...])


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_norm_is_the_published_formula(kind, epsilon):
    module = norm(kind, epsilon)
    x = np.random.default_rng(1).normal(0.5, 3.0, (2, 5, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(module(jnp.asarray(x)), reference(x, module, epsilon), atol=1e-5)


def test_a_scale_centred_at_zero_is_added_to_one():
    plain, centred = norm("rmsnorm"), norm("rmsnorm_zero_centered")
    assert (Norm("rmsnorm_zero_centered", ("embed", WIDTH), 1e-5).scale[...] == 0).all()
    centred.scale = nnx.Param(plain.scale[...] - 1, axes=("embed",))
    x = jnp.asarray(np.random.default_rng(1).normal(0.5, 3.0, (2, 5, WIDTH)), jnp.float32)
    np.testing.assert_allclose(centred(x), plain(x), rtol=1e-6)


def test_layernorm_survives_a_large_mean():
    """mean(x^2) - mean(x)^2 would lose every digit here."""
    module = norm("layernorm")
    x = (4096 + np.random.default_rng(2).normal(0, 1, (4, WIDTH))).astype(np.float32)
    np.testing.assert_allclose(module(jnp.asarray(x)), reference(x, module, 1e-5), atol=1e-3)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_bfloat16_is_normalised_in_float32(kind):
    module = norm(kind)
    x = jnp.asarray(np.random.default_rng(3).normal(0, 1, (4, WIDTH)), jnp.bfloat16)
    y = module(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, module(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_rmsnorm_has_no_bias_and_a_new_norm_only_normalises():
    assert Norm("rmsnorm", ("embed", WIDTH), 1e-5).bias is None
    x = jnp.asarray(np.random.default_rng(4).normal(2, 5, (3, WIDTH)), jnp.float32)
    y = np.asarray(Norm("layernorm", ("embed", WIDTH), 1e-5)(x))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-4)
