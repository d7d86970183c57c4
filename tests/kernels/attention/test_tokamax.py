"""Tokamax's kernels are asked for the right thing, and compile for GPUs that are not here."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, plain_tokamax
from interpreted_tokamax import backward_interpreted

from stack.config import (
    Config,
    ConfigError,
    DataConfig,
    DecoderConfig,
    KernelsConfig,
    MeshConfig,
    TrainConfig,
)
from stack.kernels.attention import KERNELS, Mask, Request, assembler, attend, choose
from stack.kernels.attention.tokamax import MISSING, obstacles
from stack.parallel.mesh import without_cache
from stack.parallel.rules import ONE_DEVICE
from stack.planner.compiled.collectives import collectives
from stack.planner.compiled.compile import compile_step, devices

HERE = importlib.util.find_spec("tokamax") is not None
needs_tokamax = pytest.mark.skipif(not HERE, reason=f"Tokamax: {MISSING}")
HOPPER = Request(platform="gpu", compute_capability=9.0, dtype="bfloat16", head_dim=128, length=4096)
BLACKWELL = dataclasses.replace(HOPPER, compute_capability=10.0)
SOFTCAP = {"softcap": 50.0}


@pytest.mark.parametrize("request_", [HOPPER, BLACKWELL])
@pytest.mark.parametrize(
    "more", [{}, SOFTCAP, {"kind": "prefix", "packed_length": 1025, "window": True}, {"cross": True}]
)
def test_what_it_can_do_it_can_where_it_is_installed(tokamax_is_here, request_, more):
    asked = dataclasses.replace(request_, **more)
    assert obstacles(asked) == ["it is not installed: pip install 'stack[tokamax]'"]
    tokamax_is_here(True)
    assert obstacles(asked) == []
    wide = dataclasses.replace(asked, head_dim=256)
    assert obstacles(wide) == ([] if request_ == HOPPER else ["head width 256 is over 192"])


@pytest.mark.usefixtures("tokamax_is_here")
def test_obstacles_are_all_told():
    worst = Request(
        platform="rocm", compute_capability=8.0, dtype="float32", head_dim=264, dropout=0.1, bias=True
    )
    assert obstacles(worst) == [
        "the platform is rocm, not an NVIDIA GPU",
        "its backward pass is for compute capability 9.0, 10.0 and 10.3, not 8.0",
        "dtype is float32, not bfloat16",
        "head width 264 is over 256",
        "it has no attention dropout",
        "the gradient of a bias would store all scores",
        "it is not installed: pip install 'stack[tokamax]'",
    ]


@pytest.mark.parametrize("kernel", ["mosaic_gpu", "tokamax"])
def test_an_assembler_that_breaks_masks_is_an_obstacle(monkeypatch, tokamax_is_here, kernel):
    tokamax_is_here(True)
    for version, told in ((12_060, []), (12_080, ["12.8"]), (12_090, ["12.9"]), (12_091, []), (13_000, [])):
        monkeypatch.setattr(assembler, "_cuda_version", lambda version=version: version)
        found = KERNELS[kernel].obstacles(HOPPER)
        assert found == [f"CUDA {name} assembles masks wrongly, mended in 12.9.1" for name in told]


def test_auto_takes_it_unmeasured_where_no_other_kernel_can_and_it_is_installed(tokamax_is_here):
    asked = dataclasses.replace(BLACKWELL, **SOFTCAP)
    assert choose(asked).kernel == "xla_chunked"
    assert "tokamax" not in choose(asked).reason
    tokamax_is_here(True)
    choice = choose(asked)
    assert (choice.kernel, choice.measured) == ("tokamax", False)
    assert "cudnn cannot: it has no soft cap; mosaic_gpu cannot: compute capability 10.0" in choice.reason
    assert choose(dataclasses.replace(HOPPER, **SOFTCAP)).kernel == "mosaic_gpu"
    assert choose(dataclasses.replace(BLACKWELL, window=True)).kernel == "cudnn"


def test_reasons_that_kernels_share_are_told_once(tokamax_is_here):
    tokamax_is_here(True)
    asked = dataclasses.replace(HOPPER, dtype="float32")
    assert "cudnn, mosaic_gpu and tokamax cannot: dtype is float32, not bfloat16" in choose(asked).reason


@pytest.mark.usefixtures("tokamax_is_here")
def test_asked_for_by_name_it_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"kernels\.attention=tokamax cannot run: it is not installed: pip"):
        choose(BLACKWELL, "tokamax")


def test_it_is_imported_by_those_who_run_it():
    code = "import sys, stack.kernels.attention as a; sys.exit('tokamax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dtype": jnp.float32}, "in bfloat16, not in float32"),
        ({"bias": True}, "takes no bias or dropout"),
        ({"queries": 1}, "whole rows, not 1 queries to 64 keys"),
        ({}, "tokamax cannot run: it is not installed"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("tokamax_is_here")
def test_what_it_cannot_do_is_refused(more, message):
    key = jnp.zeros((1, 64, 1, 64), more.get("dtype", jnp.bfloat16))
    query = key[:, : more.get("queries", 64)]
    mask = Mask(query_positions=jnp.zeros(query.shape[:2], int), key_positions=jnp.zeros((1, 64), int))
    bias = jnp.zeros((1, 1, 64, 64)) if "bias" in more else None
    with pytest.raises(ValueError, match=message):
        attend(query, key, key, mask, ONE_DEVICE, kernel="tokamax", bias=bias)


ASKED = partial(Case, dtype="bfloat16", length=40)


@pytest.mark.full
@needs_tokamax
@pytest.mark.parametrize(
    "case",
    [
        ASKED(kind="full", rows="padded"),
        ASKED(kind="full", rows="packed", window=7, local=False, scale=0.3),
        ASKED(kind="prefix", rows="padded", heads=4, kv_heads=2),
        ASKED(kind="prefix", rows="packed", softcap=1.5),
        ASKED(kind="full", rows="padded", keys=33),
        ASKED(rows="padded", window=7, local=True),
    ],
    ids=str,
)
def test_masks_and_scales_are_translated(case):
    """By its plain operations; where what nobody reads sees no key, they make means of all values."""
    read = case.read()
    with plain_tokamax():
        found = case.actual("tokamax", of=read)
    for name, want in case.expected(of=read).items():
        assert np.linalg.norm(found[name] - want) <= 8e-3 * np.linalg.norm(want), name


@pytest.mark.full
@needs_tokamax
@pytest.mark.parametrize(
    "case",
    [
        ASKED(length=200, rows="packed", heads=4, kv_heads=2),
        ASKED(length=256, rows="packed", kind="full", window=20, softcap=5.0),
        ASKED(length=160, rows="packed", kind="prefix", head_dim=80),
        ASKED(length=140, rows="padded", kind="full", keys=290),
        ASKED(length=256, rows="padded", window=40, head_dim=128),
    ],
    ids=str,
)
def test_its_backward_kernels_for_hopper_make_of_the_masks_what_is_meant(case):
    read = case.read()
    with backward_interpreted():
        found = case.actual("tokamax", of=read)
    for name, want in case.expected(of=read).items():
        assert np.linalg.norm(found[name] - want) <= 8e-3 * np.linalg.norm(want), name


COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from stack.config import MeshConfig
from stack.kernels.attention import attend, row_mask
from stack.parallel import mesh as meshes
from stack.parallel.mesh import without_cache
from stack.parallel.rules import Layout
from stack.planner.compiled.compile import devices, traced_for

config = MeshConfig(data=2, fsdp=2, tensor=2)
gpus = devices(sys.argv[1], 8)
layout = Layout.of(meshes.build(config, gpus), config)
with meshes.use(layout.mesh), traced_for(gpus[0]), without_cache():
    for width, kind, softcap in json.loads(sys.argv[2]):
        def array(dtype, *names, shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*names))
        query = array("bfloat16", "batch", None, "heads", shape=(8, 1024, 8, width))
        key = array("bfloat16", "batch", None, "kv_heads", shape=(8, 1024, 4, width))
        place = array("int32", "batch", shape=(8, 1024))
        def loss(query, key, value, place):
            mask = row_mask(place, place, packed=True, kind=kind, prefix=place)
            out = attend(query, key, value, mask, layout, kernel="tokamax", softcap=softcap)
            return out.astype(jnp.float32).sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, place).compile()
        hlo = compiled.as_text()
        told = [
            f"{width} {kind} {softcap}", hlo.count('custom_call_target="mosaic_gpu'),
            "all-gather" in hlo or "all-to-all" in hlo, "1024,1024]" in hlo,
        ]
        print("COMPILED", json.dumps(told), flush=True)
"""
SHAPES = [(64, "causal", None), (128, "prefix", 30.0)]
if os.environ.get("STACK_TESTS") == "all":
    SHAPES = [
        (width, kind, softcap)
        for width in (24, 64, 80, 96, 128, 152, 192, 256)
        for kind, softcap in (("causal", None), ("full", 30.0))
    ]
"""Widths of heads, kinds of mask, soft caps."""


@pytest.mark.full
@needs_tokamax
@pytest.mark.parametrize("target", ["h200", "b200"])
def test_its_kernels_compile_within_their_registers_and_memory(tmp_path, target):
    """Mosaic aborts the process where it fails: in one of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }
    command = [sys.executable, "-c", COMPILE, target, json.dumps(SHAPES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Autotuning cache" not in done.stderr
    compiled = [json.loads(line[9:]) for line in done.stdout.splitlines() if line.startswith("COMPILED")]
    assert len(compiled) == len(SHAPES)
    for name, calls, moves, stores_scores in compiled:
        assert calls >= 3, name
        assert not moves, name
        assert not stores_scores, name
    assembled = "".join(path.read_text() for path in tmp_path.rglob("*.ptxas"))
    assert len(re.findall(r"Used \d+ registers", assembled)) >= 3 * len(SHAPES)
    memory = [
        int(each)
        for path in tmp_path.rglob("*resources*")
        for each in re.findall(r"smem_scratch_bytes=(\d+)", path.read_text())
    ]
    assert max(memory) <= 227 * 1024


@pytest.mark.full
@needs_tokamax
@pytest.mark.usefixtures("quick_gpu_compiler")
def test_the_compiled_step_calls_it_both_ways_and_gathers_no_batch(caplog):
    rows, length, tensor = 96, 256, 2
    config = Config(
        model=DecoderConfig(
            vocab_size=1000,
            num_layers=4,
            embed_dim=256,
            num_heads=8,
            num_kv_heads=4,
            head_dim=64,
            max_length=length,
            sliding_window=32,
            attention_pattern=["local", "global"],
            attention_softcap=30.0,
        ),
        kernels=KernelsConfig(attention="tokamax"),
        data=DataConfig(sequence_length=length, packed=True),
        mesh=MeshConfig(data=2, fsdp=4, tensor=tensor, zero=3),
        train=TrainConfig(batch_size=rows, remat="full"),
    )
    with without_cache():
        hlo = compile_step(config, devices("h200", 16)).as_text()
    assert hlo
    assert not [record for record in caplog.records if "utotuning" in record.getMessage()]

    local = {f"bf16[{rows // 8},{length},{heads // tensor},64]" for heads in (8, 4)}
    calls = re.findall(r"= (\(.*?\)|\S+) custom-call\(.*custom_call_target=\"mosaic_gpu", hlo)
    assert len(calls) >= 3
    for results in calls:
        assert set(re.findall(r"bf16\[[\d,]+\]", results)) <= local, results
    mesh = {"data": 2, "fsdp": 4, "stage": 1, "context": 1, "expert": 1, "tensor": tensor}
    for collective in collectives(hlo, mesh):
        assert not any(rows in shape for _, shape in collective.arrays), collective
