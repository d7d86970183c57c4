"""The training step: one pure function of state and batch, which the planner compiles too."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from stack.kernels.attention import Mask
from stack.layers.dropout import example_keys
from stack.models.decoder import Decoder
from stack.objectives.causal import Head, Sums, cross_entropy
from stack.parallel.zero import gather_module, gradients
from stack.step.offload import apply_by_layer
from stack.step.optimizer import schedule
from stack.step.program import Program
from stack.step.state import State

Batch = dict[str, jax.Array]
"""tokens, labels, segments, positions [batch, length] and example [batch], int32."""


def train_step(program: Program, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer step.

    The loss is the mean over the labels of the whole global batch, whatever the layout and the number
    of micro-batches.

    Returns:
      The next state, and float32 scalars: loss (nats, without z-loss), accuracy, grad_norm (before
      clipping), learning_rate, tokens (labels in the batch).
    """
    config = program.config
    gradient, sums, tokens = loss_gradient(program, state["params"], state["step"], batch)
    params, opt_state = apply(program, gradient, state["opt_state"], state["params"])
    metrics = {
        "loss": sums.nll / tokens,
        "accuracy": sums.correct / tokens,
        "grad_norm": optax.tree.norm(gradient),
        "learning_rate": jnp.asarray(schedule(config.optimizer, steps=config.train.steps)(state["step"])),
        "tokens": tokens,
    }
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics


def apply(program: Program, gradient: dict, opt_state: Any, params: dict) -> tuple[Any, Any]:
    """The optimizer's update: the next parameters, and the next state of the optimizer."""
    if program.config.train.offload_optimizer:
        return apply_by_layer(program, gradient, opt_state, params)
    updates, opt_state = program.optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def loss_gradient(
    program: Program, params: dict, step: jax.Array, batch: Batch
) -> tuple[dict, Sums, jax.Array]:
    """The gradient of the mean loss in float32, split as the parameters; sums; number of labels."""
    config = program.config
    tokens = jnp.maximum((batch["labels"] >= 0).sum(dtype=jnp.float32), 1.0)

    def loss(weights: Decoder, micro: Batch) -> tuple[jax.Array, Sums]:
        keys = example_keys(config.seed, step, micro["example"]) if _drops(program) else None
        sums = loss_sums(program, weights, micro, keys=keys)
        return sums.loss / tokens, sums

    gradient, sums = gradients(
        loss, program.merge(params), batch, program.layout, accumulation=config.train.accumulation
    )
    return nnx.to_pure_dict(nnx.state(gradient)), sums, tokens


def eval_step(program: Program, params: dict, batch: Batch) -> dict[str, jax.Array]:
    """Sums over the labels of a batch: nll (nats), correct, tokens; float32 scalars."""
    layout = program.layout
    model = program.merge(params)
    sums = loss_sums(program, model if layout.zero == 3 else gather_module(model, layout), batch)
    tokens = (batch["labels"] >= 0).sum(dtype=jnp.float32)
    return {"nll": sums.nll, "correct": sums.correct, "tokens": tokens}


def loss_sums(program: Program, weights: Decoder, batch: Batch, *, keys: jax.Array | None = None) -> Sums:
    """The model's loss on a batch, with weights ready for use."""
    model, train, layout = program.config.model, program.config.train, program.layout
    segments = batch["segments"] if program.config.data.packed else None
    assert train.remat != "auto", "no program has it"
    output = weights(
        batch["tokens"],
        Mask(batch["positions"], batch["positions"], segments, segments),
        layout=layout,
        kernel=program.attention.kernel,
        keys=keys,
        remat=train.remat,
        offload=train.offload_activations,
    )
    head = Head(
        vocab_size=model.vocab_size,
        softcap=model.logit_softcap,
        z_loss=train.z_loss,
        chunk=train.loss_chunk,
        layout=layout,
    )
    return cross_entropy(output.hidden, output.table, batch["labels"], head)


def _drops(program: Program) -> bool:
    model = program.config.model
    return any((model.embedding_dropout, model.attention_dropout, model.residual_dropout))


def compiler_options(platform: str) -> dict[str, Any]:
    """Options of the step's compilation.

    On GPUs O1 turns on pipelined collectives and double-buffered loops, which overlap the gathers of
    the next layer with the work of this one.
    """
    return {"optimization_level": "O1"} if platform in ("gpu", "cuda") else {}
