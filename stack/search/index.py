"""The index of a run over documents: built once, kept, brought up to date, and searched."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stack.config.errors import ConfigError, StackError
from stack.config.paths import expand
from stack.data.records import Record
from stack.evaluation.predict import Given, Scorer, asked_task
from stack.objectives.reranking import Reranking
from stack.objectives.retrieval import Retrieval
from stack.objectives.task import Task
from stack.parallel import mesh as meshes
from stack.parallel.messages import from_first
from stack.parallel.processes import first
from stack.search.documents import LEAST_TOKENS, Document, cut, read
from stack.search.nearest import Approximate, Exact, Finder, load_faiss, nearest, normalized
from stack.search.store import (
    Building,
    Entry,
    Passage,
    Stored,
    check,
    check_folder,
    only_builder,
    open_index,
    places,
    unwritable,
)
from stack.train.bits import fingerprint
from stack.train.trainer import Trainer

PASSAGE_TOKENS, OVERLAP = 256, 32
"""Of passages, if they fit and nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Hit(Passage):
    """A passage that was found."""

    score: float
    """Cosine with the query; where another run orders them, that run's score."""


class Ready(NamedTuple):
    """A document that waits for the vectors of those before it."""

    document: Document
    passages: list[list[int]]
    texts: list[str]
    known: tuple[np.ndarray, bytes] | None
    """Vectors and texts, where they are there."""


class Index:
    """Passages of documents with the vectors that a run makes of them.

    Attributes:
      folder: where it is kept.
      stored: its files.
      query: the field of a record that holds a query.
    """

    def __init__(
        self,
        folder: Path,
        stored: Stored,
        scorer: Scorer,
        query: str,
        finder: Finder,
        width: int,
        tell: Callable[[str], None],
    ) -> None:
        """One that is there; see `build`."""
        self.folder = folder
        self.stored = stored
        self._scorer = scorer
        self.query = query
        self._finder = finder
        self._width = width
        self._tell = tell
        self._rerankers: dict[int, Scorer] = {}

    @classmethod
    def build(
        cls,
        trainer: Trainer,
        documents: str,
        *,
        folder: str | None = None,
        passage_tokens: int | None = None,
        overlap: int | None = None,
        width: int | None = None,
        approximate: bool = False,
        task: str | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """The index of documents: that which is kept, with what has changed since embedded anew.

        Every process of a run asks for the same.

        Args:
          trainer: with the parameters of a run of objective.kind=retrieval.
          documents: a folder, a text, or a .jsonl with a document in the field `text` of each line; see
            `stack.search.documents.read`.
          folder: where it is kept; by default in the run's.
          passage_tokens: of a passage at most; by default 256, or what fits.
          overlap: tokens that a passage begins before the one before it ends; by default an eighth.
          width: the first so many numbers of each vector are compared (Matryoshka); by default all.
          approximate: walk a graph of neighbours by FAISS, in place of comparing all.
          task: of a run of several, the one that retrieves.
          tell: is told what was left out, damaged or built anew.

        Raises:
          ConfigError: the run is of another objective, or an option is not as it should be.
          StackError: documents that cannot be read, or an index that cannot be written.
        """
        objective = asked_task(trainer.program, task)
        if not isinstance(objective, Retrieval):
            raise ConfigError(
                f"{trainer.folder} is a run of objective.kind={trainer.config.objective.kind}; search takes"
                " one of objective.kind=retrieval"
            )
        options = objective.options
        whole = trainer.config.model.embed_dim
        if width is not None and width not in (*options.widths, whole):
            named = ", ".join(map(str, options.widths)) or "none"
            raise ConfigError(
                f"--width {width} is neither the whole, {whole}, nor one of objective.widths ({named})"
            )
        if approximate:
            load_faiss()
        fits = trainer.config.data.sequence_length - 2
        tokens = min(PASSAGE_TOKENS, fits) if passage_tokens is None else passage_tokens
        shared = min(OVERLAP, tokens // 8) if overlap is None else overlap
        if not LEAST_TOKENS <= tokens <= fits:
            raise ConfigError(
                f"--passage {tokens}: a passage has {LEAST_TOKENS} to {fits} tokens, which fit"
                f" data.sequence_length={trainer.config.data.sequence_length} with the two around them"
            )
        if not 0 <= shared <= tokens // 2:
            raise ConfigError(f"--overlap {shared}: passages of {tokens} tokens share 0 to {tokens // 2}")
        where = _folder(trainer, documents, folder)
        check_folder(where)
        scorer = _scorer(trainer, objective)
        maker = _Maker(trainer, scorer, objective, where, tokens, shared, tell)
        stored = maker.brought_up_to_date(documents)
        vectors = stored.vectors[:, :width]
        finder: Finder
        if approximate:
            finder = Approximate(vectors, where / f"hnsw-{width or whole}.faiss", tell)
        else:
            finder = Exact(trainer.mesh, vectors)
        return cls(where, stored, scorer, options.query, finder, width or whole, tell)

    def __len__(self) -> int:
        """Passages."""
        return len(self.stored.vectors)

    @property
    def num_files(self) -> int:
        """That its passages are of."""
        return len({each.file for each in self.stored.entries})

    def search(
        self, queries: str | Sequence[str], *, top: int = 5, rerank: Trainer | None = None
    ) -> list[list[Hit]]:
        """The passages that are nearest to each query, the best first; of equal ones those that come first.

        Args:
          queries: texts.
          top: of passages, at most.
          rerank: a run of objective.kind=reranking, which reads each of these with the query, cut if need
            be, and orders them.

        Raises:
          ConfigError: `top` is below 1, or `rerank` of another objective.
          StackError: a query is empty or too long.
        """
        if top < 1:
            raise ConfigError(f"--top {top}: ask for one passage at least")
        texts = [queries] if isinstance(queries, str) else list(queries)
        reranker = None if rerank is None else self._reranker(rerank)
        found: list[list[Hit]] = []
        for some in itertools.batched(texts, self._scorer.chunk):
            vectors = self._embedded(some)[:, : self._width]
            told = nearest(self._finder, self.stored.vectors[:, : self._width], normalized(vectors), top)
            for query, numbers, scores in zip(some, told.numbers, told.scores, strict=True):
                hits = [
                    Hit(**vars(self.stored.passage(int(number))), score=float(score))
                    for number, score in zip(numbers, scores, strict=True)
                    if number >= 0
                ]
                found.append(hits if reranker is None else _reordered(reranker, query, hits))
        return found

    def _embedded(self, queries: Sequence[str]) -> np.ndarray:
        """[queries, embed] float32."""
        made = self._scorer([_given(self.query, query, "the query") for query in queries])
        for query, scored in zip(queries, made, strict=True):
            if not scored.asked.rows:
                raise StackError(f"the query {query[:40]!r}... is too long; shorten it")
            if scored.is_cut:
                self._tell(f"cut       the query {query[:40]!r}..., which is too long")
        return _vectors(made)

    def _reranker(self, trainer: Trainer) -> Scorer:
        if id(trainer) not in self._rerankers:
            self._rerankers[id(trainer)] = reranker(trainer)
        return self._rerankers[id(trainer)]


def reranker(trainer: Trainer) -> Scorer:
    """What scores a query with a passage.

    Raises:
      ConfigError: the run is of another objective.
    """
    objective = trainer.program.objective
    if not isinstance(objective, Reranking):
        raise ConfigError(
            f"--rerank {trainer.folder} is a run of objective.kind={trainer.config.objective.kind}; it takes"
            " one of objective.kind=reranking"
        )
    return _scorer(trainer, objective, cuts=True)


def _scorer(trainer: Trainer, objective: Task, *, cuts: bool = False) -> Scorer:
    return Scorer(trainer.program, trainer.trained, trainer.words, objective, cuts=cuts)


def _reordered(scorer: Scorer, query: str, hits: list[Hit]) -> list[Hit]:
    """The same, by the scores of another run."""
    assert isinstance(scorer.objective, Reranking)
    options = scorer.objective.options
    records = [{options.query: query, options.passages: [hit.text]} for hit in hits]
    texts = [Record.at(json.dumps(record), "a query and its passage") for record in records]
    made = scorer([Given(*pair) for pair in zip(records, texts, strict=True)]) if hits else []
    scores = [float(scored.asked.outputs[0]["scores"][0]) for scored in made]
    order = sorted(range(len(hits)), key=lambda number: -scores[number])
    return [replace(hits[number], score=scores[number]) for number in order]


def _given(field: str, text: str, place: str) -> Given:
    record = {field: text}
    return Given(record, Record.at(json.dumps(record), place))


def _vectors(made: Iterable[Any]) -> np.ndarray:
    """Of records of one text each, [records, embed] float32, of length 1."""
    some = np.stack([scored.asked.outputs[0]["vectors"][0] for scored in made])
    return normalized(some.astype(np.float64)).astype(np.float32)


def _folder(trainer: Trainer, documents: str, folder: str | None) -> Path:
    """Where the index of documents is kept."""
    if folder is not None:
        return expand(folder)
    place = str(expand(documents).resolve())
    return trainer.folder / f"index-{hashlib.blake2b(place.encode(), digest_size=4).hexdigest()}"


class _Maker:
    """Makes an index, or brings it up to date."""

    def __init__(
        self,
        trainer: Trainer,
        scorer: Scorer,
        objective: Retrieval,
        folder: Path,
        tokens: int,
        overlap: int,
        tell: Callable[[str], None],
    ) -> None:
        config = trainer.config
        self.folder = folder
        self.tokens, self.overlap = tokens, overlap
        self.tell = tell if first() else lambda _: None
        self.tokenizer = trainer.words
        self.width = config.model.embed_dim
        self.field = objective.options.passage
        settings = [config.model.model_dump(mode="json"), objective.pooling, self.tokenizer.fingerprint]
        told = json.dumps(settings).encode()
        with meshes.use(trainer.mesh):
            weights = fingerprint(trainer.trained)
        self.key = {
            "weights": weights,
            "settings of the model": hashlib.blake2b(told, digest_size=8).hexdigest(),
            "passage": tokens,
            "overlap": overlap,
        }
        self.about = {"run": str(trainer.folder), "step": trainer.ledger.position.step}
        self.scorer = scorer

    def brought_up_to_date(self, documents: str) -> Stored:
        """The index, made or mended as far as it must be."""
        wanted: list[tuple[Any, ...]] = [_name(document) for document in read(documents, self.tell)]
        old = open_index(self.folder, self.key, self.tell)
        if old is not None and [_name(each) for each in old.entries] == wanted:
            return old
        try:
            if first():
                with only_builder(self.folder):
                    building = Building(self.folder, self.key, self.width, self.about)
                    with closing(building):
                        self._build(building, documents, old, wanted)
            else:
                self._build(None, documents, old, wanted)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        from_first(0)  # It is there.
        made = open_index(self.folder, self.key, self.tell)
        assert made is not None
        return made

    def _build(
        self, building: Building | None, documents: str, old: Stored | None, wanted: list[tuple[Any, ...]]
    ) -> None:
        done = 0
        if building is not None:
            pairs = zip(map(_name, building.entries), wanted, strict=False)
            done = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        done = from_first(done)
        if building is not None:
            building.begin(done)
        known = {} if old is None else {each.digest: number for number, each in enumerate(old.entries)}
        console = Console(stderr=True)
        columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shows = first() and console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=not shows) as progress:
            task = progress.add_task("", total=len(wanted), completed=done)
            waiting: list[Ready] = []
            for document in itertools.islice(read(documents), done, None):
                waiting.append(self._ready(document, old, known))
                if sum(len(each.texts) for each in waiting) >= self.scorer.chunk or len(waiting) >= 4096:
                    self._embed(waiting, building)
                    progress.advance(task, len(waiting))
                    waiting = []
            self._embed(waiting, building)
        if building is not None:
            building.finish()

    def _ready(self, document: Document, old: Stored | None, known: dict[str, int]) -> Ready:
        number = known.get(document.digest)
        if old is not None and number is not None:
            return Ready(document, old.entries[number].passages, [], old.of(number))
        passages = cut(document.text, self.tokenizer, tokens=self.tokens, overlap=self.overlap)
        texts = [document.text[start:end] for start, end in passages]
        return Ready(document, places(document.text, passages), texts, None)

    def _embed(self, waiting: Sequence[Ready], building: Building | None) -> None:
        texts = [text for each in waiting for text in each.texts]
        made = iter(
            [
                vector
                for some in itertools.batched(texts, self.scorer.chunk)
                for vector in _vectors(self.scorer([_given(self.field, text, "a passage") for text in some]))
            ]
        )
        if building is None:
            return
        for each in waiting:
            vectors, utf8 = each.known or (
                np.stack(list(itertools.islice(made, len(each.texts)))),
                "".join(each.texts).encode(),
            )
            building.add(Entry.of(each.document, each.passages, check(vectors, utf8)), vectors, utf8)


def _name(each: Document | Entry) -> tuple[Any, ...]:
    """What tells a document from all others: its place and its text."""
    return each.file, each.line, each.id, each.start, each.digest
