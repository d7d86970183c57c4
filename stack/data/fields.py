"""What a batch holds, as an objective names it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import jax

    from stack.parallel.rules import Layout


class Field(NamedTuple):
    """One array of a batch."""

    name: str
    axes: tuple[str, ...]
    """Logical axes, such as `("batch",)` or `("batch", "length")`."""
    padding: int
    """What stands where a row is filled up, and in rows of padding."""
    dtype: str = "int32"


def abstract_batch(
    fields: Sequence[Field], *, sizes: Mapping[str, int], layout: "Layout"
) -> "dict[str, jax.ShapeDtypeStruct]":
    """Shapes, dtypes and shardings of a batch.

    Args:
      fields: of the objective.
      sizes: of the axes: `batch`, the rows over all devices, and those that the objective names.
      layout: how things lie on the mesh.
    """
    import jax

    return {
        field.name: jax.ShapeDtypeStruct(
            tuple(sizes[axis] for axis in field.axes), field.dtype, sharding=layout.sharding(*field.axes)
        )
        for field in fields
    }
