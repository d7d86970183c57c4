"""Text in, text out: prompts through a run's tokenizer, its model, and back."""

from collections.abc import Iterator, Sequence
from typing import Any

from stack.config import Config, StackError
from stack.config.section import is_text
from stack.data.tokenizer import Tokenizer, continuation
from stack.inference.generate import generate, stream
from stack.objectives.protocol import Objective
from stack.step.program import Program


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], objective: Objective) -> list[list[int]]:
    """The tokens of prompts as the objective has them: the start of a document, or a whole text with its end.

    Special words are text, but for objectives that train a model to read them.

    Raises:
      StackError: a prompt is not text.
    """
    for number, prompt in enumerate(prompts):
        if not is_text(prompt):
            raise StackError(f"prompt {number} holds bytes that are not UTF-8; give it as UTF-8")
    asked = objective.ask(tokenizer, prompts)
    texts = [ids.tolist() for ids in tokenizer.encode_batch(asked, marks=objective.marks)]
    if objective.continues:  # A chat template may write bos itself.
        return [
            ids if ids[:1] == [tokenizer.bos] and objective.marks else [tokenizer.bos, *ids] for ids in texts
        ]
    return [[*ids, tokenizer.eos] for ids in texts]


def decode_new(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], objective: Objective) -> str:
    """The text of new tokens, after those of a prompt or by itself."""
    return continuation(tokenizer, prompt if objective.continues else (), new, marks=objective.marks)


def end_tokens(tokenizer: Tokenizer, config: Config) -> list[int]:
    """The tokens that end a text: the end of a document, and `sample.end_tokens`.

    Raises:
      StackError: the tokenizer lacks one of them.
    """
    ids = {name: tokenizer.token(name) for name in config.sample.end_tokens}
    if missing := [name for name, number in ids.items() if number is None]:
        raise StackError(
            f"sample.end_tokens: {missing[0]!r} is no token of {config.data.tokenizer}; remove it"
        )
    return [tokenizer.eos, *(number for number in ids.values() if number is not None)]


def generate_texts(
    program: Program, params: dict, tokenizer: Tokenizer, prompts: Sequence[str], *, seed: int | None = None
) -> list[str]:
    """Continues each prompt, or writes what it asks for, as the config's `sample` says.

    Args:
      program: of the run.
      params: parameters that lie as `program.parameters`.
      tokenizer: of the run.
      prompts: texts; an empty one starts a document. In those of objectives that remove text or move it,
        `<extra_id_0>` and the other special words of the tokenizer are those words.
      seed: another seed gives another text; None: the run's.

    Returns:
      The continuations, without the prompts; of objectives that remove text, what was removed, each piece
      after the word that stood for it.

    Raises:
      StackError: a prompt is not text or fills the context, or the seed is out of range.
    """
    objective = program.objective
    tokens = encode_prompts(tokenizer, prompts, objective)
    new = generate(program, params, tokens, **_sampling(program.config, tokenizer, seed))
    return [decode_new(tokenizer, *pair, objective) for pair in zip(tokens, new, strict=True)]


def stream_text(
    program: Program, params: dict, tokenizer: Tokenizer, prompt: str, *, seed: int | None = None
) -> Iterator[str]:
    """The same of one prompt in pieces, as they come; see `generate_texts`."""
    objective = program.objective
    (tokens,) = encode_prompts(tokenizer, [prompt], objective)
    new: list[int] = []
    told = ""
    for (more,) in stream(program, params, [tokens], **_sampling(program.config, tokenizer, seed)):
        new += more
        # The last character may not be whole yet.
        whole = decode_new(tokenizer, tokens, new, objective).rstrip("\ufffd")
        if whole.startswith(told):
            yield whole.removeprefix(told)
            told = whole
    yield decode_new(tokenizer, tokens, new, objective).removeprefix(told)


def _sampling(config: Config, tokenizer: Tokenizer, seed: int | None) -> dict[str, Any]:
    seed = config.seed if seed is None else seed
    if not 0 <= seed < 2**63:
        raise StackError(f"seed={seed} must be at least 0 and below 2^63")
    options = config.sample.model_dump(include={"length", "temperature", "top_k", "top_p"})
    return {**options, "seed": seed, "eos": end_tokens(tokenizer, config)}
