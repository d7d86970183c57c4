"""The kernels for Hopper: interpreted, against float64, and compiled for a GPU that is not here."""

import dataclasses
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
from attention_cases import Case

from stack.kernels.attention import Mask, Request, attend
from stack.kernels.attention.mosaic_gpu import obstacles
from stack.kernels.attention.mosaic_gpu.tiles import interpreted
from stack.parallel.rules import ONE_DEVICE

LONG = partial(Case, dtype="bfloat16", batch=1, length=300, rows="packed")
"""Of several blocks."""
EVERY_DAY = [
    LONG(length=200),
    LONG(length=140, head_dim=80, kind="full", window=20, softcap=5.0, dropout=0.2),
]
FULL = [
    LONG(rows="whole", length=384, heads=1),
    LONG(heads=4, kv_heads=2, head_dim=96, kind="prefix"),
    LONG(rows="whole", length=260, heads=3, kv_heads=3, head_dim=128, window=40),
    LONG(head_dim=128, softcap=20.0, batch=2),
    LONG(rows="padded", length=129, head_dim=152, kind="full"),
    LONG(length=160, head_dim=256, kind="full", window=20, softcap=5.0, dropout=0.1),
    LONG(rows="whole", length=140, head_dim=24, heads=8, dropout=0.5),
    LONG(rows="padded", length=140, kind="full", keys=290),
]


@pytest.mark.parametrize(
    "case", [*EVERY_DAY, *(pytest.param(case, marks=pytest.mark.full) for case in FULL)], ids=str
)
def test_output_and_gradients_are_the_definition(case, capsys):
    with interpreted():
        found = case.actual("mosaic_gpu")
    assert "RACE DETECTED" not in capsys.readouterr().out
    for name, want in case.expected().items():
        error = np.abs(found[name] - want).max() / np.abs(want).max()
        # Two roundings to bfloat16, 2^-9 each, and those of the weights, which average out.
        assert error < 0.008, name


def test_a_query_that_sees_no_key_gets_zeros_and_gives_none():
    shape = (1, 64, 1, 64)
    query = jnp.ones(shape, jnp.bfloat16)
    places = jnp.zeros(shape[:2], jnp.int32)
    mask = Mask(kind="full", query_positions=places, key_positions=places, lengths=jnp.zeros(1, jnp.int32))
    with interpreted():
        output, pull = jax.vjp(
            partial(attend, mask=mask, layout=ONE_DEVICE, kernel="mosaic_gpu"), query, query, query
        )
        gradients = pull(output + 1)
    assert not any(np.asarray(array).any() for array in (output, *gradients))


def test_what_is_no_number_is_not_hidden():
    query = jnp.ones((1, 64, 1, 64), jnp.bfloat16).at[0, 10].set(jnp.nan)
    columns = jnp.arange(64)[None]
    mask = Mask(query_positions=columns, key_positions=columns)
    with interpreted():
        ones = jnp.ones_like(query)
        output = attend(query, ones, ones, mask, ONE_DEVICE, kernel="mosaic_gpu")
    told = np.isnan(np.asarray(output, np.float32)).all(-1)[0, :, 0]
    np.testing.assert_array_equal(np.flatnonzero(told), [10])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dtype": jnp.float32}, "in bfloat16, not in float32"),
        ({"bias": True}, "takes no bias"),
        ({"queries": 1}, "whole rows, not 1 queries to 64 keys"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(more, message):
    key = jnp.zeros((1, 64, 1, 64), more.get("dtype", jnp.bfloat16))
    query = key[:, : more.get("queries", 64)]
    mask = Mask(query_positions=jnp.zeros(query.shape[:2], int), key_positions=jnp.zeros((1, 64), int))
    bias = jnp.zeros((1, 1, 64, 64)) if "bias" in more else None
    with pytest.raises(ValueError, match=message):
        attend(query, key, key, mask, ONE_DEVICE, kernel="mosaic_gpu", bias=bias)


def test_pallas_is_imported_by_those_who_run_it():
    """It takes half a second, which every start would pay."""
    code = "import sys, stack.kernels.attention, stack.kernels.matmul.fp8;"
    code += "sys.exit('jax.experimental.pallas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_obstacles_are_all_told():
    asked = Request(
        platform="gpu", compute_capability=9.0, dtype="bfloat16", head_dim=152, packed_length=1025
    )
    assert obstacles(dataclasses.replace(asked, dropout=0.1, softcap=50.0, kind="prefix")) == []
    told = obstacles(
        dataclasses.replace(asked, compute_capability=8.0, dtype="float32", head_dim=512, bias=True)
    )
    assert len(told) == 4
    assert "8.0 is not 9.0" in told[0]


SHAPES = [(64, False), (128, True), (256, False)]
if os.environ.get("STACK_TESTS") == "all":
    SHAPES = [(width, plain) for width in (64, 80, 96, 128, 152, 192, 256) for plain in (True, False)]
"""Widths of heads, and whether scores have neither soft cap nor dropout."""
COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from stack.config import MeshConfig
from stack.kernels.attention import attend, row_mask
from stack.kernels.attention.dropout import Dropout
from stack.parallel import mesh as meshes
from stack.parallel.mesh import without_cache
from stack.parallel.rules import Layout
from stack.planner.compiled.compile import devices

config = MeshConfig(data=2, fsdp=2, tensor=2)
mesh = meshes.build(config, devices("h200", 8))
layout = Layout.of(mesh, config)
with meshes.use(mesh), without_cache():
    for width, plain in json.loads(sys.argv[1]):
        def array(dtype, *names, shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*names))
        query = array("bfloat16", "batch", None, "heads", shape=(8, 1024, 8, width))
        key = array("bfloat16", "batch", None, "kv_heads", shape=(8, 1024, 4, width))
        place = array("int32", "batch", shape=(8, 1024))
        rows = array("uint32", "batch", "heads", shape=(8, 8, 1024, 2))
        def loss(query, key, value, place, rows):
            mask = row_mask(place, place, packed=True)
            more = {} if plain else {"softcap": 30.0, "dropout": Dropout(rate=0.1, rows=rows)}
            out = attend(query, key, value, mask, layout, kernel="mosaic_gpu", **more)
            return out.astype(jnp.float32).sum()
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        hlo = step.lower(query, key, key, place, rows).compile().as_text()
        told = [f"{width} {plain}", hlo.count("mosaic_gpu"), "all-gather" in hlo, "all-to-all" in hlo]
        print("COMPILED", json.dumps(told), flush=True)
"""


@pytest.mark.full
def test_every_kernel_compiles_for_hopper_within_its_registers_and_memory(tmp_path):
    """Mosaic aborts the process where it fails: in one of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }
    command = [sys.executable, "-c", COMPILE, json.dumps(SHAPES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line[9:]) for line in done.stdout.splitlines() if line.startswith("COMPILED")]
    assert len(compiled) == len(SHAPES)
    for name, calls, gathers, exchanges in compiled:
        assert calls >= 3, name
        assert not gathers, name
        assert not exchanges, name
    assembled = "".join(path.read_text() for path in tmp_path.rglob("*.ptxas"))
    assert len(re.findall(r"Used \d+ registers", assembled)) >= 3 * len(SHAPES)
    spills = [int(each) for each in re.findall(r"(\d+) bytes spill stores", assembled)]
    assert max(spills) <= 320, "bytes a thread, of the widest heads with soft cap and dropout"
    memory = [
        int(each)
        for path in tmp_path.rglob("*resources*")
        for each in re.findall(r"smem_scratch_bytes=(\d+)", path.read_text())
    ]
    assert max(memory) <= 227 * 1024
