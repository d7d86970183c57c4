"""Evaluations of language models on a file at hand: perplexity by words, and last words, as of T-NLG."""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.config.paths import expand
from stack.data.records import Record, read_jsonl, text_at
from stack.data.text_files import read_text
from stack.data.tokenizer import Tokenizer
from stack.evaluation.likelihood import Continuation, likelihoods, perplexity, windows
from stack.step.program import Program


def word_perplexity(
    program: Program, params: dict[str, Any], tokenizer: Tokenizer, path: str
) -> dict[str, float]:
    """How a model finds a text, by its words, its tokens and its bytes.

    The likelihood of all tokens of the text is divided by its words, which white space parts, so that models
    with different tokenizers compare (WikiText, arXiv 1609.07843; Megatron-LM, arXiv 1909.08053).
    Rows read `data.sequence_length` tokens and score half of them, so each token but the first ones is
    predicted after half a row at least. The end of a text is not scored.

    Args:
      program: of the run, of a decoder.
      params: that lie as `program.parameters`.
      tokenizer: of the run.
      path: a text in UTF-8, or .jsonl with a text of its own in the field `text` of each line.

    Returns:
      word_perplexity, token_perplexity, bits_per_byte, words, tokens.

    Raises:
      StackError: the file cannot be read or holds no word; see `likelihoods`.
    """
    texts = [text for _, text in _texts(path) if text.strip()]
    words = sum(len(text.split()) for text in texts)
    if not words:
        raise StackError(f"{path}: holds no word; give it a text")
    length = program.config.data.sequence_length
    parts = [
        part
        for ids in tokenizer.encode_batch(texts)
        for part in windows([tokenizer.bos, *ids.tolist()], length=length, stride=max(1, length // 2))
    ]
    nll = sum(each.nll for each in likelihoods(program, params, parts))
    tokens = sum(len(part.tokens) for part in parts)
    return {
        "word_perplexity": perplexity(nll, words),
        "token_perplexity": perplexity(nll, tokens),
        "bits_per_byte": nll / math.log(2) / sum(len(text.encode()) for text in texts),
        "words": words,
        "tokens": tokens,
    }


def last_words(program: Program, params: dict[str, Any], tokenizer: Tokenizer, path: str) -> dict[str, float]:
    """How often a model writes the last word of passages, after the others (LAMBADA, arXiv 1606.06031).

    A word is right if each of its tokens is the likeliest one. It is what follows the last white space.

    Args:
      program: of the run, of a decoder.
      params: that lie as `program.parameters`.
      tokenizer: of the run.
      path: .jsonl with a passage in the field `text` of each line, or a text with a passage in each line.

    Returns:
      last_word_accuracy, last_word_perplexity (by passages), passages.

    Raises:
      StackError: the file cannot be read, or a passage has fewer than two words; see `likelihoods`.
    """
    asked = []
    for place, text in _texts(path, lines=True):
        passage = text.strip()
        before = passage[: len(passage) - len(passage.split()[-1])].rstrip() if passage else ""
        if not before:
            raise StackError(f"{place}: a passage of fewer than two words; remove the line")
        asked.append((before, passage))
    if not asked:
        raise StackError(f"{path}: holds no passage; give it one in each line")
    given = tokenizer.encode_batch([before for before, _ in asked])
    whole = tokenizer.encode_batch([passage for _, passage in asked])
    parts = [_split(tokenizer, *pair) for pair in zip(given, whole, strict=True)]
    told = likelihoods(program, params, parts)
    return {
        "last_word_accuracy": sum(each.is_greedy for each in told) / len(told),
        "last_word_perplexity": perplexity(sum(each.nll for each in told), len(told)),
        "passages": len(told),
    }


def _split(tokenizer: Tokenizer, given: Any, whole: Any) -> Continuation:
    """The tokens of a passage, those that its beginning has by itself given."""
    ids: Sequence[int] = whole.tolist()
    at = min(len(given), len(ids) - 1)
    return Continuation([tokenizer.bos, *ids[:at]], ids[at:])


def _texts(path: str, *, lines: bool = False) -> Iterator[tuple[str, str]]:
    """Texts of a file, and where each stands."""
    file = expand(path)
    if not file.is_file():
        raise StackError(f"{file}: there is no such file; give the path of a text")
    if ".jsonl" in file.suffixes:
        for record in read_jsonl(SourceConfig(kind="jsonl", path=str(file), field=None), file):
            assert isinstance(record, Record)
            text = text_at(json.loads(record), "text", partial(str, record.place), setting="the field")
            yield record.place, text or ""
        return
    content = "".join(read_text(SourceConfig(kind="text", path=str(file)), file))
    for number, text in enumerate(content.split("\n") if lines else [content], 1):
        if text.strip():
            yield f"{file}:{number}", text
