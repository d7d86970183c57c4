"""What a run shows when it ends, by the names that objectives give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from stack.evaluation.tables import score_tables
from stack.evaluation.trigram import trigram_nats_per_byte
from stack.inference.generate import check_prompt
from stack.inference.text import encode_prompts, end_tokens
from stack.objectives.metrics.classes import scikit_learn

if TYPE_CHECKING:
    from stack.train.trainer import Trainer

Row = tuple[str, "str | Text"]
"""A label, and what is shown beside it."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """One thing that is shown."""

    show: Callable[["Trainer", Mapping[str, Any]], dict[str, Any]]
    """(trainer, the summary so far) -> more of the summary; `rows` of it are printed."""
    check: Callable[["Trainer"], None] = lambda _: None
    """Raises at the start what would make it fail at the end."""


def show_held_out(_: "Trainer", summary: Mapping[str, Any]) -> dict[str, Any]:
    """The held-out loss over the bytes of its text, which no tokenizer changes; else over its labels."""
    if "nats_per_byte" in summary:
        return {"rows": [("held-out", f"{summary['nats_per_byte']:.4f} nats per byte")]}
    if "loss" not in summary:
        return {}
    known = f"{summary['loss']:.4f} nats per token, {summary['accuracy']:.1%} right"
    return {"rows": [("held-out", known)]}


def show_preferences(_: "Trainer", summary: Mapping[str, Any]) -> dict[str, Any]:
    """The held-out loss over pairs, and how many are told apart."""
    if "loss" not in summary:
        return {}
    known = f"{summary['loss']:.4f} nats per pair, {summary['accuracy']:.1%} right"
    return {"rows": [("held-out", f"{known}, margin {summary['margin']:.3g}")]}


def show_task(_: "Trainer", summary: Mapping[str, Any]) -> dict[str, Any]:
    """All that a task's metrics tell of the held-out records."""
    told = [f"{name} {value:.4g}" for name, value in summary.items() if isinstance(value, float)]
    return {"rows": [("held-out", ", ".join(told))]} if told else {}


def check_metrics(trainer: "Trainer") -> None:
    """Refuses held-out records whose metrics could not be told.

    Raises:
      StackError: scikit-learn is not installed.
    """
    if trainer.config.data.heldout_fraction:
        scikit_learn()


def show_trigram(trainer: "Trainer", summary: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a trigram model, if the config asks for it and there is held-out text."""
    if not (trainer.config.eval.baselines and "nats_per_byte" in summary):
        return {}
    nats = trigram_nats_per_byte(trainer.data.train.texts(), trainer.data.heldout.texts())
    return {"trigram_nats_per_byte": nats, "rows": [("trigram", f"{nats:.4f} nats per byte, to compare")]}


def show_tables(trainer: "Trainer", summary: Mapping[str, Any]) -> dict[str, Any]:
    """What tables of words and of pairs tell of the same hidden words, if the config asks for it."""
    if not (trainer.config.eval.baselines and "loss" in summary):
        return {}
    more: dict[str, Any] = {"rows": []}
    for name, score in score_tables(trainer.config, trainer.data).items():
        more |= {f"{name}_loss": score.loss, f"{name}_accuracy": score.accuracy}
        told = f"{score.loss:.4f} nats per token, {score.accuracy:.1%} right, to compare"
        more["rows"].append((name, told))
    return more


def show_sample(trainer: "Trainer", _: Mapping[str, Any]) -> dict[str, Any]:
    """What the model writes after the config's prompt, or of it, if it is to be."""
    if not trainer.config.sample.at_end:
        return {}
    prompt = trainer.config.sample.prompt
    sample = trainer.generate(prompt)[0]
    between = trainer.program.objective.between
    shown = Text(printable(prompt) + between, "bold").append(printable(sample), "not bold")
    return {"prompt": prompt, "sample": sample, "rows": [("sample", shown)]}


def check_sample(trainer: "Trainer") -> None:
    """Refuses a prompt that leaves no room in the context, and ends of a text that are no tokens.

    Raises:
      StackError: it does not, or they are not.
    """
    if not trainer.config.sample.at_end:
        return
    end_tokens(trainer.tokenizer, trainer.config)
    prompts, objective = [trainer.config.sample.prompt], trainer.program.objective
    (tokens,) = encode_prompts(trainer.tokenizer, prompts, objective)
    check_prompt(tokens, trainer.config.model, name="sample.prompt")


def printable(text: str) -> str:
    """Text that cannot move the cursor: a model of bytes may write escape sequences."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


ENDINGS: Mapping[str, Ending] = {
    "held_out": Ending(show=show_held_out),
    "preferences": Ending(show=show_preferences),
    "task": Ending(show=show_task, check=check_metrics),
    "trigram": Ending(show=show_trigram),
    "tables": Ending(show=show_tables),
    "sample": Ending(show=show_sample, check=check_sample),
}
"""All of them, by name."""
