"""The gate: what a compiled step may communicate, by a formula of its layout, never by a recording.

A layout needs so many bytes of each collective over each mesh axis. A step that moves more than
`SLACK` times that, or sums gradients in less than float32, holds the batch of all devices on one, makes
an array whole because the compiler found no other way, or does not fit, is not what was designed.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from stack.config import Config
from stack.models import model_cost
from stack.parallel import mesh as meshes
from stack.parallel.int8 import block_size
from stack.parallel.rules import BATCH_AXES, split_axes
from stack.planner.compiled.findings import Finding, Kind
from stack.planner.compiled.report import Compiled
from stack.step import program as programs
from stack.step.program import Program

SLACK = 1.1
"""A step may move this many times what the formula says."""

SCALARS = 2**16
"""Bytes a step may move over any axis besides: sums of the loss per chunk, norms, counts, indices."""

FAILURES: frozenset[Kind] = frozenset(
    {"involuntary rematerialization", "memory", "global batch", "reduced precision"}
)
"""Findings of the compiled report that do not pass."""

Limits = Mapping[tuple[str, str], float]
"""Bytes per step by kind of collective and mesh axis, of the larger side of each operation."""


def check(compiled: Compiled, config: Config) -> list[Finding]:
    """What keeps a compiled step from passing; empty: it passes.

    Args:
      compiled: the report of `compile_plan`.
      config: the config it was compiled from.
    """
    mesh = meshes.abstract(config.mesh, compiled.devices)
    allowance = limits(programs.on_mesh(config, mesh, "gpu").instance)
    results = [finding for finding in compiled.findings if finding.kind in FAILURES]
    return results + over_limits(compiled, allowance)


def over_limits(compiled: Compiled, allowance: Limits) -> list[Finding]:
    """Collectives that move more than they are allowed, each with the line that moves most of them."""
    traffic: dict[tuple[str, str], float] = defaultdict(float)
    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for collective in compiled.collectives:
        for axis in collective.axes or tuple(compiled.mesh):
            size = collective.bytes * collective.times
            traffic[collective.kind, axis] += size
            worst[collective.kind, axis][collective.source] += size
    results = []
    for (kind, axis), size in traffic.items():
        limit = SLACK * allowance.get((kind, axis), 0) + SCALARS
        if size > limit:
            lines = worst[kind, axis]
            text = f"{kind} over {axis} moves {size / 1e6:,.1f} MB a step, the layout needs "
            text += f"{allowance.get((kind, axis), 0) / 1e6:,.1f} MB"
            results.append(Finding(kind="traffic", text=text, source=max(lines, key=lines.__getitem__)))
    return results


def limits(program: Program) -> Limits:
    """Bytes per step that a layout needs, by kind of collective and mesh axis.

    ZeRO (arXiv 1910.02054): with P the bytes of the matrices in the compute dtype and G in that of
    reduction, `fsdp` gathers P and scatters G; stage 3 does so every micro-batch and gathers the layers
    twice; stage 2 scatters every micro-batch; `data` sums G / fsdp once, or for a second shard (arXiv
    2306.10209) gathers P / fsdp and scatters G / fsdp once, either in 8 bits if asked. Vectors are whole, and
    may be summed every micro-batch. Adafactor sums its squares over the dimension that is split. Tensor
    parallelism (arXiv 1909.08053): with A the bytes of a micro-batch's hidden states, two sums a layer
    forward and two backward; `sequence_parallel` (arXiv 2205.05198) has a gather and a scatter for each
    sum; layers computed again repeat those of their forward pass. Layers that attend to another text have
    a sum more each way.
    """
    total: dict[tuple[str, str], float] = defaultdict(float)
    for kind, axes, size in (*_parameters(program), *_activations(program)):
        for axis in axes:
            if program.layout.size(axis) > 1:
                total[kind, axis] += size
    return dict(total)


@dataclass(frozen=True, kw_only=True)
class _Parameter:
    """One leaf of the parameters as the layout treats it."""

    elements: int
    """On one place of `tensor`."""
    matrix: bool
    table: bool
    per_layer: bool
    """One for each layer."""
    split: bool
    """Over `fsdp`, at rest."""
    staged: bool
    """Over `stage`, at rest."""
    summed: int
    """Elements of a sum over the dimension that `fsdp` splits; 0 if it splits none."""
    whole: bool
    """On all of `tensor`."""
    int8: float
    """Bytes of an element in 8 bits, with its share of a scale; 0 where it has no second shard."""


def _leaves(program: Program) -> Iterator[_Parameter]:
    layout = program.layout
    leaves = jax.tree.leaves(program.parameters)
    names = jax.tree.leaves(program.axes, is_leaf=lambda node: isinstance(node, tuple))
    roles = jax.tree.leaves(program.roles)
    for leaf, axes, role in zip(leaves, names, roles, strict=True):
        ways = math.prod(layout.size(axis) for name in axes for axis in layout.mesh_axes(name))
        places = [place for place, entry in enumerate(leaf.sharding.spec) if "fsdp" in split_axes(P(entry))]
        split = leaf.shape[places[0]] if places else 0
        second = layout.second_shard and "data" in split_axes(leaf.sharding.spec)
        yield _Parameter(
            elements=leaf.size // ways,
            matrix=role != "vector",
            table=role == "table",
            per_layer=axes[0] == "layers",
            split=split > 0,
            staged="stage" in split_axes(leaf.sharding.spec),
            summed=leaf.size // ways // split if split else 0,
            whole=ways == 1,
            int8=1 + 4 / block_size(leaf.sharding.shard_shape(leaf.shape)[-1]) if second else 0.0,
        )


def _parameters(program: Program) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """(kind, axes, bytes per step) of what parameters and their gradients need."""
    layout, train = program.layout, program.config.train
    compute, reduce = _itemsize(program.config.model.dtype), _itemsize(train.grad_reduce_dtype)
    if layout.size("stage") > 1:
        yield from _staged_parameters(program, compute, reduce)
        return
    scatters = 1 if layout.zero < 2 else train.accumulation
    for leaf in _leaves(program):
        if not leaf.matrix:
            # Of a norm's scale, each device of `tensor` has seen its heads or its part of the sequence.
            axes = ("data", "fsdp", "tensor") if leaf.whole else ("data", "fsdp")
            yield "all-reduce", axes, leaf.elements * 4 * train.accumulation
            continue
        if leaf.whole and layout.sequence_parallel:
            yield "all-reduce", ("tensor",), leaf.elements * reduce * train.accumulation
        if not leaf.split:
            yield "all-reduce", ("data", "fsdp"), leaf.elements * reduce
            continue
        passes = 1 if layout.zero < 3 else train.accumulation * (2 if leaf.per_layer else 1)
        once = layout.tables_once and leaf.table
        yield "all-gather", ("fsdp",), leaf.elements * compute * (1 if once else passes)
        yield "reduce-scatter", ("fsdp",), leaf.elements * reduce * (1 if once else scatters)
        shard = leaf.elements / layout.size("fsdp")
        if leaf.int8:
            yield "all-gather", ("data",), shard * (leaf.int8 if layout.gather_dtype == "int8" else compute)
            if layout.scatter_dtype == "int8":
                yield "all-to-all", ("data",), shard * leaf.int8
            else:
                yield "reduce-scatter", ("data",), shard * reduce
        else:
            yield "all-reduce", ("data",), shard * reduce
        if program.config.optimizer.kind == "adafactor":
            yield "all-reduce", ("fsdp", "data") if leaf.int8 else ("fsdp",), leaf.summed * 4


def _staged_parameters(
    program: Program, compute: int, reduce: int
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """The same of a pipeline: layers are dealt out over `stage`, what is in none is gathered over it too."""
    layout, cost = program.layout, model_cost(program.config.model)
    stages, fsdp = layout.size("stage"), layout.size("fsdp")
    plan = program.pipeline([stack.number for stack in cost.stacks])
    # Of a stack of so many layers each stage has room for as many as the stage with most of them.
    room = max(
        most * plan.chunks * stages / number for most, number in zip(plan.most, plan.stacks, strict=True)
    )
    for leaf in _leaves(program):
        if not leaf.matrix:
            yield "all-reduce", ("data", "fsdp", "stage"), leaf.elements * 4
            continue
        ways = fsdp if leaf.split else 1
        here = leaf.elements / stages * room if leaf.per_layer else leaf.elements
        if not leaf.staged:
            yield "all-reduce", ("stage",), leaf.elements / ways * reduce
        elif leaf.per_layer:
            yield "all-to-all", ("stage",), here / ways * (compute + reduce)
        else:
            yield "all-gather", ("stage",), here / ways * compute
            yield "reduce-scatter", ("stage",), here / ways * reduce
        if leaf.split:
            yield "all-gather", ("fsdp",), here * compute
            yield "reduce-scatter", ("fsdp",), here * reduce
        else:
            yield "all-reduce", ("fsdp",), leaf.elements * reduce
        yield "all-reduce", ("data",), leaf.elements / (stages if leaf.staged else 1) / ways * reduce
    # Every stage has the numbers of all of its replica's tokens.
    of_row = (
        math.prod(program.objective.sizes[axis] for axis in field.axes[1:])
        for field in program.objective.fields
    )
    yield "all-gather", ("stage",), _rows(program) * 4 * sum(of_row)
    hidden = sum(_rows(program) * program.objective.sizes[stack.attention.queries] for stack in cost.stacks)
    activation = hidden / program.config.train.accumulation * program.config.model.embed_dim * compute
    if layout.sequence_parallel:
        activation /= layout.size("tensor")
    yield "collective-permute", ("stage",), 2 * plan.table.ticks * activation


def _activations(program: Program) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """(kind, axes, bytes per step) of what `tensor` needs, for the tokens of one replica."""
    config, layout = program.config, program.layout
    rows, sizes = _rows(program), program.objective.sizes
    width, cost = config.model.embed_dim * _itemsize(config.model.dtype), model_cost(config.model)
    # Nothing gathered is ever saved; sums are, by remat `dots`.
    gathers_again = 0 if config.train.remat == "none" else 1
    sums_again = 0 if config.train.remat == "dots" else gathers_again
    for stack in cost.stacks:
        hidden, layers = rows * sizes[stack.attention.queries] * width, stack.number
        sums = len(stack.attentions) + 1
        # The embedding and the final norm have one each, of what another stack reads once for all its layers.
        if layout.sequence_parallel:
            yield "all-gather", ("tensor",), hidden * (layers * sums * (2 + gathers_again) + 2)
            yield "reduce-scatter", ("tensor",), hidden * (layers * sums * (2 + sums_again) + 2)
        else:
            # What a layer adds last is not needed again: one sum less than its forward pass has.
            yield "all-reduce", ("tensor",), hidden * (layers * (2 * sums + sums_again * (sums - 1)) + 2)
    tokens = rows * sizes.get(cost.head[-1].tokens, sizes["length"])
    if layout.sequence_parallel:
        yield "all-reduce", ("tensor",), tokens * width  # The loss has a plain sum of the hidden gradient.
    # Highest score, sum of exponentials and score of the label, float32.
    yield "all-reduce", ("tensor",), tokens * 3 * 4


def _rows(program: Program) -> float:
    """Of one replica, a step."""
    return program.config.train.batch_size / math.prod(map(program.layout.size, BATCH_AXES))


def _itemsize(dtype: str) -> int:
    return np.dtype(jax.numpy.dtype(dtype)).itemsize
