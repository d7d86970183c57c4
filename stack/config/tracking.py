"""Services that follow the history of a run."""

from typing import Literal, Self

from pydantic import Field, model_validator

from stack.config.section import Section


class TrackingConfig(Section):
    """Who else is told what metrics.jsonl holds."""

    project: str = Field(default="stack", min_length=1)
    """Project of Weights & Biases, `team/project` where it is a team's, and experiment of MLflow."""
    wandb: Literal["online", "offline"] | None = None
    """Weights & Biases (extra `wandb`). online: with the key of `wandb login` or WANDB_API_KEY; offline:
    into wandb/ in the run folder, which `wandb sync` sends later; null: not at all."""
    mlflow: str | None = Field(default=None, min_length=1)
    """Where MLflow is (extra `mlflow`): http://HOST:5000, another tracking URI, or a folder; null: not at
    all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.project != "stack" and self.wandb is None and self.mlflow is None:
            raise ValueError(
                f"project={self.project} is not read without a service; set tracking.wandb or tracking.mlflow"
            )
        return self
