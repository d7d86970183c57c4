"""`stack kernels explain` tells what runs, as a run would choose it, and what keeps the others from it."""

import json
from pathlib import Path

import pytest

from stack import load
from stack.cli.run import run
from stack.kernels.attention import KERNELS
from stack.planner import kernels

ROOT = Path(__file__).parents[2]
GEMMA = ROOT / "configs" / "gemma2_2b.yaml"


@pytest.mark.usefixtures("tokamax_is_here")
def test_the_page_shows_what_the_command_says(capsys):
    assert run(["kernels", "explain", str(GEMMA), "--hardware", "h200"]) == 0
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    assert f"```\n{printed}```" in page


def test_json_says_the_same_with_the_obstacles_of_every_implementation(capsys):
    options = ["--hardware", "a100-80gb", "--json", "model.attention_dropout=0.1"]
    assert run(["kernels", "explain", str(GEMMA), *options]) == 0
    attention, loss, matmul = json.loads(capsys.readouterr().out)
    assert [attention["name"], loss["name"], matmul["name"]] == ["attention", "cross-entropy", "matmul"]
    others = {other["kernel"]: other for other in attention["others"]}
    assert list(others) == list(KERNELS)
    assert others["cudnn"]["obstacles"] == [
        "head width 256 is over 128",
        "it has no attention dropout",
        "it has no soft cap",
    ]
    assert attention["kernel"] == "xla_chunked"
    assert others["xla"]["stores_scores"]
    assert not others["xla_chunked"]["stores_scores"]


def test_figures_are_those_of_the_table_for_such_a_chip_and_shape():
    config = load(ROOT / "configs" / "gpt2_124m.yaml")
    (attention, *_) = kernels.explain(config, "h100")
    (figure,) = {other.kernel: other for other in attention.others}["cudnn"].measured
    assert figure.startswith("2.3 times as fast as xla on NVIDIA H100 80GB HBM3 (a step of GPT 124M")
    (elsewhere, *_) = kernels.explain(config, "b200")
    assert not any(other.measured for other in elsewhere.others)


def test_without_a_chip_the_targets_is_meant_and_else_the_device_here():
    config = load(ROOT / "configs" / "gpt2_124m.yaml", ["target=null"])
    assert kernels.device(config, None) == ("cpu", None)
    aimed = config.replace("target.hardware=mi300x", "target.devices=8")
    assert kernels.device(aimed, None) == ("rocm", None)
    assert kernels.device(aimed, "a100-80gb") == ("gpu", 8.0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hardware", "h1000"], "hardware 'h1000' is unknown; did you mean h100?"),
        (
            ["--hardware", "h100", "kernels.attention=cudnn"],
            "kernels.attention=cudnn cannot run: it has no soft",
        ),
        (
            ["--hardware", "h100", "kernels.attention=flash"],
            "kernels.attention='flash' must be 'auto', 'cudnn'",
        ),
    ],
)
def test_what_cannot_be_is_told_in_one_line(capsys, options, told):
    assert run(["kernels", "explain", str(GEMMA), *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
