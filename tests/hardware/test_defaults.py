"""What Stack sets of XLA, CUDA and NCCL, by machine and program; what a user has set stays, and is told."""

import ctypes
import os
from pathlib import Path

import pytest

from stack import environment
from stack.hardware import defaults, driver
from stack.hardware.defaults import DEFAULTS, Gpus, Setting, options, settle

PAGE = Path(__file__).parents[2] / "docs" / "defaults.md"

FRACTION, QUEUES, LAUNCH = (
    ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9"),
    ("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
    ("NCCL_LAUNCH_MODE", "GROUP"),
)


@pytest.fixture
def clean(monkeypatch):
    """An environment in which nobody has set any of them, before JAX looks for devices."""
    for default in DEFAULTS:
        for name in (default.name, *default.same):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("STACK_DEFAULTS", raising=False)
    monkeypatch.setattr(environment, "has_devices", lambda: False)
    before = dict(os.environ)
    own = {"STACK_DEFAULTS", "PYTEST_CURRENT_TEST"}
    yield lambda: {name: value for name, value in os.environ.items() - before.items() if name not in own}
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (None, {}),
        (Gpus(number=1, compute_capability=7.0), dict([FRACTION])),
        (Gpus(number=8, compute_capability=8.0), dict([FRACTION, LAUNCH])),
        (Gpus(number=1, compute_capability=9.0), dict([FRACTION, QUEUES])),
        (Gpus(number=8, compute_capability=9.0), dict([FRACTION, QUEUES, LAUNCH])),
        (Gpus(number=8, compute_capability=10.0), dict([FRACTION, LAUNCH])),
        (Gpus(number=1, compute_capability=12.0), dict([FRACTION])),
    ],
)
def test_variables_by_machine(clean, monkeypatch, gpus, expected):
    monkeypatch.setattr(defaults, "find", lambda: gpus)
    defaults.set_variables()
    assert clean() == expected
    told = {one.name: one for one in defaults.variable_settings()}
    assert {name: one.value for name, one in told.items()} == expected
    assert all(one.by == "stack" and one.reason and one.source for one in told.values())
    assert environment.given().keys().isdisjoint(expected), "the next process would take them for a user's"


@pytest.mark.parametrize(
    ("name", "value", "left"),
    [
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        ("XLA_CLIENT_MEM_FRACTION", "0.5", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "false", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8", "CUDA_DEVICE_MAX_CONNECTIONS"),
        ("NCCL_LAUNCH_MODE", "PARALLEL", "NCCL_LAUNCH_MODE"),
        ("NCCL_NVLS_ENABLE", "0", None),
    ],
)
@pytest.mark.usefixtures("clean")
def test_what_a_user_has_set_is_left_and_told(monkeypatch, name, value, left):
    monkeypatch.setenv(name, value)
    defaults.set_variables(Gpus(number=8, compute_capability=9.0))
    assert os.environ[name] == value
    assert name == left or left is None or left not in os.environ
    assert Setting(name=name, kind="variable", value=value, by="environment") in defaults.variable_settings()
    assert f"{name}={value} (environment)" in map(str, defaults.variable_settings())


def test_nothing_is_set_once_devices_have_been_looked_for(clean, monkeypatch):
    monkeypatch.setattr(environment, "has_devices", lambda: True)
    defaults.set_variables(Gpus(number=8, compute_capability=9.0))
    assert clean() == {}


@pytest.mark.usefixtures("clean")
def test_jax_hands_the_share_of_memory_to_the_gpu():
    from jaxlib import xla_client

    defaults.set_variables(Gpus(number=1, compute_capability=9.0))
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == pytest.approx(0.9)


BIG = 436_207_616


@pytest.mark.parametrize(
    ("program", "combined"),
    [
        ({"replicas": 8}, True),
        ({"replicas": 1}, False),
        ({"replicas": 8, "layer_bytes": defaults.XLA_COMBINES}, False),
        ({"replicas": 4, "tensor": 2}, False),
        ({"replicas": 32, "tensor": 2, "crosses_network": True}, True),
    ],
)
def test_collectives_are_combined_by_layer_where_that_helps_and_never_less_than_by_xla(program, combined):
    facts = {"layer_bytes": BIG, "tensor": 1, "crosses_network": False} | program
    own = options(**facts)
    assert own.pop("optimization_level") == "O1"
    kinds = ("all_gather", "reduce_scatter", "all_reduce")
    expected = {f"xla_gpu_{kind}_combine_threshold_bytes": BIG for kind in kinds}
    assert own == (expected if combined else {})


def test_loops_are_left_as_they_are_in_a_pipeline_alone():
    facts = {"layer_bytes": BIG, "replicas": 1, "tensor": 2, "crosses_network": False}
    name = "xla_gpu_enable_while_loop_unrolling"
    assert options(**facts, stages=4)[name] == "WHILE_LOOP_UNROLLING_NO_UNROLL"
    assert name not in options(**facts)


def test_of_an_option_the_config_decides_then_the_user_elsewhere_then_stack():
    own = options(layer_bytes=BIG, replicas=8, tensor=1, crosses_network=False)
    gather, scatter = (f"xla_gpu_{kind}_combine_threshold_bytes" for kind in ("all_gather", "reduce_scatter"))
    given = {gather: ("1", "XLA_FLAGS"), scatter: ("2", "XLA_FLAGS"), "xla_dump_to": ("x", "XLA_FLAGS")}
    settled = settle(own, {scatter: 3, "xla_gpu_autotune_level": 0}, given)
    assert {one.name: (one.value, one.by) for one in settled} == {
        "optimization_level": ("O1", "stack"),
        "xla_gpu_all_reduce_combine_threshold_bytes": (BIG, "stack"),
        gather: ("1", "XLA_FLAGS"),
        scatter: (3, "runtime.compiler_options"),
        "xla_dump_to": ("x", "XLA_FLAGS"),
        "xla_gpu_autotune_level": (0, "runtime.compiler_options"),
    }
    assert all(bool(one.reason and one.source) == (one.by == "stack") for one in settled)
    assert "xla_dump_to" not in defaults.compared(settled)


def test_the_page_has_all_of_them_with_reason_and_source():
    text = PAGE.read_text("utf-8")
    for default in DEFAULTS:
        [row] = [line for line in text.splitlines() if line.startswith(f"| `{default.name}`")]
        assert default.reason in row, default.name
        assert default.source in row, default.name


class Nvml:
    """NVIDIA's library, of a machine with these compute capabilities."""

    def __init__(self, *capabilities: tuple[int, int], broken: str = "") -> None:
        self.capabilities = capabilities
        self.broken = broken

    def __getattr__(self, name):
        return lambda *arguments: 1 if name == self.broken else getattr(self, f"_{name}")(*arguments)

    def _nvmlInit_v2(self):
        return 0

    def _nvmlShutdown(self):
        return 0

    def _nvmlDeviceGetCount_v2(self, number):
        number._obj.value = len(self.capabilities)
        return 0

    def _nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = index.value + 1  # A null pointer is none.
        return 0

    def _nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
        major._obj.value, minor._obj.value = self.capabilities[device.value - 1]
        return 0


@pytest.mark.parametrize(
    ("visible", "library", "expected"),
    [
        (None, Nvml((9, 0), (9, 0)), Gpus(number=2, compute_capability=9.0)),
        ("1", Nvml((9, 0), (10, 3)), Gpus(number=1, compute_capability=10.3)),
        ("1,0", Nvml((9, 0), (8, 6)), Gpus(number=2, compute_capability=8.6)),
        ("0,-1,1", Nvml((9, 0), (8, 6)), Gpus(number=1, compute_capability=9.0)),
        ("GPU-3f", Nvml((9, 0), (9, 0)), Gpus(number=2, compute_capability=9.0)),
        ("", Nvml((9, 0)), None),
        (None, Nvml(), None),
        (None, Nvml((9, 0), broken="nvmlInit_v2"), None),
        (None, Nvml((9, 0), broken="nvmlDeviceGetCudaComputeCapability"), None),
    ],
)
def test_the_driver_tells_the_gpus_that_are_visible(monkeypatch, visible, library, expected):
    monkeypatch.setattr(environment, "has_driver", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert driver.find() == expected


def test_without_a_driver_no_library_is_looked_for(monkeypatch):
    monkeypatch.setattr(environment, "has_driver", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert driver.find() is None
