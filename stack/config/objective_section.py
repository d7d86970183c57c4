"""What all objectives say of themselves."""

from typing import ClassVar

from stack.config.section import Section


class ObjectiveSection(Section):
    """What a model is trained for: what is known of it without JAX."""

    implementation: ClassVar[str]
    """The class that computes it, as `module:class`: config imports no objective."""
    shapes: ClassVar[tuple[str, ...]]
    """Of the models that it trains."""
    every_token: ClassVar[bool] = False
    """Whether every token of the text is predicted once, so that its loss is one of the text."""
    reads_records: ClassVar[bool] = False
    """Whether a document is a whole record and not a text; `source.field` is then null."""
    reads_template: ClassVar[bool] = False
    """Whether the tokenizer's chat template decides what is read."""
    has_reference: ClassVar[bool] = False
    """Whether it compares with the model that the run began with, which then is one that was trained."""
    has_baselines: ClassVar[bool] = False
    """Whether there is what `eval.baselines` asks for."""
    scores_words: ClassVar[bool] = True
    """Whether the model's own head scores words; if not, a head of the objective's stands in its place, and
    no text is written."""
