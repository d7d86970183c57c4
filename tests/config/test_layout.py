"""Meshes: sizes that fit, and one clear line for those that do not."""

import pytest

from stack.config import Config, ConfigError, DataConfig, DecoderConfig, EvalConfig, MeshConfig, TrainConfig
from stack.config.layout import check_divides, resolve


def test_the_free_axis_takes_what_is_left():
    assert resolve(MeshConfig(data=2, fsdp=-1, tensor=2), 8)["fsdp"] == 2


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3, fsdp=-1), "data 3 = 3 does not divide the 8 devices"),
        (MeshConfig(data=2, fsdp=2), "data 2 x fsdp 2 = 4 devices, but there are 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(mesh, message):
    with pytest.raises(ConfigError, match=message):
        resolve(mesh, 8)


def config(**changes) -> Config:
    sections = {
        "model": DecoderConfig(num_heads=12, num_kv_heads=4, embed_dim=96, mlp_dim=96),
        "data": DataConfig(sequence_length=30),
        "train": TrainConfig(batch_size=16, accumulation=2),
    }
    return Config(**sections | changes)


def sizes(**changes: int) -> dict[str, int]:
    return {"data": 1, "fsdp": 1, "stage": 1, "context": 1, "expert": 1, "tensor": 1} | changes


def test_a_tensor_degree_that_does_not_divide_names_the_largest_that_does():
    check_divides(config(), sizes(tensor=4))
    with pytest.raises(ConfigError, match=r"tensor=8 does not divide model.num_heads=12.* is 4$"):
        check_divides(config(), sizes(tensor=8))


def test_sequence_parallelism_must_divide_the_sequence():
    split = MeshConfig(tensor=4, sequence_parallel=True)
    with pytest.raises(ConfigError, match="sequence_length=30 over tensor=4"):
        check_divides(config(mesh=split), sizes(tensor=4))


def test_a_batch_that_does_not_divide_is_refused_with_a_remedy():
    check_divides(config(), sizes(data=2, fsdp=4))
    with pytest.raises(
        ConfigError, match=r"batch_size=16 in 2 micro-batches.* 16 ways; use a multiple of 32"
    ):
        check_divides(config(), sizes(data=4, fsdp=4))
    with pytest.raises(ConfigError, match=r"eval.batch_size=3 in 1 micro-batch does"):
        check_divides(config(eval=EvalConfig(batch_size=3)), sizes(data=2))
