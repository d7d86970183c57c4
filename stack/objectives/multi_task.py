"""Several tasks on one trunk, which runs once for all of them (MT-DNN, arXiv 1901.11504)."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Int64, Integer

from stack.config import Config
from stack.config.errors import StackError
from stack.config.multi_task import MultiTaskConfig
from stack.data.dataset import Dataset
from stack.data.examples import Encoder
from stack.data.fields import Field
from stack.data.tokenizer import Tokenizer
from stack.data.units import UnitExamples, lay_out
from stack.objectives.task import READ, Task
from stack.objectives.words import EXAMPLE

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from stack.models.protocol import Model
    from stack.models.stack import Execution
    from stack.objectives.protocol import Outputs, Sums

WHICH = Field(name="task", axes=("batch",), padding=-1)
"""The number of a row's task."""


class MultiTask:
    """The tasks' losses, each of its own rows, in the share that these have of a batch."""

    endings: tuple[str, ...] = ("task",)
    continues: ClassVar[bool] = True
    between: ClassVar[str] = ""
    marks: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        """Each task, of rows that have room for the units of any."""
        from stack.objectives import build

        assert isinstance(config.objective, MultiTaskConfig)
        self.tasks: dict[str, Task] = {}
        for named in config.objective.tasks:
            task = build(config.model_copy(update={"objective": named.objective}))
            assert isinstance(task, Task)
            task.name = named.name
            self.tasks[named.name] = task
        self.dropout_rates = tuple(rate for task in self.tasks.values() for rate in task.dropout_rates)
        self.of_sources = [str(source.task) for source in config.data.read_sources]
        each = [task.sizes for task in self.tasks.values()]
        self.sizes = {name: max(sizes.get(name, 0) for sizes in each) for sizes in each for name in sizes}
        read = {field for task in self.tasks.values() for field in task.fields if field in READ}
        own = [
            field._replace(name=f"{name}.{field.name}")
            for name, task in self.tasks.items()
            for field in task.labels
        ]
        self.fields = (*(field for field in READ if field in read), *own, WHICH, EXAMPLE)

    def examples(self, tokenizer: Tokenizer) -> "MixedExamples":
        """Rows of one task each."""
        parts = {name: task.examples(tokenizer) for name, task in self.tasks.items()}
        return MixedExamples(parts, self.of_sources, self.sizes)

    def equip(self, model: Any, rngs: "nnx.Rngs") -> None:
        """Puts all heads in the place of that over words."""
        from flax import nnx

        tasks = self.tasks.values()
        model.leave_out_words(pooler=any(task.pools_by_model for task in tasks))
        model.task = nnx.Module()
        for name, task in self.tasks.items():
            setattr(model.task, name, task.head(rngs))

    def ask(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> Sequence[str]:
        """There is nothing to write.

        Raises:
          StackError: always.
        """
        return next(iter(self.tasks.values())).ask(tokenizer, prompts)

    def only(self, name: str | None) -> Task:
        """One of the tasks.

        Raises:
          StackError: it is none of them.
        """
        if name not in self.tasks:
            told = "--head is missing" if name is None else f"--head {name}"
            raise StackError(f"{told}: name one of the run's: {', '.join(self.tasks)}")
        return self.tasks[name]

    def divisor(self, batch: "Mapping[str, jax.Array]") -> "dict[str, jax.Array]":
        """Of each task, what its rows have, over the share of its rows in the batch."""
        rows = (batch["task"] >= 0).sum(dtype="float32").clip(1.0)
        made = {}
        for number, (name, task) in enumerate(self.tasks.items()):
            mine = (batch["task"] == number).sum(dtype="float32")
            made[name] = task.divisor(self._own(name, batch)) * rows / mine.clip(1.0)
        return made

    def loss(
        self,
        model: "Model",
        batch: "Mapping[str, jax.Array]",
        run: "Execution",
        divisor: "Mapping[str, jax.Array]",
    ) -> "tuple[jax.Array, Sums]":
        """The sum of the losses over their divisors; the tasks' sums by name."""
        losses, sums, _ = self._run(model, batch, run)
        parts = [losses[name] / divisor[name] for name in self.tasks]
        return sum(parts[1:], parts[0]), sums

    def judge(
        self, model: "Model", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[Sums, Outputs]":
        """The same sums, and what metrics of each task are made of."""
        _, sums, scores = self._run(model, batch, run)
        shared = {field.name: batch[field.name] for field in (*READ[:2], WHICH)}
        own = {
            f"{name}.{field.name}": batch[f"{name}.{field.name}"]
            for name, task in self.tasks.items()
            for field in task.labels
        }
        return sums, {**shared, **own, **scores}

    def _run(
        self, model: Any, batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[dict[str, jax.Array], Sums, dict[str, jax.Array]]":
        hidden = model.encode(batch, run)
        losses: dict[str, Any] = {}
        scores: dict[str, Any] = {}
        sums: dict[str, Any] = {"tokens": (batch["segments"] > 0).sum(dtype="float32")}
        for number, (name, task) in enumerate(self.tasks.items()):
            own = self._own(name, batch)
            made = task.read_out(model, hidden, own, run)
            losses[name], more = task.losses(made, own, run)
            rows = (batch["task"] == number).sum(dtype="float32")
            more |= {"nll": losses[name], "count": task.count(own), "rows": rows}
            sums |= {f"{name}.{key}": value for key, value in more.items()}
            scores |= {f"{name}.{key}": value for key, value in made.items()}
        return losses, sums, scores

    def _own(self, name: str, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as one task has it."""
        task = self.tasks[name]
        own = {key: value for key, value in batch.items() if "." not in key}
        for field in task.labels:
            values = batch[f"{name}.{field.name}"]
            own[field.name] = values[..., : task.sizes["classes"]] if field.axes[-1] == "classes" else values
        return own

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """`loss` in the share of rows, `tokens`, and each task's own by its name."""
        told = {
            name: task.metrics(_named(sums, name) | {"tokens": sums["tokens"]})
            for name, task in self.tasks.items()
        }
        rows: Any = sum(sums[f"{name}.rows"] for name in self.tasks)
        loss = sum(told[name]["loss"] * sums[f"{name}.rows"] for name in self.tasks) / rows.clip(1.0)
        own = {
            f"{name}_{key}": value
            for name, values in told.items()
            for key, value in values.items()
            if key != "tokens"
        }
        return {"loss": loss, "tokens": sums["tokens"], **own}

    def evaluate(
        self,
        sums: Mapping[str, float],
        outputs: Mapping[str, np.ndarray],
        *,
        tokenizer: Tokenizer,
        num_bytes: float | None,
    ) -> dict[str, float]:
        """`loss` in the share of rows, and each task's own by its name; of a task without rows nothing."""
        told: dict[str, float] = {}
        loss, rows = 0.0, 0.0
        for number, (name, task) in enumerate(self.tasks.items()):
            if not sums[f"{name}.count"]:
                continue
            mine = outputs["task"] == number
            own = {
                key.removeprefix(f"{name}."): values[mine]
                for key, values in outputs.items()
                if key.startswith(f"{name}.") or "." not in key
            }
            own = self._own_outputs(task, own)
            values = task.evaluate(_named(sums, name), own, tokenizer=tokenizer, num_bytes=num_bytes)
            told |= {f"{name}_{key}": value for key, value in values.items()}
            loss += values["loss"] * sums[f"{name}.rows"]
            rows += sums[f"{name}.rows"]
        if not rows:
            raise StackError("objective.kind=multi_task finds no label in the held-out rows; hold out more")
        return {"loss": loss / rows, **told}

    def _own_outputs(self, task: Task, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        wide = [field.name for field in task.labels if field.axes[-1] == "classes"]
        return outputs | {name: outputs[name][..., : task.sizes["classes"]] for name in wide}


class MixedExamples:
    """Rows of sources of several tasks; see `stack.data.examples.Examples`."""

    def __init__(
        self, parts: Mapping[str, UnitExamples], of_sources: Sequence[str], sizes: Mapping[str, int]
    ) -> None:
        """What reads each task's records, and the task of each source."""
        self.parts = parts
        self.of_sources = of_sources
        self.sizes = sizes
        self.least = max(part.least for part in parts.values())
        self.packing = f"mixed units 1 {self.least}"
        self.encoder: Encoder | None = _Together(parts)

    def of(self, task: str) -> "MixedExamples":
        """The same of one source, whose records are of a task."""
        return MixedExamples(self.parts, [task], self.sizes)

    def encoder_of(self, task: str | None) -> Encoder | None:
        """That of the task."""
        return self.parts[str(task)].encoder

    def room(self, lengths: Int64[np.ndarray, " pieces"]) -> Int64[np.ndarray, " pieces"]:
        """As of the task that takes most."""
        return np.maximum(lengths + 1, self.least)

    def read(
        self,
        dataset: Dataset,
        rows: Integer[np.ndarray, " rows"],
        draws: Integer[np.ndarray, "rows 3"],
        fields: Sequence[Field],
    ) -> Mapping[str, np.ndarray]:
        """The fields of rows by number, those of other tasks empty; nothing is drawn."""
        bounds = np.cumsum([0, *(part.num_rows for part in dataset.parts)])
        sources = np.searchsorted(bounds, rows, side="right") - 1
        names = list(self.parts)
        batch = {
            field.name: np.full(
                (len(rows), *(self.sizes[axis] for axis in field.axes[1:])), field.padding, field.dtype
            )
            for field in fields
            if field.name != "example"
        }
        for number, (row, source) in enumerate(zip(rows.tolist(), sources.tolist(), strict=True)):
            if row < 0:
                continue
            task = self.of_sources[source]
            made = lay_out(dataset.pieces(row), dataset.marks(row))
            labels = {
                name if name == "prefix" else f"{task}.{name}": values
                for name, values in self.parts[task].labels(made).items()
            }
            for name, whole in batch.items():
                if name == "task":
                    whole[number] = names.index(task)
                elif name in labels or "." not in name:
                    values = labels[name] if name in labels else getattr(made, name)
                    whole[(number, *(slice(size) for size in values.shape))] = values
        return batch


class _Together:
    """All encoders: there is one of each source."""

    def __init__(self, parts: Mapping[str, UnitExamples]) -> None:
        self.parts = parts

    @property
    def key(self) -> str:
        """That of each."""
        keys = {name: part.encoder.key for name, part in self.parts.items() if part.encoder is not None}
        return json.dumps(keys)

    def __call__(self, records: Sequence[str]) -> Any:
        raise AssertionError("records are of a source, and that is of a task")


def _named(sums: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A task's own."""
    return {key.removeprefix(f"{name}."): value for key, value in sums.items() if key.startswith(f"{name}.")}
