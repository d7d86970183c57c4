"""What crosses nodes in a step, by its layout, read from steps compiled for H200s that are not here.

    uv run --extra plan python benchmarks/between_nodes.py [--nodes N ...] [--micro-batches N ...]

Nodes of eight; a GPT of 4 layers of 1,024 in bfloat16. Of each layout the bytes that come into a node in a
step at the least, in all and for each number of the matrices, and how many times less that is than with
parameters split over all devices. See `bytes_between_nodes`.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from stack.config import Config, DataConfig, DecoderConfig, MeshConfig, TrainConfig
from stack.parallel import mesh as meshes
from stack.planner.compiled.collectives import bytes_between_nodes
from stack.planner.compiled.report import compile_plan
from stack.step import program as programs

NODE = 8
MODEL = DecoderConfig(vocab_size=4096, num_layers=4, embed_dim=1024, num_heads=8, max_length=512)
INT8 = {"gather_dtype": "int8"}
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "fsdp over all": ({"second_shard": None}, "float32"),
    "data of nodes x fsdp in them": ({"second_shard": False}, "float32"),
    "second shard": ({}, "float32"),
    "second shard, int8 weights": (INT8, "float32"),
    "second shard, int8 weights, bfloat16 gradients": (INT8, "bfloat16"),
    "second shard, int8 weights and gradients": (INT8 | {"scatter_dtype": "int8"}, "float32"),
}


def config(fields: dict[str, Any], reduce_dtype: Any, nodes: int, micro_batches: int) -> Config:
    """A step of a row of each device and micro-batch."""
    flat = fields.get("second_shard", True) is None
    sizes = {"fsdp": NODE * nodes} if flat else {"data": nodes, "fsdp": NODE, "second_shard": True} | fields
    return Config(
        model=MODEL,
        data=DataConfig(sequence_length=512),
        mesh=MeshConfig.model_validate({"zero": 3} | sizes),
        train=TrainConfig(
            batch_size=NODE * nodes * micro_batches,
            accumulation=micro_batches,
            grad_reduce_dtype=reduce_dtype,
        ),
    )


def crossing(config: Config, nodes: int) -> tuple[float, int]:
    """Bytes that come into a node in a step, and the numbers of all matrices."""
    compiled = compile_plan(config, hardware="h200", devices=NODE * nodes, schedule=False)
    program = programs.on_mesh(config, meshes.abstract(config.mesh, NODE * nodes), "gpu")
    leaves = zip(jax.tree.leaves(program.parameters), jax.tree.leaves(program.roles), strict=True)
    numbers = sum(leaf.size for leaf, role in leaves if role != "vector")
    return bytes_between_nodes(compiled.collectives, compiled.mesh, NODE), numbers


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    print("| nodes | micro-batches | layout | MB | bytes a number | times less |\n|---|---|---|---|---|---|")
    for nodes in options.nodes:
        for micro_batches in options.micro_batches:
            first = 0.0
            for name, (fields, reduce_dtype) in LAYOUTS.items():
                size, numbers = crossing(config(fields, reduce_dtype, nodes, micro_batches), nodes)
                first = first or size
                cells = f"{name} | {size / 1e6:,.1f} | {size / numbers:.2f} | {first / size:.2f}"
                print(f"| {nodes} | {micro_batches} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
