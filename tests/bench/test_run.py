"""Contestants that do whatever a contestant can do: each is told by name, and takes no other with it."""

import dataclasses
import os
import sys
import time

import pytest

from stack.bench.case import Case, Machine, Row, derive
from stack.bench.run import STACK, Contest, Team, best, run_cases

CHILD = """
import json, os, sys, time
from stack.bench.serve import Ready, UnableError, serve

*before, request = sys.argv[1:]
spec = json.loads(request)["spec"]

def good():
    return Ready(lambda iterations: time.sleep(0.001 * iterations), {}, lambda: {"last": 7})

def slow():
    return Ready(lambda iterations: time.sleep(0.1 * iterations))

def chatty():
    print('{"a": "line of the framework itself"}')
    return good()

def wrong():
    return Ready(lambda iterations: None, {"ok": False, "error": 0.3, "error_of": "key", "limit": 0.02})

def nan_at_the_end():
    return Ready(good().run, {}, lambda: {"ok": False})

def unable():
    raise UnableError("no such mask")

def large():
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

def broken():
    raise ValueError("two\\nlines")

def dies():
    print("a last word", file=sys.stderr)
    os._exit(9)

def dies_later():
    calls = []
    def run(iterations):
        time.sleep(0.001 * iterations)
        calls.append(iterations)
        if len(calls) == 5:
            os._exit(3)
    return Ready(run)

def hangs():
    time.sleep(60)

def clock():
    times = []
    def run(iterations):
        times.append(time.monotonic())
        time.sleep(0.01)
    return Ready(run, {}, lambda: {"times": times})

serve({" ".join([*before, name]): globals()[name] for name in spec["makers"]}, block_seconds=0.005)
"""

MACHINE = Machine(
    platform="cpu",
    device_kind="cpu",
    compute_capability=None,
    memory_bytes=1e9,
    processor="a processor",
    cores=2,
    versions={"jax": "1.2"},
    client="cpu",
)


@pytest.fixture
def team(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return Team(name="stack", command=(sys.executable, str(script)))


def case(*makers: str) -> Case:
    return Case(suite="made", title="up", spec={"makers": makers}, priority=0, blocks=4)


def contest(team: Team, *makers: str, seconds: float = 60.0) -> dict[str, Row]:
    rows = Contest(case(*makers), [team], MACHINE, os.environ, seconds=seconds, block_seconds=0.005).run()
    return {row.by: row for row in rows}


def test_each_is_told_by_name_and_takes_no_other_with_it(team):
    makers = ["good", "unable", "large", "broken", "wrong", "dies", "nan_at_the_end", "chatty", "dies_later"]
    rows = contest(team, *makers)
    told = {name: (row.status, row.reason) for name, row in rows.items()}
    assert told == {
        "good": ("measured", ""),
        "unable": ("unable", "no such mask"),
        "large": ("too large", "RuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
        "broken": ("failed", "ValueError: two lines"),
        "wrong": ("wrong", "error of key 0.3, limit 0.02"),
        "dies": ("failed", "exit 9: a last word"),
        "nan_at_the_end": ("wrong", "its loss is not that of a new model, or no number"),
        "chatty": ("measured", ""),
        "dies_later": ("failed", 'exit 3: {"a": "line of the framework itself"}'),
    }
    for name in ("good", "chatty"):
        assert len(rows[name].blocks) == 4
        assert min(rows[name].blocks) >= 0.001
        assert rows[name].facts["last"] == 7


def test_numbers_that_are_wrong_have_no_time(team):
    for row in contest(team, "wrong", "nan_at_the_end").values():
        assert (row.seconds, row.blocks) == (None, [])
        assert "seconds" not in row.as_json()


def test_one_that_dies_last_leaves_the_others_to_be_timed(team):
    rows = contest(team, "good", "dies")
    assert (rows["good"].status, len(rows["good"].blocks)) == ("measured", 4)
    assert rows["dies"].status == "failed"


@pytest.mark.full
def test_one_that_hangs_ends_in_time_and_leaves_the_others_theirs(team, monkeypatch):
    monkeypatch.setattr("stack.bench.run.PREPARATION", 0.1)
    begun = time.monotonic()
    rows = contest(team, "good", "hangs", seconds=60.0)
    assert time.monotonic() - begun < 59
    assert (rows["hangs"].status, rows["hangs"].reason) == ("failed", "not ready after 6 s")
    assert (rows["good"].status, len(rows["good"].blocks)) == ("measured", 4)


def test_a_process_that_does_not_start_is_a_row(tmp_path):
    rows = contest(Team(name="stack", command=(sys.executable, str(tmp_path / "none.py"))))
    (row,) = rows.values()
    assert row.status == "failed"
    assert row.reason.startswith("exit 2: ")
    assert "none.py" in row.reason


@pytest.mark.parametrize("together", [True, False])
def test_a_peer_takes_turns_with_stack_or_begins_when_it_has_ended(team, together):
    teams = [team, Team(name="torch", command=(*team.command, "torch"))]
    made = dataclasses.replace(case("clock"), together=together, peers=("torch",))
    rows = Contest(made, teams, MACHINE, os.environ, seconds=60, block_seconds=0.005).run()
    ours, theirs = (row.facts["times"] for row in rows)
    assert [row.team for row in rows] == ["stack", "torch"]
    assert (max(ours) < min(theirs)) is not together


def test_no_case_begins_after_the_time_and_a_peer_is_in_its_cases_alone(team, monkeypatch):
    monkeypatch.setattr("stack.bench.run.STACK", team)
    teams = [team, Team(name="torch", command=("no such program",))]
    results = list(
        run_cases([case("slow"), case("slow")], teams, MACHINE, os.environ, seconds=0.3, block_seconds=0.005)
    )
    assert [row.status for _, rows in results for row in rows] == ["measured", "not run"]
    assert results[1][1][0].reason == "0.3 s were over"


MEASURED = Row(suite="step", title="a", by="stack", team="stack", status="measured", blocks=[0.5, 0.4, 0.6])


def row(**changes) -> Row:
    return dataclasses.replace(MEASURED, **changes)


def test_rates_follow_from_the_median_and_are_held_against_the_ceilings():
    made = row(
        facts={
            "tokens": 100,
            "flops_full": 40.0,
            "flops_causal": 30.0,
            "precision": "bfloat16",
            "peak_flops": 200.0,
            "bytes": 8.0,
            "planned_seconds": 0.25,
        }
    )
    derive(made, {"bfloat16": 100.0, "copy": 32.0})
    assert made.facts["tokens_per_second"] == 200.0
    assert (made.facts["mfu_full"], made.facts["mfu_causal"]) == (0.4, 0.3)
    assert (made.facts["of_ceiling_full"], made.facts["of_ceiling_causal"]) == (0.8, 0.6)
    assert (made.facts["of_copy"], made.facts["planned_over_measured"]) == (0.5, 0.5)
    assert made.as_json()["spread"] == pytest.approx(0.4)
    assert made.is_noisy
    assert not row(blocks=[1.0, 1.04, 0.96]).is_noisy


def test_the_ceiling_is_the_fastest_product_that_was_right():
    products = [
        row(by="small", blocks=[2.0], facts={"precision": "bfloat16", "flops_full": 100.0}),
        row(by="large", blocks=[2.0], facts={"precision": "bfloat16", "flops_full": 300.0}),
        row(by="off", status="wrong", blocks=[], facts={"precision": "bfloat16", "flops_full": 900.0}),
        row(by="copy", blocks=[2.0], facts={"bytes": 8.0}),
    ]
    assert best(products) == {"bfloat16": 150.0, "copy": 4.0}


def test_stack_is_served_by_this_interpreter():
    assert STACK.command == (sys.executable, "-m", "stack.bench.child")
