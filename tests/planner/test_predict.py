"""A run is planned where that can be done, and told why where it cannot; it is never kept from running."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from stack.config import Config
from stack.hardware import chip as chips
from stack.models.decoder import Decoder
from stack.planner import predict as module
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import from_config
from stack.planner.predict import NoPlan, Planned, line, predict

SMALL = Config.model_validate(
    {
        "model": {"num_layers": 2, "embed_dim": 64, "num_heads": 2, "max_length": 64, "vocab_size": 257},
        "data": {"sequence_length": 64},
        "train": {"batch_size": 16},
    }
)


def device(kind: str) -> Any:
    return SimpleNamespace(device_kind=kind, platform="gpu")


H200 = [device("NVIDIA H200")] * 8


def test_a_run_on_a_chip_of_the_table_is_planned():
    planned = predict(SMALL, H200)
    assert isinstance(planned, Planned)
    work = from_config(SMALL, 8, chips.load("h200"))
    assert planned.work == work
    assert planned.figures["planned_step_seconds"] == step_time(work, chips.load("h200")).total
    assert planned.figures["planned_memory_bytes"] == planned.memory.program
    assert line(SMALL, 8, planned, chosen=False).endswith(" of 141 GB on each NVIDIA H200 SXM")


def test_a_chip_that_nobody_knows_is_no_plan():
    plan = predict(SMALL, [device("NVIDIA H300")] * 8)
    assert plan == NoPlan(reason="NVIDIA H300 is not in the table of chips")
    assert line(SMALL, 8, plan, chosen=False) == "no plan: NVIDIA H300 is not in the table of chips"


def test_a_model_without_a_cost_is_no_plan(monkeypatch):
    def cost(_: Any) -> Any:
        raise NotImplementedError("this model states no cost")

    monkeypatch.setattr(Decoder, "cost", staticmethod(cost))
    assert predict(SMALL, H200) == NoPlan(reason="NotImplementedError: this model states no cost")


def test_a_layout_that_does_not_divide_is_no_plan():
    plan = predict(SMALL.replace("mesh.fsdp=3"), H200)
    assert isinstance(plan, NoPlan)
    assert plan.reason.startswith("ConfigError: mesh: fsdp 3 = 3 devices, but there are 8")


@pytest.mark.parametrize("part", ["from_config", "step_time", "memory", "auto"])
def test_no_fault_of_the_planner_is_raised(monkeypatch, part):
    monkeypatch.setattr(module, part, None)
    plan = predict(SMALL, H200)
    assert isinstance(plan, NoPlan)
    assert "NoneType" in plan.reason
    assert "\n" not in plan.reason
    if part == "from_config":
        assert line(SMALL, 8, plan, chosen=True).startswith("a layout, chosen by the planner; no plan: ")


def test_the_devices_of_the_tests_are_no_plan():
    plan = predict(SMALL, jax.devices())
    assert isinstance(plan, NoPlan)
    assert plan.reason.startswith("no two CPUs are alike")
