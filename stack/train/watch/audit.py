"""Which rows every step read, for whoever wants to see that none is lost or read twice."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from stack.config.errors import StackError
from stack.storage import durable
from stack.train.watch.listeners import Listener


class Audit(Listener):
    """Writes examples-P.jsonl for each process P: a line per step, with the numbers of the rows it read."""

    def __init__(self, folder: Path) -> None:
        """Touches nothing until the run starts."""
        self._folder = folder
        self._file: IO[str] | None = None

    def on_start(self, info: dict[str, Any]) -> None:
        """Goes on after the step of `info`; what steps after it have read is forgotten, of all processes.

        Raises:
            StackError: the files cannot be written.
        """
        mine = self._folder / f"examples-{jax.process_index()}.jsonl"
        others = self._folder.glob("examples-*.jsonl") if jax.process_index() == 0 else []
        try:
            for path in {mine, *others}:
                if path == mine or int(path.stem.rsplit("-", 1)[1]) >= jax.process_count():
                    kept = [line for step, line in self._lines(path) if step <= info["step"]]
                    durable.write_bytes(path, b"".join(kept))
            self._file = mine.open("a", encoding="utf-8")
        except OSError as error:
            raise StackError(f"{mine}: cannot be written: {error.strerror}; set train.audit=false") from error

    def note(self, step: int, rows: np.ndarray) -> None:
        """Takes a step, counted from 1, and the numbers of its rows on this process; from any thread."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "rows": rows.tolist()}) + "\n")

    def sync(self) -> None:
        """Waits until the lines are on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def on_end(self, summary: dict[str, Any]) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _lines(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """Whole lines and their steps; the last may have been cut."""
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                step = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError, RecursionError):
                if line.endswith(b"\n"):
                    self.warn(f"{path}, line {number} was damaged, and is left out")
                continue
            if line.endswith(b"\n"):
                yield step, line
