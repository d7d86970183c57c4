"""Parquet files with a column of text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stack.config import SourceConfig
from stack.config.errors import StackError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet


def read_row_groups(
    source: SourceConfig, path: Path, groups: Sequence[int] | None = None
) -> Iterator[str | None]:
    """The texts of a Parquet file, or of some of its groups of rows."""
    with _open(source, path) as (file, column):
        name = ".".join(column)
        for batch in file.iter_batches(batch_size=1024, columns=[name], row_groups=groups):
            values = batch.column(0)
            for inner in column[1:]:  # With the nulls of what it lies in.
                values = values.flatten()[values.type.get_field_index(inner)]
            yield from values.to_pylist()


def row_group_bytes(source: SourceConfig, path: Path) -> list[int]:
    """The size of each group of rows of a Parquet file: of its texts, unpacked."""
    with _open(source, path) as (file, column):
        # The columns of a group are the leaves of the schema.
        names = [file.schema.column(number).path for number in range(len(file.schema.names))]
        leaf = names.index(".".join(column))
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        return [group.column(leaf).total_uncompressed_size for group in groups]


@contextmanager
def _open(
    source: SourceConfig, path: Path
) -> Iterator[tuple["pyarrow.parquet.ParquetFile", tuple[str, ...]]]:
    """A file, and the names that lead to its column of text, from outside in."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise StackError(
            f"{path}: reading Parquet needs pyarrow; install the extra: pip install 'stack[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            yield file, _find_column(file.schema_arrow, path, source.field or "")
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise StackError(f"{path}: not a whole Parquet file ({reason}); write or copy it again") from error


def _find_column(schema: "pyarrow.Schema", path: Path, column: str) -> tuple[str, ...]:
    """The column of a name, or of a path `a.b` into columns of structs."""
    names = (column,) if column in schema.names else tuple(column.split("."))
    inside, kind = {field.name: field.type for field in schema}, None
    for number, name in enumerate(names):
        if name not in inside:
            above = f" in {'.'.join(names[:number])!r}" if number else ""
            present = ", ".join(inside) or "none"
            raise StackError(
                f"{path}: no column {column!r}; columns present{above}: {present}; set field to one of them"
            )
        kind = inside[name]
        inside = {field.name: field.type for field in kind} if str(kind).startswith("struct") else {}
    if str(kind) not in ("string", "large_string", "string_view"):
        raise StackError(
            f"{path}: column {column!r} holds {kind}, not strings; set field to a column of text"
        )
    return names
