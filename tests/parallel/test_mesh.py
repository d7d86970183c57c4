"""Meshes: sizes that fit, and one clear line for those that do not."""

import jax
import pytest
from jax.sharding import AxisType

from stack.config import Config, ConfigError, DataConfig, DecoderConfig, EvalConfig, MeshConfig, TrainConfig
from stack.parallel import mesh as meshes


def test_the_free_axis_takes_what_is_left():
    assert meshes.resolve(MeshConfig(data=2, fsdp=-1, tensor=2), 8)["fsdp"] == 2


def test_every_axis_is_there_and_explicit():
    mesh = meshes.build(MeshConfig(fsdp=4, tensor=2), jax.devices())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "stage": 1, "context": 1, "expert": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Explicit}


@pytest.fixture
def cache():
    """Whether compiled programs are cached; as before, afterwards."""
    with meshes.without_cache():
        jax.config.update("jax_enable_compilation_cache", True)
        yield lambda: bool(jax.config.jax_enable_compilation_cache)
        meshes.build(MeshConfig(fsdp=1), jax.devices()[:1])


def test_programs_of_several_cpu_devices_are_not_cached_and_others_are(cache):
    one, two = (meshes.build(MeshConfig(), jax.devices()[:number]) for number in (1, 2))
    assert not cache()
    for mesh, cached in ((one, True), (two, False), (one, True)):
        with meshes.use(mesh):
            assert cache() == cached
        meshes.build(MeshConfig(), mesh.devices.ravel().tolist())
        assert cache() == cached


def test_a_cache_that_is_off_stays_off(cache):
    jax.config.update("jax_enable_compilation_cache", False)
    for number in (1, 2, 1):
        meshes.build(MeshConfig(), jax.devices()[:number])
        assert not cache()


def test_without_cache_no_mesh_turns_it_on(cache):
    meshes.build(MeshConfig(), jax.devices()[:2])
    with meshes.without_cache():
        meshes.build(MeshConfig(), jax.devices()[:1])
        assert not cache()
    meshes.build(MeshConfig(), jax.devices()[:1])
    assert cache()


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3, fsdp=-1), "data 3 = 3 does not divide the 8 devices"),
        (MeshConfig(data=2, fsdp=2), "data 2 x fsdp 2 = 4 devices, but there are 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(mesh, message):
    with pytest.raises(ConfigError, match=message):
        meshes.resolve(mesh, 8)


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
    meshes.check_divides(config(), sizes(tensor=4))
    with pytest.raises(ConfigError, match=r"tensor=8 does not divide model.num_heads=12.* is 4$"):
        meshes.check_divides(config(), sizes(tensor=8))


def test_sequence_parallelism_must_divide_the_sequence():
    split = MeshConfig(tensor=4, sequence_parallel=True)
    with pytest.raises(ConfigError, match="sequence_length=30 over tensor=4"):
        meshes.check_divides(config(mesh=split), sizes(tensor=4))


def test_a_batch_that_does_not_divide_is_refused_with_a_remedy():
    meshes.check_divides(config(), sizes(data=2, fsdp=4))
    with pytest.raises(
        ConfigError, match=r"batch_size=16 in 2 micro-batches.* 16 ways; use a multiple of 32"
    ):
        meshes.check_divides(config(), sizes(data=4, fsdp=4))
    with pytest.raises(ConfigError, match=r"eval.batch_size=3 in 1 micro-batch does"):
        meshes.check_divides(config(eval=EvalConfig(batch_size=3)), sizes(data=2))
