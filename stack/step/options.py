"""The compiler's options of a program: what Stack sets for its devices and layers, and what a user does.

The trainer and the planner's compilations read them here, so that what is planned is what runs.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from stack.config import AXES, ConfigError
from stack.environment import xla_flags
from stack.hardware.chip import lookup
from stack.hardware.defaults import ASKED, BY_STACK, Setting, Value, options, settle
from stack.step.optimizer import is_names
from stack.step.program import Program
from stack.step.state import concrete

GPUS_OF_A_NODE = 8
"""Where the table of chips does not know one."""


def compiler_options(settled: Iterable[Setting]) -> dict[str, Value]:
    """What every jitted function that runs the model is compiled with: not what XLA has from elsewhere."""
    own = (one for one in settled if one.kind == "option" and one.by in (BY_STACK, ASKED))
    return {one.name: one.value for one in own}


def compiler_settings(program: Program) -> tuple[Setting, ...]:
    """The compiler's options of a program, each with whose it is and why; call it outside of any mesh.

    Raises:
      ConfigError: the installed XLA does not know an option of the config, or cannot read its value.
    """
    asked = program.config.runtime.compiler_options
    _check(asked)
    return settle(_known(_own(program)), asked, _given())


def _own(program: Program) -> dict[str, Value]:
    layout, device = program.layout, concrete(program).devices.flat[0]
    if device.platform not in ("gpu", "cuda"):
        return {}
    chip = lookup(device.device_kind)
    # Neighbours on `fsdp` have all places of the axes after it between them.
    span = math.prod(layout.size(axis) for axis in AXES[AXES.index("fsdp") :])
    return options(
        layer_bytes=layer_bytes(program),
        replicas=math.prod(layout.size(axis) for axis in layout.replicas),
        tensor=layout.size("tensor"),
        crosses_network=layout.zero > 0 and span > (chip.domain_size if chip else GPUS_OF_A_NODE),
        stages=layout.size("stage"),
    )


def layer_bytes(program: Program) -> int:
    """Bytes of the matrices of the largest layer, in the dtype they are gathered in, on one of `tensor`."""
    layout, total = program.layout, defaultdict(int)
    leaves = jax.tree_util.tree_leaves_with_path(program.parameters)
    names = jax.tree.leaves(program.axes, is_leaf=is_names)
    for (path, leaf), axes, role in zip(leaves, names, jax.tree.leaves(program.roles), strict=True):
        if axes[0] == "layers" and role != "vector":
            ways = math.prod(layout.size(axis) for name in axes for axis in layout.mesh_axes(name))
            total[path[0]] += leaf.size // leaf.shape[0] // ways
    size = np.dtype(jax.numpy.dtype(program.config.model.dtype)).itemsize
    return max(total.values(), default=0) * size


def _given() -> dict[str, tuple[Value, str]]:
    """What the user has set of the compiler outside of the config, and where."""
    given: dict[str, tuple[Value, str]] = {
        name: (value, "XLA_FLAGS") for name, value in xla_flags.given().items()
    }
    level = jax.config.jax_optimization_level
    if level != "UNKNOWN":
        given["optimization_level"] = level, "JAX_OPTIMIZATION_LEVEL"
    return given


def _known(own: Mapping[str, Value]) -> dict[str, Value]:
    """Stack's own options without those that the installed XLA has no more."""
    if not own or _error(own) is None:
        return dict(own)
    return {name: value for name, value in own.items() if _error({name: value}) is None}


def _check(asked: Mapping[str, Value]) -> None:
    for name, value in asked.items():
        told = _error({name: value})
        if told is None:
            continue
        where = f"runtime.compiler_options.{name}"
        if "No such compile option" in told:
            told = f"the installed XLA ({xla_flags.jaxlib()}) has no such option{xla_flags.nearest(name)}"
            raise ConfigError(f"{where}: {told}")
        raise ConfigError(f"{where}={value}: XLA cannot read that value: {told}")


def _error(some: Mapping[str, Value]) -> str | None:
    """What the compiler says against options, on a program that is nothing."""
    try:
        jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), np.float32)).compile(compiler_options=dict(some))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
    return None
