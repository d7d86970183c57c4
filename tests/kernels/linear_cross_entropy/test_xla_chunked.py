"""The chunked loss: chunks of any size, no logits beyond one, an eighth of the memory, three products."""

import math
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from stack.kernels.linear_cross_entropy import (
    Head,
    chunk_columns,
    chunk_tokens,
    linear_cross_entropy,
    logits,
)
from stack.parallel.mesh import without_cache
from stack.planner.compiled.compile import compile_lowered, devices, has_plugin

BATCH, LENGTH, WIDTH, WORDS, ROWS = 4, 12, 16, 37, 48
random = np.random.default_rng(0)
HIDDEN = random.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
TABLE = np.where(np.arange(ROWS)[:, None] < WORDS, random.normal(size=(ROWS, WIDTH)), 0).astype(np.float32)
LABELS = random.integers(0, WORDS, (BATCH, LENGTH)).astype(np.int32)
LABELS[0, 5:] = -1
LABELS[2] = -1
LABELS[3, ::3] = -1

SIZES = {
    "gpt2_124m": {"rows": 32, "length": 1024, "embed_dim": 768, "vocab_size": 50_304},
    "gpt2_1_5b": {"rows": 16, "length": 1024, "embed_dim": 1600, "vocab_size": 50_304},
    "qwen3_0_6b": {"rows": 4, "length": 4096, "embed_dim": 1024, "vocab_size": 151_936},
}
"""Of one device's micro-batch, at which a step is worth its time."""


def loss_and_gradients(head, hidden, table, labels, scale=1.0, after=1.0):
    def loss(hidden, table):
        return linear_cross_entropy(hidden, table, labels, jnp.float32(scale), head).loss * after

    return jax.value_and_grad(loss, (0, 1))(hidden, table)


def naive(head, hidden, table, labels):
    """What people write: products in the compute dtype, whole logits and their softmax in float32."""

    def loss(hidden, table):
        scores = logits(hidden, table, vocab_size=head.vocab_size)
        label_score = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(labels >= 0, jax.nn.logsumexp(scores, axis=-1) - label_score, 0.0).sum()

    return jax.value_and_grad(loss, (0, 1))(hidden, table)


def close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("chunk", [1, 9, 16, 20, 28])
def test_chunks_of_any_size_change_nothing(chunk):
    run = jax.jit(loss_and_gradients, static_argnums=0)
    close(run(Head(WORDS, chunk=chunk), HIDDEN, TABLE, LABELS), run(Head(WORDS), HIDDEN, TABLE, LABELS))


@pytest.mark.parametrize(("scale", "after"), [(1 / 7, 1.0), (1.0, 1 / 7), (2.0, 1 / 14)])
def test_loss_and_gradients_scale(scale, after):
    hidden, table, labels = map(jnp.asarray, (HIDDEN, TABLE, LABELS))
    whole = jax.tree.map(lambda array: array / 7, naive(Head(WORDS), HIDDEN, TABLE, LABELS))
    close(loss_and_gradients(Head(WORDS), hidden, table, labels, scale, after), whole)


@pytest.mark.parametrize("tokens", [1021, 1013, 4000])
def test_the_scale_is_not_rounded_to_bfloat16(tokens):
    """bfloat16(1 / 1021) is 0.25% off, and all gradients with it were."""

    def gradients(hidden, table, scale):
        return loss_and_gradients(Head(WORDS), hidden, table, jnp.asarray(LABELS), scale)[1]

    hidden, table = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(TABLE, jnp.bfloat16)
    # Halving is exact in bfloat16, so all that is left is the rounding of single elements.
    whole = gradients(hidden, table, 2.0 ** -int(np.log2(tokens)))
    ratio = 2.0 ** int(np.log2(tokens)) / tokens
    for one, other in zip(gradients(hidden, table, 1 / tokens), whole, strict=True):
        scaled, exact = (np.asarray(array, np.float64) for array in (one, other))
        assert (scaled * exact).sum() / (exact * exact).sum() == pytest.approx(ratio, rel=3e-4)


@pytest.mark.parametrize("length", [1, 2, 1021, 1024, 8191])
@pytest.mark.parametrize(("tokens", "rows"), [(1024, 8), (4096, 1), (3, 8), (10**9, 4)])
def test_chunks_are_free_of_the_length(tokens, rows, length):
    columns = chunk_columns(tokens, rows, length)
    chunks = -(-length // columns)
    assert columns * rows <= max(tokens, rows)
    assert chunks == -(-length // max(1, tokens // rows)), "as few as can be"
    assert chunks * columns - length < chunks, "and no more padding than that"


def test_a_chunk_weighs_as_much_as_the_gradient_of_the_table():
    llama = {"embed_dim": 4096, "vocab_size": 128_256}
    assert chunk_tokens(None, **llama, tensor=1) == 4096
    assert chunk_tokens(None, **llama, tensor=8) == 4096
    assert chunk_tokens(2**30, **llama, tensor=1) == 2**30 // (4 * 128_256)
    assert chunk_tokens(None, embed_dim=128, vocab_size=384, tensor=1) == 64 * 2**20 // (4 * 384)
    assert chunk_tokens(1, **llama, tensor=1) == 1


def test_a_length_without_divisors_takes_no_chunk_of_its_own_for_a_token():
    hidden = np.resize(HIDDEN, (BATCH, 13, WIDTH))
    labels = np.resize(LABELS, (BATCH, 13))
    text = jax.jit(loss_and_gradients, static_argnums=0).lower(
        Head(WORDS, chunk=7 * BATCH), hidden, TABLE, labels
    )
    assert f"tensor<{BATCH}x7x{ROWS}xf32>" in text.as_text()


def test_logits_of_one_chunk_are_all_there_is():
    """No array of the compiled loss and its gradients holds the scores of the whole batch."""
    head = Head(WORDS, chunk=2 * BATCH)
    text = jax.jit(loss_and_gradients, static_argnums=0).lower(head, HIDDEN, TABLE, LABELS).as_text()
    assert f"tensor<{BATCH}x2x{ROWS}xf32>" in text
    assert f"x{LENGTH}x{ROWS}xf32>" not in text
    assert f"tensor<{LENGTH // 2}x{BATCH}x2x{ROWS}xf32>" not in text


def arguments(rows, length, embed_dim, vocab_size, *, dtype="bfloat16", **where):
    """The options that training takes, and arrays that are not there."""
    chunk = chunk_tokens(None, embed_dim=embed_dim, vocab_size=vocab_size, tensor=1)
    return (
        Head(vocab_size - 7, chunk=chunk),
        jax.ShapeDtypeStruct((rows, length, embed_dim), dtype, **where),
        jax.ShapeDtypeStruct((vocab_size, embed_dim), dtype, **where),
        jax.ShapeDtypeStruct((rows, length), jnp.int32, **where),
    )


def products(jaxpr):
    """Multiplications in all products of matrices, those of a scan's body as often as it runs."""
    count = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            count += math.prod((*equation.outvars[0].aval.shape, *(left[i] for i in contracted)))
        count += times * sum(map(products, jax.extend.core.jaxprs_in_params(equation.params)))
    return count


@pytest.mark.parametrize("name", SIZES)
def test_it_takes_three_products_and_no_more(name):
    """Scores, the gradient of hidden states, that of the table: as many as of whole logits."""
    head, *arrays = arguments(**SIZES[name])
    hidden, table = arrays[:2]
    three = 3 * math.prod(hidden.shape) * table.shape[0]
    counts = [
        products(jax.make_jaxpr(run, static_argnums=0)(head, *arrays).jaxpr)
        for run in (loss_and_gradients, naive)
    ]
    assert counts[1] == three
    assert three <= counts[0] <= 1.01 * three, "columns that fill the last chunk count"


def compiled_for(device, run, sizes, dtype):
    """The loss and its gradients, compiled for a device, be it here or not."""
    where = jax.NamedSharding(jax.sharding.Mesh(np.array([device]), ("data",)), jax.P())
    head, *arrays = arguments(**sizes, dtype=dtype, sharding=where)
    lowered = jax.jit(run, static_argnums=0).lower(head, *arrays)
    if device.platform == "cpu":
        return lowered.compile()
    with without_cache():  # It cannot be read back without the GPU.
        return compile_lowered(lowered, device)


def temporary_bytes(compiled):
    """What the compiler says."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def check_eighth(device, sizes, dtype):
    """Temporaries, so neither arguments nor gradients."""
    runs = [compiled_for(device, run, sizes, dtype) for run in (loss_and_gradients, naive)]
    chunked, whole = (temporary_bytes(run) for run in runs)
    assert whole >= 4 * sizes["rows"] * sizes["length"] * sizes["vocab_size"], "whole logits in float32"
    assert 8 * chunked <= whole
    text = runs[0].as_text()
    assert text
    return text


def test_an_eighth_of_the_memory_of_whole_logits_on_a_cpu():
    check_eighth(jax.devices()[0], SIZES["gpt2_124m"], "float32")


@pytest.mark.skipif(not has_plugin(), reason="compiling for GPUs needs the extra plan")
@pytest.mark.usefixtures("quick_gpu_compiler")
@pytest.mark.parametrize(
    "name",
    ["gpt2_1_5b", *(pytest.param(name, marks=pytest.mark.full) for name in ("gpt2_124m", "qwen3_0_6b"))],
)
def test_an_eighth_of_the_memory_of_whole_logits_on_an_h200(name):
    text = check_eighth(devices("h200", 1)[0], SIZES[name], "bfloat16")
    assert len(re.findall(r'custom_call_target="__cublas\$lt\$matmul"| dot\(', text)) == 3, "of one chunk"
