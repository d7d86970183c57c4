"""What a model is trained for."""

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveInt

from stack.config.section import Section, one_of


class CausalConfig(Section):
    """Prediction of the next token."""

    implementation: ClassVar[str] = "stack.objectives.causal:Causal"
    """The class that computes it, as `module:class`: config imports no objective."""

    kind: Literal["causal"] = "causal"
    """Every token is predicted from those before it."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-normaliser (arXiv 2204.02311, 1e-4 there)."""
    logits_bytes: PositiveInt | None = None
    """Bytes of float32 logits that exist at one time on a device; null: as many as the table's float32
    gradient has, which every chunk of tokens reads and writes, but at least 64 MiB."""


type ObjectiveConfig = CausalConfig
"""Any of the objectives: THE list, which alone names their classes."""

AnyObjective = one_of(ObjectiveConfig)
"""The same as pydantic reads it, by `kind`; without one it is causal."""
