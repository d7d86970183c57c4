"""Stack: its own program, state and step, the layers unrolled or scanned."""

import functools
import itertools
import os
import sys

# Before jax is imported: the compile-only GPU plugin may be installed, and would be tried first.
os.environ["JAX_PLATFORMS"] = "cpu"

import child
import jax
import numpy as np

from stack.config import Config, DataConfig, DecoderConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from stack.parallel.host_memory import keep_freed_memory
from stack.step import state as states
from stack.step.program import build
from stack.step.step import train_step


def config(setting: child.Setting, *, unrolled: bool) -> Config:
    """The setting as a Stack config."""
    return Config(
        model=DecoderConfig(
            vocab_size=setting.vocab,
            vocab_multiple=1,
            max_length=setting.block,
            num_layers=setting.num_layers,
            embed_dim=setting.embed_dim,
            num_heads=setting.num_heads,
            dtype="float32",
            scan_unroll=setting.num_layers if unrolled else 1,
        ),
        data=DataConfig(sequence_length=setting.block, packed=False),
        optimizer=OptimizerConfig(
            learning_rate=setting.learning_rate,
            beta1=setting.beta1,
            beta2=setting.beta2,
            weight_decay=setting.weight_decay,
            clip_norm=setting.clip,
            schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        ),
        train=TrainConfig(batch_size=setting.batch),
    )


def main(kind: str) -> None:
    """Serves one contestant: unrolled or scanned."""
    keep_freed_memory()
    setting = child.Setting()
    program = build(config(setting, unrolled=kind == "unrolled"), jax.devices()[:1])
    sharding = program.layout.sharding("batch")
    positions = np.broadcast_to(np.arange(setting.block, dtype=np.int32), (setting.batch, setting.block))
    constant = {
        "positions": positions,
        "segments": np.ones_like(positions),
        "example": np.arange(setting.batch, dtype=np.int32),
    }
    data = itertools.cycle(
        constant | {"tokens": rows[:, :-1], "labels": rows[:, 1:]} for rows in child.batches(setting)
    )
    with jax.set_mesh(states.concrete(program)):
        state = states.init(program)
        step = jax.jit(functools.partial(train_step, program), donate_argnums=0)

        def steps(count: int) -> float:
            nonlocal state
            metrics = {}
            for _ in range(count):
                state, metrics = step(state, jax.device_put(next(data), sharding))
            return float(metrics["loss"])

        child.serve(steps, parameters=program.num_parameters, versions=f"jax {jax.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
