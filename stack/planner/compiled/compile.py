"""Compiling the training step for GPUs on a machine that has none.

Needs the extra `plan`: JAX's CUDA plugin and NVIDIA's compilers, no CUDA libraries and no driver.
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import jax
from jax.experimental import topologies

from stack.config import Config, StackError
from stack.environment import quiet_discovery
from stack.kernels.attention.absent import traced_for
from stack.step import program as programs
from stack.step import state as states
from stack.step.options import compiler_options, compiler_settings
from stack.step.steps import steps_of

DEVICES_PER_HOST = 8
"""Of an HGX or DGX machine."""

MISSING_PLUGIN = "compiling for GPUs that are not here needs the extra plan: pip install 'stack[plan]'"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abort:
    """A compilation without a GPU that fails, or kills the process, which no `except` catches."""

    pattern: str
    """What in the lowered program makes it happen."""
    versions: tuple[str, ...] | None = None
    """Of JAX; None: all."""
    below_capability: float = math.inf
    """It happens for GPUs below this compute capability."""
    reason: str
    avoid: dict[str, Any] | None = None
    """Compiler options under which it does not happen; None: the program is refused."""


ABORTS = (
    Abort(
        pattern=r"",
        versions=("0.12.0", "0.12.0.1"),
        reason="its own kernels of small all-reduces stop LLVM: size mismatch when packing elements",
        avoid={"xla_gpu_experimental_use_collective_kernels": ""},
    ),
    Abort(
        pattern=r"\bmosaic_gpu",
        below_capability=9.0,
        reason="a Mosaic kernel written for Hopper stops LLVM: cannot select llvm.nvvm.elect.sync",
    ),
    Abort(
        pattern=r"\bstablehlo\.sort\b",
        reason="how much memory CUB sorts in is asked of a GPU: invalid device ordinal",
        avoid={"xla_gpu_enable_cub_radix_sort": False},
    ),
)
"""Known aborts of XLA's GPU compiler, seen in compilations without a GPU."""


def has_plugin() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return any(_has_module(f"jax_plugins.xla_cuda{version}") for version in (13, 12))


def _has_module(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def targets() -> tuple[str, ...]:
    """The chips that can be compiled for."""
    folder = files("stack.hardware") / "targets"
    return tuple(sorted(file.name.removesuffix(".txtpb") for file in folder.iterdir()))


def devices(target: str, num_devices: int, *, per_host: int = DEVICES_PER_HOST) -> list[Any]:
    """Devices to compile for that are not here.

    Args:
      target: name of a file in `stack/hardware/targets`, such as `h200`.
      num_devices: a multiple of `per_host`, or less than it.
      per_host: devices of one host, which share its fast links.

    Raises:
      StackError: no such target, the last host would be filled in part, or the plugin is missing.
    """
    if target not in targets():
        raise StackError(
            f"compile_target={target}: there is none of that name; one of {', '.join(targets())}"
        )
    per_host = min(per_host, num_devices)
    if num_devices < 1 or num_devices % per_host:
        below = num_devices // per_host * per_host
        raise StackError(
            f"{num_devices} devices fill the last host of {per_host} in part; "
            f"compile for {below} or {below + per_host}"
        )
    if not has_plugin():
        raise StackError(MISSING_PLUGIN)
    description = (files("stack.hardware") / "targets" / f"{target}.txtpb").read_text()
    text = "\n".join(line for line in description.splitlines() if not line.startswith("#"))
    shape = f"1x{num_devices // per_host}x{per_host}"
    try:
        with quiet_discovery():
            return topologies.get_topology_desc(
                "", platform="cuda", target_config=text, topology=shape
            ).devices
    except NotImplementedError as error:
        raise StackError(
            "JAX looks for a GPU before it compiles for one that is not here; set JAX_PLATFORMS=cpu"
        ) from error


def compile_step(config: Config, target_devices: list[Any]) -> jax.stages.Compiled:
    """The training step of a config, exactly as the trainer runs it, compiled for devices not here."""
    return compile_lowered(lower_step(programs.build(config, target_devices)), target_devices[0])


def lower_step(program: programs.Program, options: Mapping[str, Any] | None = None) -> jax.stages.Lowered:
    """The training step, traced and typed for the devices of the program's mesh.

    Args:
      program: of the run.
      options: of the compiler; None: those that the trainer has.
    """
    options = compiler_options(compiler_settings(program)) if options is None else options
    with traced_for(states.concrete(program).devices.flat[0]):
        return steps_of(program, options).lower()


def compile_lowered(
    lowered: jax.stages.Lowered, device: Any, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """A program lowered for devices like this one, compiled; `options` come on top of its own.

    Kernels are not tuned where that can be helped: there is nothing to time them on, and going through
    them all is half of the time. Buffers and collectives are the same.

    Raises:
      StackError: this compilation is known to kill the process, or the compilers are missing.
    """
    avoid = avoid_aborts(lowered.as_text(), jax.__version__, float(device.compute_capability))
    options = avoid | (options or {})
    try:
        return lowered.compile(compiler_options=options | {"xla_gpu_autotune_level": 0})
    except jax.errors.JaxRuntimeError as error:
        if re.search(r"No PTX compilation provider|libdevice", str(error)):
            raise StackError(f"{MISSING_PLUGIN} (NVIDIA's compilers are not found)") from error
        if "No supported config found" not in str(error):
            raise
    # A fused product whose kernel has no default: the compiler takes the first of all that there are.
    return lowered.compile(compiler_options=options)


def avoid_aborts(lowered: str, jax_version: str, compute_capability: float) -> dict[str, Any]:
    """Compiler options that keep a program away from known aborts.

    Raises:
      StackError: nothing does.
    """
    options: dict[str, Any] = {}
    for abort in ABORTS:
        if abort.versions is not None and jax_version not in abort.versions:
            continue
        if compute_capability >= abort.below_capability or not re.search(abort.pattern, lowered):
            continue
        if abort.avoid is None:
            raise StackError(
                f"jax {jax_version} would abort while it compiles for compute capability "
                f"{compute_capability}: {abort.reason}; plan for another chip, or without that kernel"
            )
        options |= abort.avoid
    return options


@contextmanager
def capture_stderr() -> Iterator[list[str]]:
    """Lines written to the standard error by anyone, the compiler's C++ included, once it is left.

    They are shown after all where an exception passes that is not of the user's making.
    """
    lines: list[str] = []
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        failure = True
        try:
            yield lines
            failure = False
        except StackError:
            failure = False
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            text = file.read().decode(errors="replace")
            lines += text.splitlines()
            if failure:
                sys.stderr.write(text)
