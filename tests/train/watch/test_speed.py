"""Tokens a second and their share of the peak, from the times at which metrics arrive."""

import time
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from stack.config import Config
from stack.hardware.chip import load
from stack.models.flops import train_flops_per_token
from stack.train.watch.speed import Speedometer

CONFIG = Config.model_validate(
    {
        "model": {"num_layers": 2, "embed_dim": 64, "num_heads": 2},
        "data": {"sequence_length": 128},
        "train": {"batch_size": 8},
    }
)
DEVICES, LABELS = 4, 700.0
H100 = load("h100")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to go on."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


@pytest.fixture
def speedometer() -> Speedometer:
    """On four H100s that are not here, of which nothing but the name is asked."""
    device = SimpleNamespace(
        device_kind=H100.device_kinds[0], memory_stats=lambda: {"peak_bytes_in_use": 123}
    )
    mesh = SimpleNamespace(devices=np.array([device] * DEVICES), local_devices=[device])
    return Speedometer(CONFIG, cast("jax.sharding.Mesh", mesh))


def hear(speedometer: Speedometer, step: int) -> dict[str, Any]:
    return speedometer.on_metrics(step, {"tokens": LABELS, "loss": 1.0})


def test_utilisation_is_of_all_places_of_each_device(speedometer, clock):
    assert hear(speedometer, 1) == {"memory_bytes": 123.0}
    clock.seconds += 0.25
    values = hear(speedometer, 2)
    assert values["step_seconds"] == 0.25
    assert values["tokens_per_second"] == LABELS / 0.25, "labels, without padding"
    for name, convention in (("mfu_full", "full"), ("mfu_causal", "causal")):
        flops = train_flops_per_token(CONFIG.model, 128, convention)
        expected = 8 * 128 / 0.25 / DEVICES * flops / H100.peak_flops["bfloat16"]
        assert values[name] == pytest.approx(expected, rel=1e-12)
    assert values["model_flops_per_second"] == values["mfu_causal"] * H100.peak_flops["bfloat16"]


@pytest.mark.parametrize("pause", ["on_eval", "on_save", "on_start"])
def test_what_comes_between_steps_is_no_part_of_one(speedometer, clock, pause):
    arguments = {"on_eval": (1, {}), "on_save": (1,), "on_start": ({"step": 1, "steps": 9},)}
    hear(speedometer, 1)
    clock.seconds += 50
    getattr(speedometer, pause)(*arguments[pause])
    assert "step_seconds" not in hear(speedometer, 2)
    clock.seconds += 0.5
    assert hear(speedometer, 3)["step_seconds"] == 0.5


def test_the_peak_is_told_in_words(speedometer):
    peak = speedometer.on_start({"step": 0, "steps": 1})["peak"]
    assert peak == "989 TFLOP/s, NVIDIA H100 SXM, dense bfloat16"


def test_of_two_rows_the_objective_tells_the_lengths(clock):
    config = Config.model_validate(
        {
            "model": {"kind": "encoder_decoder", "num_layers": 1, "embed_dim": 64, "num_heads": 2},
            "objective": {"kind": "span_corruption", "target_length": 24},
            "data": {"sequence_length": 128},
            "train": {"batch_size": 8},
        }
    )
    device = SimpleNamespace(device_kind=H100.device_kinds[0], memory_stats=dict)
    mesh = SimpleNamespace(devices=np.array([device]), local_devices=[device])
    speedometer = Speedometer(config, cast("jax.sharding.Mesh", mesh))
    hear(speedometer, 1)
    clock.seconds += 0.5
    flops = 128 * train_flops_per_token(config.model, {"length": 128, "target_length": 24}, "causal")
    assert hear(speedometer, 2)["model_flops_per_second"] == pytest.approx(8 * flops / 0.5)


def test_what_is_not_trained_is_left_out_of_the_work(clock) -> None:
    """A third of the products of a frozen weight, and all of those that an adapter adds."""
    adapter = 'adapter={targets: [{modules: ["layers.*"], rank: 1}]}'
    device = SimpleNamespace(device_kind=H100.device_kinds[0], memory_stats=dict)
    mesh: Any = SimpleNamespace(devices=np.array([device]), local_devices=[device])
    made = Speedometer(CONFIG.replace("init_from=nowhere", adapter), mesh)
    hear(made, 1)
    clock.seconds += 1
    width, vocab = 64, CONFIG.model.padded_vocab_size
    layers, added = 2 * 12 * width**2, 2 * (4 * 2 + 2 * 5) * width
    flops = train_flops_per_token(CONFIG.model, 128, "causal") - 2 * (layers + vocab * width) + 6 * added
    assert hear(made, 2)["model_flops_per_second"] == pytest.approx(8 * 128 * flops, rel=1e-9)
