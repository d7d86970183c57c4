"""Whatever is typed: one line that names it, status 1 or 2, no traceback, nothing written."""

import io
import json
import os
import string
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
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
    st.integers(1, 3000).map(lambda depth: "[" * depth + "]" * depth),
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
many = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


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


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "nothing is written"


@many
@given(st.lists(OVERRIDES, min_size=1, max_size=3))
def test_any_override(overrides) -> None:
    words = [word for word in overrides if not word.startswith("-")]
    check(*call("config", "show", str(RUN), "--", *words))


@many
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


@many
@given(st.one_of(st.binary(max_size=200), TEXT.map(str.encode)))
def test_any_file(content) -> None:
    path = Path("run.yaml")
    path.write_bytes(content)
    try:
        check(*call("config", "show", "run.yaml"))
    finally:
        path.unlink()


@many
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
