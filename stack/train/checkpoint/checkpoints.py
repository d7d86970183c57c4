"""The checkpoints of a run: saved in the background, committed last, checked whenever they are read."""

import itertools
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import jax

from stack.config.errors import StackError
from stack.config.train import CheckpointConfig
from stack.parallel import messages
from stack.storage.store import Store
from stack.train.checkpoint.agreement import all_or_none, text_of_first
from stack.train.checkpoint.budget import Budget
from stack.train.checkpoint.manifest import (
    NAME,
    File,
    Manifest,
    read_manifest,
    saved_steps,
    unreadable,
)
from stack.train.checkpoint.reading import Reader, lay_out
from stack.train.checkpoint.writing import Writer

READER_BYTES = 2 << 30
"""Of host memory, to read with."""
_runs = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Saved:
    """How a save ended."""

    step: int
    seconds: float
    """From its beginning to its commit, most of them in the background."""
    error: str | None = None
    """Why it failed, in one line."""


class Checkpoints:
    """The checkpoints of one run.

    With a `CheckpointConfig` it saves, keeps and deletes; without one it only reads, and may be used
    while a run is saving to the same place. Every method is called by every process, on one shared store;
    the state is whole on no process.
    """

    def __init__(self, place: Store | str | os.PathLike[str], config: CheckpointConfig | None = None) -> None:
        """Opens the place; to save, makes it and clears what interrupted saves left there.

        Raises:
            StackError: it cannot be made or written.
        """
        self._store = store = place if isinstance(place, Store) else Store(place)
        self._config = config
        self._saved_step: int | None = None
        self._pending: Future[Saved] | None = None
        self._budget = Budget(READER_BYTES if config is None else int(config.host_memory_gb * 1e9))
        self._outcomes: list[Saved] = []
        self.failure: str | None = None
        """Why the last save that ended has failed, if it did."""
        self.notes: list[str] = []
        """What a person should know of what was there."""
        self.bytes_read = 0
        """From the store, by this process, in the last restore."""
        if config is not None:
            self._run, self._saves = next(_runs), itertools.count()
            self._prepare()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit checkpoint")
            self._writer = Writer(store, budget=self._budget)

    def save(
        self,
        step: int,
        state: Any,
        extra: Mapping[str, Any],
        *,
        is_finite: jax.Array | None = None,
        before_commit: Callable[[], None] = lambda: None,
        best: Callable[[Collection[int]], int | None] = lambda _: None,
    ) -> None:
        """Saves the state as the checkpoint of a step, in the background; `poll` tells how it went.

        Returns once the arrays are copied to the host, so the next step may donate their buffers;
        waits first for a save still under way. Saving the step last saved again does nothing.

        Args:
            step: optimizer steps taken.
            state: pytree of `jax.Array`, of any sharding.
            extra: what JSON can hold: the record of the run.
            is_finite: bool scalar; where it is false the checkpoint is not committed.
            before_commit: called in the background before the checkpoint counts.
            best: picks of the saved steps one that is kept besides; called in the background.
        """
        if self._config is None:
            raise ValueError(
                f"{self._store.name} is open for reading only; give Checkpoints a CheckpointConfig"
            )
        self.wait()
        if step == self._saved_step:
            return
        record = json.loads(json.dumps(extra))  # A TypeError here, not in the background.
        start = time.monotonic()
        leaves = named_leaves(state)
        about = {name: (str(leaf.dtype), leaf.shape) for name, leaf in leaves.items()}
        files = self._writer.write(step, leaves)
        name = f"save/{self._run}/{next(self._saves)}"

        def finish() -> Saved:
            error = self._commit(name, step, about, record, files, is_finite, before_commit, best)
            return Saved(step=step, seconds=time.monotonic() - start, error=error)

        self._saved_step = step
        self._pending = self._thread.submit(finish)

    def poll(self) -> list[Saved]:
        """How saves ended that ended since this was last asked; waits for none."""
        if self._pending is not None and self._pending.done():
            self.wait()
        ended, self._outcomes = self._outcomes, []
        return ended

    def wait(self) -> None:
        """Waits until the last save has ended, on all processes, and what it replaces is deleted."""
        pending, self._pending = self._pending, None
        if pending is not None:
            outcome = pending.result()
            self._outcomes.append(outcome)
            self.failure = outcome.error
            if outcome.error is not None:
                self._saved_step = None

    @property
    def most_held(self) -> int:
        """The most bytes of copies that were in this process's host memory at one time."""
        return self._budget.most

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, ascending, as this process sees them; unread.

        Raises:
            StackError: the store fails, or holds checkpoints of another format.
        """
        return saved_steps(self._store)

    def newest_first(self) -> list[int]:
        """The same from the newest on, as process 0 sees them: a shared file system may show others less."""
        steps = json.loads(text_of_first(lambda: json.dumps(self.steps()[::-1])))
        return [int(step) for step in steps]

    def latest(self) -> int | None:
        """The newest step that has a committed checkpoint, None if there is none; the same everywhere."""
        return next(iter(self.newest_first()), None)

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
            DamagedError: a file of it is not as it was written, by name; on every process.
            StackError: no such checkpoint, another model or optimizer.
        """
        wanted = named_leaves(abstract_state)
        for name, leaf in wanted.items():
            if leaf.sharding is None:
                raise ValueError(f"abstract_state: {name} has no sharding")
        arrays: dict[str, jax.Array] = {}

        def read() -> None:
            nonlocal arrays
            manifest = self._manifest(step)
            tops = set(abstract_state)
            saved = {name: like for name, like in manifest.leaves.items() if name.split(".", 1)[0] in tops}
            if differences := _differences(saved, wanted):
                raise StackError(
                    f"checkpoint {self._store.name}/{step} is of another model or optimizer: {differences}; "
                    "go on with the config it was saved with, or train under another name"
                )
            reader = Reader(self._store, manifest, budget=self._budget)
            arrays = reader.read(wanted)
            self.bytes_read = reader.bytes_read

        all_or_none(read)
        laid_out = [lay_out(arrays[name], like.sharding) for name, like in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), laid_out)

    def holds(self, step: int, abstract_state: dict[str, Any]) -> bool:
        """Whether the checkpoint of a step has these parts of a state, of these shapes and types."""
        leaves, wanted = self.manifest(step).leaves, named_leaves(abstract_state)
        return all(leaves.get(name) == (str(leaf.dtype), leaf.shape) for name, leaf in wanted.items())

    def extra(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of a step.

        Raises:
            DamagedError: it is not as it was written.
            StackError: no such checkpoint.
        """
        return self.manifest(step).extra

    def close(self) -> None:
        """Waits for the last save and ends the threads."""
        if self._config is not None:
            self.wait()
            self._thread.shutdown()
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is not None:  # What broke the run comes first.
            for outcome in self._outcomes:
                if outcome.error is not None:
                    error.add_note(outcome.error)

    def manifest(self, step: int) -> Manifest:
        """What a checkpoint says of itself, if every process can read it; else all raise, as `extra`."""
        found: list[Manifest] = []
        all_or_none(lambda: found.append(self._manifest(step)))
        return found[0]

    def _manifest(self, step: int) -> Manifest:
        if step not in (steps := self.steps()):
            there = f"there are steps {', '.join(map(str, steps))}" if steps else "there is none"
            raise StackError(f"no checkpoint of step {step} in {self._store.name}; {there}")
        try:
            return read_manifest(self._store, step)
        except OSError as error:
            raise unreadable(self._store, error) from error

    def _prepare(self) -> None:
        try:
            self._store.prepare()
            if jax.process_index() == 0:
                steps = {str(step) for step in self.steps()}
                folders = {name.split("/", 1)[0] for name in self._store.names()}
                for folder in sorted(folders - steps):
                    if folder.isdecimal():
                        self._store.remove(folder)
                        self.notes.append(
                            f"{self._store.name}/{folder} had no {NAME}: its save did not end, and what there"
                            " was of it is removed"
                        )
        except OSError as error:
            raise StackError(
                f"cannot write checkpoints to {self._store.name}: {error.strerror}; set output_dir to a"
                " folder that can be written"
            ) from error

    def _commit(
        self,
        name: str,
        step: int,
        leaves: Mapping[str, tuple[str, tuple[int, ...]]],
        extra: dict[str, Any],
        files: Callable[[], dict[str, File]],
        is_finite: jax.Array | None,
        before_commit: Callable[[], None],
        best: Callable[[Collection[int]], int | None],
    ) -> str | None:
        """Gathers what all have written and commits it; runs in the background. Why it failed, if it did."""
        try:
            told = json.dumps({name: file.as_list() for name, file in files().items()})
            if is_finite is not None and not bool(is_finite):
                raise StackError("its numbers are not all finite")
        except Exception as error:
            told = f"!{_reason(error)}"
        told_by_all = messages.gather(name, told)
        if told_by_all is None:
            return messages.broadcast(f"{name}/end", None) or None
        problem = next((text[1:] for text in told_by_all if text.startswith("!")), "")
        if not problem:
            try:
                before_commit()
                both = {key: file for text in told_by_all for key, file in json.loads(text).items()}
                manifest = Manifest(
                    step=step,
                    time=round(time.time(), 3),
                    leaves=dict(leaves),
                    files={key: File.of_list(file) for key, file in both.items()},
                    extra=extra,
                )
                for left_over in self._store.names(f"{step}/"):
                    if left_over.removeprefix(f"{step}/") not in both:
                        self._store.remove_file(left_over)
                self._store.write(f"{step}/{NAME}", manifest.encode())
            except Exception as error:
                problem = _reason(error)
        try:
            problem = self._give_up(step, problem) if problem else self._delete_old(step, best)
        except StackError as error:  # What is saved is saved; the store fails after it.
            problem = str(error)
        return messages.broadcast(f"{name}/end", problem) or None

    def _give_up(self, step: int, problem: str) -> str:
        """Removes what was half written, as a full disk needs the space back; what to say of it."""
        told = f"cannot save the checkpoint of step {step} in {self._store.name}: {problem}"
        try:
            self._store.remove_file(f"{step}/{NAME}")
            self._store.remove(str(step))
            steps = [other for other in self.steps() if other != step]
        except (OSError, StackError):  # The store is gone, and says nothing more.
            return told
        return (
            f"{told}; the checkpoint of step {steps[-1]} is intact"
            if steps
            else f"{told}; there is no earlier one"
        )

    def _delete_old(self, saved_step: int, best: Callable[[Collection[int]], int | None]) -> str:
        """Deletes what the checkpoint just committed and read back replaces; why that failed, if it did.

        Later ones than it are of a way that was left: they were damaged, or the run went back.
        """
        assert self._config is not None
        steps = self.steps()
        earlier = [step for step in steps if step <= saved_step]
        keep = {saved_step, best(earlier), *earlier[-self._config.keep_last :]}
        if self._config.keep_every is not None:
            keep |= {step for step in earlier if step % self._config.keep_every == 0}
        for step in steps:
            if step not in keep:
                try:
                    # First what makes it one: a half-deleted checkpoint must not be on the list.
                    self._store.remove_file(f"{step}/{NAME}")
                    self._store.remove(str(step))
                except OSError as error:
                    return (
                        f"cannot delete the old checkpoint {self._store.name}/{step}: {error.strerror};"
                        " check the folder's permissions, or raise checkpoint.keep_last"
                    )
        return ""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name; of named tuples, as Optax has, by the names of their fields."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _differences(saved: Mapping[str, tuple[str, tuple[int, ...]]], wanted: Mapping[str, Any]) -> str:
    """The leaves in which a checkpoint and a state differ, the first three by name; empty if equal."""
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            lines.append(f"it has no {name}")
        elif name not in wanted:
            lines.append(f"it has {name}, which the config has not")
        else:
            dtype, shape = saved[name]
            there, here = f"{dtype}{list(shape)}", f"{wanted[name].dtype}{list(wanted[name].shape)}"
            if there != here:
                lines.append(f"{name} is {there} in it and {here} in the config")
    more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
    return ", ".join(lines[:3]) + more


def _reason(error: BaseException) -> str:
    """The operating system's words for an error, or the first line of its own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]
