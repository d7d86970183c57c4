"""The kernels for Hopper: interpreted, against float64, and compiled for a GPU that is not here."""

import json
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_matmul_cases import SIZES, Case

from stack.config import ConfigError
from stack.kernels.attention.mosaic_gpu.tiles import interpreted
from stack.kernels.grouped_matmul import KERNELS, api, grouped_matmul
from stack.kernels.grouped_matmul.mosaic_gpu import multiply, weight_gradient
from stack.kernels.grouped_matmul.mosaic_gpu.tiles import PANEL, place

HOPPER = partial(Case, inputs=128, outputs=128, dtype="bfloat16")
EVERY_DAY = [HOPPER((37, 0, 90, 61), 193)]
FULL = [
    HOPPER(*SIZES["even"], outputs=256),
    HOPPER(*SIZES["empty ones"], inputs=384),
    HOPPER(*SIZES["one has all"]),
    HOPPER(*SIZES["none has any"]),
    HOPPER(*SIZES["some tokens belong to none"]),
    HOPPER(*SIZES["skewed"]),
    HOPPER((3,) * 8, 30),
    HOPPER(*SIZES["one token"]),
    HOPPER(*SIZES["more than there are"]),
]


@pytest.fixture
def _on_hopper(monkeypatch):
    monkeypatch.setattr(api, "device", lambda _: ("gpu", 9.0))


@pytest.mark.usefixtures("_on_hopper")
@pytest.mark.parametrize(
    "case", [*EVERY_DAY, *(pytest.param(case, marks=pytest.mark.full) for case in FULL)], ids=str
)
def test_result_and_gradients_are_numpy_s(case, capsys):
    with interpreted():
        found = case.actual("mosaic_gpu")
    assert "RACE DETECTED" not in capsys.readouterr().out
    for name, want in case.expected().items():
        # Rounded to bfloat16 once, by up to 2^-9 of each number.
        assert np.abs(found[name] - want).max() <= 2.0**-8 * np.abs(want).max(), name


def test_what_is_no_number_stays_in_its_group():
    """Of the tokens that share a step, and of a weight whose tile another group has too."""
    sizes = jnp.asarray([40, 30], jnp.int32)
    ones = jnp.ones((128, 128), jnp.bfloat16)
    odd = ones.at[50].set(jnp.nan).at[100].set(jnp.nan)
    with interpreted():
        gradient = np.asarray(weight_gradient(odd, odd, sizes), np.float32)
    assert np.isnan(gradient[1]).all()
    np.testing.assert_array_equal(gradient[0], 40)
    with interpreted():
        weights = jnp.stack([ones * jnp.inf, ones])
        result = np.asarray(multiply(ones, weights, sizes), np.float32)
    np.testing.assert_array_equal(result[:, 0], [np.inf] * 40 + [128] * 30 + [0] * 58)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (PANEL, 3), (2 * PANEL + 5, 4)])
def test_every_tile_is_computed_once(rows, columns):
    number = jnp.arange(rows * columns, dtype=jnp.int32)
    row, column = jax.vmap(partial(place, rows=rows, columns=columns))(number)
    assert set(zip(row.tolist(), column.tolist(), strict=True)) == {
        (i, j) for i in range(rows) for j in range(columns)
    }


@pytest.mark.parametrize(
    ("device", "dtype", "width", "reasons"),
    [
        (("gpu", 8.0), "bfloat16", 128, "compute capability 8.0 is not 9.0"),
        (("gpu", 10.0), "bfloat16", 128, "compute capability 10.0 is not 9.0"),
        (
            ("cpu", None),
            "float32",
            72,
            "not an NVIDIA GPU; dtype is float32, not bfloat16; outputs on a device are 72, no multiple",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_with_all_reasons(monkeypatch, device, dtype, width, reasons):
    monkeypatch.setattr(api, "device", lambda _: device)
    tokens, weights = jnp.ones((8, 128), dtype), jnp.ones((2, 128, width), dtype)
    with pytest.raises(ConfigError, match=re.escape(reasons)) as error:
        grouped_matmul(tokens, weights, jnp.ones((1, 2), jnp.int32), implementation="mosaic_gpu")
    assert str(error.value).endswith("; take auto, xla_chunked or xla")


COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from stack.config import ConfigError, MeshConfig
from stack.kernels.grouped_matmul import grouped_matmul
from stack.parallel import mesh as meshes
from stack.parallel.mesh import without_cache
from stack.parallel.rules import Layout
from stack.planner.compiled.compile import devices

target, name = sys.argv[1:3]
config = MeshConfig(data=2, fsdp=2, tensor=2)
mesh = meshes.build(config, devices(target, 8))
layout = Layout.of(mesh, config)


def array(dtype, *names, shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*names))


def both_ways(tokens, weights, sizes, slope, names):
    def product(tokens, weights):
        return grouped_matmul(tokens, weights, sizes, layout, names=names, implementation=name)

    result, pull = jax.vjp(product, tokens, weights)
    found = result, *pull(slope)
    assert [jax.typeof(each) for each in found] == [jax.typeof(each) for each in (slope, tokens, weights)]
    return found


with meshes.use(mesh), without_cache():
    for tokens, groups, inputs, outputs, names in json.loads(sys.argv[3]):
        operands = (
            array("bfloat16", "batch", names[0], shape=(tokens, inputs)),
            array("bfloat16", None, *names, shape=(groups, inputs, outputs)),
            array("int32", "batch", None, shape=(4, groups)),
            array("bfloat16", "batch", names[1], shape=(tokens, outputs)),
        )
        try:
            lowered = jax.jit(both_ways, static_argnums=4).lower(*operands, tuple(names))
        except ConfigError as error:
            print("COMPILED", json.dumps({"refused": str(error)}), flush=True)
            continue
        compiled = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})
        told = {"hlo": compiled.as_text(), "temporaries": compiled.memory_analysis().temp_size_in_bytes}
        print("COMPILED", json.dumps(told), flush=True)
"""
SHAPES = [
    (65_536, 8, 4096, 14_336, ("embed", "mlp")),
    (65_536, 128, 768, 2048, ("mlp", "embed")),
    (4100, 8, 1408, 2048, ("embed", "mlp")),
]
"""Tokens, groups, inputs and outputs of Mixtral 8x7B's way in and Qwen3 30B's way out, and odd ones."""


def compiled(target, name, shapes, **environment):
    command = [sys.executable, "-c", COMPILE, target, name, json.dumps(shapes)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line[9:]) for line in done.stdout.splitlines() if line.startswith("COMPILED")]


@pytest.mark.full
def test_every_kernel_compiles_for_hopper_within_its_registers_and_memory(tmp_path):
    """Mosaic aborts the process where it fails: in one of its own."""
    dumps = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    found = compiled("h200", "mosaic_gpu", SHAPES, **dumps)
    for one, (tokens, groups, inputs, outputs, _) in zip(found, SHAPES, strict=True):
        assert one["hlo"].count("mosaic_gpu") >= 3
        assert not re.findall(r"all-gather|all-to-all|collective-permute", one["hlo"])
        reduced = re.findall(r"= .*? all-reduce(?:-start)?\(", one["hlo"])
        assert any(f"f32[{groups}," in shape for shape in reduced), "gradients of weights, in float32"
        assert not any(f"[{tokens}," in shape for shape in reduced), "tokens stay where they are"
        assert one["temporaries"] < 16 * (tokens * (inputs + outputs) + 128 * inputs * outputs)
    assembled = "".join(path.read_text() for path in tmp_path.rglob("*.ptxas"))
    assert len(re.findall(r"Used \d+ registers", assembled)) >= 3 * len(SHAPES)
    assert set(re.findall(r"(\d+) bytes spill", assembled)) == {"0"}
    assert "serialized" not in assembled, "products of tensor cores overlap"
    memory = [
        int(each)
        for path in tmp_path.rglob("*resources*")
        for each in re.findall(r"smem_scratch_bytes=(\d+)", path.read_text())
    ]
    assert max(memory) <= 227 * 1024


@pytest.mark.full
@pytest.mark.parametrize("target", ["a100-80gb", "b200"])
def test_other_gpus_are_refused_before_their_compiler_aborts(target):
    (one,) = compiled(target, "mosaic_gpu", SHAPES[:1])
    assert re.search(
        r"compute capability (8|10)\.0 is not 9\.0 .*; take auto, xla_chunked or xla", one["refused"]
    )


@pytest.mark.full
@pytest.mark.parametrize(("name", "target"), [("xla_chunked", "a100-80gb"), ("xla", "h200")])
def test_array_operations_compile_for_gpus_and_one_of_them_copies_tokens_for_each_group(name, target):
    (one,) = compiled(target, name, [(16_384, 16, 1024, 512, ("embed", "mlp"))])
    assert not re.findall(r"all-gather|all-to-all|collective-permute", one["hlo"])
    copies = 16 * (16_384 // 4) * 1024 * 2
    assert KERNELS[name].copies_tokens == (one["temporaries"] > copies)
