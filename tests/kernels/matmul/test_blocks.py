"""Products with scales for blocks of a sum, against NumPy's in float64, in the interpreter and compiled."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from stack.kernels.attention.mosaic_gpu.tiles import interpreted
from stack.kernels.matmul import Blocks, Fp8
from stack.kernels.matmul.blocks import quantize_blocks
from stack.kernels.matmul.fp8 import project
from stack.layers.parameter import parameter
from stack.parallel.rules import ONE_DEVICE

E4M3 = ml_dtypes.float8_e4m3fn
UP = (2, 130, 200), (200, 264), ("embed", "mlp"), ("batch", "length", "mlp"), 1
OUT = (1, 140, 5, 48), (5, 48, 100), ("heads", "head_dim", "embed"), ("batch", "residual_length", "embed"), 2


def blocks_of(x, height, width):
    """Slices, from the start, the last of each line as long as it is."""
    for row in range(0, x.shape[0], height):
        for column in range(0, x.shape[1], width):
            yield slice(row, row + height), slice(column, column + width)


def rounded(x, height, width):
    """`x` in float64 as e4m3 holds it, with a scale for each block."""
    x = x.copy()
    for block in blocks_of(x, height, width):
        scale = 2.0 ** (np.floor(np.log2(np.abs(x[block]).max() / 448)) + 1)
        x[block] = (x[block] / scale).astype(np.float32).astype(E4M3).astype(np.float64) * scale
    return x


def by_example(x, examples, size):
    """Rounded along tokens, which are cut at the ends of examples."""
    return np.concatenate([rounded(one, size, 1) for one in np.split(x, examples)])


def expected(x, weight, cotangent, contracted, blocks):
    """The product and both gradients."""
    size = {"block": 128, "mx": 32}[blocks]
    across = size if blocks == "block" else 1
    rows = x.reshape(-1, np.prod(weight.shape[:contracted]))
    matrix, y = weight.reshape(rows.shape[1], -1), cotangent.reshape(len(rows), -1)
    return (
        rounded(rows, 1, size) @ rounded(matrix, size, across),
        rounded(y, 1, size) @ rounded(matrix, across, size).T,
        by_example(rows, len(x), size).T @ by_example(y, len(x), size),
    )


def arrays(x_shape, weight_shape, contracted):
    """Numbers of very many sizes, other ones in each block."""
    draw = np.random.default_rng(1)

    def array(*shape):
        return draw.standard_normal(shape) * 2.0 ** draw.integers(-8, 8, shape)

    return array(*x_shape), array(*weight_shape), 1e-6 * array(*x_shape[:2], *weight_shape[contracted:])


def compare(case, dtype, kernel, *, rtol, blocks: Blocks = "block"):
    x_shape, weight_shape, axes, names, contracted = case
    x, weight, cotangent = (
        np.asarray(jnp.asarray(array, dtype), np.float64)
        for array in arrays(x_shape, weight_shape, contracted)
    )

    def run(x, weight):
        how = Fp8(blocks=blocks, kernel=kernel)
        return project(
            x, parameter(weight, axes=axes, role="float8"), ONE_DEVICE, names, contracted=contracted, how=how
        )

    y, backward = jax.vjp(jax.jit(run), jnp.asarray(x, dtype), jnp.asarray(weight, jnp.float32))
    found = y, *jax.jit(backward)(jnp.asarray(cotangent, dtype))
    assert [array.dtype.name for array in found] == [dtype, dtype, "float32"]
    for array, exact in zip(found, expected(x, weight, cotangent, contracted, blocks), strict=True):
        actual = np.asarray(array, np.float64).reshape(exact.shape)
        np.testing.assert_allclose(actual, exact, rtol=0, atol=rtol * np.abs(exact).max())


@pytest.mark.parametrize("shape", [(1, 128), (128, 1), (128, 128), (1, 32)], ids=str)
def test_each_block_has_a_scale_of_its_own(shape):
    x = arrays((260, 150), (1, 1), 1)[0].astype(np.float32)
    values, scale = jax.jit(quantize_blocks, static_argnums=1)(x, shape)
    assert values.shape == x.shape
    assert scale.shape == (-(-260 // shape[0]), -(-150 // shape[1]))
    whole = np.repeat(np.repeat(scale, shape[0], 0)[:260], shape[1], 1)[:, :150]
    exact = np.asarray(values, np.float64) * whole
    np.testing.assert_array_equal(exact, rounded(x.astype(np.float64), *shape))


@pytest.mark.parametrize("blocks", ["block", "mx"])
@pytest.mark.parametrize(
    ("case", "dtype"), [(UP, "float32"), (OUT, "float32"), (UP, "bfloat16")], ids=["up", "out", "bfloat16"]
)
def test_products_and_gradients_are_those_of_rounded_numbers(case, dtype, blocks):
    rtol = 1e-6 if dtype == "float32" else 2.0**-8
    compare(case, dtype, "reference", rtol=rtol, blocks=blocks)


def test_so_are_those_that_jax_defines():
    """Of MX, as `jax.nn.scaled_matmul` has them on a CPU, where it too multiplies in what is asked for."""
    compare(OUT, "float32", "scaled_matmul", rtol=1e-6, blocks="mx")


@pytest.mark.parametrize("case", [OUT, pytest.param(UP, marks=pytest.mark.full)], ids=["out", "up"])
def test_so_are_those_of_the_kernel_for_hopper(case, capsys):
    """In the interpreter, which multiplies exactly; races are errors."""
    with interpreted():
        compare(case, "bfloat16", "mosaic_gpu", rtol=2.0**-8)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "squares", [True, pytest.param(False, marks=pytest.mark.full)], ids=["squares", "lines"]
)
def test_more_blocks_than_shared_memory_holds(squares, capsys):
    from stack.kernels.matmul import mosaic_gpu

    draw, blocks, columns = np.random.default_rng(0), 7, 128
    left, right = (
        jnp.asarray(draw.standard_normal((128, 128 * blocks)), dtype)
        for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
    )
    scales = [2.0 ** draw.integers(-5, 5, (rows, blocks)) for rows in (128, 1 if squares else columns)]
    with interpreted():
        y = jax.jit(mosaic_gpu.multiply, static_argnums=4)(
            left, jnp.float32(scales[0]), right, jnp.float32(scales[1]), jnp.float32
        )
    assert "RACE DETECTED" not in capsys.readouterr().out
    exact = [
        np.asarray(values, np.float64) * np.repeat(scale, 128, 1)
        for values, scale in zip((left, right), scales, strict=True)
    ]
    want = exact[0] @ exact[1].T
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_taken_for_a_large_number(bad):
    x = jnp.ones((2, 256)).at[0, 200].set(bad)
    values, scale = quantize_blocks(x, (1, 128), jnp.float8_e8m0fnu)
    values = values.astype(jnp.float32)
    np.testing.assert_array_equal(np.isnan(scale.astype(jnp.float32)), [[False, True], [False, False]])
    np.testing.assert_array_equal(np.isnan(values), [[False] * 128 + [True] * 128, [False] * 256])


COMPILE = """
import sys
import jax, jax.numpy as jnp
from stack.config import MeshConfig
from stack.kernels.matmul import Fp8
from stack.kernels.matmul.fp8 import project
from stack.layers.parameter import parameter
from stack.parallel import mesh as meshes
from stack.parallel.mesh import without_cache
from stack.parallel.rules import Layout
from stack.planner.compiled.compile import devices

config = MeshConfig(data=2, fsdp=2, tensor=2, zero=3)
mesh = meshes.build(config, devices(sys.argv[1], 8))
layout = Layout.of(mesh, config, dtype="bfloat16")
up, down = ("embed", "mlp"), ("mlp", "embed")

def loss(x, first, second):
    how = Fp8(blocks=sys.argv[2], kernel=sys.argv[3])
    for axes, weight in ((up, first), (down, second)):
        kernel, names = parameter(weight, axes=axes, role="float8"), ("batch", "length", axes[1])
        x = project(x, kernel, layout, names, contracted=1, how=how)
    return jnp.square(x.astype(jnp.float32)).sum()

def weight(axes, *shape):
    spec = layout.parameter_spec(axes, shape, "float8")
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))

x = jax.ShapeDtypeStruct((8, 1024, 512), jnp.bfloat16, sharding=layout.sharding("batch"))
with meshes.use(mesh), without_cache():
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    lowered = step.lower(x, weight(up, 512, 1024), weight(down, 1024, 512))
    print(lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text())
"""


def compiled(*arguments, **environment):
    """The program for a chip, in 8 bits by a kernel; Mosaic aborts its process where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def moved(hlo):
    """Dtypes of weights that are gathered, and of what is added up over devices."""
    gathers = "".join(re.findall(r"all-gather(?:-start)? = .*", hlo))
    weights = re.findall(r"(\w+)\[512,(?:512|1024)\]", gathers)
    sums = re.findall(r"(\w+)\[[\d,]+\]\S* (?:all-reduce|reduce-scatter)(?:-start)?\(", hlo)
    return set(weights), set(sums)


@pytest.mark.full
def test_the_kernel_compiles_for_hopper_and_weights_are_gathered_in_8_bits(tmp_path):
    dump = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    hlo = compiled("h200", "block", "mosaic_gpu", **dump)
    assert len(re.findall(r'custom_call_target="mosaic_gpu', hlo)) == 6, "two products and their gradients"
    assert moved(hlo) == ({"f8e4m3fn"}, {"bf16", "f32"}), "no largest number"
    assembled = "".join(path.read_text() for path in tmp_path.rglob("*.ptxas"))
    assert len(re.findall(r"Used \d+ registers", assembled)) >= 2
    assert not any(int(each) for each in re.findall(r"(\d+) bytes spill stores", assembled))
    memory = [
        int(each)
        for path in tmp_path.rglob("*resources*")
        for each in re.findall(r"smem_scratch_bytes=(\d+)", path.read_text())
    ]
    assert max(memory) <= 227 * 1024


@pytest.mark.full
def test_blackwell_multiplies_mx_and_hopper_would_widen_it_without_a_word():
    hlo = compiled("b200", "mx", "scaled_matmul")
    assert hlo.count("__cudnn$blockScaledDot") == 6, "two products and their gradients"
    assert moved(hlo) == ({"f8e4m3fn"}, {"bf16", "f32"})
    assert "__cudnn$blockScaledDot" not in compiled("h200", "mx", "scaled_matmul")
