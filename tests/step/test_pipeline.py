"""Pipelines that the contract's matrix has no cell for: other depths, policies and numbers of parts."""

import jax
import numpy as np
import pytest

from stack.config import ConfigError, MeshConfig
from stack.doctor.numerics import LIMIT, ONE_DEVICE, Cell, Family, compute, config_of, errors
from stack.step import program as programs

STAGES = {"stage": 4, "fsdp": 1, "zero": 1}


def cell(micro_batches: int, **mesh: object) -> Cell:
    return Cell(parts=("pipeline",), mesh=MeshConfig.model_validate(mesh), accumulation=micro_batches)


@pytest.mark.parametrize(
    ("family", "pipeline", "overrides"),
    [
        # Seven layers on four stages: 2, 2, 2, 1.
        pytest.param(
            "gemma",
            cell(4, stage=4, data=2, fsdp=1, zero=1),
            ("model.num_layers=7", "train.remat=dots"),
            id="uneven",
        ),
        pytest.param(
            "llama",
            cell(4, stage=2, tensor=2, fsdp=2, zero=1, schedule="interleaved", virtual_stages=2),
            ("model.num_layers=8", "train.remat=none"),
            id="interleaved",
            marks=pytest.mark.full,
        ),
        # Fewer micro-batches than stages.
        pytest.param(
            "bert", cell(2, **STAGES), ("model.num_layers=6",), id="few micro-batches", marks=pytest.mark.full
        ),
        pytest.param(
            "gpt",
            cell(8, stage=2, data=2, fsdp=1, zero=1, schedule="gpipe"),
            ("model.num_layers=5", "train.remat=save_qkv_proj"),
            id="gpipe",
            marks=pytest.mark.full,
        ),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(
    family: Family, pipeline: Cell, overrides: tuple[str, ...]
):
    numbers = compute(pipeline, family, overrides=overrides)
    wrong = errors(numbers, compute(ONE_DEVICE, family, overrides=overrides))
    assert {name: error for name, error in wrong.items() if not error <= LIMIT} == {}


def test_parameters_at_rest_are_split_over_stages_and_layers_are_not():
    program = programs.build(config_of(cell(2, stage=2, fsdp=2, zero=1), "gpt", "float32"), jax.devices()[:4])
    leaf = program.parameters["layers"]["mlp"]["up"]["kernel"]
    assert leaf.sharding.spec[:2] == (None, ("fsdp", "stage"))
    assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 == leaf.size


@pytest.mark.parametrize(
    ("mesh", "overrides", "told"),
    [
        (
            {"stage": 4, "zero": 1},
            (),
            r"mesh.stage=4: there are 2 layers \(model.num_layers\).*set mesh.stage=2",
        ),
        ({"stage": 2}, (), r"mesh.zero=3 gathers each layer again .*set mesh.zero=1"),
        ({"stage": 2, "zero": 2}, (), r"mesh.zero=2 scatters .*set mesh.zero=1"),
        (
            {"stage": 2, "zero": 1, "schedule": "interleaved", "virtual_stages": 3},
            ("model.num_layers=8",),
            r"mesh.virtual_stages=3: .* do not divide model.num_layers=8; set mesh.virtual_stages=2",
        ),
        (
            {"stage": 2, "zero": 1, "schedule": "interleaved"},
            ("train.accumulation=1",),
            r"mesh.schedule=interleaved goes round in groups of 2 .*train.accumulation=1; set it to 2",
        ),
        (
            {"stage": 2, "zero": 1},
            ("kernels.matmul=fp8",),
            r"kernels.matmul=fp8 has no pipeline yet: set mesh.stage=1, or leave",
        ),
    ],
)
def test_what_no_pipeline_can_do_is_refused(mesh: dict, overrides: tuple[str, ...], told: str):
    config = config_of(cell(2, fsdp=1, **mesh), "llama", "float32").replace(*overrides)
    with pytest.raises(ConfigError, match=told):
        programs.build(config, jax.devices()[: mesh["stage"]])


def test_options_of_a_pipeline_without_one_are_refused():
    with pytest.raises(ValueError, match=r"schedule='gpipe' is not read with stage=1"):
        MeshConfig.model_validate({"schedule": "gpipe"})
    with pytest.raises(ValueError, match=r"virtual_stages=2 is not read with schedule=1f1b"):
        MeshConfig.model_validate({"stage": 2, "virtual_stages": 2})
