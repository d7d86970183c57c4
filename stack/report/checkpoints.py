"""What `stack checkpoint` tells: of each checkpoint what it holds, and whether it is sound. Loads no JAX."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from stack.config import StackError, load
from stack.config.paths import expand
from stack.storage.store import Store
from stack.train.best import best_step, read_values
from stack.train.best import describe as describe_best
from stack.train.checkpoint.manifest import (
    DamagedError,
    Manifest,
    place,
    read_manifest,
    saved_steps,
    unreadable,
    verify,
)
from stack.train.weights.origin import describe


def store_of(run: str) -> Store:
    """Where the checkpoints of a run folder are.

    Raises:
      StackError: it is no run.
    """
    folder = expand(run)
    if not folder.is_dir():
        raise StackError(f"{folder} is not the folder of a run; give one that `stack train` made")
    return place(load(folder), folder)


def lines(verb: str, run: str, step: int | None) -> Iterator[str]:
    """What `stack checkpoint VERB` prints."""
    match verb:
        case "list":
            return list_lines(run)
        case "verify":
            return verify_lines(run, step)
        case _:
            return show_lines(run, step)


def list_lines(run: str) -> Iterator[str]:
    """A line for each checkpoint: its step, size and time, which is best; files are only counted."""
    store = store_of(run)
    steps = _steps(store)
    best, told = _best(run, store, steps)
    for step in steps:
        try:
            manifest = _manifest(store, step)
        except DamagedError as error:
            yield f"step {step:<10,} damaged: {error}"
            continue
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.time))
        size = f"{_bytes(manifest.size):>9} in {len(manifest.files):,} files"
        yield f"step {step:<10,} {size}, saved {saved}{told if step == best else ''}"


def verify_lines(run: str, step: int | None = None) -> Iterator[str]:
    """For each checkpoint, or one, whether all of it is as it was written.

    Raises:
      StackError: at the end, if something is not.
    """
    store = store_of(run)
    damaged = 0
    for one in _steps(store, step):
        problems = []
        try:
            problems += verify(store, one)
        except OSError as error:
            raise unreadable(store, error) from error
        yield from (f"step {one:,}: {problem}" for problem in problems)
        if not problems:
            yield f"step {one:,}: sound"
        damaged += len(problems)
    if damaged:
        raise StackError(f"{damaged} of the files of {store.name} are not as they were written")


def show_lines(run: str, step: int | None = None) -> Iterator[str]:
    """What is in a checkpoint, by default the newest: the record of the run, and its arrays."""
    store = store_of(run)
    manifest = _manifest(store, _steps(store, step)[-1])
    record = manifest.extra
    yield f"step      {manifest.step:,}"
    yield f"rows      {record['rows']:,} of the training sequence used"
    if record["skipped"]:
        yield f"skipped   {', '.join(f'{start:,} to {stop:,}' for start, stop in record['skipped'])}"
    if told := describe(record.get("origin", {})):
        yield f"weights   {told} at first"
    for one in record["accepted"]:
        yield f"accepted  {one['field']} {one['old']} -> {one['new']} at step {one['step']:,}"
    yield f"versions  {', '.join(f'{name} {version}' for name, version in record['versions'].items())}"
    yield f"size      {_bytes(manifest.size)} in {len(manifest.files):,} files"
    width = max(map(len, manifest.leaves), default=0)
    for name, (dtype, shape) in manifest.leaves.items():
        yield f"{name:<{width}}  {dtype}{list(shape)}, {math.prod(shape):,}"


def _best(run: str, store: Store, steps: list[int]) -> tuple[int | None, str]:
    """The best of the steps by the run's metric, and what to say of it; None if it picks none."""
    folder = expand(run)
    config = load(folder).eval
    kept: Mapping[str, Any] = {}
    for step in steps[::-1]:
        with contextlib.suppress(DamagedError):
            kept = _manifest(store, step).extra.get("listeners", {})
            break
    values = read_values(folder, kept, config.metric)
    best = best_step(values, config, steps)
    return best, "" if best is None else f", the best: {describe_best(values, config, best)}"


def _steps(store: Store, step: int | None = None) -> list[int]:
    steps = saved_steps(store)
    if not steps:
        raise StackError(f"{store.name} holds no checkpoint yet")
    if step is not None and step not in steps:
        raise StackError(
            f"no checkpoint of step {step} in {store.name}; there are {', '.join(map(str, steps))}"
        )
    return steps if step is None else [step]


def _manifest(store: Store, step: int) -> Manifest:
    try:
        return read_manifest(store, step)
    except OSError as error:
        raise unreadable(store, error) from error


def _bytes(size: int) -> str:
    """Three digits and a unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"
