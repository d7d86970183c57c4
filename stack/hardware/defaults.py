"""What Stack sets of XLA, CUDA and NCCL, each with its reason: the one place that decides it.

Two kinds: variables of the environment, which are read once when a GPU is first used and so depend on the
machine alone, and options of the compiler, which depend on the program too. What a user has set is left.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stack import environment
from stack.hardware.driver import Gpus, find

Value = bool | int | float | str
Kind = Literal["variable", "option", "tiles"]

_TOOLBOX = "NVIDIA JAX-Toolbox, docs/GPU_performance.md"
_DECISIONS = "docs/decisions.md, Defaults"


@dataclass(frozen=True, kw_only=True)
class Default:
    """One thing that is set, and where."""

    name: str
    kind: Kind
    """A variable of the environment, an option of the compiler, or tiles of a kernel, which have no default
    here."""
    value: Value | Literal["a layer"]
    """`a layer`: bytes of one layer's matrices in the dtype they are gathered in."""
    reason: str
    source: str
    capability: tuple[float, float] = (0.0, math.inf)
    """Compute capabilities it is for: from the first, below the second."""
    least_gpus: int = 1
    """GPUs of one process from which on it is set."""
    pipelines_only: bool = False
    """Whether it is for programs of several stages alone."""
    same: tuple[str, ...] = ()
    """Other names by which a user decides the same."""


DEFAULTS = (
    Default(
        name="XLA_PYTHON_CLIENT_MEM_FRACTION",
        kind="variable",
        value="0.9",
        reason="share of a GPU's memory for arrays: JAX takes 0.75, and a quarter would lie idle; the rest is"
        " for CUDA's context, NCCL's buffers and cuBLAS",
        source=_TOOLBOX,
        same=(
            "XLA_CLIENT_MEM_FRACTION",
            "XLA_PYTHON_CLIENT_PREALLOCATE",
            "XLA_PYTHON_CLIENT_ALLOCATOR",
        ),
    ),
    Default(
        name="CUDA_DEVICE_MAX_CONNECTIONS",
        kind="variable",
        value="1",
        reason="one hardware queue keeps collectives in the order the scheduler gave them beside matrix"
        " products; slower on Blackwell, where kernels of higher priority need not wait",
        source=_TOOLBOX,
        capability=(9.0, 10.0),
        least_gpus=1,
    ),
    Default(
        name="NCCL_LAUNCH_MODE",
        kind="variable",
        value="GROUP",
        reason="of one process with several GPUs: without it a call that waits for all of CUDA, between the"
        " launches of one collective, stands still for ever",
        source=_TOOLBOX,
        least_gpus=2,
    ),
    Default(
        name="optimization_level",
        kind="option",
        value="O1",
        reason="pipelined collectives and double-buffered loops: the gathers of the next layer run beside the"
        " work of this one",
        source="openxla.org/xla/effort_levels",
    ),
    *(
        Default(
            name=f"xla_gpu_{kind}_combine_threshold_bytes",
            kind="option",
            value="a layer",
            reason="XLA's 30 MiB cut a layer's weights into several collectives, which get less of the links"
            " and wait for the network each; left where all of them stay beside those of tensor on the fast"
            " links of one node, which large ones would keep waiting",
            source=f"{_TOOLBOX}; {_DECISIONS}",
        )
        for kind in ("all_gather", "reduce_scatter", "all_reduce")
    ),
    Default(
        name="xla_gpu_enable_while_loop_unrolling",
        kind="option",
        value="WHILE_LOOP_UNROLLING_NO_UNROLL",
        reason="of a pipeline: unrolled by two, the loop over its ticks has twice the buffers of what waits,"
        " and one over layers split over tensor stops the compiler (Call graph must have been flattened)",
        source="docs/decisions.md, Pipelines",
        pipelines_only=True,
    ),
)
"""All of them."""

XLA_COMBINES = 31_457_287
"""Bytes up to which XLA combines collectives by itself (jaxlib 0.11.2): no less is ever set."""

BY_STACK, ASKED = "stack", "runtime.compiler_options"
"""Who decided a setting, where no user did, and where a config asks for it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run has of one of them."""

    name: str
    kind: Kind
    value: Value
    by: str
    """`stack`, or where the user has set it: `environment`, `XLA_FLAGS`, `runtime.compiler_options` ..."""
    reason: str = ""
    source: str = ""

    def __str__(self) -> str:
        """`CUDA_DEVICE_MAX_CONNECTIONS=1`, and whose it is if not Stack's."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.name}={value}" + ("" if self.by == BY_STACK else f" ({self.by})")


def import_jax() -> None:
    """Imports JAX with what is set for the GPUs of this machine.

    Raises:
      StackError: as `environment.import_jax`.
    """
    set_variables()
    environment.import_jax()


def set_variables(gpus: Gpus | None = None) -> None:
    """Sets the variables of the environment for the GPUs of this machine; those that are set stay.

    Args:
      gpus: those of the process; None: asked of the driver.
    """
    if environment.has_devices():  # They are read no more.
        return
    gpus = gpus or find()
    for default in variables(gpus):
        if not any(name in environment.given() for name in (default.name, *default.same)):
            environment.set_default(default.name, str(default.value))


def variables(gpus: Gpus | None) -> tuple[Default, ...]:
    """The variables that are set for some GPUs; none without."""
    if gpus is None:
        return ()
    return tuple(
        one
        for one in DEFAULTS
        if one.kind == "variable"
        and one.capability[0] <= gpus.compute_capability < one.capability[1]
        and gpus.number >= one.least_gpus
    )


def variable_settings() -> tuple[Setting, ...]:
    """What the environment has of them, whoever set it, and what a user has set of NCCL besides."""
    settings = []
    given, own = environment.given(), environment.defaults()
    for default in (one for one in DEFAULTS if one.kind == "variable"):
        for name in (default.name, *default.same):
            if name in own:
                setting = Setting(name=name, kind="variable", value=own[name], by=BY_STACK)
                settings.append(replace(setting, reason=default.reason, source=default.source))
            elif name in given:
                settings.append(Setting(name=name, kind="variable", value=given[name], by="environment"))
    told = {one.name for one in settings}
    settings += [
        Setting(name=name, kind="variable", value=value, by="environment")
        for name, value in sorted(given.items())
        if name.startswith("NCCL_") and name not in told
    ]
    return tuple(settings)


def options(
    *, layer_bytes: int, replicas: int, tensor: int, crosses_network: bool, stages: int = 1
) -> dict[str, Value]:
    """The compiler's options for a program on GPUs.

    Args:
      layer_bytes: of the matrices of its largest layer, in the dtype they are gathered in.
      replicas: places with examples of their own, over which gradients are summed.
      tensor: ways its matrices are split.
      crosses_network: whether weights are gathered over more than the fast links of one node.
      stages: of its pipeline.
    """
    combined = replicas > 1 and (tensor == 1 or crosses_network) and layer_bytes > XLA_COMBINES
    values = {one.name: layer_bytes if one.value == "a layer" else one.value for one in DEFAULTS}
    return {
        one.name: values[one.name]
        for one in DEFAULTS
        if one.kind == "option"
        and (one.value != "a layer" or combined)
        and (stages > 1 or not one.pipelines_only)
    }


def settle(
    own: Mapping[str, Value], asked: Mapping[str, Value], given: Mapping[str, tuple[Value, str]]
) -> tuple[Setting, ...]:
    """The compiler's options as they come out; those of users that Stack has none of come along.

    Args:
      own: of Stack, from `options`.
      asked: by the config, over all others.
      given: by the user elsewhere: the value, and where.
    """
    settings: dict[str, Setting] = {}
    by_name = {one.name: one for one in DEFAULTS}
    for name, value in own.items():
        default = by_name[name]
        if not any(other in given for other in (name, *default.same)):
            setting = Setting(name=name, kind="option", value=value, by=BY_STACK)
            settings[name] = replace(setting, reason=default.reason, source=default.source)
    for name, (value, by) in given.items():
        settings[name] = Setting(name=name, kind="option", value=value, by=by)
    for name, value in asked.items():
        settings[name] = Setting(name=name, kind="option", value=value, by=ASKED)
    return tuple(settings.values())


def compared(settings: Sequence[Setting]) -> dict[str, str]:
    """What a program may depend on: tiles, and the compiler's options but what it writes down for people."""
    options = (one for one in settings if one.kind != "variable" and not one.name.startswith("xla_dump"))
    return {one.name: str(one.value) for one in options}
