"""What a parameter says of itself: its logical axes and its role."""

from flax import nnx
from jaxtyping import Array, Float32

from stack.parallel.rules import Role


def parameter(value: Float32[Array, "..."], *, axes: tuple[str, ...], role: Role) -> nnx.Param:
    """Declares a parameter.

    Args:
      value: float32, one dimension for each axis.
      axes: logical axes, names of `stack.parallel.rules.TABLE`; a stack of layers has `layers` in front.
      role: what it is used for, which decides how it is split, cast, decayed and reduced.
    """
    return nnx.Param(value, axes=axes, role=role)
