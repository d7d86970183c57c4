"""The cache of compiled programs: a second start compiles nothing, and nothing about it ends a run."""

import json
import os
import re
import subprocess
import sys
import time
import zlib

import pytest
import yaml
from tiny_runs import config

from stack.environment import programs

COUNT = """
import sys
import jax.monitoring
counts = {}
jax.monitoring.register_event_listener(lambda name, **_: counts.update({name: counts.get(name, 0) + 1}))
from stack.cli.run import run
status = run(sys.argv[2:])
import json
json.dump(counts, open(sys.argv[1], "w"))
sys.exit(status)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a tiny run on one CPU device with a cache of its own; how often JAX found a program or not."""
    file = tmp_path / "run.yaml"
    tiny = config(tmp_path, "run", "train.steps=2", "checkpoint.every=0", "eval.every=0")
    file.write_text(yaml.safe_dump(tiny.model_dump(mode="json")))

    def begin(name: str, cache: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COUNT, str(tmp_path / f"{name}.json"), "train", str(file)]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": cache}
        return subprocess.Popen(
            [*command, f"name={name}"],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(name: str, process: subprocess.Popen[str]) -> tuple[int, int, str]:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        counts = json.loads((tmp_path / f"{name}.json").read_text())
        hits, misses = (counts.get(f"/jax/compilation_cache/cache_{kind}", 0) for kind in ("hits", "misses"))
        told = [line for line in error.splitlines() if "cache" in line or "programs" in line]
        return hits, misses, "\n".join(told)  # The compiler may find a loaded machine slow.

    return begin, end


def test_a_second_start_compiles_nothing_and_a_damaged_entry_is_made_anew(start, tmp_path):
    begin, end = start
    cache = tmp_path / "programs"
    hits, misses, error = end("first", begin("first", str(cache)))
    assert (hits, error) == (0, "")
    assert misses > 3
    assert end("second", begin("second", str(cache))) == (misses, 0, "")

    entry = next(cache.glob("jit_train_step-*-cache"))
    entry.write_bytes(entry.read_bytes()[:1000])
    os.utime(entry, (time.time() - 100, time.time() - 100))
    os.utime(cache / "looked-at", (0, 0))
    hits, again, error = end("third", begin("third", str(cache)))
    assert (hits, again) == (misses - 1, 1)
    assert error == f"warning: {cache}: 1 damaged programs are removed, and compiled anew"


@pytest.mark.full
def test_an_entry_that_is_damaged_when_it_is_read_ends_nothing(start, tmp_path):
    begin, end = start
    cache = tmp_path / "programs"
    end("first", begin("first", str(cache)))
    for entry in cache.glob("*-cache"):
        entry.write_bytes(b"not a program")
    hits, misses, error = end("second", begin("second", str(cache)))
    assert hits == 0
    assert error.count("Error reading persistent compilation cache entry") == misses > 3


@pytest.mark.full
def test_processes_that_start_at_once_share_a_folder(start, tmp_path):
    begin, end = start
    cache = str(tmp_path / "programs")
    processes = {name: begin(name, cache) for name in ("one", "two", "three")}
    for name, process in processes.items():
        end(name, process)
    hits, misses, error = end("after", begin("after", cache))
    assert (misses, error) == (0, "")
    assert hits > 3


def test_a_folder_that_cannot_be_written_is_one_warning(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setattr(sys, "modules", {name: m for name, m in sys.modules.items() if name != "jax"})
    programs.check()
    told = (
        rf"warning: {tmp_path}/file/below cannot be written: Not a directory; compiled programs are not kept:"
        r" set JAX_COMPILATION_CACHE_DIR to a folder that can\n"
    )
    assert re.fullmatch(told, capsys.readouterr().err)
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    programs.check()
    assert capsys.readouterr().err == "", "once it is off there is nothing to say"


def test_above_the_bound_what_was_not_used_for_longest_goes(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(programs, "MOST_BYTES", 100)
    (tmp_path / "looked-at").touch()  # To look is to use.
    packed = zlib.compress(os.urandom(20))
    for age in range(10):
        path = tmp_path / f"jit_{age}-cache"
        path.write_bytes(packed)
        os.utime(path, (time.time() - 100 * (age + 1),) * 2)
    programs.check()
    assert len([*tmp_path.glob("*-cache")]) == 10, "a folder that a user names is theirs"
    monkeypatch.setattr(programs, "default_folder", lambda: tmp_path)
    programs.check()
    kept = 100 // len(packed)
    assert {path.name for path in tmp_path.glob("*-cache")} == {f"jit_{age}-cache" for age in range(kept)}


def test_the_folder_is_the_users_and_of_this_kind_of_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    mine = programs.default_folder()
    assert mine is not None
    assert mine.parent == tmp_path / ".cache" / "stack" / "jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert programs.default_folder() == mine
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert programs.default_folder() == tmp_path / "other" / "stack" / "jax" / mine.name
    monkeypatch.setattr(programs, "_CPU", frozenset({"vendor_id"}))
    other = programs.default_folder()
    assert other is not None
    assert other.name != mine.name, "what the CPU can do is part of its kind"


def test_what_a_user_says_of_the_cache_stays(monkeypatch, tmp_path):
    said = {}
    monkeypatch.setattr(sys, "modules", {name: m for name, m in sys.modules.items() if name != "jax"})
    programs.configure(said.__setitem__)
    assert said["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    programs.check()
    assert not (tmp_path / "none").exists()
