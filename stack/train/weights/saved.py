"""The weights in a checkpoint of Stack's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stack.config import StackError
from stack.data.dataset import digest
from stack.data.tokenizer import FILE, ByteTokenizer, Tokenizer
from stack.data.words import words_of
from stack.storage.store import Store
from stack.train.checkpoint.agreement import all_or_none
from stack.train.checkpoint.boxes import Box
from stack.train.checkpoint.budget import Budget
from stack.train.checkpoint.checkpoints import READER_BYTES, Checkpoints
from stack.train.checkpoint.reading import Reader, lay_out
from stack.train.ledger import TOKENIZER

_PARTS = ("params", "frozen", "ema")
"""Of a state, those that hold parameters; a later one goes before an earlier, as in `states.join`."""

_DTYPES = ("float32", "bfloat16")
"""Of parameters: what an adapter leaves as it is may be narrow."""


class Saved:
    """One checkpoint: of parameters that have a moving average, that, as it is what is evaluated."""

    def __init__(self, checkpoints: Checkpoints, store: Store, step: int, run: Path | None) -> None:
        """Reads what it says of itself.

        Args:
            checkpoints: of the run.
            store: where they are.
            step: of it.
            run: the folder of the run, if it is known: its tokenizer is there.

        Raises:
            DamagedError: it is not as it was written.
            StackError: there is none of that step, or it holds parameters of another type than it may.
        """
        manifest = checkpoints.manifest(step)
        self._record = manifest.extra
        self._run = run
        self._reader = Reader(store, manifest, budget=Budget(READER_BYTES))
        self._leaves: dict[str, str] = {}
        for part in _PARTS:
            names = [name for name in manifest.leaves if name.startswith(f"{part}.")]
            self._leaves |= {name.partition(".")[2]: name for name in names}
        self._dtypes = {name: manifest.leaves[leaf][0] for name, leaf in self._leaves.items()}
        others = [leaf for name, leaf in self._leaves.items() if self._dtypes[name] not in _DTYPES]
        if others:
            dtype = manifest.leaves[others[0]][0]
            raise StackError(
                f"{store.name}/{step}: {others[0]} is of {dtype}, but parameters are {' or '.join(_DTYPES)}"
            )
        average = ", the average of its weights" if self._averages else ""
        self.name = f"{run or store.name} at step {step:,}{average}"
        self.shapes = {name: manifest.leaves[leaf][1] for name, leaf in self._leaves.items()}

    @property
    def model(self) -> Mapping[str, Any]:
        """As it was when this was saved."""
        return self._record["config"]["model"]

    @property
    def objective(self) -> Mapping[str, Any] | None:
        """What they were trained for, where that is kept."""
        return self._record["config"].get("objective")

    @property
    def _averages(self) -> bool:
        return any(leaf.startswith("ema.") for leaf in self._leaves.values())

    def words(self, tokenizer: Tokenizer) -> dict[int, str] | None:
        """Of the run's own tokenizer."""
        own = self._record["data"].get("tokenizer")
        for known in (tokenizer, ByteTokenizer()):
            if own == digest(known.fingerprint):
                return known.words()
        file = self._run / TOKENIZER / FILE if self._run else None
        return words_of(file) if file and file.is_file() else None

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Each byte is read once for all processes, as nearly as that can be."""
        arrays: dict[str, jax.Array] = {}

        def read() -> None:
            stored = {self._leaves[name]: self._as_stored(name, like) for name, like in wanted.items()}
            arrays.update(self._reader.read(stored))

        all_or_none(read)
        laid_out = {name: lay_out(arrays[self._leaves[name]], like.sharding) for name, like in wanted.items()}
        return {name: array.astype(np.float32) for name, array in laid_out.items()}

    def _as_stored(self, name: str, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, self._dtypes[name], sharding=like.sharding)

    def read_box(self, name: str, box: Box) -> np.ndarray:
        """A part of a parameter."""
        values = self._reader.read_box(self._leaves[name], box, jax.numpy.dtype(self._dtypes[name]))
        return values.astype(np.float32, copy=False)
