"""The cache of tuned tiles: exact, whole whoever writes it, and nothing but a warning where it is damaged."""

import dataclasses
import json
import threading
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stack.config.errors import StackError
from stack.kernels import tuned
from stack.kernels.tuned import Key, find, keep

KEY = Key(operation="attention", implementation="xla_chunked", device="a device", problem={"rows": 3})
TILES = {"longest": 64, "scores": 4096}

numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
keys = st.builds(
    Key,
    operation=st.just("attention"),
    implementation=st.sampled_from(["xla_chunked", "mosaic_gpu"]),
    device=st.text(),
    problem=st.dictionaries(st.text(), plain, max_size=4),
)
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def place(key: Key = KEY) -> Path:
    assert key.path is not None
    return key.path


def looked(key: Key = KEY) -> tuple[tuned.Entry | None, str, list[str]]:
    """What is found, and what is warned of."""
    warned: list[str] = []
    entry, reason = find(key, warned.append)
    return entry, reason, warned


@quick
@given(keys, st.dictionaries(st.text(), st.integers() | st.dictionaries(st.text(), st.integers())), st.data())
def test_what_is_kept_is_found_by_exactly_its_key(key, tiles, data):
    seconds = data.draw(st.floats(1e-9, 1e9))
    place(key).unlink(missing_ok=True)
    assert looked(key) == (None, "", [])
    assert keep(key, tiles, seconds=seconds, default_seconds=2 * seconds) == place(key)
    entry, reason, warned = looked(key)
    assert (reason, warned) == ("", [])
    assert entry is not None
    assert (entry.tiles, entry.seconds, entry.speed) == (tiles, seconds, 2.0)
    for other in (
        dataclasses.replace(key, device=f"{key.device}!"),
        dataclasses.replace(key, implementation="another"),
        dataclasses.replace(key, problem={**key.problem, "and": 1}),
    ):
        assert looked(other) == (None, "", [])


def damaged(path: Path, data: st.DataObject) -> bytes:
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "noise", "flip", "value", "field", "key"]))
    if kind == "cut":
        return whole[: data.draw(st.integers(0, len(whole) - 3))]
    if kind == "noise":
        return data.draw(st.binary(max_size=200))
    if kind == "flip":  # No UTF-8 any more.
        at = data.draw(st.integers(0, len(whole) - 1))
        return whole[:at] + b"\xff" + whole[at + 1 :]
    if kind == "value":
        return json.dumps(data.draw(plain)).encode()
    fields = json.loads(whole)
    name = data.draw(st.sampled_from(sorted(set(fields) - {"default_seconds"})))
    fields[name] = {"format": 2, "seconds": -1.0}.get(name, 7.5) if kind == "field" else fields.pop(name)
    if kind == "key":
        fields = {**{n: v for n, v in fields.items() if n != name}, f"{name}s": 1}
    return json.dumps(fields).encode()


@quick
@given(st.data())
def test_what_is_damaged_is_warned_of_once_ignored_and_written_anew(data):
    keep(KEY, TILES, seconds=1.0, default_seconds=None)
    place().write_bytes(damaged(place(), data))
    entry, reason, warned = looked()
    assert entry is None
    assert reason == "those tuned here cannot be read"
    (line,) = warned
    assert line.startswith(f"{place()}: tuned tiles are ignored: ")
    assert line.endswith("`stack kernels tune` writes them anew")
    assert "\n" not in line
    keep(KEY, TILES, seconds=1.0, default_seconds=None)
    entry, _, warned = looked()
    assert entry is not None
    assert (entry.tiles, entry.speed, warned) == (TILES, None, [])


def as_folder(path: Path) -> None:
    (path / "inner").mkdir(parents=True)


def as_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [as_folder, as_loop])
def test_what_cannot_be_read_is_damage_too(make):
    place().parent.mkdir(parents=True)
    make(place())
    entry, _, warned = looked()
    assert (entry, len(warned)) == (None, 1)
    keep(KEY, TILES, seconds=1.0, default_seconds=1.0)
    assert looked()[0] is not None


def test_an_entry_of_something_else_is_damage():
    other = dataclasses.replace(KEY, device="another")
    keep(other, TILES, seconds=1.0, default_seconds=1.0)
    place().write_bytes(place(other).read_bytes())
    assert "it is of something else" in looked()[2][0]


@pytest.mark.parametrize(
    ("name", "told"), [("jax", "of jax 0.1"), ("jaxlib", "of jaxlib 0.1"), ("code", "the kernel has changed")]
)
def test_an_entry_of_other_versions_is_told_and_no_damage(monkeypatch, name, told):
    now = tuned.versions("attention")
    monkeypatch.setattr(tuned, "versions", lambda _: now | {name: "0.1"})
    keep(KEY, TILES, seconds=1.0, default_seconds=1.0)
    monkeypatch.setattr(tuned, "versions", lambda _: now)
    entry, reason, warned = looked()
    assert (entry, warned) == (None, [])
    assert reason.startswith("those tuned here are old: ")
    assert told in reason


def test_the_code_of_an_operation_is_all_of_its_folder():
    code = tuned.versions("attention")["code"]
    assert code != tuned.versions("matmul")["code"]
    assert code == tuned.versions("attention")["code"]


def test_whoever_reads_while_others_write_sees_a_whole_entry():
    keep(KEY, TILES, seconds=1.0, default_seconds=1.0)
    done = threading.Event()
    warned: list[str] = []

    def write(number: int) -> None:
        while not done.is_set():
            keep(KEY, {"longest": number} | {str(i): i for i in range(500)}, seconds=1.0, default_seconds=1.0)

    writers = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    seen = [find(KEY, warned.append)[0] for _ in range(200)]
    done.set()
    for writer in writers:
        writer.join()
    assert warned == []
    assert all(entry is not None for entry in seen)
    assert [path.name for path in place().parent.iterdir()] == [place().name], "nothing is left beside it"


def test_without_a_home_nothing_is_found_and_nothing_kept(monkeypatch):
    monkeypatch.setattr(tuned, "cache_root", lambda: None)
    assert looked() == (None, "", [])
    with pytest.raises(StackError, match="there is no home; set XDG_CACHE_HOME"):
        keep(KEY, TILES, seconds=1.0, default_seconds=1.0)


def test_a_cache_that_cannot_be_written_is_one_line(home):
    (home / "stack").write_text("a file")
    with pytest.raises(StackError, match=r"cannot be written: Not a directory; set XDG_CACHE_HOME"):
        keep(KEY, TILES, seconds=1.0, default_seconds=1.0)
    with pytest.raises(StackError, match=r"cannot be written: Not a directory; set XDG_CACHE_HOME"):
        tuned.check_writable(KEY)  # Before anything is measured.
    assert looked()[2][0].endswith("`stack kernels tune` writes them anew")


def test_cpus_of_two_kinds_share_no_tiles(monkeypatch):
    mine = tuned.device_name(jax.devices()[0])
    monkeypatch.setattr(tuned, "cpu_kind", lambda: "another")
    assert tuned.device_name(jax.devices()[0]) == "cpu another" != mine
