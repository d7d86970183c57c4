"""A workload is the step that the trainer makes of a config."""

import dataclasses
from pathlib import Path

import pytest

from stack import load
from stack.config import Config, ConfigError, DataConfig, EncoderConfig, MaskedWordsConfig, TrainConfig
from stack.hardware import chip as chips
from stack.models.flops import train_flops_per_token
from stack.parallel import mesh as meshes
from stack.planner.formula.time import product_seconds, step_time
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
        ("kernels.attention=xla",),
        ("model.attention_dropout=0.1",),
    ],
)
def test_a_chip_is_planned_with_the_attention_that_a_run_gets_there(
    name: str, changes: tuple[str, ...]
) -> None:
    chip, tree = chips.load(name), config(*changes)
    mesh = meshes.abstract(tree.mesh, 8)
    choice = programs.on_mesh(tree, mesh, chip.platform, chip.compute_capability).attention
    assert from_config(tree, 8, chip).fused_attention == (not choice.stores_scores)


def test_packed_rows_of_odd_length_are_planned_with_attention_in_blocks() -> None:
    a100, h100 = chips.load("a100-80gb"), chips.load("h100")
    packed, odd = "data.packed=true", ("data.sequence_length=1025", "model.max_length=1025")
    assert from_config(config(packed, *odd), 8, a100).blocked_attention
    assert not from_config(config(packed), 8, a100).blocked_attention
    assert not from_config(config("data.packed=false", *odd), 8, a100).blocked_attention
    assert not from_config(config(packed, *odd), 8, h100).blocked_attention, "Hopper has a kernel for them"
    assert not from_config(config(packed, *odd), 8).blocked_attention, "without a chip, of a new NVIDIA GPU"


def test_a_kernel_that_was_asked_for_and_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the platform is tpu, not an NVIDIA GPU"):
        from_config(config("kernels.attention=cudnn"), 8, chips.load("tpu-v5e"))


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


def test_a_model_of_two_stacks_is_refused_by_name() -> None:
    """Its formulas are of one row and one stack: better no plan than a wrong one."""
    with pytest.raises(ConfigError, match=r"model\.kind=encoder_decoder: the planner does not know two rows"):
        from_config(load(CONFIGS / "t5_small.yaml"), 8)


def test_of_masked_words_the_head_takes_the_time_of_those_that_are_scored() -> None:
    """Of 512 places 77 are hidden: 0.15 of them, rounded up."""
    chip = chips.load("h200")
    model = EncoderConfig(vocab_size=30522, max_length=512, head_transform=False)
    config = Config(
        model=model,
        objective=MaskedWordsConfig(),
        data=DataConfig(sequence_length=512),
        train=TrainConfig(batch_size=64),
    )
    masked = from_config(config, 1, chip)
    whole = dataclasses.replace(masked, masked=None)
    assert masked.sizes == {"length": 512, "masked": 77}
    head = 2 * 768 * model.padded_vocab_size
    for convention in ("full", "causal"):
        less = train_flops_per_token(model, whole.sizes, convention)
        less -= train_flops_per_token(model, masked.sizes, convention)
        assert less == pytest.approx(3 * head * (1 - 77 / 512))
    saved = step_time(whole, chip).matmul - step_time(masked, chip).matmul
    product = product_seconds(64 * 512, model.padded_vocab_size, 768, "bfloat16", chip)
    assert saved == pytest.approx(3 * product * (1 - 77 / 512), rel=1e-6)
    assert (masked.scored_tokens, whole.scored_tokens) == (64 * 77, 64 * 512)


def test_a_step_in_8_bits_is_planned_so_and_refused_where_it_cannot_run() -> None:
    h100, fp8 = chips.load("h100"), "kernels.matmul=fp8"
    narrow, wide = (from_config(config("mesh.zero=3", *changes), 8, h100) for changes in ((fp8,), ()))
    assert (narrow.precision, wide.precision) == ("float8", "bfloat16")
    assert narrow.why_modelled() is None
    ours, theirs = step_time(narrow, h100), step_time(wide, h100)
    assert ours.matmul < theirs.matmul
    halves = ours.communication["fsdp"].bytes / theirs.communication["fsdp"].bytes
    assert 4 / 8 < halves < 1, "gathers of the layers alone"
    for chip in ("a100-80gb", "mi300x"):
        with pytest.raises(ConfigError, match=r"kernels\.matmul=fp8 cannot run"):
            from_config(config(fp8), 8, chips.load(chip))
