"""Checkpoints: asynchronous, atomic, and readable on any mesh by any number of processes.

A run's folder of checkpoints has one folder per step, named by the step, in Orbax's format. Orbax
writes beside it and renames when every process is done, so a folder that has its metadata is whole;
what an interrupted save leaves behind has none and is never taken for a checkpoint.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from stack.config.errors import StackError
from stack.config.train import CheckpointConfig
from stack.train.quiet import quiet_readers

_METADATA = "_CHECKPOINT_METADATA"  # Orbax writes it last, before the rename.
_UNFINISHED = ".orbax-checkpoint-tmp"
_DELETED = ".deleted"


class Checkpoints:
    """The checkpoints of one run.

    With a `CheckpointConfig` it saves, keeps and deletes; without one it only reads, and may be used
    while a run is saving to the same folder. Every method is called by every process, on one shared
    file system; the state is whole on no process.
    """

    def __init__(self, folder: str | os.PathLike[str], config: CheckpointConfig | None = None) -> None:
        """Opens the folder; to save, makes it and clears what interrupted saves left there.

        Raises:
            StackError: the folder cannot be made or written.
        """
        self.folder = Path(folder).absolute()
        self._config = config
        self._saved_step: int | None = None
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        if config is not None:
            self._prepare()

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Saves the state as the checkpoint of a step, in the background.

        Returns once the arrays are copied to the host, so the next step may donate their buffers;
        waits first for a save still under way. Saving the step last saved again does nothing.

        Args:
            step: optimizer steps taken.
            state: pytree of `jax.Array`, of any sharding.
            extra: what JSON can hold: config, data fingerprint and position, versions.

        Raises:
            StackError: this save could not begin, or the one before it failed.
        """
        if self._config is None:
            raise ValueError(f"{self.folder} is open for reading only; give Checkpoints a CheckpointConfig")
        self.wait()
        if step == self._saved_step:
            return
        metadata = json.loads(json.dumps(extra))  # A TypeError here, not in the background.
        try:
            context = ocp.Context()
            # Made in the background, a folder that cannot be written shows as a time-out.
            context.asynchronous.create_directories_asynchronously = False
            with context:
                path = str(self._path(step))
                saving = ocp.save_async(path, state, overwrite=True, custom_metadata=metadata)
        except Exception as error:
            raise self._failure(step, error) from error
        self._saved_step = step
        self._pending = self._thread.submit(self._finish, step, saving)

    def wait(self) -> None:
        """Waits until the last save is on disk and the checkpoints it replaces are deleted.

        Raises:
            StackError: that save failed; the checkpoints before it are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except StackError:
                self._saved_step = None
                raise

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint on disk, ascending, as this process sees them."""
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir() if (path / _METADATA).is_file())
        return sorted(int(name) for name in names if name.isdecimal())

    def latest(self) -> int | None:
        """The newest step that has a whole checkpoint, None if there is none; the same everywhere.

        Process 0 looks and tells the others: a shared file system may show them different folders.
        """
        newest = max(self.steps(), default=-1)
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(np.int64(newest)))
        return None if newest < 0 else newest

    def restore(self, step: int, abstract_state: dict[str, Any]) -> dict[str, Any]:
        """Reads the state of a step, bit for bit, straight into the shardings asked for.

        Args:
            step: one of `steps()`.
            abstract_state: `jax.ShapeDtypeStruct` with shardings in the structure that was saved, or
                in some of its top-level entries, as `{"params": ...}`: the rest is then not read.
                Mesh, layout and number of processes may be others than those that saved.

        Returns:
            `jax.Array` in the structure of `abstract_state`.

        Raises:
            StackError: no such checkpoint, another model or optimizer, or damaged files.
        """
        on_disk = cast("dict[str, Any]", self._metadata(step).metadata)
        wanted = _leaves(abstract_state)
        for name, leaf in wanted.items():
            if leaf.sharding is None:
                raise ValueError(f"abstract_state: {name} has no sharding")
        saved = _leaves({entry: on_disk[entry] for entry in abstract_state.keys() & on_disk.keys()})
        if differences := _differences(saved, wanted):
            raise StackError(
                f"checkpoint {self._path(step)} is of another model or optimizer: {differences}; go on "
                "with the config it was saved with, or train under another name"
            )
        everything: Any = jax.tree.map(lambda _: ocp.PLACEHOLDER, on_disk) | abstract_state
        try:
            with quiet_readers():
                state: Any = ocp.load(str(self._path(step)), everything)
        except Exception as error:
            raise self._damaged(step, error) from error
        return {entry: state[entry] for entry in abstract_state}

    def extra(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of a step.

        Raises:
            StackError: no such checkpoint, or damaged files.
        """
        return cast("dict[str, Any]", self._metadata(step).custom_metadata)

    def close(self) -> None:
        """Waits for the last save and frees the thread.

        Raises:
            StackError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StackError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # What broke the run comes first.

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                if not os.access(self.folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                for path in self.folder.iterdir():
                    if _UNFINISHED in path.name or path.name.endswith(_DELETED):
                        shutil.rmtree(path)
        except OSError as error:
            raise StackError(
                f"cannot write checkpoints to {self.folder}: {_reason(error)}; set output_dir to a folder "
                "that can be written"
            ) from error

    def _finish(self, step: int, saving: ocp.AsyncResponse[None]) -> None:
        """Waits for a save and deletes what it replaces; runs in the background."""
        try:
            saving.result()
        except Exception as error:
            if jax.process_index() == 0:  # A full disk needs the space back.
                shutil.rmtree(f"{self._path(step)}{_UNFINISHED}", ignore_errors=True)
            raise self._failure(step, error) from error
        if jax.process_index() == 0:
            self._delete_old(step)

    def _delete_old(self, saved_step: int) -> None:
        assert self._config is not None
        steps = self.steps()
        keep = {saved_step, *steps[-self._config.keep_last :]}
        if self._config.keep_every is not None:
            keep |= {step for step in steps if step % self._config.keep_every == 0}
        for step in steps:
            if step not in keep:
                # The rename takes it off the list at once; a half-deleted checkpoint must not be on it.
                deleted = Path(f"{self._path(step)}{_DELETED}")
                try:
                    self._path(step).rename(deleted)
                    shutil.rmtree(deleted)
                except OSError as error:
                    raise StackError(
                        f"cannot delete the old checkpoint {self._path(step)}: {_reason(error)}; check the "
                        "folder's permissions, or raise checkpoint.keep_last"
                    ) from error

    def _metadata(self, step: int) -> ocp.CheckpointMetadata[Any]:
        if step not in (steps := self.steps()):
            there = f"there are steps {', '.join(map(str, steps))}" if steps else "there is none"
            raise StackError(f"no checkpoint of step {step} in {self.folder}; {there}")
        try:
            metadata = ocp.metadata(str(self._path(step)))
        except Exception as error:
            raise self._damaged(step, error) from error
        if metadata.metadata is None:  # Orbax only logs that it could not read it.
            raise self._damaged(step, ValueError("its list of arrays cannot be read"))
        return metadata

    def _failure(self, step: int, error: Exception) -> StackError:
        steps = self.steps()
        intact = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier one"
        return StackError(
            f"cannot save the checkpoint of step {step} in {self.folder}: {_reason(error)}; {intact}; mend "
            "the disk and run again to go on from there"
        )

    def _damaged(self, step: int, error: Exception) -> StackError:
        older = [other for other in self.steps() if other < step]
        remedy = f"delete it to go on from step {older[-1]}" if older else "delete it to start again"
        return StackError(f"checkpoint {self._path(step)} is damaged: {_reason(error)}; {remedy}")


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name; named tuples, as Optax has, are named as the dicts Orbax makes of them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The leaves in which a checkpoint and a state differ, the first three by name; empty if equal."""
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            lines.append(f"it has no {name}")
        elif name not in wanted:
            lines.append(f"it has {name}, which the config has not")
        else:
            there, here = (f"{tree[name].dtype}{list(tree[name].shape)}" for tree in (saved, wanted))
            if there != here:
                lines.append(f"{name} is {there} in it and {here} in the config")
    more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
    return ", ".join(lines[:3]) + more


def _reason(error: Exception) -> str:
    """The operating system's words for an error, or the first line of what began it."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) or type(error).__name__
    # TensorStore's: 'Failed writing: "path": Failed to write 9 bytes to file 3: ... [os_error_code='28']'.
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    return text.splitlines()[0]


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.filename == "future.py" and record.exc_info and "_SignalingThread" in str(record.msg))


# Orbax's threads log an error, three tracebacks of 30 lines each, that `wait` then raises.
logging.getLogger("absl").addFilter(_is_news)
