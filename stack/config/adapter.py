"""What is trained beside weights that stay as they are."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from stack.config.section import Section


class AdapterTargetConfig(Section):
    """Some matrices, and how large what is added to each is."""

    modules: tuple[str, ...] = Field(default=(), strict=False)
    """The matrices, by name, `*` for anything: `layers.attention.*`, `layers.mlp.up`. None is named twice."""
    rank: PositiveInt = 8
    """Columns of A and rows of B, whose product is added."""
    alpha: PositiveFloat = 16.0
    """The product is multiplied by alpha / rank."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.modules:
            raise ValueError("modules is empty; name some, as [layers.attention.*]")
        return self


class AdapterConfig(Section):
    """Matrices of low rank that are trained in place of those they are added to, which are frozen."""

    kind: Literal["lora", "dora"] = "lora"
    """LoRA (arXiv 2106.09685): W + alpha / rank A B; DoRA (arXiv 2402.09353): that, each output scaled to a
    length that is trained too."""
    targets: tuple[AdapterTargetConfig, ...] = Field(default=(), strict=False)
    """Where."""
    train: tuple[str, ...] = Field(default=(), strict=False)
    """Other parameters that are trained too, by name, `*` for anything: `final_norm.*`, `embed.*`; the head
    of a task is in any case. They are exported with the adapter."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrices and tables that are not trained are kept in; bfloat16 takes half the memory, and changes
    no number of a model whose dtype is bfloat16."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.targets:
            raise ValueError("targets is empty; name some matrices, as [{modules: [layers.*]}]")
        return self
