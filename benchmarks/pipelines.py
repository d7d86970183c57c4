"""Schedules against their tables: a step whose layers do nothing but wait, so that what is serial shows.

    uv run python benchmarks/pipelines.py [--stages 4] [--micro-batches 8] [--layers 1] [--wait 0.02]

On as many virtual CPU devices as there are stages each layer sleeps: once in its forward pass, once before
the gradient of its input, once before that of its weights. Sleeping needs no core, so the stages wait side by
side if, and only if, the program lets them. A table of so many ticks predicts so many waits.
"""

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    """Prints a line for each schedule."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=1, help="of each part")
    parser.add_argument("--wait", type=float, default=0.02, help="seconds")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["JAX_NUM_CPU_DEVICES"] = str(options.stages)
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = []
    for schedule, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)):
        ticks, seconds = measure(schedule, chunks, options)
        # A tick is the forward pass of a part. Two parts a stage have twice the layers.
        predicted = ticks * options.wait
        found.append(
            {
                "schedule": schedule,
                "parts": chunks,
                "ticks": ticks,
                "predicted": round(predicted, 3),
                "seconds": round(seconds, 3),
                "of_the_table": round(predicted / seconds, 3),
            }
        )
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"{'schedule':<16}{'parts':>6}{'ticks':>6}{'predicted s':>13}{'measured s':>12}{'of the table':>14}"
    )
    for one in found:
        told = f"{one['predicted']:>13.2f}{one['seconds']:>12.2f}{one['of_the_table']:>14.0%}"
        print(f"{one['schedule']:<16}{one['parts']:>6}{one['ticks']:>6}{told}")


def measure(schedule: str, chunks: int, options: argparse.Namespace) -> tuple[int, float]:
    """Ticks of a table, and the median seconds of a step."""
    import jax
    import numpy as np

    from stack.config import Config
    from stack.models.block import Block
    from stack.parallel import mesh as meshes
    from stack.step import program as programs
    from stack.step import state as states
    from stack.step.step import loss_gradient

    config = Config.model_validate(
        {
            "model": {
                "num_layers": options.stages * chunks * options.layers,
                "embed_dim": 16,
                "num_heads": 2,
                "max_length": 8,
                "dtype": "float32",
            },
            "data": {"sequence_length": 8},
            "mesh": {
                "stage": options.stages,
                "fsdp": 1,
                "zero": 1,
                "schedule": schedule,
                "virtual_stages": chunks,
            },
            "train": {
                "batch_size": options.micro_batches,
                "accumulation": options.micro_batches,
                "remat": "none",
            },
        }
    )
    program = programs.build(config)
    waiting = _waiting(Block.__call__, options.wait / options.layers)
    with patch.object(Block, "__call__", waiting), meshes.use(program.mesh):
        params = states.init_params(program)
        batch = {
            field.name: jax.device_put(
                np.ones([options.micro_batches, 8][: len(field.axes)], np.int32),
                program.layout.sharding(*field.axes),
            )
            for field in program.objective.fields
        }
        step = jax.jit(partial(loss_gradient, program)).lower(params, np.int32(0), batch).compile()
        times = []
        for _ in range(options.repeat + 1):
            start = time.perf_counter()
            jax.block_until_ready(step(params, np.int32(0), batch))
            times.append(time.perf_counter() - start)
    return program.pipeline(program.stacks).table.ticks, statistics.median(times[1:])


def _waiting(whole: Any, seconds: float) -> Any:
    """A block that waits besides: forward, and before the gradients of its input and of its weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from stack.step.pipeline.weights import by_hand

    def sleep(_: Any) -> Any:
        time.sleep(seconds)
        return np.zeros((), np.float32)

    def slow(x: Any) -> Any:
        nothing = jax.pure_callback(sleep, jax.ShapeDtypeStruct((), jnp.float32), x.ravel()[0])
        return x + nothing.astype(x.dtype)

    wait = partial(by_hand, slow)  # JAX calls back where all axes are split by hand.

    @jax.custom_vjp
    def late(x: Any, weight: Any) -> Any:  # noqa: ARG001 (whose gradient waits)
        return wait(x)

    late.defvjp(
        lambda x, weight: (wait(x), weight),
        lambda weight, dy: (wait(dy), wait(jnp.zeros_like(weight) + dy.sum() * 0)),
    )

    def call(self: Any, x: Any, *args: Any, **options: Any) -> Any:
        return whole(self, late(x, self.mlp.up.kernel[...]), *args, **options)

    return call


if __name__ == "__main__":
    main()
