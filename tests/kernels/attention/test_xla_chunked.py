"""The chunked kernel looks at the blocks it must, holds no more than blocks, and gathers nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case

from stack.config import MeshConfig
from stack.kernels.attention import attend, xla_chunked
from stack.kernels.attention.dropout import Dropout, draw
from stack.layers.dropout import example_keys
from stack.parallel import mesh as meshes
from stack.parallel.rules import ONE_DEVICE, Layout
from stack.planner.compiled.collectives import collectives

BLOCK = 8


def looked_at(case, *, rows=1):
    """[part, query block, key block] bool: the blocks in the lists of visits."""
    cut = xla_chunked.Cut(
        rows=rows, queries=BLOCK, keys=BLOCK, scale=1.0, softcap=None, heads=(case.kv_heads, case.heads)
    )
    listed = jax.jit(xla_chunked.visits, static_argnums=1)(case.mask(), cut)
    number, order = (np.asarray(array) for array in listed)
    found = np.zeros(order.shape, bool)
    for part, block in np.ndindex(number.shape):
        listed = order[part, block, : number[part, block]]
        assert (np.diff(listed) > 0).all(), "in order, none twice"
        found[part, block, listed] = True
    return found


def must_look_at(case, *, rows=1):
    """The same, from all pairs."""
    allowed = np.asarray(case.mask().allowed())
    ends = [(0, -size % BLOCK) for size in allowed.shape[1:]]
    allowed = np.pad(allowed, [(0, 0), *ends])
    parts, queries, keys = allowed.shape[0] // rows, *(size // BLOCK for size in allowed.shape[1:])
    return allowed.reshape(parts, rows, queries, BLOCK, keys, BLOCK).any((1, 3, 5))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        Case(length=64),
        Case(length=67, window=9),
        Case(length=67, window=9, local=False),
        Case(length=64, kind="full", rows="padded", window=5),
        Case(length=61, rows="packed"),
        Case(length=61, rows="packed", kind="full", window=4),
        Case(length=61, rows="packed", kind="prefix"),
        Case(length=40, keys=29, kind="full", rows="padded"),
    ],
    ids=str,
)
def test_blocks_are_looked_at_where_a_query_sees_a_key_and_nowhere_else(case, rows):
    np.testing.assert_array_equal(looked_at(case, rows=rows), must_look_at(case, rows=rows))


def test_work_follows_the_pairs_that_see_each_other():
    number = {name: looked_at(case).sum() for name, case in CASES_OF_WORK.items()}
    assert number["full"] == 2 * 32**2
    assert number["causal"] == 32 * 33
    assert number["window"] == 2 * (2 * 32 - 1)
    assert number["packed"] < 0.6 * number["causal"]


CASES_OF_WORK = {
    "full": Case(length=256, kind="full"),
    "causal": Case(length=256),
    "window": Case(length=256, window=9),
    "packed": Case(length=256, rows="packed"),
}


def test_what_is_not_looked_at_is_not_read(monkeypatch):
    """Numbers that are none, outside of what anybody sees, would spread through any product with them."""
    monkeypatch.setattr(
        xla_chunked, "BLOCKS", dict.fromkeys(("cpu", "gpu"), xla_chunked.BlockSizes(BLOCK, 1))
    )
    case = Case(length=32, window=8)
    arrays = case.arrays()
    far = dataclasses.replace(case.mask(), key_positions=case.mask().key_positions.at[:, :8].set(1000))
    broken = {name: arrays[name].at[:, :8].set(np.nan) for name in ("key", "value")}

    def total(arrays):
        output = attend(**arrays, mask=far, layout=ONE_DEVICE, kernel="xla_chunked")
        return jnp.square(output).sum()

    whole, found = (jax.value_and_grad(total)(arrays | changed) for changed in ({}, broken))
    jax.tree.map(np.testing.assert_array_equal, whole, found)
    assert np.isfinite(whole[0])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_blocks_are_even_and_rows_are_taken_together_while_scores_are_few(platform):
    blocks = xla_chunked.BLOCKS[platform]
    longest, scores = blocks.longest, blocks.scores
    for batch, length, keys, heads in ((8, 64, 64, 4), (6, longest + 1, 3 * longest, 16), (1, 7, 5000, 2)):
        query, key = (jnp.zeros((batch, size, heads, 1)) for size in (length, keys))
        cut = xla_chunked.cut_of(query, key, None, blocks, scale=None, softcap=None)
        assert max(cut.queries, cut.keys) <= longest
        assert batch % cut.rows == 0
        assert cut.rows == 1 or cut.rows * heads * cut.queries * cut.keys <= scores
        for size, block in ((length, cut.queries), (keys, cut.keys)):
            assert -(-size // block) == -(-size // longest), "as few as can be"
            assert block * -(-size // block) - size < 8 * -(-size // longest), "hardly filled up"


def temporary_bytes(kernel, length):
    heads = 4
    shapes = [jax.ShapeDtypeStruct((1, length, each, 64), "bfloat16") for each in (heads, 2, 2)]
    place = jax.ShapeDtypeStruct((1, length), "int32")
    mask = jax.tree.map(lambda _: place, Case(batch=1, length=8, rows="packed").mask())
    words = jax.ShapeDtypeStruct((1, heads, length, 2), "uint32")

    def total(arrays, mask, words):
        dropout = Dropout(rate=0.1, rows=words)
        query, key, value = arrays
        output = attend(query, key, value, mask, ONE_DEVICE, kernel=kernel, dropout=dropout, softcap=30.0)
        return output.astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(total)).lower(shapes, mask, words).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_its_square():
    short, long = (temporary_bytes("xla_chunked", length) for length in (1024, 4096))
    of_blocks = 4 * 256**2 * 4  # Float32 scores of a block.
    arrays = 4096 * (4 + 2 + 2) * 64 * 4
    assert long < 4 * short
    assert long < 3 * arrays + 6 * of_blocks
    assert temporary_bytes("xla", 1024) > 4 * short


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"data": 8, "fsdp": 1}], ids=str
)
def test_a_layout_changes_nothing_and_moves_nothing(monkeypatch, sizes):
    monkeypatch.setattr(
        xla_chunked, "BLOCKS", dict.fromkeys(("cpu", "gpu"), xla_chunked.BlockSizes(BLOCK, 1))
    )
    case = Case(batch=8, length=21, heads=8, kv_heads=4, rows="packed", window=9, head_dim=16)
    config = MeshConfig.model_validate(sizes)
    mesh = meshes.build(config)
    layout = Layout.of(mesh, config)
    groups = layout.size("data") * layout.size("fsdp")
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(groups, 8, 21, 21)), jnp.float32)

    def total(arrays, mask, rows, layout):
        rows = Dropout(rate=0.2, rows=rows)
        return attend(**arrays, mask=mask, layout=layout, kernel="xla_chunked", dropout=rows).sum()

    arrays, mask = case.arrays() | {"bias": bias}, case.mask()
    keys = example_keys(0, jnp.int32(0), jnp.arange(8))
    rows = draw(keys, rate=0.2, heads=8, queries=21, layout=ONE_DEVICE).rows
    expected = jax.jit(jax.value_and_grad(total), static_argnums=3)(arrays, mask, rows, ONE_DEVICE)
    with meshes.use(mesh):
        put = jax.device_put
        names = {"query": ("batch", None, "heads"), "key": ("batch", None, "kv_heads")}
        names |= {"value": names["key"], "bias": ("batch", "heads")}
        placed = {name: put(array, layout.sharding(*names[name])) for name, array in arrays.items()}
        on_rows = jax.tree.map(lambda array: put(array, layout.sharding("batch")), mask)
        words = put(rows, layout.sharding("batch", "heads"))
        run = jax.jit(jax.grad(total), static_argnums=3)
        compiled = run.lower(placed, on_rows, words, layout).compile()
        found = compiled(placed, on_rows, words)
    for name, gradient in found.items():
        assert gradient.sharding.is_equivalent_to(placed[name].sharding, 4), name
        scale = abs(expected[1][name]).max()
        np.testing.assert_allclose(gradient, expected[1][name], atol=2e-6 * scale)
    text = compiled.as_text()
    assert text
    assert [found for found in collectives(text, dict(mesh.shape)) if found.group_size > 1] == []
