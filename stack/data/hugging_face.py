"""Datasets of Hugging Face: of the Hub, or in a folder; never a program of theirs."""

import itertools
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.config.paths import expand
from stack.data.records import Record, text_at

_AT_ONCE = 1024  # rows
_COMMIT = re.compile("[0-9a-f]{40}")


def dataset_folder(source: SourceConfig) -> Path | None:
    """The folder that a source names; None: it names a dataset of the Hub.

    Raises:
        StackError: it names neither.
    """
    folder = expand(source.path or "")
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source.path or "") or folder.exists():
        raise StackError(
            f"data.sources: {folder} is no folder of a dataset, and no name of one on the Hub; check path"
        )
    return None


def pinned(source: SourceConfig) -> SourceConfig:
    """The source with the commit that its revision stands for now; a folder, and other kinds, as they are.

    Raises:
        StackError: no answer from the Hub, or no such dataset.
    """
    if source.kind != "hf" or dataset_folder(source) is not None or _COMMIT.fullmatch(source.revision or ""):
        return source
    _datasets(source)
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().dataset_info(source.path or "", revision=source.revision).sha
    except Exception as error:
        raise _refused(source, error) from error
    return source.model_copy(update={"revision": commit})


def dataset_identity(source: SourceConfig) -> str:
    """What its content is told by, once it is pinned; of a folder the content of its files says it."""
    return "" if dataset_folder(source) is not None else f"{source.path}@{source.revision}"


def read_dataset(source: SourceConfig) -> Iterator[str | None]:
    """The texts of the rows of a split, in order; None where there is none."""
    datasets = _datasets(source)
    field = source.field
    try:
        rows = _load(datasets, source)
        names = rows.column_names or ()
        if field is not None:
            column = field if field in names else field.split(".")[0]
            rows = rows.select_columns([column]) if column in names else rows
        count = itertools.count()
        for batch in rows.iter(_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                record = dict(zip(batch, values, strict=True))
                where = partial(_where, source, next(count))
                yield _whole(record, where()) if field is None else text_at(record, field, where)
    except StackError:
        raise
    except Exception as error:
        raise _refused(source, error) from error


def _whole(record: dict[str, Any], place: str) -> Record:
    try:
        return Record.at(json.dumps(record, ensure_ascii=False), place)
    except TypeError as error:
        raise StackError(f"{place}: {error}; leave that column out") from error


def _where(source: SourceConfig, number: int) -> str:
    return f"{source.path}: {source.split}: row {number} (from 0)"


def _datasets(source: SourceConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise StackError(
            f"data.sources: {source.path}: datasets of Hugging Face need the library `datasets`; install the"
            " extra: pip install 'stack[hf]'"
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _load(datasets: Any, source: SourceConfig) -> Any:
    folder = dataset_folder(source)
    if folder is None:
        return datasets.load_dataset(
            source.path,
            source.config_name,
            split=source.split,
            streaming=source.streaming,
            revision=pinned(source).revision,
        )
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_dataset(
            str(folder), source.config_name, split=source.split, streaming=source.streaming
        )
    # What `save_to_disk` wrote is memory-mapped where it lies.
    rows = datasets.load_from_disk(str(folder))
    splits = dict(rows) if isinstance(rows, datasets.DatasetDict) else {str(rows.split or source.split): rows}
    if source.split not in splits:
        raise ValueError(f"no split {source.split!r}; it has {', '.join(splits)}")
    if source.config_name is not None:
        raise ValueError(f"what was saved to disk has no configuration {source.config_name!r}")
    return splits[source.split]


def _refused(source: SourceConfig, error: Exception) -> StackError:
    told = " ".join(str(error).split()) or type(error).__name__
    told = told if len(told) <= 300 else f"{told[:297]}..."
    return StackError(
        f"data.sources: {source.path}: {told.rstrip('.')}; check path, config_name, split and revision, and"
        " the network"
    )
