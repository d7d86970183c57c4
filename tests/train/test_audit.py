"""Every row is used once an epoch, whatever interrupts the run and whoever goes on with it."""

import collections
import json
from pathlib import Path

import pytest
from tiny_runs import config, run

from stack import Trainer
from stack.train.watch.listeners import Listener


class Break(Listener):
    """Ends the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_metrics(self, step, metrics) -> None:
        if step == self.step:
            raise ArithmeticError


def rows_of(folder: Path) -> dict[int, list[int]]:
    """Of every step, over all processes."""
    steps: dict[int, list[int]] = collections.defaultdict(list)
    for path in sorted(folder.glob("examples-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps[record["step"]] += record["rows"]
    return dict(steps)


@pytest.mark.full
def test_no_row_is_lost_or_read_twice_over_breaks_batch_sizes_and_processes(tmp_path, run_processes) -> None:
    small = "data.sources.0.max_bytes=8000"
    options = ("train.audit=true", "checkpoint.every=4", "data.heldout_fraction=0", small)
    for step in (6, 11):
        with pytest.raises(ArithmeticError):
            run(tmp_path, "run", *options, "train.steps=12", listeners=[Break(step)])
    run(tmp_path, "run", *options, "train.steps=12")
    # The rest of the first epoch, and a second one, by two processes with another batch.
    rows = run_processes(go_on_with_others, tmp_path, options, devices=1, timeout_seconds=200)[0]
    steps = rows_of(tmp_path / "runs" / "run")
    assert sorted(steps) == list(range(1, 61)), "each step once"
    assert [len(steps[step]) for step in (1, 12, 13, 60)] == [8, 8, 4, 4]
    order = [row for step in sorted(steps) for row in sorted(steps[step])]
    assert len(order) == 12 * 8 + 48 * 4
    counts = collections.Counter(order)
    assert set(counts) == set(range(rows)), "none is lost"
    assert max(counts.values()) - min(counts.values()) <= 1, "none is read twice in an epoch"


def go_on_with_others(folder: Path, options: tuple[str, ...]) -> int:
    changed = config(folder, "run", *options, "train.steps=60", "train.batch_size=4")
    trainer = Trainer(changed, accept=["train.batch_size"])
    trainer.fit(progress=False)
    return trainer.data.train.num_rows
