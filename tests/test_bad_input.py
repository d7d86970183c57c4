"""Whatever is typed: one line that names it, status 1 or 2, no traceback, nothing written."""

import io
import json
import os
import random
import re
import string
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from damages import ALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stack.cli import main
from stack.config import Config
from stack.config.explain import dotted, field_names

RUN = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
NAMES = [dotted(name) for name in field_names(Config)]
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["1e9", "-1", "0", "99999999999999999999", "9" * 5000, "1e400", "0x10", "nan", ".inf"]),
)
VALUES = st.one_of(
    NUMBERS,
    TEXT,
    st.sampled_from(
        ["null", "~", "true", "[]", "{}", "[[[", "{a: {b: 1}}", "*a", "&a 1", "!!python/name:os"]
    ),
    st.integers(1, 200).map(lambda depth: "[" * depth + "]" * depth),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), TEXT),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
        max_leaves=5,
    ).map(json.dumps),
)
FIELDS = st.one_of(
    st.sampled_from(NAMES),
    st.tuples(st.sampled_from(NAMES), TEXT).map("".join),
    st.text(string.ascii_lowercase + "._0123456789=", max_size=20),
)
OVERRIDES = st.tuples(FIELDS, VALUES).map("=".join)
some = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
every_day_and_full = pytest.mark.parametrize(
    "number",
    [
        40,
        *(
            pytest.param(2_500, marks=pytest.mark.full, id=f"part {part} of 4")
            for part in ("1234" if ALL else "1")
        ),
    ],
)

SMALL = """\
name: small
model: {num_layers: 1, dtype: float32}
data:
  sources:
    - {kind: synthetic, max_bytes: 40_000}
optimizer:
  learning_rate: 1e-2
train: {steps: 8}
sample:
  prompt: "def "
"""
WORDS = (
    *(
        "null",
        "~",
        "true",
        "",
        "-1",
        "0x10",
        "9" * 400,
        "1e400",
        ".nan",
        "2001-01-01",
        "12:30",
        "1_0",
        "*a",
        "&a",
    ),
    *(
        "&a [*a]",
        "!!python/name:os.system",
        "!!python/object/apply:os.getcwd []",
        "!x",
        "!!binary YQ==",
        "!!set {a}",
    ),
    *(
        "!!int x",
        "!!float []",
        "<<: *a",
        "? a",
        "- 1",
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        "|",
        ">-",
        "%YAML 9.9",
        "---",
    ),
    *(
        "...",
        "#",
        ":",
        "\t",
        "\r",
        "\0",
        "\ufeff",
        "\u2028",
        "\\ud800",
        '"\\ud800"',
        "[" * 60,
        "{a: " * 60,
        "[" * 200,
    ),
    *("base: run.yaml", "base: .", "base: /dev/null", "base: no.yaml", "base: [1]", "base: ~nobody/x"),
)
"""What is set down where something else stood."""


def _cut(data: bytes, where: random.Random) -> bytes:
    return data[: where.randrange(len(data) + 1)]


def _flip(data: bytes, where: random.Random) -> bytes:
    place = where.randrange(len(data)) if data else 0
    return (
        data[:place]
        + bytes(byte ^ 1 << where.randrange(8) for byte in data[place : place + 1])
        + data[place + 1 :]
    )


def _bytes(data: bytes, where: random.Random) -> bytes:
    place = where.randrange(len(data) + 1)
    return data[:place] + where.randbytes(where.randrange(1, 5)) + data[place + where.randrange(5) :]


def _in_words(data: bytes, where: random.Random) -> bytes:
    """One name, number or word is another."""
    words = list(re.finditer(rb"[\w.+-]+", data))
    if not words:
        return data
    one = where.choice(words)
    other = where.choice([where.choice(WORDS).encode(), where.choice(words)[0], where.choice(NAMES).encode()])
    return data[: one.start()] + other + data[one.end() :]


def _insert(data: bytes, where: random.Random) -> bytes:
    place = where.randrange(len(data) + 1)
    return data[:place] + where.choice(WORDS).encode() + data[place:]


def _lines(data: bytes, where: random.Random) -> bytes:
    """A line is given twice, is gone, stands elsewhere, or further to the right."""
    lines = data.split(b"\n")
    line = lines.pop(where.randrange(len(lines)))
    for _ in range(where.randrange(3)):
        lines.insert(where.randrange(len(lines) + 1), b" " * where.randrange(4) + line)
    return b"\n".join(lines)


def _joined(data: bytes, where: random.Random) -> bytes:
    return data + where.choice([b"\n", b"---\n", b"  "]) + data


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": _cut,
    "flipped": _flip,
    "other bytes": _bytes,
    "other words": _in_words,
    "inserted": _insert,
    "lines": _lines,
    "twice": _joined,
    "UTF-16": lambda data, _: data.decode("utf-8", "replace").encode("utf-16"),
    "long": lambda data, where: data + b"\nname: " + where.choice([b"x", b"9"]) * 20_000,
}
TRAINS = st.sampled_from([True, False, False, False])
CONFIGS = st.lists(
    st.tuples(st.sampled_from([*["other words"] * 4, *["inserted"] * 2, *MUTATIONS]), st.integers(0, 2**32)),
    min_size=1,
    max_size=3,
)


def call(*argv: str) -> tuple[int, str, str]:
    """Status and what is written of a command, in this process."""
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        try:
            status = main(list(argv))
        except SystemExit as end:  # --help
            status = int(end.code or 0)
    return status, out.getvalue(), error.getvalue()


def check(status: int, out: str, error: str) -> None:
    """It worked, or was refused in one line."""
    if status == 0:
        assert error == ""
        return
    assert status in (1, 2)
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "nothing is written"


def check_config(*argv: str, trains: bool) -> None:
    """`config show` shows a config that can be, and refuses any other in one line, as `train` does."""
    status, out, error = call("config", "show", *argv)
    check(status, out, error)
    if status and trains:
        assert call("train", *argv) == (status, "", error)


@every_day_and_full
def test_any_override(small, number) -> None:
    @settings(some, max_examples=number)
    @given(st.lists(OVERRIDES, min_size=1, max_size=3), TRAINS)
    def is_taken_or_refused(overrides, trains) -> None:
        check_config(small, "--", *overrides, trains=trains)

    is_taken_or_refused()


@every_day_and_full
def test_any_damage_of_a_file(number) -> None:
    path = Path("run.yaml")

    @settings(some, max_examples=number)
    @given(CONFIGS, TRAINS)
    def is_taken_or_refused(mutations, trains) -> None:
        data = SMALL.encode()
        for name, seed in mutations:
            data = MUTATIONS[name](data, random.Random(seed))
        path.write_bytes(data)
        try:
            check_config("run.yaml", trains=trains)
        finally:
            path.unlink()

    is_taken_or_refused()


@some
@given(
    st.lists(
        st.one_of(
            TEXT,
            st.sampled_from(["config", "show", "--devices", "--json", "-3", "--", "eval", "--help"]),
            OVERRIDES,
        ),
        max_size=5,
    )
)
def test_any_command_line(words) -> None:
    verbs = {"doctor", "sample", "data", "train", "plan"}
    if not verbs & set(words):  # Those that could begin to work, on this very machine.
        status, out, error = call(*words)
        if status:
            check(status, out, error)


@some
@given(st.one_of(st.binary(max_size=200), TEXT.map(str.encode)))
def test_any_file(content) -> None:
    path = Path("run.yaml")
    path.write_bytes(content)
    try:
        check(*call("config", "show", "run.yaml"))
    finally:
        path.unlink()


@some
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=3), st.randoms())
def test_any_fields_in_a_file(fields, random) -> None:
    """Sections and values that are valid YAML but for their meaning."""
    lines = []
    for name, value in fields.items():
        *sections, leaf = name.replace(".0.", ".").split(".")
        lines += [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
        lines.append(f"{'  ' * len(sections)}{leaf}: {value}")
    random.shuffle(lines)
    path = Path("run.yaml")
    path.write_text("\n".join(lines), "utf-8")
    try:
        check(*call("config", "show", "run.yaml"))
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_NUM_CPU_DEVICES", "abc"),
        ("JAX_PLATFORMS", "bogus"),
        ("JAX_PLATFORMS", "cuda"),
        ("JAX_ENABLE_X64", "maybe"),
    ],
)
def test_an_environment_that_jax_does_not_take_is_one_line(name, value) -> None:
    import subprocess
    import sys

    environment = os.environ | {name: value}
    command = [sys.executable, "-m", "stack", "config", "show", RUN, "--sharding"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    check(done.returncode, done.stdout, done.stderr)
    assert done.returncode == 1
    assert f"{name}={value}" in done.stderr


@pytest.mark.parametrize(
    "call_it",
    [
        lambda: __import__("stack").load(3),
        lambda: __import__("stack").load(str(RUN), 5),
        lambda: __import__("stack").load(str(RUN), [5]),
        lambda: __import__("stack").Trainer("configs/quickstart.yaml"),
        lambda: __import__("stack").Trainer({"model": {}}),
        lambda: __import__("stack").plan("configs/quickstart.yaml"),
        lambda: __import__("stack").plan(Config(), hardware="h100", devices="8"),
        lambda: __import__("stack").plan(Config(), hardware="h100", devices=2.5),
        lambda: __import__("stack").plan(Config(), hardware=8),
        lambda: Config().replace(5),
    ],
    ids=range(10),
)
def test_wrong_types_given_to_the_library_are_one_line(call_it) -> None:
    from stack import StackError

    with pytest.raises(StackError) as caught:
        call_it()
    assert "\n" not in str(caught.value)
