"""Next-token prediction (GPT, arXiv 2005.14165): every token is predicted from those before it."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stack.config import CausalConfig, Config
from stack.data.fields import Field
from stack.models.protocol import Model
from stack.models.stack import Execution
from stack.objectives.cross_entropy import Head, chunk_tokens, cross_entropy
from stack.objectives.protocol import Sums

ROW = ("batch", "length")


class Causal:
    """Mean cross-entropy of the next token, with z-loss."""

    fields = (
        Field(name="tokens", axes=ROW, padding=0),
        Field(name="labels", axes=ROW, padding=-1),
        Field(name="segments", axes=ROW, padding=0),
        Field(name="positions", axes=ROW, padding=0),
        Field(name="example", axes=ROW[:1], padding=0),
    )
    endings = ("nats_per_byte", "trigram", "sample")

    def __init__(self, config: Config) -> None:
        """The options of the objective and of the model's head."""
        assert isinstance(config.objective, CausalConfig)
        self.config = config.objective
        self.model = config.model

    def divisor(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Labels of a batch, float32, at least 1."""
        return jnp.maximum(_count(batch), 1.0)

    def loss(
        self, model: Model, batch: Mapping[str, jax.Array], run: Execution, divisor: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """The loss over the divisor; nll (nats, without z-loss), correct and tokens, summed over labels."""
        output = model(batch, run)
        head = Head(
            vocab_size=self.model.vocab_size,
            softcap=self.model.logit_softcap,
            z_loss=self.config.z_loss,
            chunk=chunk_tokens(
                self.config.logits_bytes,
                embed_dim=self.model.embed_dim,
                vocab_size=self.model.padded_vocab_size,
                tensor=run.layout.size("tensor"),
            ),
            layout=run.layout,
        )
        sums = cross_entropy(output.hidden, output.table, batch["labels"], 1.0 / divisor, head)
        return sums.loss, {"nll": sums.nll, "correct": sums.correct, "tokens": _count(batch)}

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """`loss` (nats per token, without z-loss), `accuracy` and `tokens` (labels)."""
        tokens = sums["tokens"]
        divisor = jnp.maximum(tokens, 1.0)
        return {"loss": sums["nll"] / divisor, "accuracy": sums["correct"] / divisor, "tokens": tokens}

    def evaluate(self, sums: Mapping[str, float], *, num_bytes: float | None) -> dict[str, float]:
        """Loss (nats per token), perplexity, accuracy, nats_per_byte where there are bytes, tokens."""
        loss = sums["nll"] / sums["tokens"]
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": sums["correct"] / sums["tokens"],
            **({} if num_bytes is None else {"nats_per_byte": sums["nll"] / num_bytes}),
            "tokens": sums["tokens"],
        }


def _count(batch: Mapping[str, jax.Array]) -> jax.Array:
    return (batch["labels"] >= 0).sum(dtype=jnp.float32)
