"""How each parameter lies on a mesh, as a table."""

import math
from typing import Any

import jax

from stack.config import Config
from stack.parallel import mesh as meshes
from stack.step import program as programs

_LARGE_BYTES = 16 * 2**20
_HEADINGS = ("parameter", "shape", "axes", "spec", "bytes each")


def sharding_table(config: Config, num_devices: int) -> str:
    """Parameter, shape, logical axes, spec and bytes per device; warnings of large ones left whole.

    Nothing is allocated, and the devices need not be here.

    Raises:
      ConfigError: the config does not fit that many devices.
    """
    mesh = meshes.abstract(config.mesh, num_devices)
    program = programs.on_mesh(config, mesh, "cpu")
    rows, warnings, dtypes, total = [], [], set[str](), 0
    names = jax.tree.leaves(program.axes, is_leaf=lambda node: isinstance(node, tuple))
    leaves = jax.tree_util.tree_flatten_with_path(program.parameters)[0]
    roles = jax.tree.leaves(program.roles)
    for (path, leaf), axes, role in zip(leaves, names, roles, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        here = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total += here
        axes_text = ", ".join(axes)
        rows.append((name, _shape(leaf), axes_text, str(leaf.sharding.spec), f"{here:,}"))
        dtypes.add(str(leaf.dtype))
        whole = here == leaf.size * leaf.dtype.itemsize
        if num_devices > 1 and whole and here >= _LARGE_BYTES and role != "vector":
            warnings.append(
                f"warning: {name} is whole on every device, {here / 2**20:,.0f} MiB: {_why(program, leaf)}"
            )
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    summary = (
        f"{program.num_parameters:,} parameters in {', '.join(sorted(dtypes))};"
        f" {total:,} bytes of them per device on {sizes}, zero {config.mesh.zero}"
    )
    return "\n".join([*_columns([_HEADINGS, *rows]), "", summary, *warnings])


def _why(program: programs.Program, leaf: Any) -> str:
    layout = program.layout
    if layout.zero == 0:
        return "mesh.zero=0 splits nothing over fsdp"
    if layout.size("fsdp") == 1:
        return "mesh.fsdp=1"
    return f"fsdp {layout.size('fsdp')} divides none of {list(leaf.shape)}"


def _shape(leaf: Any) -> str:
    return "x".join(map(str, leaf.shape))


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1].rjust(widths[-1])]))
    return lines
