"""The history of a run: one line of steps whatever interrupts it, and curves of it."""

import json
import math
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from stack.config.errors import StackError
from stack.train.watch.metrics import History, MetricsLog, read_history


def write(folder: Path, start: int, steps: range, loss: float) -> None:
    log = MetricsLog(folder)
    log.on_start({"step": start, "steps": 100})
    for step in steps:
        log.on_metrics(step, {"loss": loss, "tokens_per_second": 1e5})
        if step % 2 == 0:
            log.on_eval(step, {"loss": loss + 1, "perplexity": 2.0})
    log.on_end({})


def test_records_come_back_as_they_were_told(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 3), loss=2.5)
    records = read_history(tmp_path)
    assert [{k: v for k, v in r.items() if k != "time"} for r in records] == [
        {"kind": "train", "step": 1, "loss": 2.5, "tokens_per_second": 1e5},
        {"kind": "train", "step": 2, "loss": 2.5, "tokens_per_second": 1e5},
        {"kind": "heldout", "step": 2, "loss": 3.5, "perplexity": 2.0},
    ]
    assert read_history(tmp_path / "metrics.jsonl") == records


def test_a_record_is_in_the_file_as_soon_as_it_is_told(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.on_start({"step": 0, "steps": 10})
    log.on_metrics(1, {"loss": 1.0})
    assert len(read_history(tmp_path)) == 1
    log.on_end({})


def test_a_run_that_goes_on_drops_the_steps_it_takes_again(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 8), loss=1.0)
    write(tmp_path, 4, range(5, 7), loss=9.0)
    history = History.read(tmp_path)
    assert history.curve("loss") == ([1, 2, 3, 4, 5, 6], [1.0] * 4 + [9.0] * 2)
    assert history.curve("loss", "heldout") == ([2, 4, 6], [2.0, 2.0, 10.0])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_half_a_record_left_by_a_killed_process_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4), loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert History.read(tmp_path).curve("loss")[0] == [1, 2, 3]
    write(tmp_path, 3, range(4, 6), loss=1.0)
    assert History.read(tmp_path).curve("loss")[0] == [1, 2, 3, 4, 5]


def test_numbers_that_are_not_finite_are_strict_json_and_come_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.on_start({"step": 0, "steps": 10})
    log.on_metrics(1, {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf})
    log.on_end({})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (record,) = read_history(tmp_path)
    assert math.isnan(record["loss"])
    assert (record["grad_norm"], record["low"]) == (math.inf, -math.inf)


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n[]\n')
    with pytest.raises(StackError, match=r"metrics\.jsonl, line 2: not a record of metrics; delete the line"):
        read_history(tmp_path)


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"cannot read the metrics of a run in .*: No such file"):
        read_history(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match=r"cannot write the metrics to .*: Not a directory"):
        MetricsLog(tmp_path / "file" / "run").on_start({"step": 0, "steps": 10})


def test_a_full_disk_is_told_and_the_records_wait_until_it_takes_them(tmp_path: Path) -> None:
    log, told = MetricsLog(tmp_path), list[str]()
    log.warn = told.append
    log.on_start({"step": 0, "steps": 10})
    log.on_metrics(1, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        for step in (2, 3):
            log.on_metrics(step, {"loss": 1.0})
        assert [record["step"] for record in read_history(tmp_path)] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.on_metrics(4, {"loss": 1.0})
    log.on_end({})
    assert [record["step"] for record in read_history(tmp_path)] == [1, 2, 3, 4]
    (line,) = told
    assert line.startswith(f"cannot write the metrics to {tmp_path / 'metrics.jsonl'}: File too large; ")


def read_events(folder: Path) -> list[tuple[str, int, float]]:
    """Scalars of TensorBoard's record files: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore[missing-module-attribute]

    scalars = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event = Event.FromString(data[12 : 12 + length])
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return scalars


def test_tensorboard_shows_the_same_values(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=True)
    log.on_start({"step": 0, "steps": 10})
    log.on_metrics(1, {"loss": 1.5})
    log.on_eval(1, {"loss": 2.5})
    log.on_end({})
    assert read_events(tmp_path / "tensorboard") == [("train/loss", 1, 1.5), ("heldout/loss", 1, 2.5)]


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("tensorboardX", "MetricsLog('run', tensorboard=True)", "stack[tracking]"),
        (
            "matplotlib",
            "History(records=[{'kind': 'train', 'step': 1, 'loss': 1.0}]).plot()",
            "stack[notebook]",
        ),
    ],
)
def test_a_missing_library_is_told_with_the_extra_that_brings_it(module: str, call: str, extra: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from stack.train.watch.metrics import *; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("stack.config.errors.StackError: ")
    assert f"pip install '{extra}'" in done.stderr


def test_the_plot_has_both_curves_and_labelled_axes(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 50), loss=2.0)
    figure = History.read(tmp_path).plot(tmp_path / "loss.png")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss (nats per token)")
    raw, smoothed, heldout = (np.asarray(line.get_xydata()) for line in axes.get_lines())
    assert raw[:, 0].tolist() == list(range(1, 50))
    assert smoothed[:, 1] == pytest.approx(2.0), (
        "an average of a constant is the constant, from the first point on"
    )
    assert heldout[:, 1].tolist() == [3.0] * 24
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["training, smoothed (2.000 at the end)", "held-out (3.000 at the end)"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == [], "a notebook would show it twice"


def test_smoothing_follows_a_slope_without_lag() -> None:
    records = [{"kind": "train", "step": step, "loss": 5 - step / 100} for step in range(1, 201)]
    records[100]["loss"] = math.nan
    (axes,) = History(records=records).plot().axes
    raw, smoothed = (np.asarray(line.get_xydata())[:, 1] for line in axes.get_lines())
    assert np.isfinite(smoothed).all()
    assert smoothed[5:90] == pytest.approx(raw[5:90])


def test_a_plot_of_nothing_or_to_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="holds no loss yet"):
        History(records=[]).plot()
    history = History(records=[{"kind": "train", "step": 1, "loss": math.nan}])
    with pytest.raises(StackError, match=r"cannot write the plot to .*loss\.xyz"):
        history.plot(tmp_path / "loss.xyz")
    with pytest.raises(StackError, match=r"cannot write the plot to .*No such file"):
        history.plot(tmp_path / "nowhere" / "loss.png")
