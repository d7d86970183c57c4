"""Each label by itself: its gradient is that of the whole logits, whatever the labels weigh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.kernels.linear_cross_entropy import Head, label_nll, linear_cross_entropy

BATCH, LENGTH, WIDTH, WORDS, ROWS = 3, 11, 8, 21, 24
random = np.random.default_rng(0)
HIDDEN = random.normal(size=(BATCH, LENGTH, WIDTH))
TABLE = random.normal(size=(ROWS, WIDTH))
BIAS = random.normal(size=ROWS)
LABELS = random.integers(0, WORDS, (BATCH, LENGTH)).astype(np.int32)
LABELS[0, 4:] = -1
LABELS[1, ::3] = -1
WEIGHTS = random.normal(size=(BATCH, LENGTH))


def exact(softcap: float | None, bias: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """NLL of each label, and gradients of its weighted sum, in float64."""
    raw = HIDDEN @ TABLE[:WORDS].T + (0 if bias is None else bias[:WORDS])
    scores = raw if softcap is None else softcap * np.tanh(raw / softcap)
    normaliser = np.log(np.exp(scores).sum(-1))
    counts = LABELS >= 0
    label_score = np.take_along_axis(scores, LABELS.clip(0)[..., None], -1)[..., 0]
    slope = np.exp(scores - normaliser[..., None]) - np.eye(WORDS)[LABELS.clip(0)]
    slope *= (counts * WEIGHTS)[..., None]
    slope *= 1.0 if softcap is None else 1.0 - np.square(scores / softcap)
    table = np.zeros_like(TABLE)
    table[:WORDS] = np.einsum("blv,ble->ve", slope, HIDDEN)
    for_bias = np.zeros(ROWS)
    for_bias[:WORDS] = slope.sum((0, 1))
    return np.where(counts, normaliser - label_score, 0.0), slope @ TABLE[:WORDS], table, for_bias


@pytest.mark.parametrize("chunk", [6, 15, 1024])
@pytest.mark.parametrize(("softcap", "bias"), [(None, None), (3.0, BIAS)], ids=["plain", "cap and bias"])
def test_value_and_gradient_are_those_of_float64(chunk, softcap, bias):
    head = Head(WORDS, softcap=softcap, z_loss=0.5, smoothing=0.3, chunk=chunk)
    given = [jnp.asarray(value, jnp.float32) for value in (HIDDEN, TABLE, *([] if bias is None else [bias]))]

    def weighted(*values: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden, table, *rest = values
        nll, _ = label_nll(hidden, table, jnp.asarray(LABELS), head, rest[0] if rest else None)
        return (jnp.asarray(WEIGHTS, jnp.float32) * nll).sum(), nll

    places = tuple(range(len(given)))
    (_, nll), gradients = jax.jit(jax.value_and_grad(weighted, places, has_aux=True))(*given)
    expected, *expected_gradients = exact(softcap, bias)
    np.testing.assert_allclose(nll, expected, atol=5e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=False):
        np.testing.assert_allclose(gradient, wanted, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("weight", [1 / 1021, 1 / 4000])
def test_weights_of_labels_are_not_rounded_to_bfloat16(weight):
    """bfloat16(1 / 1021) is 0.25% off, and all gradients with it would be; see the same of the sum."""
    head, shape = Head(101), (4, 64)
    hidden = jnp.asarray(random.normal(size=(*shape, 32)), jnp.bfloat16)
    table = jnp.asarray(random.normal(size=(101, 32)), jnp.bfloat16)
    labels = jnp.asarray(random.integers(0, 101, shape))

    def each(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return label_nll(hidden, table, labels, head)[0].sum() * weight

    def together(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return linear_cross_entropy(hidden, table, labels, jnp.float32(weight), head).loss

    for one, other in zip(*(jax.grad(loss, (0, 1))(hidden, table) for loss in (each, together)), strict=True):
        assert one.dtype == jnp.bfloat16
        ours, theirs = (np.asarray(array, np.float64) for array in (one, other))
        assert (ours * theirs).sum() / (theirs * theirs).sum() == pytest.approx(1, abs=3e-4)
        np.testing.assert_allclose(ours, theirs, atol=2**-7 * np.abs(theirs).max())
