"""Text in, text out: prompts through a run's tokenizer, its model, and back."""

from collections.abc import Iterator, Sequence
from typing import Any

from stack.config import Config, StackError
from stack.config.section import is_text
from stack.data.tokenizer import Tokenizer, continuation
from stack.inference.generate import generate, stream
from stack.step.program import Program


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts, each the start of a document.

    Raises:
      StackError: a prompt is not text.
    """
    for number, prompt in enumerate(prompts):
        if not is_text(prompt):
            raise StackError(f"prompt {number} holds bytes that are not UTF-8; give it as UTF-8")
    return [[tokenizer.bos, *ids.tolist()] for ids in tokenizer.encode_batch(prompts)]


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
    """Continues each prompt as the config's `sample` says.

    Args:
      program: of the run.
      params: parameters that lie as `program.parameters`.
      tokenizer: of the run.
      prompts: texts; an empty one starts a document.
      seed: another seed gives another text; None: the run's.

    Returns:
      The continuations, without the prompts.

    Raises:
      StackError: a prompt is not text or fills the context, or the seed is out of range.
    """
    tokens = encode_prompts(tokenizer, prompts)
    new = generate(program, params, tokens, **_sampling(program.config, tokenizer, seed))
    return [continuation(tokenizer, *pair) for pair in zip(tokens, new, strict=True)]


def stream_text(
    program: Program, params: dict, tokenizer: Tokenizer, prompt: str, *, seed: int | None = None
) -> Iterator[str]:
    """The same of one prompt in pieces, as they come; see `generate_texts`."""
    (tokens,) = encode_prompts(tokenizer, [prompt])
    new: list[int] = []
    told = ""
    for (more,) in stream(program, params, [tokens], **_sampling(program.config, tokenizer, seed)):
        new += more
        # The last character may not be whole yet.
        whole = continuation(tokenizer, tokens, new).rstrip("\ufffd")
        if whole.startswith(told):
            yield whole.removeprefix(told)
            told = whole
    yield continuation(tokenizer, tokens, new).removeprefix(told)


def _sampling(config: Config, tokenizer: Tokenizer, seed: int | None) -> dict[str, Any]:
    seed = config.seed if seed is None else seed
    if not 0 <= seed < 2**63:
        raise StackError(f"seed={seed} must be at least 0 and below 2^63")
    options = config.sample.model_dump(include={"length", "temperature", "top_k", "top_p"})
    return {**options, "seed": seed, "eos": end_tokens(tokenizer, config)}
