"""Whatever happens to the cache: training reads what it would have read, or the damage is named."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damages import damage, remove, seeds_of_damage

from stack import StackError
from stack.config import Config
from stack.data import Data, open_data
from stack.data.entry import BLOCK, DamagedEntryError, EntryWriter, open_entry
from stack.objectives.causal import Causal


def config(folder: Path, cache: str) -> Config:
    sources = [{"kind": "synthetic", "max_bytes": 36_000}, {"kind": "text", "path": str(folder / "text")}]
    data = {"sources": sources, "sequence_length": 64, "heldout_fraction": 0.1, "deduplicate": "near"}
    return Config.model_validate({"data": data | {"cache_dir": str(folder / cache)}})


def everything(data: Data) -> list[bytes]:
    """All rows of both sides, and what they are called."""
    sides = [side.read(np.arange(side.num_rows), Causal.fields) for side in (data.train, data.heldout)]
    sizes = [(side.num_documents, side.num_tokens, side.num_bytes) for side in (data.train, data.heldout)]
    return [repr((data.fingerprint, sizes)).encode(), *(v.tobytes() for side in sides for v in side.values())]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("sound")
    (folder / "text").mkdir()
    for name in "abc":
        (folder / "text" / name).write_text(name * 50)
    everything(open_data(config(folder, "sound"), show_progress=False))
    tokens = [path.stat().st_size for path in folder.glob("sound/*/tokens.bin")]
    assert max(tokens) > BLOCK, "several blocks are under test"
    return folder, everything(open_data(config(folder, "sound"), show_progress=False))


def read(data: Config) -> list[bytes]:
    """As a run does: damage that is met in the middle has the entry made again."""
    for _ in range(10):
        try:
            return everything(open_data(data, show_progress=False))
        except DamagedEntryError as error:
            logging.getLogger("stack").warning(str(error))
    raise AssertionError("it is damaged again and again")


@pytest.mark.parametrize("number", [20, pytest.param(400, marks=pytest.mark.full)])
def test_a_damaged_cache_is_named_and_gives_the_same_rows(prepared, number, caplog) -> None:
    folder, want = prepared
    cache = folder / "cache"
    for seed in range(number):
        shutil.copytree(folder / "sound", cache, symlinks=True)
        done = damage(cache, seed)
        caplog.clear()
        try:
            assert read(config(folder, "cache")) == want, (seed, done)
            told = [record.getMessage() for record in caplog.records]
        except StackError as error:
            told = [str(error)]
        for line in told:
            assert str(cache) in line, (seed, done)
            assert "\n" not in line
        remove(cache)


ENTRIES = {
    "one": {"tokens": np.arange(40_000, dtype="<u2"), "offsets": np.array([0, 40_000])},
    "two": {"tokens": np.arange(7, dtype="<u2"), "offsets": np.array([0, 3, 7])},
}


class MadeAgainError(Exception):
    """Instead of making it."""


def fill(name: str) -> Callable[[EntryWriter], None]:
    def write(target: EntryWriter) -> None:
        for array, values in ENTRIES[name].items():
            target.whole(array, values)
        target.finish(name=name)

    return write


def refuse(_: EntryWriter) -> None:
    raise MadeAgainError


@seeds_of_damage
def test_a_damaged_entry_is_named_or_read_as_it_was_written(tmp_path, seeds) -> None:
    sound, cache = tmp_path / "sound", tmp_path / "cache"
    sound.mkdir()
    for name in ENTRIES:
        open_entry(sound / name, fill(name), warn=print)
    for seed in seeds:
        shutil.copytree(sound, cache)
        done = damage(cache, seed)
        for name, arrays in ENTRIES.items():
            told: list[str] = []
            is_there = os.path.lexists(cache / name)
            try:
                about, got = open_entry(cache / name, refuse, warn=told.append)
                assert about == {"name": name}, (seed, done)
                for array, values in arrays.items():
                    assert got[array][:].tobytes() == values.tobytes(), (seed, done)
            except MadeAgainError:
                assert told or not is_there, (seed, done)
            except StackError as error:
                told.append(str(error))
            for line in told:
                assert str(cache) in line, (seed, done)
                assert "\n" not in line
        remove(cache)
