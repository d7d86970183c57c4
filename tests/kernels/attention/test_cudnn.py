"""cuDNN's attention keeps the batch and the heads where they lie.

jax traces the call wherever it is told a version of cuDNN; only running it needs a GPU.
"""

import jax
import jax.numpy as jnp
import pytest

from stack.config import MeshConfig
from stack.kernels.attention import Mask, attend
from stack.parallel import mesh as meshes
from stack.parallel.rules import Layout

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 8, 64, 4, 2, 64


@pytest.fixture(autouse=True)
def traceable(monkeypatch):
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91_300)


@pytest.fixture(params=[{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8, "fsdp": 1}], ids=str)
def layout(request):
    config = MeshConfig.model_validate(request.param)
    return Layout.of(meshes.build(config), config)


def inputs(layout, *, packed):
    def array(dtype, *names, shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*names))

    query = array("bfloat16", "batch", None, "heads", shape=(BATCH, LENGTH, HEADS, HEAD_DIM))
    key = array("bfloat16", "batch", None, "kv_heads", shape=(BATCH, LENGTH, KV_HEADS, HEAD_DIM))
    place = array("int32", "batch", shape=(BATCH, LENGTH))
    return (query, key, key), (place, place, place, place) if packed else (place, place)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_output_and_gradients_are_split_as_the_inputs(layout, packed, window):
    arrays, mask = inputs(layout, packed=packed)

    def run(query, key, value, mask):
        return attend(query, key, value, Mask(*mask), layout, kernel="cudnn", window=window)

    def total(*inputs):
        return run(*inputs).astype(jnp.float32).sum()

    with meshes.use(layout.mesh):
        output = jax.eval_shape(run, *arrays, mask)
        cotangents = jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), *arrays, mask)
    expected = layout.spec("batch", None, "heads", None)
    assert "data" in str(expected)
    for array, like in zip((output, *cotangents), (arrays[0], *arrays), strict=True):
        assert array.shape == like.shape
        assert array.dtype == like.dtype
        assert array.sharding.spec == expected


def test_each_device_computes_its_own_rows_and_heads(layout):
    arrays, mask = inputs(layout, packed=False)

    def run(query, key, value, mask):
        return attend(query, key, value, Mask(*mask), layout, kernel="cudnn")

    with meshes.use(layout.mesh):
        jaxpr = jax.make_jaxpr(run)(*arrays, mask)
    (island,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "shard_map"]
    query, key = (variable.aval.shape for variable in island.params["jaxpr"].invars[:2])
    rows = BATCH // (layout.size("data") * layout.size("fsdp"))
    assert query == (rows, LENGTH, HEADS // layout.size("tensor"), HEAD_DIM)
    assert key == (rows, LENGTH, KV_HEADS // layout.size("tensor"), HEAD_DIM)
