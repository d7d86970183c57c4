"""Several tasks on one trunk."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stack.config.explain import shown
from stack.config.objective_section import ObjectiveSection
from stack.config.section import Section
from stack.config.tasks import AnyTask, ClassificationConfig


class NamedTask(Section):
    """One of several tasks."""

    name: str = ""
    """By which sources, metrics and its head have it: letters, digits and _."""
    objective: AnyTask = ClassificationConfig()
    """What it is, by `kind`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.name.isidentifier():
            raise ValueError(
                f"name={shown(self.name)} must be of letters, digits and _, and begin with a letter"
            )
        return self


class MultiTaskConfig(ObjectiveSection):
    """Several tasks on one trunk."""

    implementation = "stack.objectives.multi_task:MultiTask"
    reads_records = True
    scores_words = False
    shapes = ("decoder", "encoder", "encoder_decoder")

    kind: Literal["multi_task"] = "multi_task"
    """Several tasks train one trunk, each with a head of its own (MT-DNN, arXiv 1901.11504). Rows are drawn
    by the weights of sources (`data.sources.N.task` names the task of each, `data.temperature` evens them
    out); in a batch a task counts as many rows as it has."""
    tasks: Annotated[tuple[NamedTask, ...], Field(strict=False)] = ()
    """Each by a name of its own."""

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(names) < 2:
            raise ValueError("tasks has fewer than two; name several, or take the one task's kind")
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks has {shown(doubled[0])} twice; give each another name")
        return self
