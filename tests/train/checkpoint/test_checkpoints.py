"""Checkpoints: exact on any mesh, safe against donation, interruption and a full disk."""

import contextlib
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stack.config.errors import StackError
from stack.config.train import CheckpointConfig
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.checkpoint.manifest import NAME

EXTRA = {"config": {"seed": 1, "name": "run"}, "data": {"position": 12, "fraction": 0.25, "path": None}}


def make_mesh(*sizes: int) -> Mesh:
    return jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def make_state(rows: int = 64) -> dict[str, Any]:
    """A state as the trainer has it, every leaf with values of its own."""
    params = {"embed": {"table": np.zeros((rows, 8), np.float32)}, "norm": {"scale": np.zeros(7, np.float32)}}
    state = {
        "params": params,
        "opt_state": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        "step": np.int32(0),
    }
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: (random.standard_normal(x.shape) * 100).astype(x.dtype), state)


def abstract(state: Any, mesh: Mesh, spec: P) -> Any:
    """Shapes with matrices laid out by the spec and everything else whole."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec if x.ndim == 2 else P())
        ),
        state,
    )


def place(state: Any, mesh: Mesh, spec: P) -> Any:
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), state, abstract(state, mesh, spec))


def assert_equal(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def tiny(value: float = 0.0) -> dict[str, Any]:
    return {"params": {"w": jnp.full((4,), value)}, "step": jnp.int32(value)}


@contextlib.contextmanager
def files_limited_to(size: int) -> Generator[None]:
    """The kernel refuses to let any file of this process grow beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [((8, 1), P("fsdp")), ((2, 4), P("tensor", "fsdp")), ((1, 1), P())],
    ids=["other sizes", "transposed", "one device"],
)
def test_a_checkpoint_is_read_bit_for_bit_on_another_mesh(
    tmp_path: Path, sizes: tuple[int, int], spec: P
) -> None:
    state = make_state()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(5, place(state, make_mesh(4, 2), P("fsdp", "tensor")), EXTRA)
    want = abstract(state, make_mesh(*sizes), spec)
    reader = Checkpoints(tmp_path)
    got = reader.restore(5, want)
    assert_equal(got, state)
    assert jax.tree.all(jax.tree.map(lambda x, to: x.sharding == to.sharding, got, want))
    assert reader.extra(5) == EXTRA


def test_parameters_are_read_without_the_optimizer(tmp_path: Path) -> None:
    state = make_state()
    mesh = make_mesh(4, 2)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(5, place(state, mesh, P("fsdp", "tensor")), {})
    want = abstract({"params": state["params"]}, mesh, P("tensor"))
    assert_equal(Checkpoints(tmp_path).restore(5, want), {"params": state["params"]})


@pytest.mark.parametrize("spec", [P("fsdp", "tensor"), P(None, "tensor")], ids=["sharded", "replicated"])
def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path: Path, spec: P) -> None:
    state = make_state(rows=1 << 16)
    mesh = make_mesh(4, 2)
    live = place(state, mesh, spec)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with jax.set_mesh(mesh), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        overwrite(place(state, mesh, spec))  # Compiled before the race begins.
        checkpoints.save(1, live, {})
        jax.block_until_ready(overwrite(live))
        checkpoints.wait()
        assert_equal(checkpoints.restore(1, abstract(state, mesh, spec)), state)


def test_what_is_restored_may_be_donated_and_is_each_device_its_own(tmp_path: Path) -> None:
    """Arrays of CPUs are the memory they were read into, which devices that hold the same share."""
    state, mesh = make_state(), make_mesh(4, 2)
    replicated = abstract(state, mesh, P())

    def own(x: jax.Array) -> jax.Array:
        return x + jax.lax.axis_index("fsdp").astype(x.dtype)

    alone = jax.shard_map(own, in_specs=P(), out_specs=P(), check_vma=False)
    add = jax.jit(lambda tree: jax.tree.map(alone, tree), donate_argnums=0)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, jax.set_mesh(mesh):
        checkpoints.save(1, place(state, mesh, P()), {})
        checkpoints.wait()
        for _ in range(2):
            added = add(checkpoints.restore(1, replicated))
            for leaf, old in zip(jax.tree.leaves(added), jax.tree.leaves(state), strict=True):
                for shard in leaf.addressable_shards:
                    want = old + np.asarray(shard.device.id // 2).astype(old.dtype)
                    assert np.array_equal(shard.data, want)


def test_the_last_and_every_nth_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_every=30)) as checkpoints:
        for step in range(10, 80, 10):
            checkpoints.save(step, tiny(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [30, 60, 70]
        assert checkpoints.latest() == 70
    assert sorted(os.listdir(tmp_path)) == ["30", "60", "70"]


def test_saving_the_same_step_again_does_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, tiny(1), {"first": True})
        checkpoints.save(1, tiny(2), {"first": False})
        checkpoints.wait()
        assert checkpoints.extra(1) == {"first": True}


def test_what_an_interrupted_save_left_is_never_the_latest(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(10, tiny(), {})
    (tmp_path / "30").mkdir()
    shutil.copytree(tmp_path / "10", tmp_path / "40", ignore=shutil.ignore_patterns(NAME))
    (tmp_path / "notes").mkdir()

    assert Checkpoints(tmp_path).latest() == 10
    assert (tmp_path / "40").exists(), "a reader must not touch a save under way"

    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert not (tmp_path / "40").exists()
        assert (tmp_path / "notes").exists()
        assert checkpoints.latest() == 10
        for step in (20, 30, 40):
            checkpoints.save(step, tiny(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [30, 40]


def test_a_checkpoint_behind_a_link_counts(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "run", CheckpointConfig(keep_last=1)) as checkpoints:
        checkpoints.save(10, tiny(10), {})
        checkpoints.wait()
        shutil.move(tmp_path / "run" / "10", tmp_path / "elsewhere")
        (tmp_path / "run" / "10").symlink_to(tmp_path / "elsewhere")
        assert checkpoints.latest() == 10
        checkpoints.save(20, tiny(20), {})
        checkpoints.wait()
        assert [saved.error for saved in checkpoints.poll()] == [None, None]
    assert os.listdir(tmp_path / "run") == ["20"]
    assert (tmp_path / "elsewhere" / "0" / "0").exists()


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere").latest() is None
    with pytest.raises(StackError, match=r"no checkpoint of step 3 in .*nowhere; there is none"):
        Checkpoints(tmp_path / "nowhere").extra(3)


def test_a_missing_step_is_told_with_the_steps_there_are(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(10, tiny(), {})
        checkpoints.save(20, tiny(), {})
        checkpoints.wait()
        with pytest.raises(StackError, match=r"no checkpoint of step 15 in .*; there are steps 10, 20"):
            checkpoints.restore(15, abstract(tiny(), make_mesh(8, 1), P()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tree: tree["params"].update(w=jnp.zeros(5)),
            r"params\.w is float32\[4\] in it and float32\[5\]",
        ),
        (
            lambda tree: tree["params"].update(w=jnp.zeros(4, jnp.bfloat16)),
            r"and bfloat16\[4\] in the config",
        ),
        (lambda tree: tree["params"].update(bias=jnp.zeros(4)), r"it has no params\.bias"),
        (lambda tree: tree["params"].pop("w"), r"it has params\.w, which the config has not"),
    ],
    ids=["shape", "dtype", "missing leaf", "extra leaf"],
)
def test_a_state_that_does_not_fit_is_refused_by_the_name_of_the_leaf(
    tmp_path: Path, change: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, tiny(), {})
    other = tiny()
    change(other)
    with pytest.raises(StackError, match=message):
        Checkpoints(tmp_path).restore(1, abstract(other, make_mesh(8, 1), P()))
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints_intact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    mesh = make_mesh(4, 2)
    state = make_state(rows=1 << 12)
    live = place(state, mesh, P("fsdp", "tensor"))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, live, EXTRA)
        checkpoints.wait()
        assert [saved.error for saved in checkpoints.poll()] == [None]
        with files_limited_to(1 << 16):
            checkpoints.save(2, live, EXTRA)
            checkpoints.wait()
        (failed,) = checkpoints.poll()
        assert failed.error == (
            f"cannot save the checkpoint of step 2 in {tmp_path}: File too large; the checkpoint of step 1 is"
            " intact"
        )
        assert checkpoints.poll() == []
        assert caplog.records == [], "it must be the only word about it"
        assert capfd.readouterr() == ("", "")
        assert os.listdir(tmp_path) == ["1"], "what was half written must give its space back"
        assert_equal(checkpoints.restore(1, abstract(state, mesh, P("fsdp"))), state)
        checkpoints.save(2, live, EXTRA)  # The disk is mended.
    assert checkpoints.latest() == 2


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path: Path) -> None:
    live = place(make_state(rows=1 << 12), make_mesh(8, 1), P("fsdp"))

    def run() -> None:
        with files_limited_to(1 << 16), Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            checkpoints.save(1, live, {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        run()
    assert "cannot save the checkpoint of step 1" in interrupt.value.__notes__[0]


def test_numbers_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, tiny(1), {}, is_finite=jnp.bool(True))
        checkpoints.save(2, tiny(2), {}, is_finite=jnp.bool(False))
        checkpoints.wait()
        first, second = checkpoints.poll()
        assert first.error is None
        assert second.error == (
            f"cannot save the checkpoint of step 2 in {tmp_path}: its numbers are not all finite; the"
            " checkpoint of step 1 is intact"
        )
        assert checkpoints.steps() == [1]


def test_checkpoints_after_the_one_saved_are_of_a_way_that_was_left(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=2)) as checkpoints:
        for step in (10, 20, 30, 15):
            checkpoints.save(step, tiny(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [15]


def test_checkpoints_of_an_earlier_format_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "10").mkdir()
    (tmp_path / "10" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(StackError, match=r"/10 is a checkpoint of an earlier format; go on with the version"):
        Checkpoints(tmp_path, CheckpointConfig())
    assert (tmp_path / "10" / "_CHECKPOINT_METADATA").exists()


def test_host_memory_is_bounded_in_saving_and_in_restoring(tmp_path: Path) -> None:
    mesh = make_mesh(8, 1)
    state = {"params": {f"w{number}": np.full((8, 1 << 18), number, np.float32) for number in range(8)}}
    config = CheckpointConfig(host_memory_gb=0.01)
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(1, place(state, mesh, P("fsdp")), {})
        checkpoints.wait()
        assert 5e6 < checkpoints.most_held <= 10e6, "of 67 MB"
        assert_equal(checkpoints.restore(1, abstract(state, mesh, P("fsdp"))), state)
        assert checkpoints.most_held <= 10e6


def test_each_byte_is_read_once_however_many_devices_hold_it(tmp_path: Path) -> None:
    state = {"params": {"w": np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)}}
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, place(state, make_mesh(4, 2), P("fsdp", "tensor")), {})
    for mesh, spec in ((make_mesh(8, 1), P()), (make_mesh(2, 4), P("tensor", "fsdp"))):
        reader = Checkpoints(tmp_path)
        assert_equal(reader.restore(1, abstract(state, mesh, spec)), state)
        assert reader.bytes_read <= 1.1 * state["params"]["w"].nbytes


def restore_in(folder: str, sizes: tuple[int, int], spec: tuple[str | None, ...]) -> tuple[int, int]:
    """In one of several processes: bytes read, and shards it holds, which are as they should be."""
    like = {"params": {"w": np.empty((1024, 1024), np.float32)}}
    reader = Checkpoints(Path(folder))
    restored = reader.restore(1, abstract(like, make_mesh(*sizes), P(*spec)))["params"]["w"]
    whole = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    for shard in restored.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
    return reader.bytes_read, len(restored.addressable_shards)


@pytest.mark.full
@pytest.mark.parametrize("spec", [(), (None, "fsdp"), ("tensor", "fsdp")])
def test_each_byte_is_read_once_by_several_processes_in_another_layout(
    tmp_path: Path, run_processes, spec
) -> None:
    state = {"params": {"w": np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)}}
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, place(state, make_mesh(4, 2), P("fsdp", "tensor")), {})
    told = run_processes(restore_in, str(tmp_path), (2, 4), spec, processes=2, devices=4)
    assert [shards for _, shards in told] == [4, 4]
    assert all(read > 0 for read, _ in told), "both read"
    assert sum(read for read, _ in told) <= 1.1 * state["params"]["w"].nbytes


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match=r"cannot write checkpoints to .*: Not a directory; set output_dir"):
        Checkpoints(tmp_path / "file" / "checkpoints", CheckpointConfig())


def test_a_folder_that_vanished_is_told(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig())
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    checkpoints.save(1, tiny(), {})
    checkpoints.close()
    (failed,) = checkpoints.poll()
    assert failed.error is not None
    assert re.match(r"cannot save the checkpoint of step 1 in .*: Not a directory$", failed.error)


_PROCESS = """
import os, sys
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from stack.config.train import CheckpointConfig
from stack.train.checkpoint.checkpoints import Checkpoints

folder, address, index = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(index), initialization_timeout=60)
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
sharding = NamedSharding(mesh, P("fsdp"))
with Checkpoints(folder, CheckpointConfig(keep_last=1)) as checkpoints:
    step = checkpoints.latest()
    state = checkpoints.restore(step, {"w": jax.ShapeDtypeStruct((16, 3), np.float32, sharding=sharding)})
    with jax.set_mesh(mesh):
        state = jax.jit(lambda tree: {"w": tree["w"] * 2})(state)
    checkpoints.save(step + 1, state, {"processes": jax.process_count()})
    checkpoints.wait()
    assert checkpoints.latest() == step + 1
"""


def test_two_processes_go_on_from_one_and_one_from_two(tmp_path: Path) -> None:
    want = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, {"w": place(want, make_mesh(4, 2), P("tensor"))}, {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(tmp_path), address, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output
    reader = Checkpoints(tmp_path)
    assert reader.steps() == [2]
    assert reader.extra(2) == {"processes": 2}
    assert_equal(reader.restore(2, abstract({"w": want}, make_mesh(2, 4), P("fsdp"))), {"w": want * 2})
