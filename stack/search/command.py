"""`stack search`."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from stack.config.errors import ConfigError, StackError
from stack.config.paths import check_writable, expand
from stack.data.records import text_at
from stack.evaluation.files import read_given
from stack.parallel.processes import first
from stack.search.index import Hit, Index, reranker
from stack.train.trainer import Trainer

_SHOWN = 240
"""Characters of a passage."""


def run(
    *,
    config: str,
    rest: Sequence[str],
    documents: str,
    query: Sequence[str],
    queries: str | None,
    output: str | None,
    top: int,
    rerank: str | None,
    index: str | None,
    width: int | None,
    passage: int | None,
    overlap: int | None,
    approximate: bool,
    head: str | None,
    which: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Iterator[str]:
    """Builds the index where it must be, and searches it; yields what was found, as lines.

    Args:
      config: the folder of a run.
      rest: overrides of its config.
      documents: path of what is searched.
      query: what to look for.
      queries: path of a .jsonl with more.
      output: path of the .jsonl to write.
      top: passages of each query.
      rerank: the folder of the run that orders them.
      index: where the index is kept.
      width: numbers of vectors that are compared.
      passage: tokens of a passage.
      overlap: tokens that neighbours share.
      approximate: whether FAISS finds them.
      head: of a run of several tasks, the one that retrieves.
      which: of the run's checkpoints; see `Trainer.from_run`.
      tell: is told what else a person should know.

    Raises:
      ConfigError: options that do not go together.
      StackError: what `Index` raises, or a file that cannot be read or written.
    """
    if (queries is None) != (output is None):
        raise ConfigError("--queries FILE and --output FILE belong together; give both")
    if queries is not None and query:
        raise ConfigError("--query and --queries: give one of them")
    if top < 1:
        raise ConfigError(f"--top {top}: ask for one passage at least")
    is_asked = not query and queries is None
    if is_asked and jax.process_count() > 1:
        raise ConfigError("several processes share no standard input; give --query or --queries")
    if output is not None and expand(output).exists():
        raise StackError(f"{output} is there already; remove it, or give --output another name")
    trainer = Trainer.from_run(config, rest, **which)
    second = None if rerank is None else Trainer.from_run(rerank)
    if second is not None:
        reranker(second)

    made = Index.build(
        trainer,
        documents,
        folder=index,
        passage_tokens=passage,
        overlap=overlap,
        width=width,
        approximate=approximate,
        task=head,
        tell=tell,
    )
    tell(f"index     {len(made):,} passages of {made.num_files:,} files in {made.folder}")
    root = expand(documents)
    base = f"{documents.rstrip('/')}/" if root.is_dir() else f"{documents[: -len(root.name)]}"
    if queries is not None and output is not None:
        number = _answer_file(made, second, (queries, output), base, top)
        yield f"{number:,} queries in {output}"
        return
    for text in _asked() if is_asked else query:
        try:
            (hits,) = made.search(text, top=top, rerank=second)
        except StackError as error:
            if not is_asked:
                raise
            tell(f"error: {error}")
            continue
        yield from _lines(text, hits, base)


def _asked() -> Iterator[str]:
    """Lines of standard input; a terminal is asked for each."""
    console = Console(stderr=True)
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            console.print("query> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _lines(query: str, hits: Sequence[Hit], base: str) -> Iterator[str]:
    yield f"query     {query}"
    for number, hit in enumerate(hits, start=1):
        named = "" if hit.id is None else f"  id {hit.id}"
        yield f"{number:>4}  {hit.score:.4f}  {base}{hit.file}:{hit.line}{named}  [{hit.start}:{hit.end}]"
        text = " ".join(hit.text.split())
        yield f"      {text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'}"


def _answer_file(index: Index, rerank: Trainer | None, paths: tuple[str, str], base: str, top: int) -> int:
    """Writes each record of a file with its `hits`."""
    target = expand(paths[1])
    check_writable(target)
    given = list(read_given(paths[0]))
    texts = []
    for each in given:
        place = str(getattr(each.text, "place", "a record"))
        text = text_at(each.record, index.query, lambda place=place: place, setting="objective.query")
        if text is None or not text.strip():
            raise StackError(f"{place}: field {index.query!r} is empty; write a query, or remove the line")
        texts.append(text)
    found = index.search(texts, top=top, rerank=rerank)
    if first():
        part = target.with_name(f"{target.name}.part")
        with part.open("w", encoding="utf-8") as file:
            for each, hits in zip(given, found, strict=True):
                told = [vars(hit) | {"file": f"{base}{hit.file}"} for hit in hits]
                file.write(json.dumps(each.record | {"hits": told}, ensure_ascii=False) + "\n")
        part.replace(target)
    return len(given)
