"""Direct preference optimization (DPO, arXiv 2305.18290): of two answers, one is made likelier."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from stack.config import Config, PreferredConfig
from stack.config.errors import StackError
from stack.config.explain import kind_of
from stack.data.chat import ChatTemplate
from stack.data.fields import Field
from stack.data.tokenizer import Tokenizer
from stack.objectives.preferred import ChatPairs, PairedExamples, PairEncoder, PairReader, TextPairs
from stack.objectives.words import EXAMPLE, PACKED, Words

if TYPE_CHECKING:
    import jax

    from stack.kernels.linear_cross_entropy import Head
    from stack.models.protocol import Model
    from stack.models.stack import Execution
    from stack.objectives.protocol import Sums

REFERENCE = Field(name="reference", axes=("batch", "answers"), padding=0, dtype="float32")
"""Log-probabilities of a row's answers by the reference, nats, a number per segment."""
_LEAST = 4
"""Places of a pair at least: of each text bos and a token."""


class Preferences(Words, ABC):
    """Mean over pairs of -log sigmoid(beta (chosen - rejected)), log-probabilities over the reference's.

    With conservative labels each preference is wrong with some probability. The reference is the model that
    the run began with; what it tells of all rows is computed once, see `stack.train.reference`.
    """

    fields = (*PACKED[:-1], REFERENCE, EXAMPLE)
    endings = ("preferences", "sample")
    reference: ClassVar[str] = REFERENCE.name

    def __init__(self, config: Config) -> None:
        """The options."""
        super().__init__(config)
        assert isinstance(config.objective, PreferredConfig)
        self.preferred = config.objective
        pairs = max(1, self.sizes["length"] // _LEAST) if config.data.packed else 1
        self.sizes["answers"] = 2 * pairs

    @abstractmethod
    def reader(self, tokenizer: Tokenizer) -> PairReader:
        """How records are read.

        Raises:
          ConfigError: the tokenizer lacks what it takes.
        """

    def examples(self, tokenizer: Tokenizer) -> PairedExamples:
        """Rows of pairs."""
        encoder = PairEncoder(
            tokenizer=tokenizer,
            reader=self.reader(tokenizer),
            has_prompt=self.preferred.prompt is not None,
            sequence_length=self.sizes["length"],
            too_long=self.preferred.too_long,
            marks=self.marks,
        )
        return PairedExamples(encoder=encoder, answers=self.sizes["answers"])

    def divisor(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """Pairs of a batch, float32, at least 1."""
        return _pairs(batch).clip(1.0)

    def head(self, run: "Execution") -> "Head":
        """That of words, whose labels are not smoothed: `label_smoothing` is of preferences here."""
        return super().head(run)._replace(smoothing=0.0)

    def log_probs(
        self, model: "Model", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[jax.Array, jax.Array]":
        """Log-probabilities of answers, nats, and their labels, each [batch, answers] float32.

        Both are 0 where a row has no such segment.
        """
        import jax.numpy as jnp

        from stack.kernels.linear_cross_entropy import label_nll

        output, labels = model(batch, run), batch["labels"]
        nll, _ = label_nll(output.hidden, output.table, labels, self.head(run), output.bias)
        # Summed by comparison: a cumulative sum would round the longest rows the most.
        here = batch["segments"][:, :, None] == jnp.arange(1, self.sizes["answers"] + 1)
        told = jnp.where(here, nll[:, :, None], 0.0).sum(1)
        return -told, (here & (labels >= 0)[:, :, None]).sum(1, dtype="float32")

    def loss(
        self, model: "Model", batch: "Mapping[str, jax.Array]", run: "Execution", divisor: "jax.Array"
    ) -> "tuple[jax.Array, Sums]":
        """The loss over the divisor; sums over pairs, in which rewards are beta times log-ratios."""
        import jax
        import jax.numpy as jnp

        policy, counts = self.log_probs(model, batch, run)
        ratio = policy - batch[self.reference]
        if self.preferred.length_normalised:
            ratio = ratio / counts.clip(1.0)
        rewards, smoothing = self.preferred.beta * ratio, self.preferred.label_smoothing
        chosen, rejected = rewards[:, 0::2], rewards[:, 1::2]
        is_pair, margin = counts[:, 0::2] > 0, chosen - rejected
        each = -(1.0 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
        total = jnp.where(is_pair, each, 0.0).sum()
        return total / divisor, {
            "preference": total,
            "correct": (is_pair & (margin > 0)).sum(dtype="float32"),
            "margin": margin.sum(),
            "chosen_reward": chosen.sum(),
            "rejected_reward": rejected.sum(),
            "pairs": _pairs(batch),
            "tokens": counts.sum(),
        }

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """`loss`, `accuracy` (pairs whose preferred answer has the higher reward), rewards, `tokens`."""
        return _means(sums, sums["pairs"].clip(1.0)) | {"pairs": sums["pairs"], "tokens": sums["tokens"]}

    def evaluate(
        self,
        sums: Mapping[str, float],
        outputs: Mapping[str, Any] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        num_bytes: float | None,
    ) -> dict[str, float]:
        """The same of held-out pairs.

        Raises:
          StackError: there is none.
        """
        if not sums["pairs"]:
            raise StackError(
                f"objective.kind={kind_of(type(self.options))}: no pair is held out; raise"
                " data.heldout_fraction"
            )
        return _means(sums, sums["pairs"]) | {"pairs": sums["pairs"], "tokens": sums["tokens"]}


class Preference(Preferences):
    """Preferences among texts."""

    def reader(self, tokenizer: Tokenizer) -> PairReader:
        """The fields."""
        options = self.preferred
        return TextPairs(prompt=options.prompt, chosen=options.chosen, rejected=options.rejected)


class ChatPreference(Preferences):
    """Preferences among what an assistant says."""

    marks: ClassVar[bool] = True
    between = "\n"

    def reader(self, tokenizer: Tokenizer) -> ChatPairs:
        """By the tokenizer's template."""
        options = self.preferred
        template = ChatTemplate.of(tokenizer, "messages")
        return ChatPairs(
            template=template, prompt=options.prompt, chosen=options.chosen, rejected=options.rejected
        )

    def ask(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
        """Each prompt as what a user says, up to where the assistant begins."""
        template = self.reader(tokenizer).template
        return [template.ask(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]


def _pairs(batch: "Mapping[str, jax.Array]") -> "jax.Array":
    return (batch["segments"].max(1) // 2).sum(dtype="float32")


def _means(sums: Mapping[str, Any], pairs: Any) -> dict[str, Any]:
    """Per pair; `margin` is that of the rewards."""
    return {
        "loss": sums["preference"] / pairs,
        "accuracy": sums["correct"] / pairs,
        **{name: sums[name] / pairs for name in ("margin", "chosen_reward", "rejected_reward")},
    }
