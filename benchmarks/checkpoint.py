"""How fast checkpoints are written and read, against a plain copy of their bytes; what guarding a step costs.

    uv run python benchmarks/checkpoint.py [--gigabytes 1] [--rounds 5] [--folder DIR] [--json FILE]

Write: a state of so many gigabytes saved and waited for, digests, reading back and syncs included, against
the same bytes written in files of 64 MiB by as many threads, each file and the folder synced. Read: restored
into arrays, every block checked, against the same files read; both with the page cache dropped where that is
allowed, which the output says. Stall: how long `save` keeps the caller. They take turns, in an order shuffled
every round; medians and the ratios of the medians. Then the cost per step, in one process of one device: of
the check that a step is good, with its choice of parameters, compiled into the step of a small GPT or not; of
the heartbeat and the look at signals, timed by themselves.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stack import Config, Trainer
from stack.config.train import CheckpointConfig, TrainConfig
from stack.step import guard, step
from stack.step import state as states
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.checkpoint.writing import THREADS
from stack.train.heartbeat import Heartbeat
from stack.train.stop import Stop

FILE = 64 << 20


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        result = bandwidth(Path(name), arguments.gigabytes, arguments.rounds)
    result |= per_step(arguments.rounds)
    for key, value in result.items():
        print(f"{key:<42}{value:.4g}" if isinstance(value, float) else f"{key:<42}{value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def bandwidth(folder: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Seconds and ratios of writing and reading."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), P())
    rows = max(8, int(gigabytes * 1e9 / 8 / 4 / 4096))
    random_bits = np.random.default_rng(0)
    state = {
        "params": {
            f"w{number}": jax.device_put(random_bits.standard_normal((rows, 4096), np.float32), sharding)
            for number in range(8)
        }
    }
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    host = [np.asarray(leaf).reshape(-1).view(np.uint8) for leaf in jax.tree.leaves(state)]
    parts = [data[start : start + FILE] for data in host for start in range(0, len(data), FILE)]
    times: dict[str, list[float]] = {}
    dropped = True

    def timed(name: str, run: Callable[[], object]) -> None:
        begin = time.perf_counter()
        run()
        times.setdefault(name, []).append(time.perf_counter() - begin)

    saving = Checkpoints(folder / "saved", CheckpointConfig(keep_last=1))
    steps = itertools.count(1)

    def save() -> None:
        shutil.rmtree(folder / "saved", ignore_errors=True)
        step = next(steps)
        begin = time.perf_counter()
        saving.save(step, state, {})
        stalled = time.perf_counter()
        saving.wait()
        times.setdefault("save", []).append(time.perf_counter() - begin)
        times.setdefault("stall", []).append(stalled - begin)

    def copy() -> None:
        shutil.rmtree(folder / "copied", ignore_errors=True)
        (folder / "copied").mkdir()

        def write(number: int) -> None:
            with (folder / "copied" / str(number)).open("wb") as file:
                file.write(parts[number].data)
                file.flush()
                os.fsync(file.fileno())

        def run() -> None:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(write, range(len(parts))))
            descriptor = os.open(folder / "copied", os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

        timed("copy", run)

    def restore() -> None:
        nonlocal dropped
        dropped &= drop_cache()
        reader = Checkpoints(folder / "saved")
        step = reader.steps()[-1]
        timed("restore", lambda: jax.block_until_ready(reader.restore(step, like)))

    def read() -> None:
        nonlocal dropped
        dropped &= drop_cache()

        def run() -> None:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda path: path.read_bytes(), (folder / "copied").iterdir()))

        timed("read", run)

    for round_number in range(rounds + 1):
        for pair in ([save, copy], [restore, read]):
            random.Random(round_number).shuffle(pair)
            for run in pair:
                run()
        if round_number == 0:
            times.clear()  # To warm up.
    saving.close()
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bytes": size,
        "page cache dropped before reading": dropped,
        "save, GB/s": size / middle["save"] / 1e9,
        "copy with sync, GB/s": size / middle["copy"] / 1e9,
        "save against copy": middle["copy"] / middle["save"],
        "restore, GB/s": size / middle["restore"] / 1e9,
        "read, GB/s": size / middle["read"] / 1e9,
        "restore against read": middle["read"] / middle["restore"],
        "stall of save, seconds": middle["stall"],
        "stall, GB/s": size / middle["stall"] / 1e9,
    }


def drop_cache() -> bool:
    """Has the system forget what it has read, if it lets us."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def per_step(rounds: int) -> dict[str, Any]:
    """Seconds that each guard adds to a step, and their share of one."""
    fields = {
        "model": {"num_layers": 4, "embed_dim": 128, "num_heads": 4, "max_length": 64, "dtype": "float32"},
        "data": {"sources": [{"kind": "synthetic"}], "sequence_length": 64},
        "train": {"batch_size": 12},
    }
    with tempfile.TemporaryDirectory() as name:
        changes = (f"output_dir={name}/runs", f"data.cache_dir={name}/cache")
        trainer = Trainer(Config.model_validate(fields).replace(*changes), devices=jax.devices()[:1])
        with jax.set_mesh(trainer.mesh):
            guarded, plain = blocks(trainer, checked=True), blocks(trainer, checked=False)
            times: dict[str, list[float]] = {"guarded": [], "plain": []}
            for number in range(3 * rounds + 1):
                pair = [("guarded", guarded), ("plain", plain)]
                random.Random(number).shuffle(pair)
                for key, run in pair:
                    times[key].append(run())
    middle = {key: statistics.median(values[1:]) for key, values in times.items()}
    heart, stop = Heartbeat(TrainConfig()), Stop(1e9)
    count = 100_000
    begin = time.perf_counter()
    for number in range(count):
        heart.beat(number, 0.0)
        stop.reached(number)
    watching = (time.perf_counter() - begin) / count
    return {
        "step, seconds": middle["plain"],
        "check of the numbers, share of a step": middle["guarded"] / middle["plain"] - 1,
        "heartbeat and signals, seconds": watching,
        "heartbeat and signals, share of a step": watching / middle["plain"],
    }


def blocks(trainer: Trainer, *, checked: bool) -> Callable[[], float]:
    """A function that trains for 20 steps, and tells the seconds of one."""
    judge, choose = guard.judge, guard.choose
    replaced: Any = guard
    if not checked:
        replaced.judge = lambda _, state, **__: (jnp.bool(True), state)
        replaced.choose = lambda _, new, __: new
    try:
        jitted = jax.jit(partial(step.train_step, trainer.program), donate_argnums=0)
        state, batch = states.init(trainer.program), trainer.batch(0)
        state, _ = jax.block_until_ready(jitted(state, batch))
    finally:
        replaced.judge, replaced.choose = judge, choose

    def run() -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(20):
            state, _ = jitted(state, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - begin) / 20

    return run


if __name__ == "__main__":
    main()
