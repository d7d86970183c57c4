"""Damage of any kind, anywhere in a checkpoint, is found before it is used, and named."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damages import damage, remove, seeds_of_damage
from hypothesis import given, settings
from hypothesis import strategies as st

from stack import Config, StackError
from stack.storage.store import Store
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.checkpoint.manifest import BLOCK, NAME, DamagedError, Manifest, saved_steps, verify
from stack.train.ledger import Ledger

STATE = {
    "params": {"a": np.arange(700_000, dtype=np.float32), "b": np.ones((3, 5), np.float32)},
    "step": np.int32(7),
}


def flip(data: bytes, where: random.Random) -> bytes:
    place = where.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << where.randrange(8)]) + data[place + 1 :]


KINDS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped": flip,
    "truncated": lambda data, where: data[: where.randrange(len(data))],
    "emptied": lambda *_: b"",
    "removed": lambda *_: None,
    "longer": lambda data, where: data + bytes(where.randrange(1, 9)),
    "zeroed": lambda data, _: bytes(len(data)),
    "other": lambda data, where: where.randbytes(len(data)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    from stack.config.train import CheckpointConfig

    folder = tmp_path_factory.mktemp("damage")
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        checkpoints.save(7, jax.tree.map(jnp.asarray, STATE), {"rows": 3, "note": "ä"})
    return folder


def like(state) -> dict:
    device = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), jax.P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=device), state)


def restore(folder: Path) -> dict:
    reader = Checkpoints(folder)
    reader.extra(7)
    return reader.restore(7, like(STATE))


def test_what_is_not_damaged_is_read(saved) -> None:
    got = restore(saved)
    assert jax.tree.all(jax.tree.map(np.array_equal, got, STATE))
    assert list(verify(Store(saved), 7)) == []
    assert (saved / "7" / "0" / "0").stat().st_size > 2 * BLOCK, "several blocks are under test"


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 2**32), file=st.sampled_from(["0/0", NAME]))
def test_a_damaged_file_is_named(saved, tmp_path_factory, kind, seed, file) -> None:
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    path = folder / "7" / file
    damaged = KINDS[kind](path.read_bytes(), random.Random(seed))
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    if kind == "removed" and file == NAME:
        assert Checkpoints(folder).steps() == [], "without it there is no checkpoint"
        return
    with pytest.raises(DamagedError, match=f"7/{file} is (damaged: |missing)"):
        restore(folder)
    assert len(list(verify(Store(folder), 7))) == 1
    shutil.rmtree(folder)


def test_a_file_that_was_added_is_named(saved, tmp_path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "7" / "0" / "1").write_bytes(b"x")
    with pytest.raises(DamagedError, match="7/0/1 was added"):
        restore(folder)


def test_a_manifest_is_read_back_as_it_was_written() -> None:
    manifest = Manifest(
        step=1, time=1.5, leaves={"a.b": ("bfloat16", (2, 3))}, files={}, extra={"x": [1, "ä", None]}
    )
    assert Manifest.decode(manifest.encode()) == manifest
    with pytest.raises(ValueError, match="its format is 2, this version of Stack reads 1"):
        Manifest.decode(manifest.encode().replace(b'"format": 1', b'"format": 2'))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8", "bool", "uint32", "float16"])
def test_every_type_comes_back_bit_for_bit(tmp_path, dtype) -> None:
    from stack.config.train import CheckpointConfig

    values = np.random.default_rng(0).integers(0, 2, (5, 3)).astype(dtype)
    state = {"w": jnp.asarray(values), "empty": jnp.zeros((0, 4), dtype)}
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state, {})
    got = Checkpoints(tmp_path).restore(1, like(state))
    assert got["w"].dtype == dtype
    assert np.asarray(got["w"]).tobytes() == values.tobytes()
    assert got["empty"].shape == (0, 4)


def test_a_checkpoint_under_the_name_of_another_is_named(run_folder, tmp_path) -> None:
    copy = shutil.copytree(run_folder / "checkpoints", tmp_path / "copy")
    (copy / "3").rename(copy / "5")
    with pytest.raises(DamagedError, match=r"5/manifest\.jsonl is damaged: it is of step 3$"):
        Checkpoints(copy).restore(5, like(at(3)))


def test_links_that_lead_back_to_a_folder_above_them_are_not_followed_for_ever(run_folder, tmp_path) -> None:
    copy = shutil.copytree(run_folder / "checkpoints", tmp_path / "copy")
    want = Store(copy).names()
    for number in range(4):
        (copy / "3" / f"back{number}").symlink_to(copy)
        (copy / "7" / f"other{number}").symlink_to(copy / "3")
    names = Store(copy).names()
    assert want == [name for name in names if "back" not in name and "other" not in name]
    assert saved_steps(Store(copy)) == [3, 7]


def ledger(folder: Path) -> Ledger:
    return Ledger(Config(), folder)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Of a run with two checkpoints: of its step and of nothing else."""
    from stack.config.train import CheckpointConfig

    folder = tmp_path_factory.mktemp("run")
    mine = ledger(folder)
    with Checkpoints(mine.store, CheckpointConfig(keep_last=2)) as checkpoints:
        for step in (3, 7):
            checkpoints.save(step, jax.tree.map(jnp.asarray, at(step)), mine.record(step, {}, {}).as_dict())
    return folder


def at(step: int) -> dict:
    values = np.random.default_rng(step).normal(size=300_000).astype(np.float32)
    return {"params": {"a": values, "b": np.array([step], np.float32)}, "guard": {}, "step": np.int32(step)}


@seeds_of_damage
def test_a_damaged_run_goes_on_from_a_checkpoint_as_it_was_or_names_the_damage(
    run_folder, tmp_path, seeds
) -> None:
    want = {step: jax.tree.map(lambda leaf: leaf.tobytes(), at(step)) for step in (3, 7)}
    abstract = like(at(3))
    for seed in seeds:
        copy = shutil.copytree(run_folder, tmp_path / "copy")
        done = damage(copy / "checkpoints", seed)
        mine, told = ledger(copy), list[str]()
        try:
            got = mine.restore(Checkpoints(mine.store), abstract, data=dict, warn=told.append)
        except StackError as error:
            told.append(str(error))
            got = None
        else:
            if got is None:
                assert saved_steps(mine.store) == [], (seed, done)
            else:
                found = jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), got)
                assert found == want[mine.position.step], (seed, done)
                assert told or mine.position.step == max(saved_steps(mine.store)), (seed, done)
        for line in told:
            assert str(copy) in line, (seed, done, line)
            assert "\n" not in line
        remove(copy)
