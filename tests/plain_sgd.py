"""Instances of plain SGD in NumPy: float64, but for gradients, which are of the program of one instance."""

from functools import partial
from typing import Any

import jax
import numpy as np

from stack import Config, Trainer
from stack.parallel import mesh as meshes
from stack.step import state as states
from stack.step.program import build
from stack.step.step import loss_gradient
from stack.train.checkpoint.checkpoints import named_leaves

Params = dict[str, np.ndarray]

SGD = (
    *("optimizer.kind=sgd", "optimizer.clip_norm=null", "optimizer.weight_decay=0", "optimizer.beta1=0"),
    *("optimizer.learning_rate=0.5", "optimizer.schedule.warmup_steps=0"),
)


def params_of(state: dict[str, Any]) -> Params:
    return {name: states.to_host(leaf) for name, leaf in named_leaves(state["params"]).items()}


class PlainSgd:
    """What `number` instances of a config do on their parts of each batch."""

    def __init__(self, config: Config, number: int) -> None:
        plain = config.model_copy(update={"average": Config().average}).replace("mesh.data=1", "mesh.fsdp=1")
        device = jax.devices()[:1]
        self._size, self._rate = plain.train.batch_size // number, plain.optimizer.learning_rate
        self._batches = Trainer(plain, devices=device)
        self._program = build(plain.replace(f"train.batch_size={self._size}"), device)
        self._likes = self._program.split(self._program.parameters)[0]
        self._gradient = jax.jit(partial(loss_gradient, self._program))
        with meshes.use(states.concrete(self._program)):
            begun = params_of(states.init(self._program))
        self.begun: Params = {name: values.astype(np.float64) for name, values in begun.items()}

    def step(self, step: int, inner: list[Params]) -> None:
        """Moves the parameters of every instance by the step that follows so many."""
        rows = {name: np.asarray(values) for name, values in self._batches.batch(step).items()}
        for number, params in enumerate(inner):
            first = number * self._size
            mine = {name: values[first : first + self._size] for name, values in rows.items()}
            for name, values in self._gradients(step, params, mine).items():
                params[name] = params[name] - self._rate * values

    def _gradients(self, step: int, params: Params, rows: dict[str, np.ndarray]) -> Params:
        with meshes.use(states.concrete(self._program)):
            likes = self._program.abstract_batch()
            batch = {name: jax.device_put(rows[name], like.sharding) for name, like in likes.items()}
            leaves = [
                jax.device_put(np.float32(params[name]), leaf.sharding)
                for name, leaf in named_leaves(self._likes).items()
            ]
            tree = jax.tree.unflatten(jax.tree.structure(self._likes), leaves)
            found, _ = self._gradient(tree, np.int32(step), batch)
        return {name: np.asarray(values, np.float64) for name, values in named_leaves(found).items()}
