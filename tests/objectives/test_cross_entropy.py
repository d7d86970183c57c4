"""The chunked loss and its gradients are those of plain softmax cross-entropy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import MeshConfig
from stack.objectives.cross_entropy import Head, chunk_columns, chunk_tokens, cross_entropy
from stack.parallel import mesh as meshes
from stack.parallel.rules import Layout
from stack.parallel.zero import gather_weight

BATCH, LENGTH, WIDTH, WORDS, ROWS = 4, 12, 16, 37, 48
random = np.random.default_rng(0)
HIDDEN = random.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
TABLE = np.where(np.arange(ROWS)[:, None] < WORDS, random.normal(size=(ROWS, WIDTH)), 0).astype(np.float32)
LABELS = random.integers(0, WORDS, (BATCH, LENGTH)).astype(np.int32)
LABELS[0, 5:] = -1
LABELS[2] = -1
LABELS[3, ::3] = -1


BIAS = np.where(np.arange(ROWS) < WORDS, random.normal(size=ROWS), 0).astype(np.float32)


def reference(*, softcap=None, z_loss=0.0, bias=None):
    """Loss, nll, correct and the gradients of the loss, by hand in float64."""
    hidden, table = HIDDEN.astype(np.float64), TABLE[:WORDS].astype(np.float64)
    raw = hidden @ table.T + (0 if bias is None else bias[:WORDS])
    scores = raw if softcap is None else softcap * np.tanh(raw / softcap)
    normaliser = np.log(np.exp(scores).sum(-1))
    counts = LABELS >= 0
    is_label = np.arange(WORDS) == LABELS[..., None]
    nll = (normaliser - (scores * is_label).sum(-1))[counts].sum()
    loss = nll + z_loss * np.square(normaliser)[counts].sum()
    correct = (scores.argmax(-1) == LABELS)[counts].sum()
    softmax = np.exp(scores - normaliser[..., None])
    slope = softmax * (1 + 2 * z_loss * normaliser[..., None]) - is_label
    if softcap is not None:
        slope *= 1 - np.tanh(raw / softcap) ** 2
    slope *= counts[..., None]
    table_gradient = np.zeros((ROWS, WIDTH))
    table_gradient[:WORDS] = np.einsum("blv,ble->ve", slope, hidden)
    if bias is None:
        return (loss, nll, correct), (slope @ table, table_gradient)
    bias_gradient = np.zeros(ROWS)
    bias_gradient[:WORDS] = slope.sum((0, 1))
    return (loss, nll, correct), (slope @ table, table_gradient, bias_gradient)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5 * max(np.abs(expected).max(), 1e-30))


def loss_and_gradients(head, hidden, table, labels):
    hidden, table, labels = map(jnp.asarray, (hidden, table, labels))

    def loss(hidden, table):
        sums = cross_entropy(hidden, table, labels, jnp.float32(1), head)
        return sums.loss, sums

    (_, sums), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, table)
    return sums, gradients


@pytest.mark.parametrize("chunk", [1, 9, 16, 20, 28, 1024])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"z_loss": 0.01}, {"softcap": 3.0, "z_loss": 0.1}])
def test_loss_and_gradients_are_those_of_the_formula(options, chunk):
    head = Head(WORDS, chunk=chunk, **options)
    sums, gradients = jax.jit(loss_and_gradients, static_argnums=0)(head, HIDDEN, TABLE, LABELS)
    expected_sums, expected_gradients = reference(**options)
    for actual, expected in zip((*sums, *gradients), (*expected_sums, *expected_gradients), strict=True):
        close(actual, expected)
    without = cross_entropy(
        jnp.asarray(HIDDEN), jnp.asarray(TABLE), jnp.asarray(LABELS), jnp.float32(1), head
    )
    for actual, expected in zip(without, sums, strict=True):
        close(actual, expected)


def test_padded_words_and_ignored_labels_get_no_gradient():
    _, (hidden, table) = loss_and_gradients(Head(WORDS, z_loss=0.1), HIDDEN, TABLE, LABELS)
    assert not np.asarray(table)[WORDS:].any()
    assert not np.asarray(hidden)[LABELS < 0].any()
    assert np.asarray(hidden)[LABELS >= 0].any(-1).all()


def test_a_batch_without_labels_is_zero():
    sums, gradients = loss_and_gradients(Head(WORDS), HIDDEN, TABLE, np.full_like(LABELS, -1))
    assert not any(np.asarray(array).any() for array in (*sums, *gradients))


def test_large_scores_do_not_overflow():
    sums, gradients = loss_and_gradients(Head(WORDS), HIDDEN * 1e4, TABLE, LABELS)
    assert all(np.isfinite(array).all() for array in (*sums, *gradients))


@pytest.mark.parametrize(("scale", "after"), [(1 / 7, 1.0), (1.0, 1 / 7), (2.0, 1 / 14)])
def test_loss_and_gradients_scale(scale, after):
    def mean(hidden, table):
        labels = jnp.asarray(LABELS)
        return cross_entropy(hidden, table, labels, jnp.float32(scale), Head(WORDS)).loss * after

    value, gradients = jax.value_and_grad(mean, argnums=(0, 1))(jnp.asarray(HIDDEN), jnp.asarray(TABLE))
    (loss, *_), expected = reference()
    close(value, loss / 7)
    for actual, gradient in zip(gradients, expected, strict=True):
        close(actual, gradient / 7)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "z_loss": 0.1}])
def test_a_bias_of_words_is_added_and_has_its_gradient(options):
    def loss(hidden, table, bias):
        head = Head(WORDS, chunk=9, **options)
        sums = cross_entropy(hidden, table, jnp.asarray(LABELS), jnp.float32(1), head, bias)
        return sums.loss, sums

    arrays = map(jnp.asarray, (HIDDEN, TABLE, BIAS))
    (_, sums), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    expected_sums, expected = reference(bias=BIAS.astype(np.float64), **options)
    for actual, wanted in zip((*sums, *gradients), (*expected_sums, *expected), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("tokens", [1021, 1013, 4000])
def test_the_scale_is_not_rounded_to_bfloat16(tokens):
    """bfloat16(1 / 1021) is 0.25% off, and all gradients with it were."""

    def gradients(hidden, table, scale):
        def loss(hidden, table):
            return cross_entropy(hidden, table, jnp.asarray(LABELS), scale, Head(WORDS)).loss

        return jax.grad(loss, argnums=(0, 1))(hidden, table)

    hidden, table = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(TABLE, jnp.bfloat16)
    # Halving is exact in bfloat16, so all that is left is the rounding of single elements.
    whole = gradients(hidden, table, jnp.float32(2.0 ** -int(np.log2(tokens))))
    ratio = 2.0 ** int(np.log2(tokens)) / tokens
    for one, other in zip(gradients(hidden, table, jnp.float32(1 / tokens)), whole, strict=True):
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


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 8}, {"fsdp": 4, "data": 1, "tensor": 2}],
)
def test_a_mesh_changes_nothing(sizes):
    config = MeshConfig.model_validate(sizes)
    mesh = meshes.build(config)
    layout = Layout.of(mesh, config)
    head = Head(WORDS, softcap=3.0, z_loss=0.1, chunk=8, layout=layout)
    names = ("vocab", "embed")

    def run(hidden, table, bias, labels):
        def loss(hidden, table, bias):
            gathered = gather_weight(table, layout, names, "table")
            sums = cross_entropy(hidden, gathered, labels, jnp.float32(1), head, bias)
            return sums.loss, sums

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(hidden, table, bias)

    with meshes.use(mesh):
        hidden = jax.device_put(HIDDEN, layout.sharding("batch", "length", "embed"))
        spec = layout.parameter_spec(names, TABLE.shape, "table")
        table = jax.device_put(TABLE, jax.NamedSharding(mesh, spec))
        bias = jax.device_put(BIAS, layout.sharding("vocab"))
        labels = jax.device_put(LABELS, layout.sharding("batch", "length"))
        (_, sums), gradients = jax.jit(run)(hidden, table, bias, labels)
    expected_sums, expected_gradients = reference(softcap=3.0, z_loss=0.1, bias=BIAS.astype(np.float64))
    for actual, expected in zip((*sums, *gradients), (*expected_sums, *expected_gradients), strict=True):
        close(actual, expected)
