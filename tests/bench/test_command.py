"""The command: what it refuses, a tiny run through real processes, and what is left of one that is killed."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest

from stack.bench import command
from stack.cli import main

STACK = [sys.executable, "-m", "stack", "bench"]

# Read by every Python that starts with this on its path: the list of kernels as another author leaves it.
WITH_A_BROKEN_KERNEL = """
import sys
if any("stack" in word for word in getattr(sys, "orig_argv", [])):
    from stack.kernels.attention import choice, xla
    from dataclasses import replace

    def attend(query, key, value, mask, layout, **options):
        return xla.attend(query, key, value, replace(mask, kind="full"), layout, **options)

    choice.KERNELS["broken"] = choice.Kernel(attend=attend, obstacles=xla.obstacles)
"""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["atention"],
            f"suite 'atention' is unknown; did you mean attention? there are {', '.join(command.SUITES)}",
        ),
        (
            ["zzz"],
            f"suite 'zzz' is unknown; there are {', '.join(command.SUITES)}",
        ),
        (["--against", "jax,torch"], "peer 'jax' is unknown; there are torch, tokamax"),
        (["--seconds", "0"], "--seconds 0: give more than 0"),
        (["--json", __file__], f"{__file__}: the file exists; remove it or give another name"),
    ],
)
def test_a_bad_command_line_is_one_line_with_status_2(capsys, arguments, told):
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr() == ("", f"error: {told}\n")


def test_absent_peers_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    teams, found = command._teams(["torch", "tokamax"], "/no/such/python", command.probe(os.environ))
    assert [team.name for team in teams] == ["stack"]
    assert found["torch"].startswith("absent: /no/such/python does not run: ")
    assert found["tokamax"] == "absent: not installed"
    assert command._torch(sys.executable, command.probe(os.environ))[1].startswith(
        f"absent: {sys.executable}: ModuleNotFoundError"
    )


def test_a_tiny_run_measures_all_kernels_and_catches_a_wrong_one(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITH_A_BROKEN_KERNEL)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    target = tmp_path / "out" / "bench.json"
    done = subprocess.run(
        [*STACK, "attention", "--tiny", "--against", "none", "--json", target],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    report = json.loads(target.read_text())
    number = sum(len(case["rows"]) for case in report["cases"])
    assert done.stderr == f"error: 4 of {number} measurements failed; their reasons are above\n"
    assert report["machine"]["platform"] == "cpu"
    assert report["commit"].startswith("commit ")
    assert report["ceilings"].keys() == {"float32", "bfloat16", "copy"}
    rows = {row["by"]: row for case in report["cases"][1:] for row in case["rows"]}
    assert rows["cudnn"]["status"] == "unable"
    for which in ("forward", "with gradients"):
        right, wrong = rows[f"xla, {which}"], rows[f"broken, {which}"]
        assert (right["status"], len(right["blocks"])) == ("measured", 7)
        assert right["facts"]["error"] < 1e-6
        assert right["facts"]["of_ceiling_full"] > 0
        assert (wrong["status"], wrong["blocks"]) == ("wrong", [])
        assert wrong["facts"]["error"] > 0.1
        assert "seconds" not in wrong
        assert f"  broken, {which}" in done.stdout
    assert done.stdout.count("\nwrong: attention: tiny, 2 x 64") == 4


@pytest.mark.full
def test_every_suite_runs_and_a_killed_run_keeps_what_it_had(tmp_path):
    target = tmp_path / "bench.json"
    run = [*STACK, "--tiny", "--against", "none", "--json", target]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("  scatter"):
                break
        process.send_signal(signal.SIGKILL)
    report = json.loads(target.read_text())
    suites = [case["suite"] for case in report["cases"]]
    twice = ["attention"] * 2, ["parity"] * 2
    last = ["matmul", "grouped_matmul", "embedding"]
    assert suites == ["ceilings", *twice[0], "step", "cross_entropy", *twice[1], *last]
    rows = [row for case in report["cases"] for row in case["rows"]]
    assert {row["status"] for row in rows} == {"measured", "unable"}
    assert {"cudnn", "bfloat16 cudnn"} <= {row["by"] for row in rows if row["status"] == "unable"}
    (step,) = (row for row in rows if row["suite"] == "step")
    assert step["facts"]["first_loss"] == pytest.approx(math.log(257), abs=0.2)
    assert step["facts"]["last_loss"] < step["facts"]["first_loss"]
    assert step["facts"]["tokens_per_second"] > 0


@pytest.mark.full
def test_a_list_tells_the_cases_of_this_machine_and_runs_none(capsys):
    assert main(["bench", "step", "attention", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ceilings")
    assert "step           quickstart, 128 packed, float32, 12 rows, remat none" in lines
    assert {line.split()[0] for line in lines} == {"ceilings", "attention", "step"}
