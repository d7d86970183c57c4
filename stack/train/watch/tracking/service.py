"""What a service is that follows the history of a run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the history says of a step: of its training, of an evaluation after it, or of both."""

    step: int
    """Optimizer steps taken."""
    time: float
    """Seconds since 1970."""
    metrics: Mapping[str, float]
    """By names such as `train/loss` and `heldout/loss`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run, and where it is to be told."""

    service: str
    """A key of `SERVICES`."""
    target: str
    """What the config says of the service: its mode, or where it is."""
    project: str
    """Of Weights & Biases; the experiment of MLflow."""
    id: str
    """Of the run, the same for all its starts."""
    name: str
    """Of the run, for people."""
    folder: str
    """Of the run."""
    config: Mapping[str, Any]
    """What the run is."""
    pid: int
    """Of the process that trains."""


class Service(ABC):
    """A service; every method may raise whatever it likes, and may take as long as it likes."""

    @abstractmethod
    def open(self) -> int:
        """Opens the run there, or makes it; returns the last step whose row it has, 0 if it has none."""

    @abstractmethod
    def send(self, rows: Sequence[Row]) -> None:
        """Sends rows of steps that it does not have, in their order."""

    @abstractmethod
    def close(self, step: int, summary: Mapping[str, float | str] | None, status: str) -> None:
        """Ends what this start of the run has to tell.

        Args:
          step: the last that was sent.
          summary: numbers and texts of a run that came to its end; None: it did not.
          status: "finished", "failed" (with an error, or as it was stopped) or "killed".
        """


SERVICES = {
    "wandb": "stack.train.watch.tracking.to_wandb:WeightsAndBiases",
    "mlflow": "stack.train.watch.tracking.to_mlflow:MLflow",
}
"""The class of each, by the field of the config that asks for it; package and extra have the same name."""

ENVIRONMENT = {
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Tries of its own would hide for minutes that a server is away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # Whoever names a folder wants one.
}
"""What their libraries go by, unless the environment says otherwise; none tells its makers of a run."""
