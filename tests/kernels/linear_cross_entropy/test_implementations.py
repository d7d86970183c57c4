"""Every implementation gives the values and gradients of the reference in float64; the reference, NumPy's."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import MeshConfig
from stack.kernels.linear_cross_entropy import KERNELS, Head, linear_cross_entropy
from stack.kernels.linear_cross_entropy.reference import linear_cross_entropy as reference
from stack.parallel import mesh as meshes
from stack.parallel.rules import ONE_DEVICE, Layout
from stack.parallel.zero import gather_weight

WIDTH = 16
SHAPES = {"padded": (4, 12, 37, 48), "odd": (3, 7, 41, 41), "one token": (1, 1, 5, 8)}
"""Rows, columns, words, rows of the table."""
CASES = [
    *itertools.product(["padded"], ["some"], [None, 3.0], [0.0, 0.1], [False, True], [0.0]),
    *itertools.product(["padded"], ["some"], [None, 3.0], [0.1], [True], [0.2]),
    *itertools.product(["odd", "one token"], ["all"], [3.0], [0.1], [True], [0.2]),
    ("padded", "none", 3.0, 0.1, True, 0.2),
]
"""Shape, which labels count, soft cap, z-loss, whether words have a bias, smoothing."""
LIMIT = {"float32": 1e-5, "bfloat16": 2.0**-7}
"""Of the largest value. A slope and then a gradient are rounded to bfloat16, each by up to 2^-9."""


def arrays(shape, *, counts="some", dtype="float32"):
    """Hidden states, table, labels and bias; those of float32 are of numbers that bfloat16 holds."""
    rows, columns, words, table_rows = SHAPES[shape]
    random = np.random.default_rng(0)
    is_word = np.arange(table_rows) < words
    hidden = random.normal(size=(rows, columns, WIDTH))
    table = np.where(is_word[:, None], random.normal(size=(table_rows, WIDTH)), 0)
    bias = np.where(is_word, random.normal(size=table_rows), 0).astype(np.float32)
    numbers = random.integers(0, words, (rows, columns)).astype(np.int32)
    if counts == "some":
        numbers[0, columns // 2 + 1 :] = -1
        numbers[-1, 1::3] = -1
    if counts == "none":
        numbers[:] = -1
    return hidden.astype(dtype), table.astype(dtype), numbers, bias


def sums_and_gradients(function, hidden, table, labels, bias, head, scale, **options):
    """Sums, and the gradients of the loss in hidden states, table and bias, if there is one."""

    def loss(hidden, table, bias):
        sums = function(hidden, table, labels, scale, head, bias, **options)
        return sums.loss, sums

    hidden, table, labels, scale = map(jnp.asarray, (hidden, table, labels, scale))
    bias = None if bias is None else jnp.asarray(bias)
    argnums = (0, 1) if bias is None else (0, 1, 2)
    (_, sums), gradients = jax.value_and_grad(loss, argnums, has_aux=True)(hidden, table, bias)
    return sums, gradients


def truth(hidden, table, labels, bias, head, scale):
    """The same of the reference, all in float64."""
    with jax.enable_x64(True):
        wide = [None if array is None else jnp.asarray(array, jnp.float64) for array in (hidden, table, bias)]
        out = sums_and_gradients(
            reference, wide[0], wide[1], labels, wide[2], head._replace(layout=Layout()), scale
        )
        assert all(array.dtype == jnp.float64 for array in jax.tree.leaves(out))
        return jax.tree.map(np.asarray, out)


def by_hand(hidden, table, labels, bias, head, scale):
    """The same in NumPy, with the derivatives written out."""
    words = head.vocab_size
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    raw = hidden @ table[:words].T + (0 if bias is None else bias[:words].astype(np.float64))
    scores = raw if head.softcap is None else head.softcap * np.tanh(raw / head.softcap)
    normaliser = np.log(np.exp(scores).sum(-1))
    counts, is_label = labels >= 0, np.arange(words) == labels[..., None]
    logs, target = scores - normaliser[..., None], (1 - head.smoothing) * is_label + head.smoothing / words
    nll = -(logs * is_label).sum(-1)[counts].sum()
    loss = scale * (
        -(logs * target).sum(-1)[counts].sum() + head.z_loss * np.square(normaliser)[counts].sum()
    )
    correct = (scores.argmax(-1) == labels)[counts].sum()
    slope = np.exp(scores - normaliser[..., None]) * (1 + 2 * head.z_loss * normaliser[..., None]) - target
    if head.softcap is not None:
        slope *= 1 - np.tanh(raw / head.softcap) ** 2
    slope *= scale * counts[..., None]
    padding = len(table) - words
    gradients = slope @ table[:words], np.pad(np.einsum("blv,ble->ve", slope, hidden), ((0, padding), (0, 0)))
    if bias is not None:
        gradients += (np.pad(slope.sum((0, 1)), (0, padding)),)
    return (loss, nll, correct), gradients


def check(actual, expected, limit):
    """Each array is right to within a share of its largest value."""
    actual, expected = jax.tree.leaves(tuple(actual)), jax.tree.leaves(tuple(expected))
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == np.shape(other)
        error = np.abs(np.asarray(one, np.float64) - other).max()
        assert error <= limit * np.abs(other).max() or error < 1e-30


@pytest.mark.parametrize(("shape", "counts", "softcap", "z_loss", "with_bias", "smoothing"), CASES)
def test_the_reference_is_the_formula(shape, counts, softcap, z_loss, with_bias, smoothing):
    hidden, table, labels, bias = arrays(shape, counts=counts)
    head = Head(SHAPES[shape][2], softcap=softcap, z_loss=z_loss, smoothing=smoothing)
    case = (hidden, table, labels, bias if with_bias else None, head, 0.3)
    for actual, expected in zip(truth(*case), by_hand(*case), strict=True):
        check(actual, expected, 1e-13)


@pytest.mark.parametrize(("shape", "counts", "softcap", "z_loss", "with_bias", "smoothing"), CASES)
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_implementation_is_the_reference(
    kernel, dtype, shape, counts, softcap, z_loss, with_bias, smoothing
):
    hidden, table, labels, bias = map(jnp.asarray, arrays(shape, counts=counts, dtype=dtype))
    bias = bias if with_bias else None
    head, scale = (
        Head(SHAPES[shape][2], softcap=softcap, z_loss=z_loss, smoothing=smoothing, chunk=9),
        jnp.float32(0.3),
    )
    run = jax.jit(partial(sums_and_gradients, partial(linear_cross_entropy, kernel=kernel), head=head))
    sums, gradients = run(hidden, table, labels, bias, scale=scale)
    expected_sums, expected = truth(hidden, table, labels, bias, head, 0.3)
    check(sums, expected_sums, 1e-5)
    check(gradients, expected, LIMIT[dtype])
    assert [one.dtype for one in gradients] == [dtype, dtype, "float32"][: len(gradients)]
    check(linear_cross_entropy(hidden, table, labels, scale, head, bias, kernel=kernel), expected_sums, 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padded_words_and_labels_that_do_not_count_get_no_gradient(kernel):
    hidden, table, labels, bias = arrays("padded")
    head = Head(37, z_loss=0.1, softcap=3.0, smoothing=0.2)
    _, gradients = sums_and_gradients(
        linear_cross_entropy, hidden, table, labels, bias, head, jnp.float32(1), kernel=kernel
    )
    hidden, table, bias = map(np.asarray, gradients)
    assert not table[37:].any()
    assert not bias[37:].any()
    assert not hidden[labels < 0].any()
    assert hidden[labels >= 0].any(-1).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_without_labels_is_zero(kernel):
    hidden, table, labels, bias = arrays("padded", counts="none")
    sums, gradients = sums_and_gradients(
        linear_cross_entropy,
        hidden,
        table,
        labels,
        bias,
        Head(37, z_loss=0.1, smoothing=0.2),
        jnp.float32(1),
        kernel=kernel,
    )
    assert not any(np.asarray(array).any() for array in (*sums, *gradients))


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_do_not_overflow(kernel):
    hidden, table, labels, bias = arrays("padded")
    hidden *= np.float32(1e4)
    sums, gradients = sums_and_gradients(
        linear_cross_entropy,
        hidden,
        table,
        labels,
        bias,
        Head(37, smoothing=0.2),
        jnp.float32(1),
        kernel=kernel,
    )
    assert all(np.isfinite(array).all() for array in (*sums, *gradients))


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 8}, {"fsdp": 4, "data": 1, "tensor": 2}],
)
@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "reference"])
def test_a_mesh_changes_nothing(kernel, sizes):
    config = MeshConfig.model_validate(sizes)
    mesh = meshes.build(config)
    layout = Layout.of(mesh, config)
    head = Head(37, softcap=3.0, z_loss=0.1, smoothing=0.2, chunk=8, layout=layout)
    names = ("vocab", "embed")
    whole = arrays("padded")

    def loss(hidden, table, labels, scale, head, bias):
        gathered = gather_weight(table, layout, names, "table")
        return linear_cross_entropy(hidden, gathered, labels, scale, head, bias, kernel=kernel)

    def run(hidden, table, labels, bias):
        return sums_and_gradients(loss, hidden, table, labels, bias, head, jnp.float32(0.3))

    specs = (
        layout.sharding("batch", "length", "embed"),
        jax.NamedSharding(mesh, layout.parameter_spec(names, whole[1].shape, "table")),
        layout.sharding("batch", "length"),
        layout.sharding("vocab"),
    )
    with meshes.use(mesh):
        placed = map(jax.device_put, whole, specs)
        sums, gradients = jax.jit(run)(*placed)
    expected_sums, expected = truth(*whole, head, 0.3)
    check(sums, expected_sums, 1e-5)
    check(gradients, expected, 1e-5)
    for gradient, spec in zip(gradients, (specs[0], specs[1], specs[3]), strict=True):
        assert gradient.sharding == spec


def test_the_reference_is_for_one_device():
    config = MeshConfig(tensor=8, fsdp=1)
    layout = Layout.of(meshes.build(config), config)
    with pytest.raises(ValueError, match="the reference is for one device; take xla_chunked"):
        linear_cross_entropy(*call(layout=layout), kernel="reference")


def call(*, dtype="float32", vocab_size=37, layout=ONE_DEVICE):
    """Arguments of a call."""
    hidden, table, labels, _ = map(jnp.asarray, arrays("padded"))
    return hidden, table.astype(dtype), labels, jnp.float32(1), Head(vocab_size, layout=layout)


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match="unknown linear_cross_entropy kernel 'fast': xla_chunked, ref"):
        linear_cross_entropy(*call(), kernel="fast")
    with pytest.raises(ValueError, match="hidden is float32, table bfloat16; cast one"):
        linear_cross_entropy(*call(dtype="bfloat16"))
    with pytest.raises(ValueError, match="49 words do not fit a table of 48 rows"):
        linear_cross_entropy(*call(vocab_size=49))
