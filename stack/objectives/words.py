"""What all objectives over words share: the mean cross-entropy of their labels.

Who prepares data needs no JAX, so what computes is imported where it does.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from stack.config import Config, WordsConfig
from stack.config.errors import ConfigError, StackError
from stack.config.explain import kind_of
from stack.data.examples import PLAIN, Examples
from stack.data.fields import Field
from stack.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jax

    from stack.kernels.linear_cross_entropy import Head
    from stack.models.protocol import Model
    from stack.models.stack import Execution
    from stack.objectives.protocol import Outputs, Sums

ROW = ("batch", "length")
EXAMPLE = Field(name="example", axes=ROW[:1], padding=0)
PACKED = (
    Field(name="tokens", axes=ROW, padding=0),
    Field(name="labels", axes=ROW, padding=-1),
    Field(name="segments", axes=ROW, padding=0),
    Field(name="positions", axes=ROW, padding=0),
    EXAMPLE,
)
"""Rows in which every place may have a label."""


class Words:
    """Mean cross-entropy of labels, with z-loss and smoothing, from hidden states of the labels' shape."""

    dropout_rates: tuple[float, ...] = ()
    fields: tuple[Field, ...] = PACKED
    endings: tuple[str, ...] = ("held_out",)
    continues: bool = True
    """Whether what is written goes on with a prompt, which then begins a document; if not, the prompt is a
    whole text, and what is written another."""
    between: str = ""
    """What is shown between a prompt and what is written."""
    marks: ClassVar[bool] = False
    """Whether special words that are written out in a prompt stand for themselves, and are shown."""

    def __init__(self, config: Config) -> None:
        """The options of the objective and of the model's head."""
        assert isinstance(config.objective, WordsConfig)
        self.options = config.objective
        self.model = config.model
        self.sizes: dict[str, int] = {"length": config.data.sequence_length}

    def examples(self, tokenizer: Tokenizer) -> Examples:
        """Rows as they are packed."""
        return PLAIN

    def equip(self, model: Any, rngs: Any) -> None:
        """A model has what words need."""

    def ask(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> Sequence[str]:
        """The texts that a model is given for prompts: themselves."""
        return prompts

    def divisor(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """Labels of a batch, float32, at least 1."""
        return _count(batch).clip(1.0)

    def loss(
        self, model: "Model", batch: "Mapping[str, jax.Array]", run: "Execution", divisor: "jax.Array"
    ) -> "tuple[jax.Array, Sums]":
        """The loss over the divisor; nll (nats, without z-loss), correct and tokens, summed over labels."""
        from stack.kernels.linear_cross_entropy import linear_cross_entropy

        output, labels, head = model(batch, run), batch["labels"], self.head(run)
        sums = linear_cross_entropy(output.hidden, output.table, labels, 1.0 / divisor, head, output.bias)
        return sums.loss, {"nll": sums.nll, "correct": sums.correct, "tokens": _count(batch)}

    def judge(
        self, model: "Model", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[Sums, Outputs]":
        """The same sums; nothing is needed of a row beside."""
        return self.loss(model, batch, run, self.divisor(batch))[1], {}

    def head(self, run: "Execution") -> "Head":
        """How hidden states become scores of words, and those a loss."""
        from stack.kernels.linear_cross_entropy import Head, chunk_tokens

        return Head(
            vocab_size=self.model.vocab_size,
            softcap=self.model.logit_softcap,
            z_loss=self.options.z_loss,
            smoothing=self.options.label_smoothing,
            chunk=chunk_tokens(
                self.options.logits_bytes,
                embed_dim=self.model.embed_dim,
                vocab_size=self.model.padded_vocab_size,
                tensor=run.layout.size("tensor"),
            ),
            layout=run.layout,
        )

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """`loss` (nats per token, without z-loss and smoothing), `accuracy` and `tokens` (labels)."""
        tokens = sums["tokens"]
        divisor = tokens.clip(1.0)
        return {"loss": sums["nll"] / divisor, "accuracy": sums["correct"] / divisor, "tokens": tokens}

    def evaluate(
        self,
        sums: Mapping[str, float],
        outputs: Mapping[str, Any] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        num_bytes: float | None,
    ) -> dict[str, float]:
        """Loss (nats per label), perplexity, accuracy, nats_per_byte where text is known whole, tokens.

        Raises:
          StackError: there is no label.
        """
        tokens = sums["tokens"]
        if not tokens:
            raise StackError(
                f"objective.kind={kind_of(type(self.options))} finds nothing to predict in the held-out rows"
                " (`stack data report` shows rows); lengthen data.sequence_length, raise objective.rate or"
                " hold out more text"
            )
        loss = sums["nll"] / tokens
        per_byte = (
            {}
            if num_bytes is None or not self.options.every_token
            else {"nats_per_byte": sums["nll"] / num_bytes}
        )
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": sums["correct"] / tokens,
            **per_byte,
            "tokens": sums["tokens"],
        }


def word(tokenizer: Tokenizer, text: str, vocab_size: int, *, field: str) -> int:
    """The id of a word that an objective needs.

    Raises:
      ConfigError: the tokenizer has no such word, or the model no row for it.
    """
    number = tokenizer.token(text)
    if number is None:
        raise ConfigError(
            f"objective.{field}: the tokenizer has no word {text!r}; add it, or name another in its place"
        )
    if number >= vocab_size:
        raise ConfigError(
            f"objective.{field}: {text!r} is word {number} of the tokenizer, but model.vocab_size is"
            f" {vocab_size}; set model.vocab_size={number + 1} or more"
        )
    return number


def _count(batch: "Mapping[str, jax.Array]") -> "jax.Array":
    return (batch["labels"] >= 0).sum(dtype="float32")
