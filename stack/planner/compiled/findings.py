"""What is wrong with a compiled step, or slower than it need be: one sentence and one line for each."""

import dataclasses
import math
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding

from stack.parallel.mesh import without_cache
from stack.parallel.rules import BATCH_AXES, split_axes
from stack.planner.compiled import compile as compiling
from stack.planner.compiled.collectives import Collective, sources
from stack.step.program import Program

LARGE_PARAMETER = 16 * 2**20
"""Bytes of a parameter that should not lie whole on every device."""

EXACT = ("f32", "f64", "s32", "u32", "s64", "u64", "pred", "s8", "u8")
"""What sums lose nothing in that matters."""

Kind = Literal[
    "involuntary rematerialization",
    "memory",
    "global batch",
    "whole parameter",
    "reduced precision",
    "attention",
    "traffic",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong with a compiled step, or slower than it need be."""

    kind: Kind
    text: str
    """One sentence, with the numbers."""
    source: str = ""
    """The line that causes it, where that is known."""

    def __str__(self) -> str:
        """`involuntary rematerialization: ... (stack/layers/mlp.py:40)`."""
        return f"{self.kind}: {self.text}" + (f" ({self.source})" if self.source else "")


def findings(
    program: Program, operations: Iterable[Collective], *, need: float, memory: float, warnings: Iterable[str]
) -> list[Finding]:
    """Everything but involuntary rematerializations, for which see `involuntary`.

    Args:
      program: what was compiled.
      operations: its collectives.
      need: bytes that it holds on each device.
      memory: bytes that each device has.
      warnings: what the compiler has printed.
    """
    operations = list(operations)
    return [
        *_memory_findings(need, memory, warnings),
        *_batch_findings(program, operations),
        *_precision_findings(operations),
        *_parameter_findings(program),
        *_attention_findings(program),
    ]


def _memory_findings(need: float, memory: float, warnings: Iterable[str]) -> list[Finding]:
    if need <= memory:
        return []
    text = f"{gib(need)} on each device, which has {gib(memory)}"
    if attempt := re.search(r"Can't reduce memory use below .*", "\n".join(warnings)):
        text += f"; XLA has computed again what it could ({attempt[0]})"
    return [Finding(kind="memory", text=text)]


def involuntary(warnings: Iterable[str], lowered: jax.stages.Lowered, device: Any) -> list[Finding]:
    """Arrays that XLA makes whole on every device because it cannot get from one sharding to another.

    Args:
      warnings: what XLA has printed.
      lowered: the program, compiled once more for the lines of its operations if there are any.
      device: one that it is lowered for.
    """
    arrays = dict.fromkeys(match.groups() for line in warnings if (match := _INVOLUNTARY.search(line)))
    lines = _partitioner_sources(lowered, device) if arrays else {}
    return [
        Finding(
            kind="involuntary rematerialization",
            text=f"{name} {shape}, made whole on every device to go from {_axes(before)} to {_axes(after)}",
            source=lines.get(int(frame or 0), ""),
        )
        for before, after, shape, name, frame in arrays
    ]


_INVOLUNTARY = re.compile(
    r"Involuntary full rematerialization.*? from sharding \{(.*?)\} to \{(.*?)\} efficiently for HLO "
    r'operation %\S+ = (\S+?)(?:\{[\d,]*\})? .*?op_name="([^"]*)"(?: stack_frame_id=(\d+))?'
)


def _axes(sharding: str) -> str:
    """What a sharding splits, without the mesh that all of them name."""
    return re.sub(r"^.*?\], ", "", sharding)


def _partitioner_sources(lowered: jax.stages.Lowered, device: Any) -> dict[int, str]:
    """The lines of stack frames as the partitioner numbers them, which only a dump of it tells."""
    with (
        tempfile.TemporaryDirectory() as folder,
        compiling.capture_stderr(),
        without_cache(),
    ):
        compiling.compile_lowered(lowered, device, {"xla_dump_to": folder})
        dumps = list(Path(folder).glob("*after_spmd_partitioner.txt"))
        return sources(dumps[0].read_text()) if dumps else {}


def _batch_findings(program: Program, operations: Iterable[Collective]) -> list[Finding]:
    return [
        Finding(
            kind="global batch",
            text=f"{c.kind} over {over(c.axes)} of {_shapes(c)}, {c.times} times a step, holds all rows "
            "of the batch on every device",
            source=c.source,
        )
        for c in operations
        # Of a pipeline, every stage has the numbers of all tokens of its replica.
        if any(holds_global_batch(program, shape) for dtype, shape in c.arrays if dtype != "s32")
    ]


def holds_global_batch(program: Program, shape: tuple[int, ...]) -> bool:
    """Whether an array is of all rows of a batch or a micro-batch: of tokens, or of vectors of tokens.

    A parameter may have the same sizes; its own are passed over.
    """
    train, length = program.config.train, program.config.data.sequence_length
    sizes = tuple(size for size in shape if size > 1)
    if math.prod(map(program.layout.size, BATCH_AXES)) == 1:
        return False
    for rows in {train.batch_size, train.batch_size // train.accumulation} - {1}:
        if rows * length in sizes:
            return True
        if rows in sizes and length in sizes[sizes.index(rows) + 1 :]:
            return tuple(sorted(sizes)) not in _parameter_sizes(program)
    return False


def _parameter_sizes(program: Program) -> set[tuple[int, ...]]:
    """Sizes of parameters, of one layer and of all: whole, as `tensor` splits them, and at rest."""
    layout, sizes = program.layout, set()
    names = jax.tree.leaves(program.axes, is_leaf=lambda node: isinstance(node, tuple))
    for leaf, axes in zip(jax.tree.leaves(program.parameters), names, strict=True):
        whole = NamedSharding(program.mesh, layout.whole_spec(axes)).shard_shape(leaf.shape)
        for shape in (leaf.shape, whole, leaf.sharding.shard_shape(leaf.shape)):
            sizes |= {tuple(sorted(size for size in part if size > 1)) for part in (shape, shape[1:])}
    return sizes


def _precision_findings(operations: Iterable[Collective]) -> list[Finding]:
    """Sums over replicas are of gradients, losses and norms: none may be rounded to 16 bits."""
    return [
        Finding(
            kind="reduced precision",
            text=f"{c.kind} over {over(c.axes)} of {_shapes(c)}, {c.times} times a step, sums in "
            "less than float32",
            source=c.source,
        )
        for c in operations
        if c.kind in ("all-reduce", "reduce-scatter")
        and {"data", "fsdp"} & set(c.axes)
        and not {dtype for dtype, _ in c.arrays} <= set(EXACT)
    ]


def _parameter_findings(program: Program) -> list[Finding]:
    """Large parameters that no dimension of lets `fsdp` split."""
    layout = program.layout
    if layout.zero == 0 or layout.size("fsdp") == 1:
        return []
    results = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(program.parameters)[0]:
        shard = leaf.sharding.shard_shape(leaf.shape)
        bytes_here = math.prod(shard) * leaf.dtype.itemsize
        if bytes_here > LARGE_PARAMETER and "fsdp" not in split_axes(leaf.sharding.spec):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            text = (
                f"{name} {list(leaf.shape)} is whole on every device, {gib(bytes_here)}: "
                f"fsdp={layout.size('fsdp')} divides none of its free dimensions"
            )
            results.append(Finding(kind="whole parameter", text=text))
    return results


def _attention_findings(program: Program) -> list[Finding]:
    choice = program.attention
    if not choice.stores_scores or choice.reason == "asked for":
        return []
    return [Finding(kind="attention", text=f"XLA's plain one, which stores all scores: {choice.reason}")]


def over(axes: tuple[str, ...]) -> str:
    """`data x fsdp`."""
    return " x ".join(axes) or "unknown axes"


def _shapes(collective: Collective) -> str:
    names = [f"{dtype}{list(shape)}" for dtype, shape in collective.arrays[:3]]
    return ", ".join(names) + (" ..." if len(collective.arrays) > 3 else "")


def gib(size: float) -> str:
    """`12.34 GiB`."""
    return f"{size / 2**30:.2f} GiB"
