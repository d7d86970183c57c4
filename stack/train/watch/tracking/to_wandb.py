"""Weights & Biases."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import wandb

from stack.train.watch.tracking.service import Row, Service, Task

_SECONDS = 30.0  # For its server to answer, and for wandb to read a file.


class WeightsAndBiases(Service):
    """A run by its id; steps are W&B's own, which it takes in rising order alone, each once.

    Online its server says which it has; offline the files of the starts before do, a folder of wandb/ each.
    """

    def __init__(self, task: Task) -> None:
        """Asks nobody yet."""
        self._task = task
        self._run: wandb.Run | None = None

    def open(self) -> int:
        """Opens the run to go on after its last step."""
        task, is_online = self._task, self._task.target == "online"
        wandb.teardown()  # Of a try before.
        last = 0 if is_online else self._last_in_files()
        team, _, project = task.project.rpartition("/")
        self._run = wandb.init(
            entity=team or None,
            project=project,
            id=task.id,
            name=task.name,
            dir=task.folder,
            config=dict(task.config),
            resume="allow",
            settings=wandb.Settings(
                mode="online" if is_online else "offline",
                console="off",
                silent=True,
                init_timeout=_SECONDS,
                program="stack train",
                x_stats_pid=task.pid,
                stop_fn=lambda: None,  # Else a button of the web page would end this process alone.
            ),
        )
        return max(last, self._run.starting_step - 1)

    def send(self, rows: Sequence[Row]) -> None:
        """Hands them to wandb's own process, which writes them to its file and sends them when it can."""
        assert self._run is not None
        for row in rows:
            values = {**row.metrics, "_timestamp": row.time}
            self._run.log(values, step=row.step, commit=True)

    def close(self, step: int, summary: Mapping[str, float | str] | None, status: str) -> None:
        """Waits until all is sent, or in the file."""
        assert self._run is not None
        self._run.summary.update(dict(summary or {}))
        self._run.finish(exit_code=0 if status == "finished" else 1)

    def _last_in_files(self) -> int:
        """The last step that the starts before have written, as wandb reads its files."""
        files = Path(self._task.folder, "wandb").glob(f"*run-*-{self._task.id}/*.wandb")
        for path in sorted(files, key=lambda path: path.parent.name, reverse=True):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
            done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
            step = json.loads(done.stdout).get("step") if done.returncode == 0 else None
            if step:
                return int(step)
        return 0
