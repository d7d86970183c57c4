"""What the compiler says of a step on GPUs that are not here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stack.config import (
    Config,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    StackError,
    TargetConfig,
    TrainConfig,
)
from stack.hardware import chip as chips
from stack.parallel.mesh import without_cache
from stack.planner.compiled import compile as compiling
from stack.planner.compiled.findings import holds_global_batch, involuntary
from stack.planner.compiled.report import (
    Compiled,
    as_dict,
    compile_plan,
    compile_target,
    lines,
    read_schedule,
)
from stack.step import program as programs

BATCH, LENGTH = 48, 160
CONFIG = Config(
    model=DecoderConfig(vocab_size=1000, num_layers=2, embed_dim=256, num_heads=8, max_length=LENGTH),
    data=DataConfig(sequence_length=LENGTH),
    mesh=MeshConfig(fsdp=4, zero=3),
    train=TrainConfig(batch_size=BATCH, remat="full"),
)


@pytest.fixture(scope="module")
def report() -> Compiled:
    # For a chip that the compiler does not know.
    config = CONFIG.model_copy(update={"target": TargetConfig(compile_target="h200")})
    return compile_plan(config, hardware="v100-32gb", devices=4)


@pytest.mark.full
def test_the_report_says_what_was_compiled_for_and_in_whose_place(report):
    assert (report.hardware, report.target, report.devices) == ("v100-32gb", "h200", 4)
    assert report.mesh["fsdp"] == 4
    assert report.versions["jax"] == jax.__version__
    assert "4 v100-32gb, as h200 in its place" in lines(report)[0]


@pytest.mark.full
def test_memory_is_of_one_device_and_adds_up(report):
    memory = report.memory
    # Float32 parameters and two moments of a quarter of the model, and a quarter of the batch.
    quarter = 12 * (2 * 12 * 256**2 + 1024 * 256 + LENGTH * 256) / 4
    batch = BATCH / 4 * LENGTH * 4 * 4
    assert memory.arguments == pytest.approx(quarter + batch, rel=0.03)
    assert memory.aliased == pytest.approx(quarter, rel=0.03)
    assert memory.total == memory.arguments + memory.outputs - memory.aliased + memory.temporaries
    assert memory.device == chips.load("v100-32gb").memory_bytes


@pytest.mark.full
def test_collectives_are_told_with_the_line_that_wants_them(report):
    gathers = [traffic for traffic in report.traffic if traffic.kind == "all-gather"]
    assert [(traffic.axes, traffic.source.split(":")[0]) for traffic in gathers] == [
        (("fsdp",), "stack/parallel/zero.py")
    ]
    layers = 2 * 12 * 256**2 * 2
    ends = (1024 + LENGTH) * 256 * 2
    assert gathers[0].bytes == 2 * layers + ends


@pytest.mark.full
def test_the_compilers_schedule_is_longer_than_what_it_cannot_hide(report):
    assert 0 < sum(report.schedule.exposed.values()) < report.schedule.seconds < 1
    assert set(report.schedule.exposed) <= {"all-gather", "reduce-scatter", "all-reduce"}


@pytest.mark.full
def test_kernels_are_counted_once_for_each_run(report):
    forward = report.kernels["__cudnn$fmhaScaleBiasSoftmax"]
    backward = report.kernels["__cudnn$fmhaScaleBiasSoftmaxBackward"]
    # Each of the 2 layers forward, again, and backward.
    assert (forward, backward) == (4, 2)


@pytest.mark.full
def test_the_report_is_plain_json_and_says_no_word_too_many(report):
    plain = json.loads(json.dumps(as_dict(report)))
    assert plain["memory"]["total"] == report.memory.total
    assert plain["collectives"][0]["axes"] == ["fsdp"]
    assert lines(report)[-1] == "  findings: none"


def test_a_chip_the_compiler_does_not_know_needs_another_in_its_place():
    with pytest.raises(StackError, match=r"mi300x: the compiler knows no such chip.*target.compile_target"):
        compile_target(chips.load("mi300x"), CONFIG)


@pytest.mark.parametrize("name", compiling.targets())
def test_every_target_is_the_chip_of_its_name(name):
    device = compiling.devices(name, 8)[0]
    chip = chips.load(name)
    assert chip.compile_target == name
    assert device.device_kind.upper().replace("-", " ").split()[1].startswith(name.split("-")[0].upper())


def test_a_partly_filled_host_is_refused_with_the_nearest_counts():
    with pytest.raises(StackError, match="compile for 1000 or 1008"):
        compiling.devices("h200", 1004)
    assert len(compiling.devices("h200", 3)) == 3


def test_without_the_plugin_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(compiling, "_has_module", lambda _: False)
    with pytest.raises(StackError, match=r"pip install 'stack\[plan\]'"):
        compile_plan(CONFIG, hardware="h200", devices=4)


@pytest.mark.full
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU to find")
def test_where_jax_looks_for_a_gpu_first_the_remedy_is_named():
    program = "from stack.planner.compiled.compile import devices; devices('h200', 8)"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "StackError: JAX looks for a GPU" in ran.stderr
    assert "set JAX_PLATFORMS=cpu" in ran.stderr


def test_a_compilation_known_to_abort_is_refused_or_led_around():
    hopper = 'stablehlo.custom_call @mosaic_gpu_v2(%0) {backend_config = "..."}'
    with pytest.raises(StackError, match=r"would abort.*Mosaic kernel written for Hopper"):
        compiling.avoid_aborts(hopper, "0.11.2", 8.0)
    assert compiling.avoid_aborts(hopper, "0.11.2", 9.0) == {}
    around = compiling.avoid_aborts("stablehlo.add", "0.12.0.1", 9.0)
    assert around == {"xla_gpu_experimental_use_collective_kernels": ""}


DUMP = """\
hlo_module {
  computations {
    name: "body"
    instructions {
      name: "x"
    }
    id: 7
  }
  computations {
    name: "main"
    instructions {
      name: "y"
    }
    id: 9
  }
}
computation_schedules {
  computation_id: 7
  scheduler_statistics {
    all_gather_wasted_cycles: 2.5
    total_wasted_cycles: 2.5
    total_cycles: 1e2
  }
  cycles_per_microsecond: 1
}
computation_schedules {
  computation_id: 9
  scheduler_statistics {
    reduce_scatter_wasted_cycles: 4
    total_cycles: 50
  }
  cycles_per_microsecond: 1
}
"""


def test_the_schedule_of_a_loop_counts_as_often_as_it_runs():
    schedule = read_schedule(DUMP, {"body": 12, "main": 1})
    assert schedule is not None
    assert schedule.seconds == pytest.approx((12 * 100 + 50) * 1e-6)
    assert schedule.exposed == pytest.approx({"all-gather": 30e-6, "reduce-scatter": 4e-6})


def wrong_way(x: jax.Array, w: jax.Array, split: Callable[..., NamedSharding]) -> jax.Array:
    y = jax.lax.with_sharding_constraint(jnp.tanh(x @ w).reshape(64, 32, 16), split("b", None, "a"))
    y = jnp.sin(y)
    return jax.lax.with_sharding_constraint(y, split(None, ("b", "a"), None))


def lowered_and_complaints() -> tuple[jax.stages.Lowered, object, list[str]]:
    device, *_ = devices = compiling.devices("h200", 8)
    mesh = Mesh(np.array(devices).reshape(2, 4), ("a", "b"))

    def split(*axes) -> NamedSharding:
        return NamedSharding(mesh, P(*axes))

    x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=split("a", None))
    w = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=split(None, "b"))
    with compiling.capture_stderr() as complaints, without_cache(), jax.set_mesh(mesh):
        lowered = jax.jit(partial(wrong_way, split=split)).lower(x, w)
        compiling.compile_lowered(lowered, device)
    return lowered, device, complaints


def test_an_involuntary_rematerialization_is_found_with_its_line_every_time(capfd):
    line = wrong_way.__code__.co_firstlineno + 1
    for _ in range(2):  # The second time there is no cache to hide it.
        lowered, device, complaints = lowered_and_complaints()
        findings = involuntary(complaints, lowered, device)
        assert [finding.source for finding in findings] == [f"{__file__}:{line}"]
        assert "from [{'b'}, {}, {'a'}] to [{}, {'b', 'a'}, {}]" in findings[0].text
    assert capfd.readouterr().err == ""


def test_the_cache_is_left_as_it_was():
    before = jax.config.jax_enable_compilation_cache
    for enabled in (not before, before):
        jax.config.update("jax_enable_compilation_cache", enabled)
        with without_cache():
            assert not jax.config.jax_enable_compilation_cache
        assert jax.config.jax_enable_compilation_cache == enabled


def complain() -> None:
    os.write(2, b"from C\n")
    raise OSError("from Python")


def test_what_c_writes_is_captured_and_shown_only_with_an_exception(capfd):
    with compiling.capture_stderr() as text:
        os.write(2, b"from C\n")
    assert text == ["from C"]
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError, match="from Python"), compiling.capture_stderr():
        complain()
    assert capfd.readouterr().err == "from C\n"


@pytest.mark.parametrize(
    ("shape", "holds"),
    [
        ((BATCH, LENGTH, 256), True),
        ((BATCH * LENGTH, 256), True),
        ((2, BATCH, 8, LENGTH), True),
        ((BATCH // 4, LENGTH, 256), False),
        ((2, 256, 1024), False),
        ((LENGTH, BATCH), False),
    ],
)
def test_an_array_holds_the_global_batch_if_all_its_rows_are_in_it(shape, holds):
    program = programs.build(CONFIG, compiling.devices("h200", 4))
    assert holds_global_batch(program, shape) == holds


def test_a_parameter_with_the_sizes_of_the_batch_is_none():
    sizes = {"num_heads": BATCH, "head_dim": 10, "embed_dim": LENGTH}
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update=sizes)})
    program = programs.build(config, compiling.devices("h200", 4))
    assert not holds_global_batch(program, (2, BATCH, 10, LENGTH))
    assert holds_global_batch(program, (2, BATCH, 20, LENGTH))
