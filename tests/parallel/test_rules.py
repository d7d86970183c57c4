"""Where each array lies, by the one table."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from stack.config import MeshConfig
from stack.parallel import mesh as meshes
from stack.parallel.rules import ONE_DEVICE, Layout

KERNEL = ("layers", "embed", "heads", "head_dim")


def layout(**mesh) -> Layout:
    config = MeshConfig(**mesh)
    return Layout.of(meshes.abstract(config, 8), config)


def test_axes_of_one_device_leave_no_trace():
    assert layout(fsdp=8).spec("batch", "length", "heads") == P("fsdp", None, None)
    assert layout(data=2, fsdp=4).spec("batch", "length") == P(("data", "fsdp"), None)
    assert ONE_DEVICE.spec("batch", "length") is None


def test_sequence_parallelism_splits_the_residual_stream_alone():
    split = layout(fsdp=4, tensor=2, sequence_parallel=True)
    assert split.spec("batch", "residual_length", "embed") == P("fsdp", "tensor", None)
    assert split.spec("batch", "length", "heads") == P("fsdp", None, "tensor")


def test_fsdp_takes_the_first_dimension_it_divides():
    stage3 = layout(fsdp=4, tensor=2)
    assert stage3.parameter_spec(KERNEL, (8, 64, 6, 10), "matrix") == P(None, "fsdp", "tensor", None)
    assert stage3.parameter_spec(KERNEL, (8, 63, 6, 12), "matrix") == P(None, None, "tensor", "fsdp")
    assert stage3.parameter_spec(KERNEL, (8, 63, 6, 9), "matrix") == P(None, None, "tensor", None)


def test_the_stack_of_layers_and_vectors_stay_whole():
    assert layout(fsdp=8).parameter_spec(("layers", "embed"), (8, 64), "vector") == P(None, None)
    assert layout(fsdp=8).parameter_spec(("layers", "embed", "mlp"), (8, 63, 64), "matrix")[0] is None


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_stage_0_splits_nothing_over_fsdp(zero):
    spec = layout(fsdp=8, zero=zero).parameter_spec(("vocab", "embed"), (128, 64), "table")
    assert spec == (P("fsdp", None) if zero else P(None, None))


def test_products_over_a_split_axis_are_partial_sums():
    spec = layout(fsdp=4, tensor=2).product_spec(
        ("batch", "residual_length", "embed"), contracted=("heads", "head_dim")
    )
    assert spec == P("fsdp", None, None, unreduced={"tensor"})


def test_a_mesh_of_real_devices_gives_the_same_specs():
    config = MeshConfig(fsdp=4, tensor=2)
    real = Layout.of(meshes.build(config, jax.devices()), config)
    assert real.spec("batch", "vocab") == layout(fsdp=4, tensor=2).spec("batch", "vocab")
