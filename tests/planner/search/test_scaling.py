"""Scaling curves: what is fixed, what grows, where they end, and what is drawn of them."""

import json
import sys
from pathlib import Path

import pytest

from stack.config import Config, ConfigError, StackError, load
from stack.hardware import chip as chips
from stack.planner.plan import plan
from stack.planner.search import scaling
from stack.planner.search.search import apply_layout

CONFIGS = Path(__file__).parents[3] / "configs"


def gpt2(*overrides: str) -> Config:
    return load(CONFIGS / "gpt2_124m.yaml", ["target=null", "train.batch_size=16", *overrides])


@pytest.fixture(scope="module")
def curves() -> scaling.Scaling:
    return scaling.scaling(gpt2(), hardware=chips.load("h100"), devices=scaling.counts("4..68"))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("8..64", [8, 16, 32, 64]),
        ("8..10240", [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 10240]),
        ("3..3", [3]),
    ],
)
def test_a_range_doubles_to_its_end(text, numbers):
    assert scaling.counts(text) == numbers


@pytest.mark.parametrize("text", ["8", "..8", "8..", "64..8", "0..8", "8..x", "8...64"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ConfigError, match="expected a range such as"):
        scaling.counts(text)


@pytest.mark.full
def test_strong_keeps_the_batch_and_weak_that_of_each_device(curves):
    assert [point.devices for point in curves.strong] == [4, 8, 16, 32, 64, 68]
    assert {point.batch for point in curves.strong} == {16}
    assert [point.batch / point.devices for point in curves.weak] == [4] * 6
    for point in (*curves.strong, *curves.weak):
        if point.candidate:
            assert point.candidate.work.devices == point.devices
            assert point.candidate.work.batch == point.batch


@pytest.mark.full
def test_strong_scaling_ends_where_the_batch_is_split_up(curves):
    obstacles = {point.devices: point.obstacle for point in curves.strong}
    assert obstacles[64] is None
    assert obstacles[68] is not None
    assert obstacles[68].startswith(
        "no layout splits train.batch_size=16 over 68 devices; use 66 or 72 devices, or "
    )
    assert all(point.obstacle is None for point in curves.weak)


@pytest.mark.full
def test_efficiency_is_against_the_fewest_devices_and_falls_under_strong_scaling(curves):
    result = [value for value in scaling.efficiencies(curves.strong) if value is not None]
    assert result[0] == 1.0
    assert result == sorted(result, reverse=True)
    assert result[-1] < 0.95
    speeds = [point.tokens_per_second for point in curves.strong if point.candidate]
    assert result == pytest.approx([speed / speeds[0] for speed in speeds])


@pytest.mark.full
def test_a_point_is_what_a_plan_of_its_layout_says(curves):
    point = curves.strong[3]
    assert point.candidate is not None
    config = apply_layout(gpt2(), point.candidate.work)
    planned = plan(config, hardware="h100", devices=32)
    assert planned.time == point.candidate.time
    assert scaling.mfu(curves, point) == pytest.approx((planned.mfu("full"), planned.mfu("causal")))


def test_the_target_says_what_each_device_has():
    config = gpt2("target={hardware: h100, devices: 16}")
    result = scaling.scaling(config, hardware=chips.load("h100"), devices=[8, 32])
    assert [point.batch for point in result.weak] == [8, 32]
    config = gpt2("target={hardware: h100, devices: 32}")
    result = scaling.scaling(config, hardware=chips.load("h100"), devices=[1, 2])
    assert result.weak[0].obstacle == "1/2 rows are no whole number"
    assert result.weak[1].candidate is not None


@pytest.mark.full
def test_the_table_and_the_json_hold_every_point(curves):
    lines = scaling.lines(curves)
    assert sum(line.lstrip().startswith("68 ") for line in lines) == 2
    assert any("100.0%" in line and "zero" in line for line in lines)
    answer = json.loads(json.dumps(scaling.as_dict(curves)))
    assert [point["devices"] for point in answer["strong"]] == [4, 8, 16, 32, 64, 68]
    assert answer["strong"][0]["efficiency"] == 1.0
    assert "obstacle" in answer["strong"][-1]


@pytest.mark.full
def test_a_chip_that_cannot_train_it_is_marked_so(curves):
    result = scaling.scaling(gpt2(), hardware=chips.load("v100-32gb"), devices=[8])
    assert "modelled only: float16 is not built" in scaling.lines(result)[1]
    assert not any("modelled only" in line for line in scaling.lines(curves))


@pytest.mark.full
def test_a_picture_is_drawn(curves, tmp_path):
    pytest.importorskip("matplotlib")
    path = scaling.plot(curves, tmp_path / "curve.png")
    assert path == tmp_path / "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StackError, match="cannot write the plot"):
        scaling.plot(curves, tmp_path / "curve.xyz")


@pytest.mark.full
def test_without_matplotlib_a_page_is_written(curves, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = scaling.plot(curves, tmp_path / "curve.png")
    assert path == tmp_path / "curve.html"
    page = path.read_text()
    assert page.count("<svg") == 2
    points = sum(point.candidate is not None for point in (*curves.strong, *curves.weak))
    assert page.count("<circle") == 2 * points
    assert "http" not in page, "it loads nothing"


def test_there_is_no_plot_of_nothing(tmp_path):
    curves = scaling.scaling(gpt2(), hardware=chips.load("h100"), devices=[97])
    with pytest.raises(StackError, match="nothing to plot"):
        scaling.plot(
            scaling.Scaling(config=curves.config, hardware=curves.hardware, strong=curves.strong, weak=()),
            tmp_path / "curve.png",
        )
