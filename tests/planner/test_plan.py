"""A plan keeps the layout of each device, says what it found and refuses what cannot be."""

import dataclasses
import json
from pathlib import Path

import pytest

from stack.config import Config, ConfigError, load
from stack.hardware import chip as chips
from stack.planner import report
from stack.planner.compiled.compile import has_plugin
from stack.planner.formula.memory import memory
from stack.planner.plan import plan
from stack.planner.remedy import find_remedy

CONFIGS = Path(__file__).parents[2] / "configs"


def llama(*overrides: str) -> Config:
    return load(CONFIGS / "llama3_8b.yaml", ["target=null", "train.accumulation=64", *overrides])


def test_devices_grow_data_and_the_batch():
    result = plan(llama(), hardware="h100", devices=1024)
    assert (result.work.data, result.work.fsdp) == (128, 8)
    assert result.work.batch == 128 * 512
    assert result.work.micro_batch == 1
    assert (
        "the global batch is 65,536 rows, not the config's 512: each replica keeps its 64" in result.notes[0]
    )


def test_the_configs_own_devices_leave_its_batch():
    result = plan(llama(), hardware="h100", devices=8)
    assert result.work.batch == 512
    assert result.notes == ()


def test_the_target_stands_for_the_options():
    config = llama("target={hardware: h200, devices: 64}", "train.accumulation=8")
    result = plan(config)
    assert (result.hardware.name, result.devices, result.work.data) == ("h200", 64, 8)
    assert result.work.batch == 512


def test_the_run_is_the_configs_tokens_whatever_the_batch():
    small, large = (plan(llama(), hardware="h100", devices=devices) for devices in (8, 16))
    assert small.total_tokens == large.total_tokens == 3_576_279 * 512 * 8192
    assert small.steps == 3_576_279
    assert large.steps == -(-3_576_279 // 2)
    assert large.device_hours == pytest.approx(large.steps * large.time.total * 16 / 3600)
    # What the second replica costs is the sum of gradients over both.
    assert large.time.total - small.time.total == pytest.approx(large.time.communication["data"].exposed)


def test_cost_and_energy_are_of_the_device_hours():
    result = plan(llama(), hardware="h100", devices=8, price_per_hour=2.5)
    assert result.cost == pytest.approx(2.5 * result.device_hours)
    assert result.energy_kwh == pytest.approx(0.7 * result.device_hours)
    assert plan(llama(), hardware="h100", devices=8).cost is None


def test_both_conventions_of_mfu_differ_by_the_half_of_attention():
    result = plan(llama(), hardware="h100", devices=8)
    full, causal = result.mfu("full"), result.mfu("causal")
    assert full is not None
    assert causal is not None
    assert full / causal == pytest.approx(1.13, abs=0.01)
    assert causal * 989e12 * 8 * result.time.total == pytest.approx(result.flops_per_step)


def test_turing_nlg_is_planned_on_the_machine_it_was_trained_on():
    result = plan(load(CONFIGS / "turing_nlg_17b.yaml"), hardware="v100-32gb", devices=256)
    assert (result.work.data, result.work.fsdp, result.work.tensor, result.work.batch) == (2, 32, 4, 512)
    assert result.parameters == 17_177_045_760
    full, peak = result.mfu("full"), result.peak_flops
    assert full is not None
    assert peak is not None
    assert full * peak * 256 * result.time.total == pytest.approx(5.615e16, rel=1e-3)
    assert any("no bfloat16" in note for note in result.notes)


@pytest.mark.parametrize(
    ("hardware", "devices", "message"),
    [
        ("h1000", 8, "'h1000' is unknown; did you mean h100?"),
        ("h100", 12, "mesh.fsdp=6 (data 2); or use 8 or 16 devices"),
        ("h100", 3, "mesh.fsdp=3 (data 1); or use 8 devices"),
        ("h100", 0, "0 devices are too few; give at least 1"),
        (None, 8, "no hardware is named; give --hardware, one of a100-40gb"),
    ],
)
def test_what_cannot_be_is_one_line_with_the_nearest_that_can(hardware, devices, message):
    with pytest.raises(ConfigError) as error:
        plan(llama(), hardware=hardware, devices=devices)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match=r"train.batch_size=513 .* use a multiple of"):
        plan(llama("train.batch_size=513", "train.accumulation=1"), hardware="h100", devices=8)


def test_an_open_layout_is_not_guessed():
    with pytest.raises(ConfigError, match="add --search to see its choices"):
        plan(llama("mesh=auto"), hardware="h100", devices=8)


def test_what_does_not_fit_is_said_with_a_remedy():
    result = plan(llama("train.remat=none"), hardware="l4", devices=8)
    assert not result.fits
    assert result.binds.startswith("memory: it needs")
    assert "no layout of 8 devices holds it; 16 do with" in result.binds
    assert any("DOES NOT FIT" in line for line in report.lines(result))


def test_a_fit_names_what_it_rests_on():
    result = plan(llama(), hardware="h100", devices=8)
    assert result.fits
    assert any("fits in 80 (by formula, not compiled)" in line for line in report.lines(result))
    assert report.as_dict(result)["memory_source"] == "formula"


def test_the_json_is_whole_and_plain():
    read = json.loads(json.dumps(report.as_dict(plan(llama(), hardware="h100", devices=8))))
    categories = (
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "temporaries",
        "collectives",
    )
    assert sum(read["memory"][name] for name in (*categories, "reserve")) == pytest.approx(
        read["memory"]["total"]
    )
    assert read["time"]["communication"]["fsdp"]["exposed"] > 0
    assert read["parameters"] == 8_030_261_248
    assert read["compiled"] is None


def test_a_chip_of_the_users_own_is_planned_for(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: h100\nmemory_bytes: 40e9\n")
    result = plan(llama(), hardware=file, devices=8)
    assert result.hardware.memory_bytes == 40e9
    assert result.time == plan(llama(), hardware="h100", devices=8).time


@pytest.mark.parametrize("chip", chips.names())
def test_every_chip_plans(chip):
    result = plan(llama(), hardware=chip, devices=8)
    assert result.time.total > 0
    assert report.lines(result)


@pytest.mark.full
@pytest.mark.skipif(not has_plugin(), reason="compiling for GPUs needs the extra plan")
def test_a_plan_is_compiled_for_the_chip_of_the_users_own(tmp_path):
    """By its file, not by its name, which no other part of the program can find."""
    file = tmp_path / "mine.yaml"
    file.write_text("base: h100\nmemory_bytes: 40e9\n")
    small = llama("model.num_layers=2", "model.embed_dim=256", "model.mlp_dim=512", "model.num_heads=8")
    small = small.replace("train.batch_size=8", "train.accumulation=1", "eval.batch_size=8")
    result = plan(small, hardware=file, devices=8, compile_step=True)
    assert result.compiled is not None
    assert result.compiled.memory.device == 40e9
    assert report.as_dict(result)["memory_source"] == "compiled"
    assert result.bytes_per_device == result.compiled.memory.total + result.memory.reserve


@pytest.mark.parametrize(
    ("hardware", "devices", "overrides"),
    [
        ("l4", 8, ["train.remat=none"]),
        ("a100-40gb", 8, ["train.remat=none"]),
        ("a100-80gb", 8, ["train.remat=none", "mesh.zero=1"]),
        ("t4", 8, []),
    ],
)
def test_a_remedy_makes_it_fit(hardware, devices, overrides):
    result = plan(llama(*overrides), hardware=hardware, devices=devices)
    assert not result.fits
    remedy = find_remedy(result.work, result.hardware)
    assert remedy is not None
    assert remedy.overrides[0] in result.binds
    sizes = {axis: getattr(result.config.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    layout = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
    batch = [f"train.batch_size={result.work.batch}", "eval.batch_size=null"]
    config = llama(*overrides, *layout, *batch, *remedy.overrides)
    mended = plan(config, hardware=hardware, devices=remedy.devices)
    assert mended.fits
    assert not mended.is_tight
    assert mended.bytes_per_device == pytest.approx(remedy.bytes_per_device)


def test_the_remedy_of_a_pipeline_is_one():
    staged = ("mesh={fsdp: 1, data: 2, stage: 4, zero: 1, schedule: interleaved}", "train.accumulation=4")
    result = plan(llama("train.remat=none", *staged), hardware="a100-40gb", devices=8)
    assert not result.fits
    remedy = find_remedy(result.work, result.hardware)
    assert remedy is not None
    assert not any(one.startswith("mesh.zero") for one in remedy.overrides)
    assert remedy.devices > 8
    # Three rows in each of four micro-batches; with two there would be six, which are no groups of four.
    work = dataclasses.replace(result.work, micro_batch=3, batch=24)
    need = memory(work)
    chip = dataclasses.replace(result.hardware, memory_bytes=1.05 * need.program + need.reserve - 1)
    fewer = find_remedy(work, chip)
    assert fewer is not None
    assert fewer.overrides == ("train.accumulation=12",)


def test_what_no_number_of_devices_holds_is_said_so():
    result = plan(llama("data.sequence_length=8192"), hardware="h100", devices=8)
    tiny = dataclasses.replace(result.hardware, memory_bytes=2e9)
    assert find_remedy(result.work, tiny) is None
    assert "16,384 devices do not hold it" in plan(llama(), hardware=tiny, devices=8).binds


def test_a_fit_within_the_formulas_error_is_no_plain_fit():
    result = plan(llama(), hardware="h100", devices=8)
    tight = dataclasses.replace(result.hardware, memory_bytes=1.02 * result.bytes_per_device)
    told = plan(llama(), hardware=tight, devices=8)
    assert told.fits
    assert told.is_tight
    assert any("by less than the formula may be wrong by" in line for line in report.lines(told))


def test_small_models_are_planned_in_units_that_fit():
    small = load(CONFIGS / "quickstart.yaml")
    text = "\n".join(report.lines(plan(small, hardware="h100", devices=1)))
    assert "memory of a device, MB" in text
    assert "time of a step, us" in text
    assert "parameters                       3.61" in text


def test_a_plan_prints_as_its_lines():
    result = plan(llama(), hardware="h100", devices=8)
    assert str(result) == "\n".join(report.lines(result))
    assert result._repr_html_().startswith("<pre>llama3_8b on 8 x NVIDIA H100")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "the time leaves out the all-reduces of each operand's largest number"),
        (["kernels.fp8.scaling=delayed"], None),
        (
            ["kernels.fp8.blocks=block"],
            "has weights gathered in 8 bits, also those whose shards cut",
        ),
        (["kernels.fp8.blocks=block", "mesh.zero=1"], None),
    ],
)
def test_what_the_time_does_not_know_of_8_bits_is_told(overrides, told):
    config = llama("kernels.matmul=fp8", "mesh.zero=3", *overrides)
    notes = [note for note in plan(config, hardware="h100", devices=8).notes if "fp8" in note]
    assert bool(notes) == bool(told)
    assert told is None or told in notes[0]
