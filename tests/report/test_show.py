"""A look at runs tells where they stand, from what lies in their folders alone."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stack.cli import main
from stack.config import Config, dump
from stack.report.show import WIDTH, sparkline
from stack.train.checkpoint.manifest import NAME, File, Manifest, Piece, digest_blocks


def write_run(
    folder: Path, *overrides: str, steps: int = 10, checkpoints: tuple[int, ...] = (), age: float = 1000.0
) -> Path:
    """A run folder as the trainer leaves it."""
    folder.mkdir(parents=True)
    config = Config().replace(f"name={folder.name}", "train.steps=10", *overrides)
    (folder / "config.yaml").write_text(dump(config))
    records = [
        {"kind": "train", "step": n, "time": 1.0, "loss": 5.0 / n, "tokens_per_second": 100.0 * n}
        for n in range(1, steps + 1)
    ]
    records += [
        {"kind": "heldout", "step": n, "time": 1.0, "loss": 2.0 + abs(n - 4)} for n in range(2, steps + 1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    os.utime(folder / "metrics.jsonl", (time.time() - age,) * 2)
    for step in checkpoints:
        write_checkpoint(folder / "checkpoints" / str(step), step)
    return folder


def write_checkpoint(folder: Path, step: int) -> None:
    """One of 500,000 bytes, in the format that is read back."""
    data = bytes(500_000)
    piece = Piece(leaf="params.w", start=(0,), shape=(125_000,), offset=0)
    record = {"rows": 8 * step, "skipped": [[3, 5]], "versions": {"jax": "0.11.2"}}
    accepted = [{"field": "train.batch_size", "old": "4", "new": "8", "step": 2}]
    manifest = Manifest(
        step=step,
        time=0.0,
        leaves={"params.w": ("float32", (125_000,))},
        files={"0/0": File(size=len(data), digests=digest_blocks(data), pieces=(piece,))},
        extra=record | {"accepted": accepted},
    )
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "0").write_bytes(data)
    (folder / NAME).write_bytes(manifest.encode())


def test_checkpoints_are_listed_verified_and_shown(capsys, tmp_path) -> None:
    run = write_run(tmp_path / "run", checkpoints=(5, 10))

    def told(*arguments: str) -> tuple[int, list[str], str]:
        status = main(["checkpoint", arguments[0], str(run), *arguments[1:]])
        out, error = capsys.readouterr()
        return status, out.splitlines(), error

    status, lines, _ = told("list")
    assert status == 0
    assert [line.split(", saved ")[0] for line in lines] == [
        f"step {step:<10,}    500 kB in 1 files" for step in (5, 10)
    ]
    assert told("verify")[:2] == (0, ["step 5: sound", "step 10: sound"])
    assert told("show", "--step", "5")[1] == [
        "step      5",
        "rows      40 of the training sequence used",
        "skipped   3 to 5",
        "accepted  train.batch_size 4 -> 8 at step 2",
        "versions  jax 0.11.2",
        "size      500 kB in 1 files",
        "params.w  float32[125000], 125,000",
    ]
    assert told("show", "--step", "7")[::2] == (
        1,
        f"error: no checkpoint of step 7 in {run}/checkpoints; there are 5, 10\n",
    )
    damaged = run / "checkpoints" / "10" / "0" / "0"
    damaged.write_bytes(b"\1" + damaged.read_bytes()[1:])
    status, lines, error = told("verify")
    assert (status, lines) == (
        1,
        [
            "step 5: sound",
            f"step 10: {damaged} is damaged: its bytes from 0 on are not what was written",
        ],
    )
    assert error == f"error: 1 of the files of {run}/checkpoints are not as they were written\n"
    damaged.write_bytes(b"")
    assert told("list")[1][1] == f"step 10         damaged: {damaged} is damaged: it has 0 of 500,000 bytes"


def shown(capsys, *arguments: object) -> list[str]:
    assert main(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_one_run_is_shown_in_full(capsys, tmp_path) -> None:
    run = write_run(tmp_path / "one", checkpoints=(5, 10))
    lines = shown(capsys, run)
    assert lines[:3] == ["run       one", f"folder    {run}", "state     done, 10 steps"]
    assert "held-out  8.0000 at step 10, the best 2.0000 at step 4" in lines
    assert "speed     550 tokens/s, the median of its steps" in lines
    assert "saved     steps 5, 10; 1.0 MB" in lines
    assert any(line.endswith("█▄▃▂▂▂▁▁▁▁") for line in lines)


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({"steps": 4, "checkpoints": (3,)}, "stopped at step 4 of 10; newest checkpoint 3"),
        ({"steps": 4}, "stopped at step 4 of 10; no checkpoint yet"),
        ({"steps": 4, "age": 0.0}, "at step 4 of 10, last heard of 0 s ago; no checkpoint yet"),
    ],
)
def test_where_a_run_stands_is_said(capsys, tmp_path, options, state) -> None:
    assert f"state     {state}" in shown(capsys, write_run(tmp_path / "run", **options))


def test_a_run_that_has_not_begun_and_half_a_line_are_no_error(capsys, tmp_path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert len(shown(capsys, run)) > 4
    (run / "metrics.jsonl").unlink()
    assert "state     not begun; no checkpoint yet" in shown(capsys, run)


def test_several_runs_are_a_table_and_what_their_configs_differ_in(capsys, tmp_path) -> None:
    first = write_run(tmp_path / "first", checkpoints=(10,))
    second = write_run(tmp_path / "second", "optimizer.learning_rate=1e-3", "data.sources.0.max_bytes=1000")
    lines = shown(capsys, first, second)
    assert lines[0].split() == ["run", "state", "loss", "held-out", "best", "tokens/s"]
    assert lines[1].split()[-4:] == ["0.5000", "8.0000", "2.0000", "550"]
    differing = {line.split()[0]: line.split()[1:] for line in lines[4:]}
    assert differing == {
        "field": ["first", "second"],
        "optimizer.learning_rate": ["0.0003", "0.001"],
        "data.sources.0.max_bytes": ["null", "1000"],
    }


def test_a_run_is_compared_with_a_file_and_equal_ones_are_said_so(capsys, tmp_path) -> None:
    run = write_run(tmp_path / "run", "seed=3")
    (tmp_path / "base.yaml").write_text("train: {steps: 10}\n")
    lines = shown(capsys, run, "--base", tmp_path / "base.yaml")
    assert lines[-1].split() == ["seed", "3", "0"]
    (tmp_path / "base.yaml").write_text("train: {steps: 10}\nseed: 3\n")
    assert shown(capsys, run, "--base", tmp_path / "base.yaml")[-1].startswith("their configs are equal")


def test_tables_are_of_a_screens_width(capsys, tmp_path) -> None:
    runs = [write_run(tmp_path / f"{'long' * 30}{n}", f"sample.prompt={'word ' * n}") for n in range(1, 8)]
    lines = shown(capsys, *runs)
    assert max(map(len, lines)) <= WIDTH
    assert lines[1].startswith("...")


def test_json_holds_the_same(capsys, tmp_path) -> None:
    (told,) = json.loads("\n".join(shown(capsys, write_run(tmp_path / "run", checkpoints=(10,)), "--json")))
    assert (told["state"], told["heldout_loss"], told["best_heldout_step"]) == ("done, 10 steps", 8.0, 4)
    assert (told["checkpoints"], told["checkpoint_bytes"]) == ([10], 500_000)


def test_a_sparkline_has_gaps_where_numbers_are_not_finite() -> None:
    assert sparkline([3.0, math.nan, 1.0, 2.0]) == "█ ▁▅"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([], plain=True) == ""
    assert len(sparkline([float(n) for n in range(1000)])) <= 60
    assert sparkline([0.0, 1.0], plain=True).isascii()


def test_plots_are_pictures_and_pages_that_need_nothing_else(capsys, tmp_path) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", "seed=1")]
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.html", b"<!doctype html>")):
        assert shown(capsys, *runs, "--plot", tmp_path / name)[-1] == f"drew {tmp_path / name}"
        assert (tmp_path / name).read_bytes().startswith(start)
    page = (tmp_path / "a.html").read_text()
    assert "<script" not in page
    assert "src=" not in page
    assert "currentColor" in page
    assert "seed   0    1" in page


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing"], "nothing is not the folder of a run"),
        (["{tmp}"], "is neither a config file nor a run: it holds no config.yaml"),
        (["{run}", "nothing"], "nothing is not the folder of a run"),
        (["{run}", "--plot", "a.xyz"], "--plot a.xyz: what should it be? end the name in .png"),
        (["{run}", "--plot", "nowhere/a.png"], "--plot nowhere/a.png: there is no folder nowhere"),
        (["{run}", "--base", "nothing.yaml"], "nothing.yaml: no such file"),
    ],
)
def test_what_is_no_run_is_one_line(capsys, tmp_path, arguments, told) -> None:
    run = write_run(tmp_path / "run")
    words = [word.format(tmp=tmp_path, run=run) for word in arguments]
    assert main(["show", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_damaged_files_are_named(capsys, tmp_path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("{}\n")
    assert main(["show", str(run)]) == 1
    assert "metrics.jsonl, line 1: not a record" in capsys.readouterr().err
    (run / "config.yaml").write_text("train: {stepz: 3}\n")
    assert main(["show", str(run)]) == 2
    assert "train.stepz is not a field" in capsys.readouterr().err


def test_a_look_loads_no_jax(tmp_path) -> None:
    code = (
        "import sys; from stack.cli import main; main(['show', sys.argv[1]]); assert 'jax' not in sys.modules"
    )
    run = write_run(tmp_path / "run")
    subprocess.run([sys.executable, "-c", code, "show", run], check=True, capture_output=True)
