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

from stack.kernels.attention import Kind, Mask, Request, attend, row_mask
from stack.kernels.attention.dropout import Dropout, keep
from stack.kernels.attention.mosaic_gpu import interpreted, obstacles
from stack.parallel.rules import ONE_DEVICE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One attention, of one row."""

    length: int
    heads: int = 2
    kv_heads: int = 1
    width: int = 64
    kind: Kind = "causal"
    documents: tuple[int, ...] = ()
    """Lengths of those that share the row; empty: one, with padding behind it if `real` says so."""
    real: int | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    keys: int | None = None
    """Of another row."""


EVERY_DAY = [
    Case(length=200, documents=(70, 130)),
    Case(length=100, width=80, kind="full", real=70, window=20, softcap=5.0, dropout=0.2),
]
FULL = [
    Case(length=384, documents=(384,), heads=1),
    Case(length=300, heads=4, kv_heads=2, width=96, kind="prefix", documents=(100, 30, 170)),
    Case(length=130, heads=3, kv_heads=3, width=128, window=40, documents=(130,)),
    Case(length=256, width=128, softcap=20.0, documents=(90, 166)),
    Case(length=129, width=152, kind="full", real=100),
    Case(length=160, width=256, kind="full", documents=(60, 40, 30), window=20, softcap=5.0, dropout=0.1),
    Case(length=140, width=256, documents=(80, 60)),
    Case(length=150, width=24, heads=8, kv_heads=1, dropout=0.5, documents=(150,)),
    Case(length=70, width=64, kind="full", keys=190, real=70),
]


def mask_of(case: Case) -> Mask:
    segments, positions, prefix = (np.zeros((1, case.length), np.int32) for _ in range(3))
    place = 0
    for number, length in enumerate(case.documents or (case.real or case.length,), start=1):
        document = slice(place, place + length)
        segments[0, document], positions[0, document] = number, np.arange(length)
        prefix[0, place : place + length // 3] = 1
        place += length
    if case.keys is not None:
        columns = (jnp.zeros((1, number), jnp.int32) for number in (case.length, case.keys))
        lengths = jnp.array([case.keys - 30])
        return Mask(kind="full", query_positions=next(columns), key_positions=next(columns), lengths=lengths)
    return row_mask(
        jnp.asarray(segments),
        jnp.asarray(positions),
        packed=bool(case.documents),
        kind=case.kind,
        window=case.window,
        prefix=jnp.asarray(prefix) if case.kind == "prefix" else None,
    )


def exact(case: Case, arrays, mask: Mask, dropout: Dropout | None):
    """The output, and the gradients of its product with the cotangent, in float64."""
    query, key, value, cotangent = (np.asarray(array[0], np.float64) for array in arrays)
    group = case.heads // case.kv_heads
    scale = case.width**-0.5
    output, d_query, d_key, d_value = (np.zeros_like(array) for array in (query, query, key, value))
    allowed = np.asarray(mask.allowed())[0]
    for head in range(case.heads):
        q, d, k, v = query[:, head], cotangent[:, head], key[:, head // group], value[:, head // group]
        products = scale * q @ k.T
        scores = products if case.softcap is None else case.softcap * np.tanh(products / case.softcap)
        scores = np.where(allowed, scores, -np.inf)
        exponentials = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
        weights = exponentials / np.maximum(exponentials.sum(-1, keepdims=True), 1e-300)
        stays = 1.0
        if dropout is not None:
            stays = np.asarray(keep(dropout.rows[0, head], jnp.arange(len(k)), case.dropout)) / (
                1 - case.dropout
            )
        output[:, head] = (weights * stays) @ v
        d_weights = (d @ v.T) * stays
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
        if case.softcap is not None:
            d_scores *= 1 - np.tanh(products / case.softcap) ** 2
        d_query[:, head] = scale * d_scores @ k
        d_key[:, head // group] += scale * d_scores.T @ q
        d_value[:, head // group] += (weights * stays).T @ d
    return output, d_query, d_key, d_value


@pytest.mark.parametrize(
    "case", [*EVERY_DAY, *(pytest.param(case, marks=pytest.mark.full) for case in FULL)], ids=str
)
def test_output_and_gradients_are_those_of_float64(case, capsys):
    random = np.random.default_rng(0)

    def draw(number: int, heads: int) -> jax.Array:
        return jnp.asarray(random.normal(size=(1, number, heads, case.width)), jnp.bfloat16)

    keys = case.keys or case.length
    query, key, value = draw(case.length, case.heads), draw(keys, case.kv_heads), draw(keys, case.kv_heads)
    mask = mask_of(case)
    real = sum(case.documents) or case.real or case.length
    counts = jnp.arange(case.length) < real
    cotangent = draw(case.length, case.heads) * counts[None, :, None, None]
    dropout = None
    if case.dropout:
        rows = random.integers(0, 2**32, (1, case.heads, case.length, 2), dtype=np.uint32)
        dropout = Dropout(rate=case.dropout, rows=jnp.asarray(rows))
    ask = partial(
        attend, mask=mask, layout=ONE_DEVICE, kernel="mosaic_gpu", softcap=case.softcap, dropout=dropout
    )
    with interpreted():
        output, pull = jax.vjp(ask, query, key, value)
        found = output, *pull(cotangent)
    assert "RACE DETECTED" not in capsys.readouterr().out
    expected = exact(case, (query, key, value, cotangent), mask, dropout)
    for name, one, want in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        kept = slice(real if name == "output" else None)
        error = np.abs(np.asarray(one[0], np.float64)[kept] - want[kept]).max() / np.abs(want[kept]).max()
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


WIDTHS = [64, 80, 96, 128, 152, 256]
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
    for width in json.loads(sys.argv[1]):
        for plain in (True, False):
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
@pytest.mark.parametrize("widths", [WIDTHS[:3], WIDTHS[3:5], WIDTHS[5:]], ids=str)
def test_every_kernel_compiles_for_hopper_within_its_registers_and_memory(tmp_path, widths):
    """Mosaic aborts the process where it fails: in one of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }
    command = [sys.executable, "-c", COMPILE, json.dumps(widths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line[9:]) for line in done.stdout.splitlines() if line.startswith("COMPILED")]
    assert len(compiled) == 2 * len(widths)
    for name, calls, gathers, exchanges in compiled:
        assert calls >= 3, name
        assert not gathers, name
        assert not exchanges, name
    assembled = "".join(path.read_text() for path in tmp_path.rglob("*.ptxas"))
    assert len(re.findall(r"Used \d+ registers", assembled)) >= 6 * len(widths)
    spills = [int(each) for each in re.findall(r"(\d+) bytes spill stores", assembled)]
    assert max(spills) <= 400, "bytes a thread, of the widest heads with soft cap and dropout"
    memory = [
        int(each)
        for path in tmp_path.rglob("*resources*")
        for each in re.findall(r"smem_scratch_bytes=(\d+)", path.read_text())
    ]
    assert max(memory) <= 227 * 1024
