"""`stack kernels tune`, really: tiles are tried on this machine, and a run takes the fastest."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
import yaml
from tiny_runs import config

from stack.bench import tune
from stack.bench.case import Row
from stack.bench.serve import Ready
from stack.bench.suites import tiles as suite
from stack.bench.suites.machine import describe
from stack.cli import main
from stack.config import Config, load
from stack.config.errors import StackError
from stack.kernels import tuned
from stack.kernels.attention import KERNELS, Problem, Request, xla_chunked
from stack.kernels.attention.mosaic_gpu.tiles import interpreted
from stack.kernels.attention.tiling import TILINGS
from stack.kernels.attention.trial import LIMIT
from stack.kernels.attention.xla_chunked import BlockSizes
from stack.step import program as programs
from stack.step.tiles import problem, with_tuned

CHUNKED = "kernels.attention=xla_chunked"
PROBLEM = Problem(
    request=Request(platform="cpu", dtype="float32", head_dim=16, length=32, packed_length=32, dropout=0.1),
    rows=4,
    heads=2,
    kv_heads=1,
)
DEFAULT = str(TILINGS["xla_chunked"].default(PROBLEM))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "run.yaml"
    longer = ("data.sequence_length=128", "model.max_length=128")
    path.write_text(yaml.safe_dump(config(tmp_path, "run", CHUNKED, *longer).model_dump(mode="json")))
    return str(path)


def built(read: Config) -> programs.Program:
    return with_tuned(programs.build(read, jax.devices()[:1]), pytest.fail)


def test_tiles_are_tried_kept_and_taken(tmp_path, file, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    assert str(built(load(file)).attention) == "attention: xla_chunked (asked for); default tiles"
    monkeypatch.setattr(tune, "GAIN", 0.5)  # Whatever is the fastest: no default is twice as fast.
    told = tmp_path / "told.json"
    assert main(["kernels", "tune", file, "--rounds", "2", "--json", str(told)]) == 0
    screen = capsys.readouterr()
    report = json.loads(told.read_text())
    (part,) = report["parts"]
    assert [row["status"] for row in part["rows"]] == ["measured"] * len(part["rows"])
    assert len(part["rows"]) > 1
    assert all(len(row["blocks"]) == 2 and row["facts"]["error"] < 1e-5 for row in part["rows"])
    fastest = min(part["rows"], key=lambda row: row["seconds"])
    assert part["chosen"] == fastest["by"]
    assert "attention  8 rows of 128, 2 heads of 16, causal, packed, float32\n" in screen.out
    for row in part["rows"]:
        assert re.search(rf"^  {re.escape(row['by'])} +\d+\.\d{{3}} ms +\d", screen.out, re.MULTILINE)
        assert f"  {row['by']}: right\n" in screen.err

    (path,) = report["kept"].values()
    entry = tuned.Entry.model_validate_json(Path(path).read_bytes())
    assert entry.seconds == fastest["seconds"]
    choice = built(load(file)).attention
    default = part["chosen"] == part["default"]
    assert str(choice.tiles) == ("None" if default else part["chosen"])
    assert choice.tiles_from.startswith("default tiles, the fastest" if default else "tiles tuned on cpu ")


def test_a_run_of_more_devices_is_tuned_for_what_each_of_them_does(file):
    plain = load(file).model_dump(mode="json")
    mine = suite.problem_of(plain, 1)["problem"]
    assert suite.problem_of(plain, 64)["problem"] == mine, "each has as much to do"
    split = load(file, ["mesh.fsdp=4", "mesh.tensor=2", "train.accumulation=2"]).model_dump(mode="json")
    found = Problem.of_plain(suite.problem_of(split, 8)["problem"])
    assert (found.rows, found.heads, found.kv_heads) == (1, 1, 1)
    assert suite.problem_of(split, None)["problem"] == found.plain(), "as on the eight of this machine"
    assert "mesh" in suite.problem_of(split | {"mesh": {"fsdp": 3}}, None)["error"]


def test_what_is_asked_for_is_part_of_the_problem(file):
    more = ["model.sliding_window=8", "model.num_kv_heads=1", "model.attention_dropout=0.1"]
    program = programs.build(load(file, more), jax.devices()[:1])
    found = problem(program.config, program.layout, platform="cpu")
    told = "8 rows of 128, 2 heads of 16 (keys of 1), causal, packed, window 8, dropout 0.1, float32"
    assert str(found) == told
    assert Problem.of_plain(json.loads(json.dumps(found.plain()))) == found


def prepared(tiles: BlockSizes | None = None, passes: str = "with gradients", **more) -> Ready:
    asked = dataclasses.replace(PROBLEM, request=dataclasses.replace(PROBLEM.request, **more))
    blocks = tiles or BlockSizes(16, 2**12)
    spec = {"kernel": "xla_chunked", "passes": passes, "problem": asked.plain()}
    spec |= {"tiles": {"those": {"longest": blocks.longest, "scores": blocks.scores}}}
    return suite.makers(spec, [])["those"]()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"passes": "forward"},
        pytest.param({"kind": "prefix", "softcap": 5.0}, marks=pytest.mark.full),
        pytest.param({"kind": "full", "bias": True, "packed_length": None}, marks=pytest.mark.full),
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_tiles_that_are_right_are_timed(more):
    ready = prepared(**more)
    assert ready.facts["ok"]
    ready.run(2)


@pytest.mark.full
def test_tiles_of_the_kernels_for_hopper_are_tried_in_the_same_way():
    """In the interpreter: from what a child is told to what is timed."""
    asked = dataclasses.replace(PROBLEM.request, platform="gpu", dtype="bfloat16")
    hopper = dataclasses.replace(PROBLEM, request=asked, rows=2, heads=1)
    part = TILINGS["mosaic_gpu"].parts[-1]
    *_, tiles = part.candidates(hopper, TILINGS["mosaic_gpu"].default(hopper))
    plain = {str(tiles): TILINGS["mosaic_gpu"].plain(tiles)}
    spec = {"kernel": "mosaic_gpu", "passes": part.passes, "problem": hopper.plain(), "tiles": plain}
    with interpreted():
        ready = suite.makers(json.loads(json.dumps(spec)), [])[str(tiles)]()
    assert ready.facts["ok"], ready.facts
    assert 1e-4 < ready.facts["error"] < LIMIT == ready.facts["limit"]


@pytest.mark.parametrize("first_row", [0, 1], ids=["everywhere", "where rows are several, as in a run"])
def test_tiles_that_are_wrong_are_not(monkeypatch, first_row):
    kernel = KERNELS["xla_chunked"]

    def attend(*arrays, tiles=None, **options):
        output = xla_chunked.attend(*arrays, tiles=tiles, **options)
        wrong = output.at[first_row:, 3].multiply(1.1)
        return output if tiles is None or tiles.longest != 16 else wrong

    monkeypatch.setitem(KERNELS, "xla_chunked", dataclasses.replace(kernel, attend=attend))
    facts = prepared().facts
    assert not facts["ok"]
    assert facts["error"] > 0.01
    assert first_row == 0 or facts["error_of"] == "the default tiles"
    assert prepared(tiles=BlockSizes(8, 2**12)).facts["ok"]


def rows(**seconds: float | str) -> list[Row]:
    made = []
    for name, value in seconds.items():
        row = Row(suite="tiles", title="a", by=name, team="stack", status="measured", blocks=[])
        if isinstance(value, str):
            row.status, row.reason = "wrong", value
        else:
            row.blocks = [value] * 3
        made.append(row)
    return made


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ({"default": 1.0, "a": 0.5, "b": 0.7}, "a"),
        ({"default": 1.0, "a": 0.99}, "default"),
        ({"default": 1.0, "a": 1.5}, "default"),
        ({"default": "off", "a": 1.5, "b": 1.4}, "b"),
        ({"default": 1.0, "a": "off"}, "default"),
        ({"default": "off", "a": "off"}, None),
    ],
)
def test_the_fastest_that_is_right_is_taken_if_it_is_worth_it(measured, chosen):
    assert tune._fastest(rows(**measured), "default") == chosen


def test_the_table_tells_all_of_them():
    (part,) = TILINGS["xla_chunked"].parts
    made = rows(default=0.002, a=0.001, b="error 0.3, limit 0.02")
    result = tune.Result(kernel="xla_chunked", part=part, rows=made, default="default", chosen="a")
    assert list(tune.lines(result)) == [
        "  a           1.000 ms  2.000 x  taken",
        "  default     2.000 ms  1.000 x  default",
        "  b       wrong: error 0.3, limit 0.02",
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rounds", "0"], "--rounds 0 --seconds 300: give more than 0 of both"),
        (["--seconds", "-1"], "--rounds 7 --seconds -1: give more than 0 of both"),
        (["--json", __file__], f"{__file__}: the file exists; remove it or give another name"),
        (["kernels.attention=xla"], "kernels.attention=xla has no tiles to tune; set kernels.attention=auto"),
        (["kernels.attention=cudnn"], "kernels.attention=cudnn has no tiles to tune"),
    ],
)
def test_what_cannot_be_tuned_is_one_line_with_status_2(file, capsys, arguments, told):
    assert main(["kernels", "tune", file, *arguments]) == 2
    screen = capsys.readouterr()
    assert screen.out == ""
    assert screen.err.startswith(f"error: {told}")
    assert screen.err.count("\n") == 1


def test_a_machine_on_which_nothing_can_be_tuned_says_why():
    hopper = {"mosaic_gpu": TILINGS["mosaic_gpu"]}
    with pytest.raises(StackError, match=r"^nothing can be tuned on this machine: mosaic_gpu: the platf"):
        tune._able(hopper, PROBLEM)
    able, told = tune._able(TILINGS, PROBLEM)
    assert list(able) == ["xla_chunked"]
    assert list(told) == ["mosaic_gpu"]


def test_where_nothing_ran_nothing_is_kept(file, monkeypatch):
    monkeypatch.setattr(tune, "_ask", lambda *_: (describe(), PROBLEM, "a device"))
    monkeypatch.setattr(tune.Contest, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(tune.Contest, "run", lambda _: rows(**{DEFAULT: "off"}))
    monkeypatch.setattr(tune.jax.config, "update", lambda *_: None)
    with pytest.raises(StackError, match=r"^nothing was tuned: no tiles of xla_chunked ran; the reasons are"):
        list(tune.run(load(file)))
