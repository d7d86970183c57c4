"""A loss of power under a real file system: the run goes on to the same end from what was called saved."""

import fcntl
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import records, run, saved_state, start, wait_for_step

from stack.storage.store import Store
from stack.train.checkpoint.manifest import saved_steps, verify

OPTIONS = ("train.steps=300", "eval.every=40", "checkpoint.every=20", "checkpoint.keep_last=1")
CUTS = 4
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN: from now on nothing reaches the disk,
_NO_LOG_FLUSH = (2).to_bytes(4, "little")  # and what its journal has not written by now neither.


def system(*command: object) -> bool:
    return subprocess.run([str(word) for word in command], capture_output=True).returncode == 0


class LoopDisk:
    """An ext4 in a file."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image, self.folder = image, folder
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(64 << 20)

    def make(self) -> bool:
        return system("mkfs.ext4", "-q", "-F", self._image) and self.mount()

    def mount(self) -> bool:
        return system("mount", "-o", "loop", self._image, self.folder)

    def cut(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(descriptor)

    def unmount(self) -> bool:
        return system("umount", self.folder)


@pytest.fixture
def disk(tmp_path) -> Iterator[LoopDisk]:
    made = LoopDisk(tmp_path / "image", tmp_path / "disk")
    if os.geteuid() != 0 or not made.make():
        pytest.skip("needs root, mkfs.ext4 and loop devices, to mount a disk of its own")
    yield made
    made.unmount()


@pytest.mark.full
def test_after_a_cut_of_a_mounted_disk_the_run_is_the_unbroken_one(disk, tmp_path) -> None:
    run(tmp_path / "whole", "run", *OPTIONS)
    chance = random.Random(0)
    promised = 0
    for number in range(CUTS):  # Each after the one before.
        process = start(disk.folder, "run", *OPTIONS)
        subprocess.run(["sync", "-f", disk.folder / "run.yaml"], check=True)
        wait_for_step(disk.folder, "run", 300 * number // CUTS + chance.randrange(1, 300 // CUTS), process)
        time.sleep(0.05 * chance.random())
        disk.cut()
        process.kill()
        out, _ = process.communicate()
        assert disk.unmount()
        assert disk.mount()
        store = Store(disk.folder / "runs" / "run" / "checkpoints")
        told = re.findall(r"^step (\d+)  checkpoint$", out, re.MULTILINE)
        promised = max([promised, *map(int, told)])
        there = saved_steps(store)
        assert max(there, default=0) >= promised
        for step in there:
            assert list(verify(store, step)) == []
    assert promised > 0
    run(disk.folder, "run", *OPTIONS)
    assert saved_state(disk.folder, "run") == saved_state(tmp_path / "whole", "run")
    assert records(disk.folder, "run") == records(tmp_path / "whole", "run")
