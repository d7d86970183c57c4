"""A workload is the step that the trainer makes of a config."""

from pathlib import Path

import pytest

from stack import load
from stack.config import Config, ConfigError
from stack.hardware import chip as chips
from stack.parallel import mesh as meshes
from stack.planner.formula.workload import from_config
from stack.step import program as programs

CONFIGS = Path(__file__).parents[3] / "configs"


def config(*changes: str) -> Config:
    return load(CONFIGS / "gpt2_124m.yaml", ["mesh.fsdp=8", *changes])


@pytest.mark.parametrize("name", [*chips.names()])
@pytest.mark.parametrize(
    "changes",
    [
        ("data.packed=true", "data.sequence_length=1024"),
        ("data.packed=true", "data.sequence_length=1023"),
        ("data.packed=false", "data.sequence_length=1023"),
        ("model.dtype=float32",),
        ("model.attention=xla",),
        ("model.attention_dropout=0.1",),
    ],
)
def test_a_chip_is_planned_with_the_attention_that_a_run_gets_there(
    name: str, changes: tuple[str, ...]
) -> None:
    chip, tree = chips.load(name), config(*changes)
    mesh = meshes.abstract(tree.mesh, 8)
    choice = programs.on_mesh(tree, mesh, chip.platform, chip.compute_capability).attention
    assert from_config(tree, 8, chip).fused_attention == (choice.kernel == "cudnn")


def test_packed_rows_of_odd_length_are_planned_without_the_fused_kernel() -> None:
    h100 = chips.load("h100")
    packed, odd = "data.packed=true", "data.sequence_length=1023"
    assert not from_config(config(packed, odd), 8, h100).fused_attention
    assert from_config(config(packed), 8, h100).fused_attention
    assert from_config(config("data.packed=false", odd), 8, h100).fused_attention
    assert not from_config(config(packed, odd), 8).fused_attention, "without a chip, of a new NVIDIA GPU"


def test_a_kernel_that_was_asked_for_and_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the platform is tpu, not an NVIDIA GPU"):
        from_config(config("model.attention=cudnn"), 8, chips.load("tpu-v5e"))


@pytest.mark.parametrize(
    ("name", "platform"),
    [("h100", "gpu"), ("v100", "gpu"), ("mi300x", "rocm"), ("tpu-v6e", "tpu"), ("cpu", "cpu")],
)
def test_a_chip_is_of_a_platform(name: str, platform: str) -> None:
    assert chips.load(name).platform == platform


def test_a_chip_without_bfloat16_is_planned_in_float16() -> None:
    assert from_config(config(), 8, chips.load("v100")).precision == "float16"
    assert from_config(config("model.dtype=float32"), 8, chips.load("v100")).precision == "float32"
    assert from_config(config("model.dtype=float32"), 8, chips.load("a100")).precision == "tensorfloat32"


@pytest.mark.parametrize("change", ["mesh=auto", "train.remat=auto"])
def test_what_is_left_to_the_planner_is_no_workload_yet(change: str) -> None:
    with pytest.raises(ConfigError, match="there is no layout yet"):
        from_config(load(CONFIGS / "gpt2_124m.yaml", [change]), 8)
