"""Where weights come from: a checkpoint of a run, or a folder of safetensors."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from stack.config import StackError, load
from stack.config.paths import expand
from stack.config.reading import RUN_CONFIG
from stack.data.tokenizer import Tokenizer
from stack.storage.store import Store
from stack.train.checkpoint.boxes import Box
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.checkpoint.manifest import NAME, place
from stack.train.weights.folder import Folder, is_folder_of_weights
from stack.train.weights.saved import Saved


class Source(Protocol):
    """Float32 parameters by dotted name, as `layers.mlp.up.kernel`, and what model they are of."""

    @property
    def name(self) -> str:
        """Where and what it is, for people."""
        ...

    @property
    def model(self) -> Mapping[str, Any]:
        """The section `model` of the config they are of, as plain values."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every parameter: layers stacked, tables with their padding."""
        ...

    def words(self, tokenizer: Tokenizer) -> dict[int, str] | None:
        """The words of the tokenizer they were trained with, by id; None where nobody knows.

        Args:
            tokenizer: the one of now, which it may be.
        """
        ...

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Whole parameters, each laid out as wanted; every process calls.

        Raises:
            DamagedError: a file of a checkpoint is not as it was written.
            StackError: anything else that is not as it should be.
        """
        ...

    def read_box(self, name: str, box: Box) -> np.ndarray:
        """A part of a parameter that is of no layer, on this host; raises what `read` does, and OSError."""
        ...


def find(where: str) -> list[Callable[[], Source]]:
    """What opens the weights at a place: those to take first, then older ones, should they be damaged.

    Args:
        where: the folder of a run, of its checkpoints or of one of them, in a bucket too, or a folder of
            safetensors.

    Raises:
        StackError: it is none of these.
    """
    if "://" in where:
        parent, _, last = where.rstrip("/").rpartition("/")
        return list(_saved(Store(parent), int(last)) if last.isdecimal() else _saved(Store(where)))
    folder = expand(where)
    if (folder / RUN_CONFIG).is_file():
        return list(_saved(place(load(folder), folder), run=folder))
    if is_folder_of_weights(folder):
        return [partial(Folder, folder)]
    if folder.is_dir() and folder.name.isdecimal():
        folder = folder.absolute()
        return list(_saved(Store(folder.parent), int(folder.name), run=_run_of(folder.parent)))
    if any(folder.glob(f"*/{NAME}")):
        return list(_saved(Store(folder), run=_run_of(folder.absolute())))
    problem = "holds none of these" if folder.is_dir() else "does not exist"
    raise StackError(
        f"{folder} {problem}: give the folder of a run, one of its checkpoints (runs/NAME/checkpoints/STEP),"
        " or a folder with a config.json and safetensors files"
    )


def _saved(store: Store, step: int | None = None, *, run: Path | None = None) -> Iterator[partial[Saved]]:
    checkpoints = Checkpoints(store)
    steps = checkpoints.newest_first() if step is None else [step]
    if not steps:
        raise StackError(f"{store.name} holds no checkpoint yet; train that run first")
    yield from (partial(Saved, checkpoints, store, one, run) for one in steps)


def _run_of(checkpoints: Path) -> Path | None:
    """The run whose checkpoints lie in a folder, if it is there."""
    return checkpoints.parent if (checkpoints.parent / RUN_CONFIG).is_file() else None
