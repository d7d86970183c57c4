"""cuDNN's attention keeps the batch and the heads where they lie, and is asked for the right thing.

Tracing and compiling it needs neither a GPU nor cuDNN; running it does.
"""

import dataclasses
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import Config, DataConfig, DecoderConfig, KernelsConfig, MeshConfig, TrainConfig
from stack.kernels.attention import Mask, attend, row_mask
from stack.parallel import mesh as meshes
from stack.parallel.mesh import without_cache
from stack.parallel.rules import ONE_DEVICE, Layout
from stack.planner.compiled.collectives import collectives
from stack.planner.compiled.compile import compile_step, devices, traced_for

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 8, 64, 4, 2, 64
HOPPER, AMPERE = (SimpleNamespace(compute_capability=capability) for capability in ("9.0", "8.0"))


@pytest.fixture(params=[{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8, "fsdp": 1}], ids=str)
def layout(request):
    config = MeshConfig.model_validate(request.param)
    return Layout.of(meshes.build(config), config)


def abstract_mask(place, *, packed):
    """Of rows that are not there."""
    zeros = jnp.zeros(place.shape, place.dtype)
    segments = zeros if packed else None
    mask = Mask(query_positions=zeros, key_positions=zeros, query_segments=segments, key_segments=segments)
    return jax.tree.map(lambda _: place, mask)


def inputs(layout, *, packed, head_dim=HEAD_DIM):
    def array(dtype, *names, shape):
        sharding = None if layout.trivial else layout.sharding(*names)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    query = array("bfloat16", "batch", None, "heads", shape=(BATCH, LENGTH, HEADS, head_dim))
    key = array("bfloat16", "batch", None, "kv_heads", shape=(BATCH, LENGTH, KV_HEADS, head_dim))
    place = array("int32", "batch", shape=(BATCH, LENGTH))
    return (query, key, key), abstract_mask(place, packed=packed)


@pytest.mark.parametrize("window", [None, 16, "of some layers"])
@pytest.mark.parametrize("packed", [False, True])
def test_output_and_gradients_are_split_as_the_inputs(layout, packed, window):
    arrays, mask = inputs(layout, packed=packed)

    def run(query, key, value, mask):
        told = {"window": window}
        if window == "of some layers":
            told = {"window": 16, "local": mask.query_positions[0, 0] > 0}
        return attend(query, key, value, dataclasses.replace(mask, **told), layout, kernel="cudnn")

    def total(*inputs):
        return run(*inputs).astype(jnp.float32).sum()

    with meshes.use(layout.mesh), traced_for(HOPPER):
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
        return attend(query, key, value, mask, layout, kernel="cudnn")

    with meshes.use(layout.mesh), traced_for(HOPPER):
        jaxpr = jax.make_jaxpr(run)(*arrays, mask)
    (island,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "shard_map"]
    query, key = (variable.aval.shape for variable in island.params["jaxpr"].invars[:2])
    rows = BATCH // (layout.size("data") * layout.size("fsdp"))
    assert query == (rows, LENGTH, HEADS // layout.size("tensor"), HEAD_DIM)
    assert key == (rows, LENGTH, KV_HEADS // layout.size("tensor"), HEAD_DIM)


@pytest.mark.parametrize(
    ("window", "local"), [(None, None), (1, None), (5, None), (5, True), (5, False)], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["causal", "full", "prefix"])
def test_what_is_asked_of_cudnn_is_what_xla_computes(monkeypatch, kind, packed, window, local):
    """JAX answers the same call without cuDNN; only the kernel itself is left out."""
    draw = np.random.default_rng(0).normal
    query = jnp.asarray(draw(size=(2, 12, 4, 8)), jnp.float32)
    key, value = (jnp.asarray(draw(size=(2, 12, 2, 8)), jnp.float32) for _ in range(2))
    segments = jnp.array([[1] * 5 + [2] * 4 + [3] * 3 if packed else [1] * 12, [1] * 9 + [0] * 3])
    starts = jnp.array([[0] * 5 + [5] * 4 + [9] * 3, [0] * 9 + [9] * 3])
    positions = jnp.arange(12) - (starts if packed else jnp.zeros_like(starts))
    mask = row_mask(segments, positions, packed=packed, kind=kind, window=window)
    if kind == "prefix":
        mask = dataclasses.replace(mask, prefix=(positions < 3) & (segments > 0))
    if local is not None:
        mask = dataclasses.replace(mask, local=jnp.asarray(local))
    ask = partial(attend, query, key, value, mask, ONE_DEVICE)

    answer = jax.nn.dot_product_attention

    def without_cudnn(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return answer(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    real = np.asarray(segments) > 0  # Padding may see nothing, and then each kernel answers as it likes.
    np.testing.assert_allclose(ask(kernel="cudnn")[real], ask(kernel="xla")[real], atol=1e-5)


def whole(query, key, mask):
    return attend(query, key, key, mask, ONE_DEVICE, kernel="cudnn")


def test_a_part_of_a_row_is_refused():
    (query, key, _), mask = inputs(ONE_DEVICE, packed=False)
    last = jax.ShapeDtypeStruct((BATCH, 1, HEADS, HEAD_DIM), query.dtype)
    with pytest.raises(ValueError, match="whole rows, not 1 queries to 64 keys"):
        jax.eval_shape(whole, last, key, mask)


def test_the_gpu_that_is_traced_for_limits_the_heads_and_not_the_one_here():
    (query, key, _), mask = inputs(ONE_DEVICE, packed=False, head_dim=152)  # Turing-NLG's

    def trace(device):
        with traced_for(device):
            return jax.eval_shape(partial(whole), query, key, mask)  # traces are kept by function

    assert trace(HOPPER).shape == query.shape
    with pytest.raises(NotImplementedError, match="head dim must be <= 128"):
        trace(AMPERE)


@pytest.mark.full
@pytest.mark.parametrize(
    ("packed", "windows"),
    [
        (False, {}),
        (True, {}),
        (False, {"sliding_window": 32, "attention_pattern": ["local", "global"], "position": "rotary"}),
    ],
    ids=["one document", "packed", "windows of some layers"],
)
@pytest.mark.usefixtures("quick_gpu_compiler")
def test_the_compiled_step_calls_cudnn_both_ways_and_gathers_no_batch(packed, windows):
    rows, length, tensor = 96, 160, 2
    config = Config(
        model=DecoderConfig(
            vocab_size=1000,
            num_layers=3,
            embed_dim=256,
            num_heads=8,
            num_kv_heads=4,
            head_dim=152,
            max_length=length,
            **windows,
        ),
        kernels=KernelsConfig(attention="cudnn"),
        data=DataConfig(sequence_length=length, packed=packed),
        mesh=MeshConfig(data=2, fsdp=4, tensor=tensor, zero=3),
        train=TrainConfig(batch_size=rows, remat="full"),
    )
    with without_cache():  # A hit would prove nothing.
        hlo = compile_step(config, devices("h200", 16)).as_text()
    assert hlo

    local = {f"bf16[{rows // 8},{heads // tensor},{length},152]" for heads in (8, 4)}
    calls = re.findall(r"= (\(.*?\)) custom-call\(.*custom_call_target=\"(__cudnn\$\w+)\"", hlo)
    name = "__cudnn$fmhaScaleBiasSoftmax" if packed else "__cudnn$fmhaSoftmax"
    assert {target for _, target in calls} == {name, name + "Backward"}
    for results, _ in calls:
        assert set(re.findall(r"bf16\[[\d,]+\]", results)) <= local, results

    found = collectives(hlo, {"data": 2, "fsdp": 4, "stage": 1, "context": 1, "expert": 1, "tensor": tensor})
    assert any(collective.kind == "reduce-scatter" for collective in found)
    for collective in found:
        assert not any(rows in shape for _, shape in collective.arrays), collective
