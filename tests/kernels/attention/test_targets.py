"""Every implementation compiles, forward and backward, for the GPUs there are, none of which is here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stack import load
from stack.config import Config, DataConfig, DecoderConfig, KernelsConfig, MeshConfig, TrainConfig
from stack.hardware import chip as chips
from stack.kernels.attention import KERNELS
from stack.parallel.mesh import without_cache
from stack.planner.compiled.collectives import collectives
from stack.planner.compiled.compile import compile_step, devices
from stack.step.kernels import choose_attention

CONFIGS = Path(__file__).parents[3] / "configs"
SCRIPT = """
import json, os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp
from stack.config import MeshConfig
from stack.kernels.attention import KERNELS, Mask, Request, attend
from stack.parallel import mesh as meshes
from stack.parallel.rules import Layout
from stack.planner.compiled.compile import devices, traced_for

target = sys.argv[1]
config = MeshConfig(data=2, fsdp=1, tensor=2)
gpus = devices(target, 4)
layout = Layout.of(meshes.build(config, gpus), config)
batch, length, heads, kv_heads, width = 6, 2048, 4, 2, 64


def shape(dtype, names, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=layout.sharding(*names))


query = shape("bfloat16", ("batch", None, "heads"), batch, length, heads, width)
key = shape("bfloat16", ("batch", None, "kv_heads"), batch, length, kv_heads, width)
place = shape("int32", ("batch",), batch, length)
with meshes.use(layout.mesh), traced_for(gpus[0]):
    for name, kernel in KERNELS.items():
        asked = Request(
            platform="gpu", compute_capability=float(gpus[0].compute_capability), dtype="bfloat16",
            head_dim=width, packed_length=length,
        )
        if kernel.obstacles(asked):
            print(json.dumps({"kernel": name, "obstacles": kernel.obstacles(asked)}))
            continue

        def total(query, key, value, place, segments):
            mask = Mask(
                query_positions=place, key_positions=place, query_segments=segments, key_segments=segments
            )
            return attend(query, key, value, mask, layout, kernel=name).astype(jnp.float32).sum()

        lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(query, key, key, place, place)
        compiled = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})
        text, memory = compiled.as_text(), compiled.memory_analysis()
        print(json.dumps({"kernel": name, "temporaries": memory.temp_size_in_bytes, "hlo": text}))
"""
SCORES = 3 * 2 * 2048**2 * 4
"""Bytes of one device's scores, float32."""


@pytest.mark.full
@pytest.mark.parametrize("target", ["a100-80gb", "h200", "b200"])
def test_an_implementation_compiles_for_a_target_and_moves_nothing(target):
    """In a process of its own: what a compiler cannot do, it may say by an abort."""
    command = [sys.executable, "-c", SCRIPT, target]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {line["kernel"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert found.keys() == KERNELS.keys()
    for name, line in found.items():
        if "obstacles" in line:
            continue
        mesh = {"data": 2, "fsdp": 1, "stage": 1, "context": 1, "expert": 1, "tensor": 2}
        moved = [one for one in collectives(line["hlo"], mesh) if one.group_size > 1]
        assert moved == [], name
        assert KERNELS[name].stores_scores == (line["temporaries"] > SCORES), (name, line["temporaries"])


@pytest.mark.full
@pytest.mark.usefixtures("quick_gpu_compiler")
def test_a_step_with_attention_in_blocks_compiles_where_loops_are_pipelined():
    """Stage 3 gathers in the loop over layers; blocks are loops in it, and the batch stays where it lies."""
    rows, length = 96, 1100
    config = Config(
        model=DecoderConfig(
            vocab_size=1000,
            num_layers=3,
            embed_dim=256,
            num_heads=8,
            num_kv_heads=4,
            max_length=length,
            attention_softcap=30.0,
            attention_dropout=0.1,
        ),
        kernels=KernelsConfig(attention="xla_chunked"),
        data=DataConfig(sequence_length=length),
        mesh=MeshConfig(data=2, fsdp=4, tensor=2, zero=3),
        train=TrainConfig(batch_size=rows, remat="none"),
    )
    with without_cache():
        hlo = compile_step(config, devices("h200", 16)).as_text()
    assert hlo
    found = collectives(hlo, {"data": 2, "fsdp": 4, "stage": 1, "context": 1, "expert": 1, "tensor": 2})
    assert any(collective.kind == "reduce-scatter" for collective in found)
    for collective in found:
        assert not any(rows in shape for _, shape in collective.arrays), collective
    assert not re.findall(rf"f32\[[\d,]*{length},{length}\]", hlo)


def recipes():
    for path in sorted(CONFIGS.glob("*.yaml")):
        target = load(path).target
        if target is not None and chips.load(target.hardware).platform != "cpu":
            yield path.stem


@pytest.mark.parametrize("name", list(recipes()))
def test_the_default_attention_of_a_recipe_stores_no_scores_on_its_target(name):
    config = load(CONFIGS / f"{name}.yaml")
    assert config.target is not None
    chip = chips.load(config.target.hardware)
    choice = choose_attention(config, platform=chip.platform, compute_capability=chip.compute_capability)
    assert not choice.stores_scores, str(choice)
