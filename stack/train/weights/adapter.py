"""An adapter that was trained: in the folder of its run, or by itself in a small one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import xxhash

from stack.config import Config, ConfigError, StackError, load
from stack.config.paths import expand
from stack.config.reading import RUN_CONFIG
from stack.data.tokenizer import FILE
from stack.interop.safetensors_folder import open_file
from stack.train.checkpoint.agreement import all_or_none
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.checkpoint.manifest import DamagedError, place
from stack.train.ledger import TOKENIZER
from stack.train.weights.saved import Saved

ABOUT, ARRAYS = "adapter.json", "adapter.safetensors"
"""The files of a small folder; the run's tokenizer lies beside them, as in the run's own."""
FORMAT = 2


class Arrays(Protocol):
    """Where the numbers are."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of each parameter, by dotted name."""
        ...

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Whole parameters, each laid out as wanted; every process calls."""
        ...


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """What was trained of a run with an adapter, without the weights that were not."""

    name: str
    """Where and what it is, for people."""
    config: Config
    """Of the run."""
    step: int
    """Optimizer steps it was trained for."""
    base: Mapping[str, Any]
    """`source` and `digest` of the weights it was trained beside."""
    tokenizer: Path
    """Its file, which is not there where bytes are tokens."""
    arrays: Arrays

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """All that was trained, by dotted name.

        Args:
            wanted: the shape and the place of each.

        Raises:
            StackError: it is damaged, or of another shape.
        """
        for name, like in wanted.items():
            there = self.arrays.shapes.get(name)
            if there != like.shape:
                told = "is missing" if there is None else f"is {list(there)}, not {list(like.shape)}"
                raise StackError(f"{self.name}: {name} {told}; export the adapter again")
        return self.arrays.read(wanted)


def find_adapter(where: str, overrides: tuple[str, ...] = ()) -> SavedAdapter:
    """The adapter at a place.

    Args:
        where: the folder of a run, whose newest sound checkpoint is taken, or of an exported adapter.
        overrides: of its config.

    Raises:
        StackError: there is none, or it is damaged.
    """
    folder = expand(where)
    if (folder / ABOUT).is_file():
        return _of_folder(folder, overrides)
    if (folder / RUN_CONFIG).is_file():
        return _of_run(folder, overrides)
    problem = "holds neither" if folder.is_dir() else "does not exist"
    raise StackError(
        f"--adapter {folder} {problem}: give the folder of a run that has an adapter, or one that"
        " `stack export RUN --to adapter FOLDER` has made"
    )


def _of_run(folder: Path, overrides: tuple[str, ...]) -> SavedAdapter:
    config = load(folder, overrides)
    if config.adapter is None:
        raise StackError(f"--adapter {folder}: this run has none; give one whose config has `adapter`")
    store = place(config, folder)
    checkpoints, damaged = Checkpoints(store), []
    for step in checkpoints.newest_first():
        try:
            saved = Saved(checkpoints, store, step, folder)
            base = checkpoints.extra(step)["origin"]
        except DamagedError as error:
            damaged.append(str(error))
            continue
        return SavedAdapter(
            name=saved.name,
            config=config,
            step=step,
            base=base,
            tokenizer=folder / TOKENIZER / FILE,
            arrays=saved,
        )
    told = "; ".join(damaged) or f"{store.name} holds no checkpoint yet; train that run first"
    raise StackError(f"--adapter {folder}: {told}")


def _of_folder(folder: Path, overrides: tuple[str, ...]) -> SavedAdapter:
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text("utf-8"))
        if about["format"] != FORMAT:
            raise StackError(
                f"{path} is of format {about['format']}, and this version reads {FORMAT}; export the adapter"
                " again"
            )
        config = Config.model_validate(about["config"])
        step, base, digest = int(about["step"]), dict(about["base"]), str(about["arrays"])
    except OSError as error:
        raise StackError(f"{path} cannot be read: {error.strerror}") from error
    except ConfigError as error:
        raise StackError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StackError(f"{path} is not what `stack export` wrote: {error!r}; export it again") from error
    return SavedAdapter(
        name=f"{folder} at step {step:,}",
        config=config.replace(*overrides),
        step=step,
        base=base,
        tokenizer=folder / TOKENIZER / FILE,
        arrays=_File(folder / ARRAYS, digest),
    )


def digest_of(path: Path) -> str:
    """Of the bytes of a file, XXH3 with 128 bits."""
    told = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            told.update(part)
    return told.hexdigest()


class _File:
    """A file of safetensors, whose names are those of parameters."""

    def __init__(self, path: Path, digest: str) -> None:
        """Reads what it says of itself, and whether it is what was written."""
        if not path.is_file():
            raise StackError(f"{path} is missing; export the adapter again")
        self._tensors = open_file(path)
        if digest_of(path) != digest:
            raise StackError(
                f"{path} is damaged: its bytes are not those whose digest {ABOUT} has; export the adapter"
                " again"
            )
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Each process reads what lies on its devices."""
        arrays: dict[str, jax.Array] = {}

        def read() -> None:
            for name, like in wanted.items():
                part = partial(_part, self._tensors[name], like.dtype)
                arrays[name] = jax.make_array_from_callback(like.shape, like.sharding, part)

        all_or_none(read)
        return arrays


def _part(tensor: np.ndarray, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    return np.array(tensor[index], dtype)
