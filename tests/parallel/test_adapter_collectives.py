"""What a compiled GPU step with an adapter communicates: gradients of the adapter alone."""

import jax
import pytest

from stack.config import Config
from stack.parallel.mesh import without_cache
from stack.planner.compiled.collectives import collectives
from stack.planner.compiled.compile import compile_step, devices
from stack.step import program as programs

pytestmark = pytest.mark.usefixtures("quick_gpu_compiler")

ROWS, LENGTH, EMBED = 12, 160, 256  # Of one device.
FIELDS = {
    "init_from": "elsewhere",
    "model": {"vocab_size": 1000, "num_layers": 4, "embed_dim": EMBED, "num_heads": 8, "max_length": LENGTH},
    "kernels": {"attention": "xla"},
    "data": {"sequence_length": LENGTH},
    "mesh": {"data": 2, "fsdp": 4, "tensor": 2, "zero": 3, "sequence_parallel": True},
    "train": {"batch_size": 8 * ROWS, "remat": "full"},
}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_base_is_gathered_and_nothing_of_it_comes_back(kind) -> None:
    adapter = f"adapter={{kind: {kind}, base_dtype: bfloat16, targets: [{{modules: [layers.*], rank: 16}}]}}"
    config = Config.model_validate(FIELDS).replace(adapter)
    targets = devices("h200", 16)
    program = programs.build(config, targets)
    leaves = jax.tree_util.tree_flatten_with_path(program.parameters)[0]
    sizes = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.size for path, leaf in leaves}
    adapters = sum(size for name, size in sizes.items() if "lora" in name)
    matrices = sum(size for name, size in sizes.items() if name.endswith(("kernel", "table")))
    with without_cache():
        text = compile_step(config, targets).as_text()
    assert text
    found = collectives(text, dict(program.mesh.shape))

    def total(kind: str, axis: str, dtype: str) -> int:
        return sum(
            one.elements * one.times
            for one in found
            if one.kind == kind and axis in one.axes and {name for name, _ in one.arrays} == {dtype}
        )

    assert 0 < total("reduce-scatter", "fsdp", "f32") <= adapters
    assert total("all-gather", "fsdp", "bf16") <= 2 * (matrices + adapters)
    # Those of activations are scattered: a gradient that is whole would make an all-reduce of each.
    assert total("all-reduce", "tensor", "bf16") <= ROWS * LENGTH * EMBED
