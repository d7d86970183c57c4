"""The training step: one pure function of state and batch, which the planner compiles too."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from stack.layers.dropout import example_keys
from stack.layers.linear import use_float8
from stack.objectives.protocol import Outputs, Sums
from stack.parallel.zero import gather_module, gradients, take_second_shards
from stack.step import ema, float8, guard, pipeline
from stack.step.offload import apply_by_layer
from stack.step.optimizer import schedule
from stack.step.program import Program
from stack.step.state import State, join

Batch = dict[str, jax.Array]
"""The fields of the program's objective; among them `example` [batch] int32, a row's number."""


def train_step(program: Program, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer step.

    The loss is divided by what the whole global batch counts, whatever the layout and the number of
    micro-batches.

    Returns:
      The next state, and float32 scalars: the objective's metrics, grad_norm (before clipping),
      learning_rate, and skipped: 1 where the step's numbers are bad, and parameters and optimizer state are
      those before it.
    """
    state, sums, told = update(program, state, batch)
    return state, program.objective.metrics(sums) | told


def update(program: Program, state: State, batch: Batch) -> tuple[State, Sums, dict[str, jax.Array]]:
    """The same, with the objective's sums before they are metrics, and the rest of these."""
    config, step = program.config, state["step"]
    gradient, sums = loss_gradient(
        program, state["params"], step, batch, state.get("frozen"), state.get("float8")
    )
    latest: Any = sums.pop("float8", None)
    norm = optax.tree.norm(gradient)
    is_good, after = guard.judge(
        config.stability, state["guard"], step=step, loss=sums["loss"], grad_norm=norm
    )
    params, opt_state = apply(program, gradient, state["opt_state"], state["params"], is_good)
    rate = schedule(config.optimizer, steps=config.train.steps)
    told = {
        "grad_norm": norm,
        "learning_rate": jnp.asarray(rate(step - state["guard"]["skipped"])),
        "skipped": 1 - is_good.astype(jnp.float32),
    }
    changed = {"params": params, "opt_state": opt_state, "step": step + 1, "guard": after}
    if latest is not None:
        told["float8_excess"] = float8.excess(state["float8"], latest)
        history = float8.advance(state["float8"], latest)
        changed["float8"] = guard.choose(is_good, history, state["float8"])
    if decay := config.optimizer.ema_decay:
        applied = step - state["guard"]["skipped"]
        changed["ema"] = ema.average(decay, state["ema"], params, applied=applied, is_good=is_good)
    return state | changed, sums, told


def apply(
    program: Program, gradient: dict, opt_state: Any, params: dict, is_good: jax.Array
) -> tuple[Any, Any]:
    """The optimizer's update: the next parameters, and the next state of the optimizer.

    Where the step is not good, a bool scalar, both are as they were.
    """
    if program.config.train.offload_optimizer:
        return apply_by_layer(program, gradient, opt_state, params, is_good)
    updates, state = program.optimizer.update(gradient, opt_state, params)
    return guard.choose(is_good, (optax.apply_updates(params, updates), state), (params, opt_state))


def loss_gradient(
    program: Program,
    params: dict,
    step: jax.Array,
    batch: Batch,
    frozen: dict | None = None,
    history: float8.History | None = None,
) -> tuple[dict, Sums]:
    """The gradient of the loss in float32, split as the parameters; the objective's sums, and its `loss`.

    With a history, the sums have as `float8` the largest numbers of this step.

    Args:
      program: of the run.
      params: the parameters that are trained, of which the gradient is.
      step: optimizer steps taken, int32 scalar.
      batch: the whole global batch.
      frozen: the parameters that are not trained.
      history: of delayed scaling.
    """
    config, objective, layout = program.config, program.objective, program.layout
    divisor = objective.divisor(batch)
    model = program.merge(join({"params": params, "frozen": frozen or {}}))
    if program.matmul.fp8 is not None:
        use_float8(model, program.matmul.fp8, float8.amaxes(program, history))
    graph, trained, rest = nnx.split(model, lambda path, _: path not in program.frozen, ...)
    rest = take_second_shards(rest, layout) if layout.zero == 3 else gather_module(rest, layout)

    def loss(
        shared: tuple[jax.Array, jax.Array], weights: Any, micro: Batch, **how: Any
    ) -> tuple[jax.Array, Sums]:
        step, divisor = shared
        keys = example_keys(config.seed, step, micro["example"]) if _drops(program) else None
        model, run = nnx.merge(graph, weights, rest), replace(program.execution(keys=keys), **how)
        value, sums = objective.loss(model, micro, run, divisor)
        return value, sums | {"loss": value}

    shared, accumulation = (step, divisor), config.train.accumulation
    if layout.size("stage") > 1:
        gradient, sums = pipeline.gradients(
            loss, trained, batch, shared, layout, micro_batches=accumulation, plan_of=program.pipeline
        )
    else:
        gradient, sums = gradients(partial(loss, shared), trained, batch, layout, accumulation=accumulation)
    gradient = nnx.to_pure_dict(gradient)
    if history is not None:
        gradient, latest = float8.extract(gradient)
        sums |= {"float8": latest}
    return gradient, sums


def eval_step(program: Program, params: dict, batch: Batch) -> tuple[Sums, Outputs]:
    """The objective's sums over a batch, and what it needs of each row, on every device; without dropout."""
    layout, objective = program.layout, program.objective
    model = program.merge(params)
    weights = model if layout.zero == 3 else gather_module(model, layout)
    sums, outputs = objective.judge(weights, batch, program.execution())
    return sums, layout.everywhere(outputs)


def _drops(program: Program) -> bool:
    model = program.config.model
    rates = (model.embedding_dropout, model.attention_dropout, model.residual_dropout)
    return any((*rates, *program.objective.dropout_rates))
