"""A batch is a function of the seed and the step, the same on any layout of devices."""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stack.config import Config, MeshConfig
from stack.data import Data, Dataset, open_data
from stack.data.fields import Field
from stack.data.loader import Batch, heldout_batches, prefetch, training_batches
from stack.data.mixture import training_order
from stack.objectives.causal import Causal
from stack.parallel import mesh as meshes
from stack.parallel.rules import Layout

BATCH = 8
RECORDED = {
    0: [87, 552, 486, 330, 531, 480, 83, 744, 437, 125, 629, 394, 133, 487, 695, 151, 427, 597, 198, 764],
    7: [35, 600, 582, 324, 586, 521, 113, 538, 635, 96, 739, 609, 156, 435, 736, 336, 645, 699, 66, 411],
}
"""Rows of two sources of 383 rows each, the second twice as often, by seed."""
LENGTH = 32


def tree(folder: Path, *sizes: tuple[int, float]) -> Config:
    """Synthetic sources of so many bytes, with weights."""
    sources = [{"kind": "synthetic", "max_bytes": size, "weight": weight} for size, weight in sizes]
    data = {"sources": sources, "sequence_length": LENGTH, "heldout_fraction": 0.1, "cache_dir": str(folder)}
    return Config.model_validate({"data": data})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return open_data(tree(tmp_path_factory.mktemp("cache"), (20_000, 1.0)), show_progress=False)


def layout(**sizes: int) -> Layout:
    config = MeshConfig.model_validate({"fsdp": 1} | sizes)
    devices = jax.devices()[: config.data * config.fsdp * config.tensor]
    return Layout.of(meshes.build(config, devices), config)


def whole(batch: Batch) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in batch.items()}


def assert_equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, values in left.items():
        np.testing.assert_array_equal(values, right[name], err_msg=name)


def make_batches(
    dataset: Dataset, *, size: int = BATCH, seed: int = 0, on: Layout | None = None
) -> Callable[[int], Batch]:
    """From step to batch, shuffled; on one device unless told where."""
    return training_batches(
        dataset, fields=Causal.fields, batch_size=size, seed=seed, shuffle=True, layout=on or layout()
    )


def train(data: Data, *, seed: int = 0) -> Callable[[int], dict[str, np.ndarray]]:
    """From step to batch, on one device."""
    make = make_batches(data.train, seed=seed)
    return lambda step: whole(make(step))


def test_a_batch_has_the_promised_keys_shapes_and_types(data: Data) -> None:
    batch = train(data)(0)
    assert list(batch) == ["tokens", "labels", "segments", "positions", "example"]
    assert {name: values.shape for name, values in batch.items() if name != "example"} == dict.fromkeys(
        ["tokens", "labels", "segments", "positions"], (BATCH, LENGTH)
    )
    assert batch["example"].tolist() == list(range(BATCH))
    assert all(values.dtype == np.int32 for values in batch.values())


@settings(deadline=None, max_examples=20)
@given(steps=st.lists(st.integers(0, 10**12), min_size=1, max_size=5))
def test_a_batch_depends_on_no_step_before(data: Data, steps: list[int]) -> None:
    used = train(data)
    for step in steps:
        used(step)
    assert_equal(used(steps[0]), train(data)(steps[0]))


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 4}, {"tensor": 8}], ids=str
)
def test_a_batch_is_the_same_on_every_layout(data: Data, sizes: dict[str, int]) -> None:
    for step in (0, 3, 10_000):
        on = layout(**sizes)
        batch = make_batches(data.train, on=on)(step)
        for field in Causal.fields:
            assert batch[field.name].sharding == on.sharding(*field.axes)
        assert_equal(whole(batch), train(data)(step))


def test_a_field_that_data_has_not_is_an_error(data: Data) -> None:
    fields = (*Causal.fields, Field(name="pixels", axes=("batch", "length"), padding=0))
    with pytest.raises(ValueError, match="no field pixels; it has tokens, labels, segments, positions"):
        training_batches(data.train, fields=fields, batch_size=8, seed=0, shuffle=True, layout=layout())(0)


def test_fields_say_what_fills_them_up_and_of_what_type(data: Data) -> None:
    fields = (Field(name="labels", axes=("batch", "length"), padding=-7, dtype="int16"),)
    make, number = heldout_batches(data.heldout, fields=fields, batch_size=BATCH, layout=layout())
    batch = make(number - 1)
    assert list(batch) == ["labels"]
    assert batch["labels"].dtype == "int16"
    assert (np.asarray(batch["labels"])[data.heldout.num_rows % BATCH :] == -7).all()


PROCESS = """
import sys
import jax, numpy as np
number, address, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(address, 2, number, initialization_timeout=60)
from stack.config import Config
from stack.data import Dataset, open_data
from stack.config import MeshConfig
from stack.data.loader import training_batches
from stack.objectives.causal import Causal
from stack.parallel import mesh as meshes
from stack.parallel.rules import Layout

read = []
class Watched(Dataset):
    def read(self, rows, fields):
        read.append(len(rows))
        return super().read(rows, fields)

data = open_data(Config.model_validate_json(open(folder + "/config.json").read()), show_progress=False)
train = Watched(parts=data.train.parts, weights=data.train.weights, tokenizer=data.tokenizer)
config = MeshConfig(data=16, fsdp=1)
layout = Layout.of(meshes.build(config), config)
make = training_batches(train, fields=Causal.fields, batch_size=16, seed=0, shuffle=True, layout=layout)
batch = make(5)
shards = {name: [np.asarray(s.data) for s in values.addressable_shards] for name, values in batch.items()}
np.savez(f"{folder}/{number}.npz", read=read, **{n: np.concatenate(v) for n, v in shards.items()})
"""


@pytest.mark.full
def test_two_processes_each_read_their_half_of_the_same_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = tree(tmp_path, (20_000, 1.0))
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", PROCESS]
    processes = [subprocess.Popen([*command, str(number), address, str(tmp_path)]) for number in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]

    halves = [dict(np.load(tmp_path / f"{number}.npz")) for number in range(2)]
    assert [half.pop("read").tolist() for half in halves] == [[8], [8]]
    dataset = open_data(config, show_progress=False).train
    make = make_batches(dataset, size=16)
    joined = {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
    assert_equal(joined, whole(make(5)))


def test_each_epoch_holds_every_row_once_in_a_new_order(data: Data) -> None:
    count = data.train.num_rows
    order = training_order(data.train, seed=0, shuffle=True)
    epochs = [[order[i] for i in range(epoch * count, (epoch + 1) * count)] for epoch in range(3)]
    assert all(set(epoch) == set(range(count)) and len(epoch) == count for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != [training_order(data.train, seed=1, shuffle=True)[i] for i in range(count)]
    assert epochs[0] != list(range(count))


def test_without_shuffle_rows_come_in_order(data: Data) -> None:
    order = training_order(data.train, seed=0, shuffle=False)
    count = data.train.num_rows
    assert [order[i] for i in range(count + 3)] == [*range(count), 0, 1, 2]


def test_the_batches_of_consecutive_steps_are_the_rows_in_their_order(data: Data) -> None:
    order = training_order(data.train, seed=0, shuffle=True)
    steps = data.train.num_rows // BATCH + 2  # into the second epoch
    rows = data.train.read(np.array([order[place] for place in range(steps * BATCH)]), Causal.fields)
    batches = [train(data)(step) for step in range(steps)]
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in rows}
    assert_equal(joined, rows)


def test_sources_are_mixed_by_weight_whatever_their_sizes(tmp_path: Path) -> None:
    config = tree(tmp_path, (20_000, 3.0), (60_000, 1.0), (5_000, 0.5))
    mixed = open_data(config, show_progress=False)
    order = training_order(mixed.train, seed=0, shuffle=True)
    rows = np.array([order[i] for i in range(9000)])
    edges = np.cumsum([part.num_rows for part in mixed.train.parts])
    counts = np.bincount(np.searchsorted(edges, rows, "right"), minlength=3)
    assert counts.tolist() == pytest.approx([6000, 2000, 1000], abs=2)
    smallest = rows[rows >= edges[1]]
    times = np.bincount(smallest - edges[1])
    assert times.max() - times.min() <= 1


def test_the_held_out_set_comes_once_with_padding_at_the_end(data: Data) -> None:
    make, count = heldout_batches(data.heldout, fields=Causal.fields, batch_size=BATCH, layout=layout(data=8))
    assert data.heldout.num_rows % BATCH
    batches = [whole(make(number)) for number in range(count)]
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    del joined["example"]
    rows = data.heldout.num_rows
    expected = data.heldout.read(np.arange(rows), Causal.fields)
    assert_equal({name: values[:rows] for name, values in joined.items()}, expected)
    assert len(joined["labels"]) - rows < BATCH
    assert (joined["labels"][rows:] == -1).all()
    assert (joined["segments"][rows:] == 0).all()
    assert (joined["labels"] >= 0).sum() == data.heldout.num_tokens


def numbered(number: int) -> Batch:
    return {"tokens": jax.numpy.full((1, 1), number)}


def test_prefetching_changes_nothing_and_works_ahead_within_its_bound() -> None:
    asked = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            yield number

    stream = prefetch(numbered, numbers(), ahead=3)
    for expected in range(20):
        assert next(stream)["tokens"].item() == expected
        assert len(asked) == expected + 4
    stream.close()  # pyrefly: ignore
    assert [batch["tokens"].item() for batch in prefetch(numbered, range(7))] == list(range(7))
    assert list(prefetch(numbered, [])) == []


def test_an_error_comes_out_at_its_step_and_the_thread_ends() -> None:
    def make(number: int) -> Batch:
        if number == 2:
            raise OSError("the disk is gone")
        return numbered(number)

    stream = prefetch(make, range(10))
    assert [batch["tokens"].item() for batch in islice(stream, 2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_closing_early_ends_the_thread() -> None:
    stream = prefetch(numbered, range(10**9))
    next(stream)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    stream.close()  # pyrefly: ignore
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_order_of_rows_is_the_recorded_one(tmp_path: Path) -> None:
    """Of Grain's permutations too: where this fails, raise `mixture.VERSION` and record anew."""
    two = open_data(tree(tmp_path, (12_000, 1.0), (12_000, 2.0)), show_progress=False).train
    assert [part.num_rows for part in two.parts] == [383, 383]
    for seed, rows in RECORDED.items():
        order = training_order(two, seed=seed, shuffle=True)
        assert [order[place] for place in range(len(rows))] == rows


def test_sources_of_one_size_are_shuffled_apart(tmp_path: Path) -> None:
    two = open_data(tree(tmp_path, (12_000, 1.0), (12_000, 1.0)), show_progress=False).train
    first, second = (part.num_rows for part in two.parts)
    order = training_order(two, seed=0, shuffle=True)
    rows = np.array([order[place] for place in range(first + second)])
    assert rows[rows < first].tolist() != (rows[rows >= first] - first).tolist()
