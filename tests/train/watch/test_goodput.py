"""The account of a run's time adds up, across restarts."""

import json
import math
import time

import pytest

from stack.train.watch.goodput import FILE, KINDS, Goodput


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_all_time_is_of_one_kind_and_a_restart_loses_what_came_after_the_checkpoint(tmp_path, clock) -> None:
    first = Goodput(tmp_path, 1000.0)
    clock(5)  # Loading.
    first.on_start({"step": 0, "steps": 9})
    clock(10)
    first.on_metrics(1, {"data_wait_seconds": 1.0})
    clock(4)
    assert first.on_metrics(2, {"data_wait_seconds": 0.5}) == {"goodput": 3.5 / 19}
    clock(2)
    first.on_eval(2, {})
    kept = first.on_save(2)
    clock(3)
    first.on_metrics(3, {"checkpoint_seconds": 0.25})
    clock(1)
    assert first.on_end({"error": "killed"}) is None
    spent = json.loads((tmp_path / FILE).read_text())["seconds"]
    assert spent == {
        "step": 3.5 + 2.75,
        "compile": 9.0,
        "data wait": 1.5,
        "checkpoint": 0.25,
        "evaluation": 2.0,
        "restart": 5.0,
        "lost": 0.0,
        "other": 1.0,
    }
    clock(100)  # Down.
    second = Goodput(tmp_path, time.time())
    clock(5)
    second.on_start({"step": 2, "steps": 9, "kept": kept})
    clock(10)
    second.on_metrics(3, {})
    clock(4)
    second.on_metrics(4, {})
    summary = second.on_end({"rows": [("held-out", "1")]})
    assert summary is not None
    spent = json.loads((tmp_path / FILE).read_text())["seconds"]
    assert spent["lost"] == 2.75
    assert spent["step"] == 3.5 + 4
    assert spent["restart"] == 5 + 105
    assert sum(spent.values()) == pytest.approx(25 + 119)
    assert summary["rows"][1] == (
        "time",
        "0:02:24 in all: restart 76%, compile 13%, step 5%, lost 2%, evaluation 1%, data wait 1%, other 1%",
    )


NOT_FINITE = json.dumps({"seconds": dict.fromkeys(KINDS, math.nan), "time": 1, "begun": 1}).encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"[" * 9999, b'{"seconds": {}}', b'{"seconds": {"step": "x"}}', NOT_FINITE],
)
def test_a_damaged_account_is_named_and_begins_anew(tmp_path, content) -> None:
    (tmp_path / FILE).write_bytes(content)
    account, told = Goodput(tmp_path, time.time()), list[str]()
    account.warn = told.append
    account.on_start({"step": 2, "steps": 9})
    account.on_end({})
    assert told == [f"{tmp_path / FILE} was damaged, and begins anew: goodput counts from here"]
    assert set(json.loads((tmp_path / FILE).read_text())["seconds"]) == set(KINDS)
