"""The picture of a pipeline's schedule, from the command."""

import json

import pytest

from stack.config import ConfigError, StackError
from stack.planner.command import run

OPTIONS = {
    "hardware": None,
    "devices": None,
    "search": False,
    "top": 8,
    "compile_step": False,
    "schedule": True,
    "price": None,
    "validate": None,
}
PIPELINE = (
    *("model.num_layers=8", "mesh.stage=4", "mesh.zero=1"),
    *("train.batch_size=16", "train.accumulation=4"),
)


def told(*overrides: str, out: str | None = None, as_json: bool = False) -> list[str]:
    lines = run(config="configs/quickstart.yaml", overrides=overrides, out=out, json=as_json, **OPTIONS)
    return "\n".join(lines).splitlines()


def test_the_text_has_a_line_for_each_stage_and_a_mark_for_each_tick():
    assert told(*PIPELINE) == [
        "1f1b, 4 stages of 2 layers, 4 micro-batches, bubble 43%",
        "21 ticks; 0-9 forward, a-j backward, . nothing",
        "",
        "stage 0   0123......aa.bb.cc.dd",
        "stage 1   .012....aa3bb.cc.dd..",
        "stage 2   ..01..aa2bb3cc.dd....",
        "stage 3   ...0aa1bb2cc3dd......",
        "",
        "held at most: 4, 3, 2, 1 micro-batches",
        "",
        "--out schedule.png draws it",
    ]


def test_zero_bubble_shows_both_halves():
    text = told(*PIPELINE, "mesh.schedule=zero_bubble")
    assert text[1] == "15 ticks; 0-9 forward, a-j gradient of what enters, A-J of weights, . nothing"
    assert text[6] == "stage 3   ...0a1b2c3dABCD"
    assert text[8].endswith("weight gradients put off: 1, 2, 3, 4")


def test_parts_of_too_few_layers_for_their_ticks_have_the_halves_too():
    text = told(*PIPELINE, "model.num_layers=4")
    assert text[0] == "1f1b, 4 stages of 1 layer, 4 micro-batches, bubble 33%"
    assert text[6] == "stage 3   ...0aA1bB2cC3dD..."


def test_json_has_every_action():
    found = json.loads("\n".join(told(*PIPELINE, as_json=True)))
    assert (found["schedule"], found["ticks"], found["live"]) == ("1f1b", 21, [4, 3, 2, 1])
    assert len(found["entries"]) == 2 * 4 * 4
    assert found["entries"][0] == {
        "stage": 0,
        "tick": 0,
        "ticks": 1,
        "kind": "forward",
        "micro_batch": 0,
        "chunk": 0,
    }


def test_a_picture_is_drawn(tmp_path):
    picture = tmp_path / "schedule.png"
    assert told(*PIPELINE, out=str(picture))[-1] == f"drew {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StackError, match=r"end the name in .png"):
        told(*PIPELINE, out=str(tmp_path / "schedule.txt"))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ((), "one stage has no schedule"),
        (("mesh.stage=-1", "mesh.fsdp=1"), "how many stages"),
        (("mesh.stage=4",), "mesh.zero=3 gathers each layer again"),
        (("mesh.stage=8", "mesh.zero=1"), "set mesh.stage=4"),
    ],
)
def test_what_has_no_schedule_is_refused(overrides, line):
    with pytest.raises(ConfigError, match=line):
        told(*overrides)
