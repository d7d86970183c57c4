"""The display of a run: in a terminal, in a log, and when nobody reads any more."""

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from stack.train.watch.progress import Progress

METRICS = {"loss": 2.34567, "tokens_per_second": 12345.6}


def run(progress: Progress, steps: int = 100, start: int = 0) -> None:
    progress.on_start({"step": start, "steps": steps})
    for step in range(start + 1, steps + 1):
        progress.on_metrics(step, METRICS)
        if step == 50:
            progress.on_eval(step, {"loss": 2.0, "perplexity": 7.389, "accuracy": 0.5})
            progress.on_checkpoint(step)
    progress.on_end({})


def test_a_log_gets_a_few_plain_lines() -> None:
    log = io.StringIO()
    run(Progress(Console(file=log, width=40)), steps=1000)
    lines = log.getvalue().splitlines()
    shown = [int(match[1].replace(",", "")) for line in lines if (match := re.match(r"step ([\d,]+)/", line))]
    assert shown == [1, *range(51, 1000, 50), 1000]
    assert lines[0] == "step 1/1,000  loss 2.3457  12.3k tokens/s"
    assert re.fullmatch(r"step 51/1,000  loss 2\.3457  12\.3k tokens/s  \d:\d\d:\d\d left", lines[3])
    assert lines[1:3] == ["step 50  held-out: loss 2  perplexity 7.389  accuracy 0.5", "step 50  checkpoint"]
    assert "\x1b" not in log.getvalue()


def test_a_run_that_goes_on_starts_where_it_stopped() -> None:
    log = io.StringIO()
    run(Progress(Console(file=log)), steps=100, start=98)
    assert [line.split("  ")[0] for line in log.getvalue().splitlines()] == ["step 99/100", "step 100/100"]


def test_a_terminal_gets_one_bar_that_moves() -> None:
    screen = io.StringIO()
    progress = Progress(
        Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm-256color"})
    )
    stdout = sys.stdout
    run(progress)
    assert sys.stdout is stdout, "the bar must give standard output back"
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue())
    frames = text.split("\r")
    assert "━" in text
    assert "step 0/100  compiling" in text
    assert sum("step 99/100  loss 2.3457  12.3k tokens/s" in frame for frame in frames) == 1
    assert "step 50  held-out: loss 2  perplexity 7.389  accuracy 0.5" in text


@pytest.mark.parametrize("width", [50, 80, 110, 200])
def test_the_bar_and_its_line_stay_on_one_line(width) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    progress = Progress(console)
    progress.on_start({"step": 0, "steps": 10})
    for step in (1, 2):
        progress.on_metrics(step, METRICS | {"learning_rate": 1e-4, "grad_norm": 2.0})
    assert len(console.render_lines(progress._bar())) == 1


def test_the_time_left_is_what_the_steps_so_far_took() -> None:
    progress = Progress(Console(file=io.StringIO()))
    progress.on_start({"step": 0, "steps": 10})
    assert progress.line() == "step 0/10  compiling"
    progress.on_metrics(1, METRICS)
    assert "left" not in progress.line(), "the first step holds the compilation"
    progress.on_metrics(2, METRICS)
    assert progress.line().endswith("0:00:00 left")


def test_a_closed_file_ends_the_display_and_not_the_run() -> None:
    for terminal in (False, True):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, _environ={"TERM": "xterm-256color"})
        progress = Progress(console)
        progress.on_start({"step": 0, "steps": 100})
        screen.close()
        for step in range(1, 101):
            progress.on_metrics(step, METRICS)
        progress.on_end({})
        assert progress.line().startswith("step 100/100")


def test_a_run_outlives_the_reader_of_its_output() -> None:
    code = (
        "import sys; from stack.train.watch.progress import Progress; p = Progress(); "
        "p.on_start({'step': 0, 'steps': 20}); sys.stdin.read(); "
        "[p.on_metrics(step, {'loss': 1.0}) for step in range(1, 21)]; p.on_end({}); "
        "print('more'); print('survived', file=sys.stderr)"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    os.close(reader)
    _, errors = process.communicate("")
    assert (process.returncode, errors) == (0, "survived\n")


def test_a_line_has_rate_norm_and_the_speed_of_the_last_steps() -> None:
    progress = Progress(Console(file=io.StringIO()))
    progress.on_start({"step": 0, "steps": 100})
    for step, speed in ((1, 30_000.0), (2, 1_000.0)):
        more = {"loss": 2.0, "learning_rate": 3e-4, "grad_norm": 1.25, "tokens_per_second": speed}
        progress.on_metrics(step, more)
    # Two steps of as many tokens took 31 times as long as one at 30,000.
    assert progress.line().startswith("step 2/100  loss 2.0000  lr 3.00e-04  grad norm 1.25  1.94k tokens/s")
