"""Optax optimizers whose per-parameter rules act per layer, although layers are stacked."""

from typing import Any

import jax
import optax

from stack.config import OptimizerConfig, ScheduleConfig
from stack.step import groups
from stack.step.muon import scale_by_muon

Axes = Any
"""A tree like the parameters with the logical axes of each."""

Roles = Any
"""A tree like the parameters with the role of each."""


def build(
    config: OptimizerConfig,
    *,
    steps: int,
    axes: Axes,
    roles: Roles,
    depths: Any = None,
    dtype: str = "float32",
) -> optax.GradientTransformation:
    """Clipping, the optimizer's rule, weight decay of matrices, the learning rate: in that order.

    Args:
      config: the options.
      steps: of the whole run, which the schedule may end with.
      axes: the logical axes of every parameter.
      roles: the role of every parameter.
      depths: how many layers are above each, of `groups.depths`; None: nothing depends on it.
      dtype: what products of matrices are computed in.

    Raises:
      ConfigError: a group that names none of them, or one of another group.
    """
    clip, rule = parts(config, steps=steps, axes=axes, roles=roles, depths=depths, dtype=dtype)
    return optax.chain(*clip, *rule)


def parts(
    config: OptimizerConfig,
    *,
    steps: int,
    axes: Axes,
    roles: Roles,
    depths: Any = None,
    dtype: str = "float32",
    layer: jax.Array | None = None,
) -> tuple[list, list]:
    """What of it looks at the whole gradient, and what at each layer and parameter by itself.

    With a `layer`, int32 scalar, the latter is for updates of that one, [1, ...] of each stack.
    """
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    rule = [_rule(config, axes, roles, dtype)]
    rates, decays = groups.rates_and_decays(config, roles)
    if any(jax.tree.leaves(decays)):
        rule.append(groups.add_decay(decays))
    rule.append(optax.scale_by_learning_rate(schedule(config, steps=steps)))
    if config.layer_decay != 1:
        rates = groups.layer_rates(config.layer_decay, rates, depths)
    rule.append(groups.multiply(rates, layer))
    if config.unfreeze_every is not None:
        rule.append(groups.unfreeze(config.unfreeze_every, depths, layer))
    return clip, rule


def schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Step (from 0) -> learning rate."""
    shape, peak = config.schedule, config.learning_rate
    warmup = shape.warmup(steps)
    rise = optax.linear_schedule(0.0, peak, max(1, warmup))
    parts, boundaries = [rise, _after_warmup(shape, peak, steps)], [warmup]
    joined = optax.join_schedules(parts, boundaries)
    # The first update counts as one step of the rise: a step at rate 0 would be wasted.
    whole = (lambda step: joined(step + 1)) if warmup else parts[1]
    return (lambda step: whole(step - shape.start_step)) if shape.start_step else whole


def _after_warmup(shape: ScheduleConfig, peak: float, steps: int) -> optax.Schedule:
    length = shape.decay_steps or max(1, steps - shape.start_step - shape.warmup(steps))
    end = peak * shape.final_fraction
    match shape.kind:
        case "constant":
            return optax.constant_schedule(peak)
        case "linear":
            return optax.linear_schedule(peak, end, length)
        case "cosine":
            return optax.cosine_decay_schedule(peak, length, shape.final_fraction)
        case "wsd":
            fall = max(1, round(length * shape.decay_fraction))
            return optax.linear_schedule(peak, end, fall, transition_begin=length - fall)


def _rule(config: OptimizerConfig, axes: Axes, roles: Roles, dtype: str) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    match config.kind:
        case "adamw":
            return adam
        case "muon":
            labels = jax.tree.map(lambda role: "muon" if role == "matrix" else "adam", roles)
            matrices = jax.tree.map(lambda role, names: names if role == "matrix" else (), roles, axes)
            muon = scale_by_muon(config.momentum, matrices, dtype=dtype)
            return optax.partition({"muon": muon, "adam": adam}, labels)
        case "sgd":
            return optax.trace(config.beta1)
        case "lion":
            return optax.scale_by_lion(config.beta1, config.beta2)
        case "adafactor":
            # The rule without its own clock: factored second moments, an update of at most root mean
            # square 1, scaled by the parameter's own.
            rule = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            )
            return per_layer(rule, axes)


def per_layer(rule: optax.GradientTransformation, axes: Axes) -> optax.GradientTransformation:
    """`rule`, applied to each layer of a stack as if it were a parameter of its own."""

    def label(path: tuple[Any, ...], names: tuple[str, ...]) -> str:
        # Stacks may differ in depth, so each is by itself.
        return (
            f"layers of {jax.tree_util.keystr(path[:1], simple=True)}" if names[0] == "layers" else "single"
        )

    stacked = optax.GradientTransformation(jax.vmap(rule.init), jax.vmap(rule.update))
    labels = jax.tree.map_with_path(label, axes, is_leaf=is_names)
    used = set(jax.tree.leaves(labels))
    return optax.partition({name: rule if name == "single" else stacked for name in used}, labels)


def is_names(node: Any) -> bool:
    """Whether a node of a tree of axes is one parameter's axes."""
    return isinstance(node, tuple)
