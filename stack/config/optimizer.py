"""How gradients become updates."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from stack.config.condition import Condition
from stack.config.section import Section


class ScheduleConfig(Section):
    """Learning rate over steps, as a fraction of optimizer.learning_rate."""

    conditions = (
        Condition(fields=("decay_steps", "final_fraction"), other="kind", values=("cosine", "wsd", "linear")),
        Condition(fields=("decay_fraction",), other="kind", values=("wsd",)),
    )

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape after the warmup: `cosine` (arXiv 1608.03983), `linear`, `constant`, or `wsd`, constant
    and then linear decay (arXiv 2404.06395)."""
    start_step: NonNegativeInt = 0
    """The step it begins at, warmup and all: the one a run stands at that goes on with a new schedule."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear rise from 0; null: a tenth of the run's, at most 100."""
    decay_steps: PositiveInt | None = None
    """Steps from the end of the warmup to the end of the decay; null: to the end of the run."""
    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """`wsd`: share of decay_steps, at their end, that decays."""
    final_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Fraction of the peak at the end; 0.1 in GPT-3 and Llama."""

    def warmup(self, steps: int) -> int:
        """Steps of the warmup in a run of so many."""
        return min(100, steps // 10) if self.warmup_steps is None else self.warmup_steps


class GroupConfig(Section):
    """Parameters with a learning rate and a decay of their own."""

    parameters: tuple[str, ...] = Field(default=(), strict=False)
    """By name, `*` for anything: `embed.*`, `layers.mlp.*`. None is in two groups."""
    learning_rate_factor: PositiveFloat = 1.0
    """Their learning rate is this times that of the schedule."""
    weight_decay: NonNegativeFloat | None = None
    """Of all of them, biases and norm scales too; null: that of the optimizer, where it decays them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.parameters:
            raise ValueError("parameters is empty; name some, as [embed.*]")
        if self.learning_rate_factor == 1 and self.weight_decay is None:
            raise ValueError("a group has a learning_rate_factor or a weight_decay of its own; set one")
        return self


class OptimizerConfig(Section):
    """One of Optax's optimizers, with global-norm clipping before and weight decay after."""

    conditions = (
        Condition(fields=("beta1",), other="kind", values=("adamw", "sgd", "lion", "muon")),
        Condition(fields=("beta2",), other="kind", values=("adamw", "lion", "muon")),
        Condition(fields=("epsilon",), other="kind", values=("adamw", "muon")),
        Condition(fields=("momentum",), other="kind", values=("muon",)),
    )

    kind: Literal["adamw", "sgd", "lion", "adafactor", "muon"] = "adamw"
    """AdamW (arXiv 1711.05101), SGD with momentum, Lion (arXiv 2302.06675), Adafactor (1804.04235), Muon for
    matrices and AdamW for tables and vectors (arXiv 2502.16982, whose scale lets both share a rate)."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW, Lion: decay of the first moment. SGD: its momentum."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW: decay of the second moment; 0.95 in GPT-3 and Llama. Lion: decay of its average of
    gradients; 0.99 in its paper."""
    epsilon: PositiveFloat = 1e-8
    """AdamW: added to the root of the second moment."""
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Muon: decay of its sum of gradients; 0.95 by its authors."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices, per step as learning rate x this; 0.1 in GPT-3."""
    decay_embeddings: bool = True
    """Whether embedding and position tables decay too; biases and norm scales never do."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    frozen: tuple[str, ...] = Field(default=(), strict=False)
    """Parameters that are not trained, by name, `*` for anything: `embed.*`, `layers.attention.*`. They
    have no gradient and no moments."""
    groups: tuple[GroupConfig, ...] = Field(default=(), strict=False)
    """Some parameters with a learning rate and a decay of their own; the others have those above."""
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """What the learning rate is multiplied by from each layer to the one below it, as in ELECTRA (arXiv
    2003.10555) and BEiT (2106.08254): with 0.8 the head's is whole, that of the top layer 0.8 of it, of the
    next 0.64, and that of embeddings the least. Each stack is counted from its own top."""
    unfreeze_every: PositiveInt | None = None
    """Steps after which one more layer is trained, from the top down and embeddings last (gradual unfreezing,
    arXiv 1801.06146): at first the top layer and what is above it. Until then a layer stays bit for bit as it
    was, and its moments follow its gradient. Null: all from the start."""
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Decay of a moving average of the weights, as 0.999, which is evaluated, sampled and exported in their
    place; null: none. After t steps it is at most (1 + t) / (10 + t)."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over time."""
