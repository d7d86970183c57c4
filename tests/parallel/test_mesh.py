"""Meshes as they are built, and what of them the persistent cache may keep."""

import jax
import pytest
from jax.sharding import AxisType

from stack.config import MeshConfig
from stack.parallel import mesh as meshes


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
