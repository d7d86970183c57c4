"""The compiler's options of a program: by layout, the same for trainer and planner, a user's over all."""

import os
import re
import subprocess
import sys

import jax
import pytest
from tiny_runs import config

from stack import Trainer
from stack.config import (
    Config,
    ConfigError,
    DataConfig,
    DecoderConfig,
    KernelsConfig,
    MeshConfig,
    TrainConfig,
)
from stack.hardware import defaults
from stack.parallel.mesh import without_cache
from stack.planner.compiled import compile as compiling
from stack.planner.compiled.collectives import collectives
from stack.step import options
from stack.step import program as programs

KINDS = ("all_gather", "reduce_scatter", "all_reduce")
THRESHOLDS = [f"xla_gpu_{kind}_combine_threshold_bytes" for kind in KINDS]

WIDE = Config(
    model=DecoderConfig(
        vocab_size=256,
        num_layers=3,
        embed_dim=1024,
        num_heads=8,
        max_length=128,
        mlp_dim=16_384,
        mlp_bias=False,
        qkv_bias=False,
        out_bias=False,
    ),
    kernels=KernelsConfig(attention="xla"),
    data=DataConfig(sequence_length=128),
    train=TrainConfig(batch_size=64, remat="full"),
)
LAYER_BYTES = 2 * (4 * 1024 * 1024 + 2 * 1024 * 16_384)
"""Of a layer above in bfloat16: queries, keys, values and output; the MLP's two."""


def program(mesh: MeshConfig, number: int, *overrides: str) -> programs.Program:
    one = WIDE.model_copy(update={"mesh": mesh}).replace(*overrides)
    return programs.build(one, compiling.devices("h200", number))


def settled(*program_of) -> dict[str, tuple]:
    return {one.name: (one.value, one.by) for one in options.compiler_settings(program(*program_of))}


@pytest.mark.parametrize(
    ("mesh", "number", "expected"),
    [
        (MeshConfig(fsdp=8), 8, LAYER_BYTES),
        (MeshConfig(data=8, zero=0), 8, LAYER_BYTES),
        (MeshConfig(fsdp=1), 1, None),
        (MeshConfig(fsdp=4, tensor=2), 8, None),
        (MeshConfig(data=2, fsdp=4, tensor=2), 16, None),
        (MeshConfig(fsdp=16), 16, LAYER_BYTES),
        (MeshConfig(fsdp=8, tensor=2), 16, LAYER_BYTES / 2),
        (MeshConfig(data=16, fsdp=1, tensor=2, zero=0), 32, None),
    ],
)
def test_collectives_are_combined_by_the_bytes_of_a_layer(mesh, number, expected):
    own = settled(mesh, number)
    assert own["optimization_level"] == ("O1", "stack")
    assert {own[name] for name in THRESHOLDS if name in own} == ({(expected, "stack")} if expected else set())


def test_of_a_layer_that_tensor_splits_a_device_gathers_its_part():
    assert options.layer_bytes(program(MeshConfig(fsdp=8, tensor=2), 16)) == LAYER_BYTES / 2
    assert options.layer_bytes(program(MeshConfig(fsdp=8), 8, "model.dtype=float32")) == 2 * LAYER_BYTES


def test_nothing_is_set_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    made = programs.build(config(tmp_path, "run"), jax.devices()[:1])
    assert options.compiler_settings(made) == ()


def test_what_the_user_sets_wins_and_is_told(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{THRESHOLDS[0]}=7 --xla_gpu_autotune_level=0")
    asked = f"runtime.compiler_options.{THRESHOLDS[1]}=8"
    made = program(MeshConfig(fsdp=8), 8, asked, "runtime.compiler_options.optimization_level=O2")
    settings = options.compiler_settings(made)
    assert {one.name: (one.value, one.by) for one in settings} == {
        "optimization_level": ("O2", "runtime.compiler_options"),
        THRESHOLDS[0]: ("7", "XLA_FLAGS"),
        THRESHOLDS[1]: (8, "runtime.compiler_options"),
        THRESHOLDS[2]: (LAYER_BYTES, "stack"),
        "xla_gpu_autotune_level": ("0", "XLA_FLAGS"),
    }
    passed = options.compiler_options(settings)
    assert passed == {"optimization_level": "O2", THRESHOLDS[1]: 8, THRESHOLDS[2]: LAYER_BYTES}


def test_variables_and_tiles_are_no_options_of_the_compiler(monkeypatch):
    """As a run on GPUs has them in one list; XLA would refuse their names."""
    monkeypatch.setenv("NCCL_LAUNCH_MODE", "GROUP")
    monkeypatch.setenv("STACK_DEFAULTS", "NCCL_LAUNCH_MODE")
    (variable,) = (one for one in defaults.variable_settings() if one.name == "NCCL_LAUNCH_MODE")
    tiles = defaults.Setting(name="attention.tiles", kind="tiles", value="64 tokens", by="stack")
    option = defaults.Setting(name="optimization_level", kind="option", value="O1", by="stack")
    assert options.compiler_options([variable, tiles, option]) == {"optimization_level": "O1"}
    assert defaults.compared([variable, tiles, option]) == {
        "attention.tiles": "64 tokens",
        "optimization_level": "O1",
    }


@pytest.fixture
def level():
    """JAX told to compile at another level."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O2")
    yield
    jax.config.update("jax_optimization_level", before)


@pytest.mark.usefixtures("level")
def test_a_level_that_jax_was_told_is_left(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    settings = options.compiler_settings(program(MeshConfig(fsdp=1), 1))
    assert [str(one) for one in settings] == ["optimization_level=O2 (JAX_OPTIMIZATION_LEVEL)"]
    assert options.compiler_options(settings) == {}


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (
            "xla_gpu_enable_triton_gem=false",
            r"xla_gpu_enable_triton_gem: .* has no such option; did you mean xla_gpu_enable_triton_gemm\?",
        ),
        ("optimisation_level=O1", r"optimisation_level: .*; did you mean optimization_level\?"),
        ("xla_gpu_enable_async_collectives=true", r".* has no such option; .*"),
        (
            "xla_gpu_autotune_level=high",
            r"xla_gpu_autotune_level=high: XLA cannot read that value: .*int32.*",
        ),
    ],
)
def test_an_option_that_xla_does_not_take_is_one_line_before_anything_is_done(tmp_path, option, told):
    with pytest.raises(ConfigError) as error:
        Trainer(config(tmp_path, "run", f"runtime.compiler_options.{option}"), devices=jax.devices()[:1])
    assert re.fullmatch(rf"runtime\.compiler_options\.{told}", str(error.value))
    assert not (tmp_path / "runs").exists()


def test_an_option_of_stacks_own_that_xla_has_no_more_is_left_out(monkeypatch):
    gone = defaults.Default(name="xla_gpu_gone", kind="option", value=1, reason="r", source="s")
    monkeypatch.setattr(defaults, "DEFAULTS", (*defaults.DEFAULTS, gone))
    own = settled(MeshConfig(fsdp=8), 8)
    assert "xla_gpu_gone" not in own
    assert own[THRESHOLDS[0]] == (LAYER_BYTES, "stack")


def test_trainer_and_planner_compile_with_the_same(monkeypatch):
    """What each hands to `jax.jit` for the step; the planner's compilation adds only what it lacks."""
    absent = compiling.devices("h200", 8)
    one = WIDE.model_copy(update={"mesh": MeshConfig(fsdp=8)})
    one = one.replace("runtime.compiler_options.xla_gpu_enable_triton_gemm=false")
    handed = []

    class Stop(Exception):
        pass

    def jit(_, **options):
        if "donate_argnums" in options:
            handed.append(options["compiler_options"])
            raise Stop
        return real(_, **options)

    real = jax.jit
    trainer = Trainer(one, devices=absent)
    made = programs.build(one, absent)
    monkeypatch.setattr(jax, "jit", jit)
    for step in (lambda: trainer.train_step, lambda: compiling.lower_step(made)):
        with pytest.raises(Stop):
            step()
    assert handed[0] == handed[1]
    assert handed[0][THRESHOLDS[0]] == LAYER_BYTES
    assert handed[0]["xla_gpu_enable_triton_gemm"] is False
    assert trainer._recompute._options == trainer._compiler_options == handed[0]


_COMPILE = """
import jax, jax.numpy as jnp
from stack.planner.compiled import compile as compiling
from stack.hardware.defaults import options
[device] = compiling.devices("{target}", 1)
sharding = jax.sharding.SingleDeviceSharding(device)
like = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
own = options(layer_bytes=2**29, replicas=8, tensor=1, crosses_network=False)
assert len(own) == 4, own
print(jax.jit(lambda x: x + 1).lower(like).compile(compiler_options=own).as_text()[:10])
"""


@pytest.mark.parametrize("target", ["h200", pytest.param("b200", marks=pytest.mark.full)])
def test_the_gpu_compiler_takes_all_of_them(target):
    """As a real step has them, and in XLA_FLAGS, of which an unknown one would end the process."""
    own = defaults.options(layer_bytes=2**29, replicas=8, tensor=1, crosses_network=False)
    flags = " ".join(f"--{name}={value}" for name, value in own.items() if name.startswith("xla"))
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE.format(target=target)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "HloModule \n"), done.stderr


@pytest.mark.full
@pytest.mark.usefixtures("quick_gpu_compiler")
def test_a_layer_is_gathered_and_scattered_in_fewer_collectives(monkeypatch):
    counts = []
    for layer in (True, False):
        if not layer:
            monkeypatch.setattr(defaults, "XLA_COMBINES", LAYER_BYTES)  # Then XLA's own are left.
        with without_cache():
            made = program(MeshConfig(fsdp=8), 8)
            text = compiling.compile_lowered(compiling.lower_step(made), compiling.devices("h200", 8)[0])
        found = collectives(text.as_text() or "", dict(made.mesh.shape))
        counts.append(sum(one.times for one in found if one.kind in ("all-gather", "reduce-scatter")))
    assert counts[0] < 0.75 * counts[1]
