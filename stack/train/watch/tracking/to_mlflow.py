"""MLflow, by its client alone."""

from collections.abc import Mapping, Sequence
from itertools import batched
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from stack.config.fields import flatten
from stack.train.watch.tracking.service import Row, Service, Task

_TAG = "stack.run"
_MOST_METRICS = 1000  # Of a request; of parameters it takes 100, of characters of a text 5,000.
_MOST_PARAMETERS = 100
_MOST_LETTERS = 5000
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class MLflow(Service):
    """A run of an experiment, known by a tag: a server gives its runs numbers of its own.

    It keeps every value that it is told of a step, so it is told none twice: what it has is asked first.
    """

    def __init__(self, task: Task) -> None:
        """Asks nobody yet."""
        self._task = task
        self._client = MlflowClient(task.target, registry_uri=task.target)
        self._run = ""

    def open(self) -> int:
        """Finds the run by its tag; a config that has changed since it began is told in tags."""
        task, client = self._task, self._client
        experiment = client.get_experiment_by_name(task.project)
        place = experiment.experiment_id if experiment else client.create_experiment(task.project)
        found = client.search_runs([place], f"tags.`{_TAG}` = '{task.id}'", max_results=1)
        run = found[0] if found else client.create_run(place, tags={_TAG: task.id}, run_name=task.name)
        self._run = run.info.run_id
        client.update_run(self._run, status="RUNNING")
        config = {name: value[:_MOST_LETTERS] for name, value in flatten(dict(task.config))}
        known = run.data.params
        new = [Param(name, value) for name, value in config.items() if name not in known]
        for some in batched(new, _MOST_PARAMETERS):
            client.log_batch(self._run, params=some)
        # A parameter cannot change there.
        changed = [RunTag(name, value) for name, value in config.items() if known.get(name, value) != value]
        for some in batched(changed, _MOST_PARAMETERS):
            client.log_batch(self._run, tags=some)
        steps = (self._last(f"{kind}/loss") for kind in ("train", "heldout"))
        return max(steps)

    def send(self, rows: Sequence[Row]) -> None:
        """Whole rows, as many a request as it takes."""
        some: list[Metric] = []
        for row in rows:
            values = [Metric(name, v, round(1000 * row.time), row.step) for name, v in row.metrics.items()]
            if len(some) + len(values) > _MOST_METRICS:
                self._client.log_batch(self._run, metrics=some)
                some = []
            some += values
        self._client.log_batch(self._run, metrics=some)

    def close(self, step: int, summary: Mapping[str, float | str] | None, status: str) -> None:
        """Numbers of the summary are metrics of its last step, texts are tags."""
        for name, value in (summary or {}).items():
            if isinstance(value, str):
                self._client.set_tag(self._run, name, value[:_MOST_LETTERS])
            elif self._last(name) < step:
                self._client.log_metric(self._run, name, value, step=step)
        self._client.set_terminated(self._run, _STATUS[status])

    def _last(self, name: str) -> int:
        history: Any = self._client.get_metric_history(self._run, name)
        return max((one.step for one in history), default=0)
