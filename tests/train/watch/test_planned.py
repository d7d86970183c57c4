"""A run is compared with its plan; where they differ there is one warning, with the likely reason."""

import dataclasses
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

from stack.config import Config
from stack.data.loader import timed
from stack.doctor.faults.runs import TINY
from stack.hardware import chip as chips
from stack.kernels.attention import Choice
from stack.planner.formula.memory import memory
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import from_config
from stack.planner.predict import NoPlan, Planned, line, predict
from stack.planner.search import auto
from stack.train.trainer import Trainer
from stack.train.watch.announce import introduction
from stack.train.watch.listeners import Listener
from stack.train.watch.planned import FIRST_STEPS, STEPS, Comparison
from stack.train.watch.progress import Progress

FIELDS: dict[str, Any] = TINY | {
    "train": {"steps": FIRST_STEPS + STEPS + 3, "batch_size": 8, "log_every": 1},
    "optimizer": {"schedule": {"kind": "constant"}},
}
H100 = chips.load("h100")
CUDNN = Choice(kernel="cudnn", reason="honours the whole config")
XLA = Choice(kernel="xla", reason="cudnn cannot: dtype is float32, not bfloat16")
SMALL = Config.model_validate(
    {"model": {"num_layers": 2, "embed_dim": 1024, "num_heads": 16}, "train": {"batch_size": 64}}
)


def planned(config: Config = SMALL, devices: int = 8, **changes: Any) -> Planned:
    work = dataclasses.replace(from_config(config, devices, H100), **changes)
    return Planned(work=work, chip=H100, time=step_time(work, H100), memory=memory(work))


def warnings(
    plan: Planned | None,
    *metrics: dict[str, float],
    attention: Choice = CUDNN,
    config: Config = SMALL,
) -> list[str]:
    """What is said of a run of these metrics, the last again and again."""
    comparison = Comparison(plan, attention, config)
    told = [*metrics, *[metrics[-1]] * (3 * STEPS)]
    return [text for one in told if (text := comparison.read(one))]


@pytest.mark.parametrize("ratio", [0.86, 1.0, 1.14])
def test_a_run_like_its_plan_is_not_spoken_of(ratio):
    plan = planned()
    measured = {"step_seconds": ratio * plan.time.total, "memory_bytes": ratio * plan.memory.program}
    assert warnings(plan, measured) == []


def test_a_slow_run_is_told_once_with_both_figures():
    plan = planned()
    (text,) = warnings(plan, {"step_seconds": 1.3 * plan.time.total})
    assert text.startswith(
        f"a step takes {1.3 * plan.time.total:.3g} s, 1.30 of the {plan.time.total:.3g} s planned: "
    )
    assert "\n" not in text


def test_the_first_steps_and_a_few_slow_ones_do_not_count():
    plan = planned()
    good, slow = {"step_seconds": plan.time.total}, {"step_seconds": 10 * plan.time.total}
    assert warnings(plan, *[slow] * FIRST_STEPS, *[slow] * (STEPS // 2 - 2), good) == []
    assert warnings(plan, *[good, good, good, slow] * STEPS, good) == []


def test_without_a_plan_nothing_is_compared():
    assert warnings(None, {"step_seconds": 1e9, "memory_bytes": 1e15}) == []


def reason(plan: Planned, metrics: dict[str, float], **options: Any) -> str:
    (text,) = warnings(plan, metrics, **options)
    return text.partition("planned: ")[2]


def test_the_reason_is_the_input_where_the_batch_is_waited_for():
    plan = planned()
    seconds = 2 * plan.time.total
    assert "wait for the next batch" in reason(
        plan, {"step_seconds": seconds, "data_wait_seconds": 0.95 * seconds}
    )
    hidden = {"step_seconds": seconds, "data_wait_seconds": 0.5 * seconds}
    assert "wait for" not in reason(plan, hidden), "the step before hides it"


def test_the_reason_is_the_attention_kernel_where_another_was_planned():
    plan = planned()
    assert plan.work.fused_attention
    slow = {"step_seconds": 2 * plan.time.total}
    assert "attention: xla (cudnn cannot: dtype is float32" in reason(plan, slow, attention=XLA)
    large = {"step_seconds": plan.time.total, "memory_bytes": 2 * plan.memory.program}
    assert "attention: xla (cudnn cannot" in reason(plan, large, attention=XLA)
    assert "xla" not in reason(planned(fused_attention=False), {"step_seconds": 99.0}, attention=XLA)


def test_the_reason_is_the_machine_where_steps_vary():
    plan = planned()
    fast, slow = ({"step_seconds": factor * plan.time.total} for factor in (1.0, 2.0))
    (text,) = warnings(plan, *[fast, slow, slow] * STEPS, slow)
    assert "the machine is shared or throttles" in text


def test_the_reason_is_the_network_where_processes_lie_apart(monkeypatch):
    plan = planned(SMALL, 16)
    slow = {"step_seconds": 2 * plan.time.total}
    assert "network" not in reason(plan, slow)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "2 processes, whose network may be slower than the 50 GB/s" in reason(plan, slow)


def test_the_reason_is_the_chip_where_nothing_else_is_seen():
    wide = SMALL.replace("model.embed_dim=8192", "model.num_heads=64", "train.batch_size=512")
    plan = planned(wide)
    assert "below the figures of NVIDIA H100 SXM" in reason(plan, {"step_seconds": 2 * plan.time.total})
    assert "better than its generation" in reason(plan, {"step_seconds": 0.5 * plan.time.total})


def test_memory_is_told_apart_from_time():
    plan = planned()
    same = {"step_seconds": plan.time.total}
    (text,) = warnings(plan, same | {"memory_bytes": 1.5 * plan.memory.program})
    assert text.startswith("a device holds up to ")
    assert "1.50 of the " in text
    assert "stack plan --compile" in text
    evaluating = SMALL.replace("eval.every=5", "eval.batch_size=512")
    large = same | {"memory_bytes": 1.5 * plan.memory.program}
    assert "lower eval.batch_size" in reason(plan, large, config=evaluating)
    assert "shares buffers" in reason(plan, same | {"memory_bytes": 0.5 * plan.memory.program})
    both = {"step_seconds": 2 * plan.time.total, "memory_bytes": 2 * plan.memory.program}
    (text,) = warnings(plan, both)
    assert "a step takes" in text
    assert "; a device holds" in text


def test_the_stand_in_of_a_cpu_is_no_plan():
    plan = predict(Config(), jax.devices())
    assert isinstance(plan, NoPlan)
    assert plan.reason.startswith("no two CPUs are alike")


class Notes(Listener):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.metrics: list[dict[str, float]] = []
        self.warnings: list[str] = []

    def on_start(self, info) -> None:
        self.info = info

    def on_metrics(self, step, metrics) -> None:
        self.metrics.append(metrics)

    def on_warning(self, text) -> None:
        self.warnings.append(text)


def run(tmp_path: Path, **fields: Any) -> tuple[Trainer, Notes, str]:
    """A run on this CPU, described by a file; what was told, and what was printed."""
    chip = tmp_path / "mine.yaml"
    chip.write_text("\n".join(["base: cpu", "title: This CPU", *(f"{k}: {v}" for k, v in fields.items())]))
    places = (f"output_dir={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache")
    config = Config.model_validate(FIELDS).replace(*places, f"target={{hardware: {chip}}}")
    notes, screen = Notes(), io.StringIO()
    trainer = Trainer(config, devices=jax.devices()[:1], listeners=[notes, Progress(Console(file=screen))])
    trainer.fit()
    return trainer, notes, screen.getvalue()


def test_a_run_tells_and_logs_its_plan_and_warns_where_it_was_wrong(tmp_path):
    # A chip a million times faster than any CPU.
    trainer, notes, screen = run(tmp_path, peak_flops="{float32: 1e18}", memory_bandwidth="1e16")
    plan = predict(trainer.config, jax.devices()[:1])
    assert isinstance(plan, Planned)
    seconds = plan.time.total
    assert notes.info["planned_step_seconds"] == seconds
    assert notes.info["planned"] == line(trainer.config, 1, plan, chosen=False)
    assert f"{seconds:.4g} s a step" in str(introduction(notes.info))
    assert all(metrics["planned_step_seconds"] == seconds for metrics in notes.metrics)
    assert trainer.history.curve("planned_step_seconds")[1] == [seconds] * trainer.config.train.steps
    assert trainer.history.curve("planned_memory_bytes")[1][0] == plan.memory.program
    assert len(notes.warnings) == 1
    assert notes.warnings[0].startswith("a step takes ")
    assert screen.count("warning: a step takes ") == 1


def test_waiting_for_data_is_measured():
    def batches() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.01)
            yield number

    waits = list(timed(batches()))
    assert [batch for batch, _ in waits] == [0, 1, 2]
    assert all(waited >= 0.01 for _, waited in waits)


def test_a_choice_of_the_planner_is_announced(tmp_path):
    config = Config.model_validate(FIELDS).replace("mesh=auto", f"output_dir={tmp_path}")
    chosen = auto.resolve(config, jax.devices())
    nothing = NoPlan(reason="why not")
    text = line(chosen, 8, nothing, chosen=True)
    assert text.endswith("chosen by the planner; no plan: why not")
    assert f"zero {chosen.mesh.zero}" in text
    assert line(chosen, 8, nothing, chosen=False) == "no plan: why not"


@pytest.mark.parametrize(
    ("chip", "reason"),
    [
        ("base: cpu", "no two CPUs are alike"),
        ("bas: cpu", "ConfigError: .*bas is not a field"),
        ("base: cpu\nmemory_bytes: 0", "ConfigError: .*memory_bytes=0 must be"),
    ],
)
def test_what_cannot_be_planned_is_told_and_trains(tmp_path, chip, reason):
    file = tmp_path / "cpu.yaml"
    file.write_text(chip)
    config = Config.model_validate(FIELDS).replace(f"target={{hardware: {file}}}")
    plan = predict(config, jax.devices()[:1])
    assert isinstance(plan, NoPlan)
    assert re.match(reason, plan.reason), plan.reason


def test_a_fault_of_the_planner_keeps_nothing_from_training(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr("stack.planner.predict.step_time", fail)
    chip = chips.load("h100")
    monkeypatch.setattr(auto, "chip_of", lambda *_: chip)
    plan = predict(SMALL, jax.devices())
    assert plan == NoPlan(reason="ZeroDivisionError: float division by zero")
