"""The weights in a folder as transformers writes it."""

import json
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stack.config import StackError
from stack.data.tokenizer import FILE, Tokenizer
from stack.data.words import words_of
from stack.interop.hugging_face import Weights, config_from_hf
from stack.interop.safetensors_folder import open_folder
from stack.parallel import mesh as meshes
from stack.step import state as states
from stack.train.checkpoint.agreement import all_or_none
from stack.train.checkpoint.boxes import Box

CONFIG = "config.json"


def is_folder_of_weights(folder: Path) -> bool:
    """Whether it looks like one, sound or not."""
    names = (CONFIG, "*.safetensors", "*.safetensors.index.json", "*.bin")
    return folder.is_dir() and any(True for name in names for _ in folder.glob(name))


class Folder:
    """config.json, safetensors files and, if it is there, tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        """Compares the files with the config: names, types and shapes; reads no weights.

        Raises:
            StackError: a file is missing or damaged, or of a model that Stack does not have.
        """
        state = open_folder(folder)
        self._folder = folder
        self.name = str(folder)
        self.num_tensors = len(state)
        self.config = _read_config(folder / CONFIG, state)
        self.model: Mapping[str, Any] = self.config.model_dump(mode="json")
        try:
            self._weights = Weights(state, self.config)
            self._weights.check()
        except StackError as error:
            raise StackError(f"{folder}: {error}") from None
        self.notes = _notes(self._weights.unread)
        """What of the files is not read, a line each."""
        self.shapes = {_dotted(path): shape for path, shape in self._weights.shapes.items()}

    def words(self, tokenizer: Tokenizer) -> dict[int, str] | None:
        """Of its tokenizer.json."""
        file = self._folder / FILE
        return words_of(file) if file.is_file() else None

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """One layer of one parameter after another; each process reads what lies on its devices."""
        arrays: dict[str, jax.Array] = {}

        def read() -> None:
            for name, like in wanted.items():
                assert isinstance(like.sharding, NamedSharding)
                arrays[name] = _place(self._weights, _path(name), like.sharding)

        all_or_none(self._named(read))
        return arrays

    def read_box(self, name: str, box: Box) -> np.ndarray:
        """A part of a parameter."""
        index = tuple(slice(*part) for part in box)
        return self._named(lambda: self._weights.read(_path(name), None, index))()

    def _named[T](self, read: Callable[[], T]) -> Callable[[], T]:
        """The same, but its errors name the folder."""

        def named() -> T:
            try:
                return read()
            except StackError as error:
                raise StackError(f"{self._folder}: {error}") from None

        return named


def _notes(unread: Mapping[str, str]) -> list[str]:
    """What is left out, each with the names of its tensors."""
    names = {what: [name for name, other in unread.items() if other == what] for what in unread.values()}
    return [
        f"{what} is not read, as Stack's models have none: {', '.join(some)}" for what, some in names.items()
    ]


def _read_config(path: Path, names: Collection[str]) -> Any:
    try:
        keys = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise StackError(f"{path} cannot be read: {error.strerror}; give a folder that has it") from error
    except (ValueError, RecursionError) as error:
        raise StackError(f"{path} is no JSON: {error}; fetch it again") from error
    try:
        return config_from_hf(keys, names)
    except StackError as error:
        raise StackError(f"{path}: {error}") from None


def _place(weights: Weights, path: str, sharding: NamedSharding) -> jax.Array:
    """A parameter as it lies at rest, layer after layer; a host holds one beside its devices' shards."""
    shape, layers = weights.shapes[path], weights.layers(path)
    if not layers:
        return _spread(partial(weights.read, path, None), shape, sharding)
    assert isinstance(sharding.mesh, Mesh), "arrays are made on devices"
    auto = states.automatic(sharding.mesh)
    whole, one = NamedSharding(auto, sharding.spec), NamedSharding(auto, P(*sharding.spec[1:]))
    with meshes.use(auto):
        array = jax.jit(partial(jnp.zeros, shape, jnp.float32), out_shardings=whole)()
        for layer in layers:
            array = _put(whole)(array, _spread(partial(weights.read, path, layer), shape[1:], one), layer)
    return meshes.retype(array, sharding)


def _spread(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
    # Once for all devices that hold the same part.
    return jax.make_array_from_callback(shape, sharding, cache(lambda index: read(index or ())))


@cache
def _put(whole: NamedSharding) -> Callable[..., jax.Array]:
    def put(array: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, layer, number, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=whole)


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _path(name: str) -> str:
    return name.replace(".", "/")
