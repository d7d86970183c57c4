"""Compiling the training step for GPUs on a machine that has none.

Needs the extra `plan`: JAX's CUDA plugin and NVIDIA's compilers, no CUDA libraries and no driver.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as checks
from jax.experimental import topologies

from stack.config import Config
from stack.train import program as programs
from stack.train import state as states
from stack.train.step import compiler_options, train_step

OLDEST_CUDNN = 91_200
"""cuDNN 9.12, the oldest that JAX's CUDA packages allow."""


def devices(target: str, num_devices: int, *, per_host: int = 8) -> list[Any]:
    """Devices to compile for that are not here.

    Args:
      target: name of a file in `stack/plan/targets`, such as `h200`.
      num_devices: a multiple of `per_host`, or less than it.
      per_host: devices of one host, which share its fast links.
    """
    description = (files("stack.plan") / "targets" / f"{target}.txtpb").read_text()
    text = "\n".join(line for line in description.splitlines() if not line.startswith("#"))
    per_host = min(per_host, num_devices)
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=text, topology=f"1x{num_devices // per_host}x{per_host}"
    )
    return topology.devices


def compile_step(config: Config, target_devices: list[Any]) -> jax.stages.Compiled:
    """The training step of a config, exactly as the trainer runs it, compiled for devices not here."""
    program = programs.build(config, target_devices)
    state = states.abstract(program)
    with jax.set_mesh(states.concrete(program)), traced_for(target_devices[0]):
        step = jax.jit(
            lambda state, batch: train_step(program, state, batch),
            donate_argnums=0,
            compiler_options=compiler_options("cuda"),
        )
        return step.lower(state, abstract_batch(program)).compile()


def abstract_batch(program: programs.Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch."""
    rows, length = program.config.train.batch_size, program.config.data.sequence_length
    layout = program.layout
    whole = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=layout.sharding("batch", "length"))
    example = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=layout.sharding("batch"))
    return dict.fromkeys(("tokens", "labels", "segments", "positions"), whole) | {"example": example}


@contextmanager
def traced_for(device: jax.Device) -> Iterator[None]:
    """What is traced within is for a GPU that is not here.

    JAX checks the call against this machine's cuDNN and GPU and cannot be told of others; the
    compiler then needs neither.
    """
    here = checks.check_cudnn_version, checks.check_compute_capability

    def has_capability(capability: str) -> bool:
        return _version(device.compute_capability) >= _version(capability)

    checks.check_cudnn_version, checks.check_compute_capability = lambda: OLDEST_CUDNN, has_capability
    try:
        yield
    finally:
        checks.check_cudnn_version, checks.check_compute_capability = here


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
