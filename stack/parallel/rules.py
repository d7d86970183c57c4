"""THE table: which mesh axes each logical axis is split over.

Layers and models name axes ("batch", "heads", ...); only this file knows what becomes of a name.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stack.config import MeshConfig

BATCH_AXES = ("data", "fsdp")
SPLIT_AXES = frozenset({"data", "fsdp", "stage"})
"""What parameters at rest are split over besides `tensor`: of a pipeline, over its stages too, and over
`data` where there is a second shard."""

TABLE: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "length": (),
    "residual_length": (),  # ("tensor",) under sequence parallelism
    "target_length": (),
    "masked": (),
    "answers": (),
    "units": (),
    "classes": (),
    "types": (),
    "buckets": (),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "amax": (),
    "rank": (),
    "split_rank": ("tensor",),
}
"""Logical axis -> mesh axes. Parameters are split over `fsdp` besides: see `parameter_spec`."""

Role = Literal["matrix", "table", "vector", "float8", "amax"]
"""What a parameter is used for. A `matrix` enters matmuls; a `table` is read row by row, and may enter one
as well. Both are split over `fsdp` and used in the compute dtype. A `vector` (a norm's scale, a bias) is
used elementwise: it stays float32, whole over `fsdp`, and never decays. A matrix is `float8` within a step
that rounds it to that: its product gathers it. `amax` are largest numbers, whose gradient is what they
are now: it is the same everywhere, and of several micro-batches the largest counts."""

ELEMENTWISE: frozenset[Role] = frozenset({"vector", "amax"})
"""Roles of what is whole everywhere, and enters no product."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How arrays lie on a mesh; without one, every question has a trivial answer."""

    mesh: Mesh | AbstractMesh | None = None
    zero: int = 0
    sequence_parallel: bool = False
    tables_once: bool = False
    """Whether stage 3 gathers tables once a step, not every micro-batch."""
    second_shard: bool = False
    """Whether parameters of stage 3 lie split over `data` too: see `stack.parallel.second_shard`."""
    gather_dtype: Literal["compute", "int8"] = "compute"
    """What weights cross `data` in then."""
    scatter_dtype: Literal["reduce", "int8"] = "reduce"
    """What gradients do."""
    dtype: Any = None
    """What matrices are cast to when they are gathered; None: as they are."""
    reduce_dtype: Any = "float32"
    """What gradients are summed in."""
    split_batch: bool = True
    """False: the batch is whole everywhere (generation, where rows are few)."""
    rows_over_stages: bool = False
    """Whether the batch is split over `stage` as well, as everything outside of the pipeline wishes."""
    manual: frozenset[str] = frozenset()
    """Mesh axes that a surrounding `shard_map` has already split over: nothing is left to split there."""

    @staticmethod
    def of(mesh: Mesh | AbstractMesh, config: MeshConfig, **changes: Any) -> "Layout":
        """The layout a config asks for on a mesh."""
        return Layout(
            mesh=mesh,
            zero=3 if mesh.shape["stage"] > 1 else config.zero,
            sequence_parallel=config.sequence_parallel,
            tables_once=config.tables_once,
            second_shard=config.second_shard,
            gather_dtype=config.gather_dtype,
            scatter_dtype=config.scatter_dtype,
            **changes,
        )

    def everywhere(self, tree: Any) -> Any:
        """Arrays of a tree, whole on every device."""
        return tree if self.trivial else jax.tree.map(lambda values: jax.reshard(values, P()), tree)

    def size(self, axis: str) -> int:
        """Devices along one mesh axis."""
        return self.mesh.shape[axis] if self.mesh is not None and axis not in self.manual else 1

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes, of more than one device, that a logical axis is split over."""
        axes = TABLE[name]
        if name == "residual_length" and self.sequence_parallel:
            axes = ("tensor",)
        if name == "batch" and self.rows_over_stages:
            axes = (*axes, "stage")
        if name == "batch" and not self.split_batch:
            axes = ()
        return tuple(axis for axis in axes if self.size(axis) > 1)

    @property
    def trivial(self) -> bool:
        """Whether there is nothing to split over."""
        if self.mesh is None:
            return True
        return all(self.size(axis) == 1 for axis in self.mesh.axis_names)

    @property
    def replicas(self) -> frozenset[str]:
        """The mesh axes that hold different examples, over which gradients are summed."""
        return frozenset(self.mesh_axes("batch"))

    def spec(self, *names: str | None) -> P | None:
        """Partition of an activation with these logical axes; None where there is nothing to split."""
        if self.trivial:
            return None
        return P(*(spec_entry(self.mesh_axes(name)) if name else None for name in names))

    def product_spec(self, names: tuple[str, ...], *, contracted: tuple[str, ...]) -> P | None:
        """Partition of a matmul's result before its partial sums are added.

        Where the contracted axes are split, each device holds a partial sum: `unreduced`. Laying that
        out with `shard` is then a reduce-scatter where the result is split over the same devices and
        an all-reduce where it is not.
        """
        if self.trivial:
            return None
        if self.manual:  # JAX has no partial sums there yet: they are added at once.
            return self.spec(*names)
        summed = {axis for name in contracted for axis in self.mesh_axes(name)}
        entries = (tuple(axis for axis in self.mesh_axes(name) if axis not in summed) for name in names)
        return P(*map(spec_entry, entries), unreduced=summed)

    def shard(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x`, laid out as its logical axes say."""
        spec = self.spec(*names)
        return x if spec is None else jax.reshard(x, spec)

    def sum_late(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x`, laid out as its logical axes say, for matmuls whose results are split over `tensor`.

        Its gradient stays a partial sum on each device, of however many matmuls, until it leaves here.
        """
        spec = self.spec(*names)
        if spec is None or self.size("tensor") == 1 or self.manual:
            return self.shard(x, *names)
        return jax.reshard(x, P(*spec.partitions, reduced={"tensor"}))

    def sharding(self, *names: str | None) -> NamedSharding:
        """The same as a sharding, for arrays made outside jit."""
        assert self.mesh is not None, "a layout without a mesh has no shardings"
        return NamedSharding(self.mesh, self.spec(*names) or P())

    def whole_spec(self, names: tuple[str, ...]) -> P:
        """Partition of a parameter once gathered over `fsdp`: what `tensor` alone makes of it."""
        return P(*(spec_entry(self.mesh_axes(name)) for name in names))

    def parameter_spec(self, names: tuple[str, ...], shape: tuple[int, ...], role: Role) -> P:
        """Partition of a parameter at rest.

        `tensor` by the table; `fsdp`, from ZeRO stage 1, splits the first dimension it divides among
        those that no other axis splits, and so does `stage`, which may share one with `fsdp`. Where there is
        a second shard, `data` does as well. The stack of layers is never split: the scan walks along it.
        """
        splitting = ("fsdp", "data") if self.second_shard else ("fsdp",)
        axes = [self.mesh_axes(name) for name in names]
        free = [name != "layers" and not split for name, split in zip(names, axes, strict=True)]
        for axis in (*splitting, "stage") if role not in ELEMENTWISE and self.zero > 0 else ():
            ways = [self.size(axis) * math.prod(map(self.size, split)) for split in axes]
            fits = [place for place, size in enumerate(shape) if free[place] and size % ways[place] == 0]
            if fits and self.size(axis) > 1:
                axes[fits[0]] = (*axes[fits[0]], axis)
        return P(*map(spec_entry, axes))

    def second_spec(self, names: tuple[str, ...], shape: tuple[int, ...], role: Role) -> P:
        """The same but for `data`: the partition of the second shard; without one, as at rest."""
        return replace(self, second_shard=False).parameter_spec(names, shape, role)


ONE_DEVICE = Layout()
"""No mesh: nothing is split, nothing is gathered."""


def split_axes(spec: P) -> frozenset[str]:
    """The mesh axes that a partition names."""
    return frozenset(axis for entry in spec.partitions for axis in axes_of(entry))


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def spec_entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Axes as PartitionSpec normalises them, so that equal layouts compare equal."""
    if not axes:
        return None
    return axes[0] if len(axes) == 1 else axes
