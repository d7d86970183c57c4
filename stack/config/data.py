"""What the model reads."""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from stack.config.condition import Condition
from stack.config.explain import shown
from stack.config.section import Section


def _weight(value: Any) -> Any:
    """A number, or points of one: what lists hold as tuples."""
    points = value if isinstance(value, list | tuple) else [(0, value)]
    if not points or not all(isinstance(point, list | tuple) and len(point) == 2 for point in points):
        raise ValueError(f"{shown(value)} is no list of points; write [[row, weight], ...]")
    for row, weight in points:
        if type(row) is not int or not 0 <= row < 2**63:
            raise ValueError(
                f"{shown(row)} is no row of a point [row, weight]; write a whole number from 0 on"
            )
        if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
            raise ValueError(f"{shown(weight)} is no weight; write a number from 0 on")
    rows = [row for row, _ in points]
    if any(later <= row for row, later in pairwise(rows)):
        raise ValueError(f"the rows of its points, {', '.join(map(str, rows))}, do not rise; order them")
    return tuple(map(tuple, points)) if points is value else value


Weight = Annotated[NonNegativeFloat | tuple[tuple[int, NonNegativeFloat], ...], BeforeValidator(_weight)]
"""A weight, or the points of one that changes: rows of the training sequence, and the weight at each."""


def weight_at(weight: "float | tuple[tuple[int, float], ...]", row: int) -> float:
    """A weight at a row of the training sequence: between points in a straight line."""
    if not isinstance(weight, tuple):
        return weight
    (low, start), (high, end) = (
        next((point for point in reversed(weight) if point[0] <= row), weight[0]),
        next((point for point in weight if point[0] >= row), weight[-1]),
    )
    return start if high <= low else start + (end - start) * (row - low) / (high - low)


RECORDS = ("jsonl", "arrayrecord", "hf")
"""Kinds of sources whose documents may be whole records."""


class SourceConfig(Section):
    """One stream of documents."""

    conditions = (
        Condition(
            fields=("path",),
            other="kind",
            values=("text", "code", "jsonl", "parquet", "arrayrecord", "hf", "tokens"),
        ),
        Condition(fields=("field",), other="kind", values=("jsonl", "parquet", "arrayrecord", "hf")),
        Condition(fields=("encoding",), other="kind", values=("text", "code", "jsonl")),
        Condition(fields=("include", "exclude", "max_line_characters"), other="kind", values=("code",)),
        Condition(fields=("config_name", "split", "revision", "streaming"), other="kind", values=("hf",)),
    )

    large = frozenset({"max_bytes"})

    kind: Literal[
        "python", "text", "code", "jsonl", "parquet", "arrayrecord", "hf", "tokens", "synthetic"
    ] = "python"
    """`python`: the documentation and standard library installed with the interpreter; `text`: one
    document per file; `code`: one per file of a tree of source code; `jsonl`, `parquet`, `arrayrecord`:
    one per record; `hf`: one per row of a dataset of Hugging Face; `tokens`: a memory-mapped token file;
    `synthetic`: documents made from the seed, for tests and benchmarks."""
    path: str | None = None
    """File, folder or glob pattern; for `hf` the name of a dataset on the Hub, or a folder; not for `python`
    and `synthetic`."""
    field: str | None = "text"
    """`jsonl`, `parquet`, `arrayrecord`, `hf`: the field or column that holds the text, or the path to it
    inside others, as `meta.text` or `messages.0.content`; null, not for `parquet`: the whole record, which of
    `arrayrecord` may be a text, and of the others is for objectives that read records."""
    task: str | None = None
    """`objective.kind=multi_task`: the name of the task that its records are of."""
    weight: Weight = 1.0
    """Share of training rows drawn from this source, relative to the others'. A list of points [row, weight]
    changes it in the course of training, rows counted over the whole run (step x batch_size): at each row
    that a point of some source names the weights are made shares, between them every share goes in a
    straight line, before the first and after the last it stays."""
    max_bytes: PositiveInt | None = None
    """Read documents, in order, until this many bytes of text; null: all."""
    encoding: str = "utf-8"
    """`text`, `jsonl`: character encoding on disk; undecodable bytes are an error that names the file.
    `code`: files that are not in it are left out."""
    min_characters: PositiveInt | None = None
    """Leave out documents of fewer characters (Unicode code points); null: none."""
    max_characters: PositiveInt | None = None
    """Leave out documents of more characters; null: none."""
    include: tuple[str, ...] = Field(default=(), strict=False)
    """`code`: patterns of names, as `*.py`, or of paths from the root, as `src/**/*.py`, of the files to be
    read; one of a folder names all below it. Empty: all."""
    exclude: tuple[str, ...] | None = Field(default=None, strict=False)
    """`code`: patterns of what is not read, in the same way. Null: what lies in a tree without having been
    written there: node_modules, site-packages, __pycache__, venv, vendor, third_party, target, dist,
    `*.min.js`, `*.min.css`, `*.map`, `*.lock`, package-lock.json, pnpm-lock.yaml and go.sum."""
    max_line_characters: PositiveInt | None = 1000
    """`code`: leave out files with a longer line, which were hardly written by hand; null: none."""
    config_name: str | None = None
    """`hf`: which configuration of the dataset."""
    split: str = "train"
    """`hf`: which split, as `train`; where it is not streamed also a part of one, as `train[:10%]`."""
    revision: str | None = None
    """`hf`: branch, tag or commit on the Hub; a whole commit is looked up without asking the Hub."""
    streaming: bool = False
    """`hf`: read it as it is downloaded, and keep its tokens alone; false: keep a copy of the dataset in the
    cache of Hugging Face too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind not in ("python", "synthetic") and self.path is None:
            raise ValueError(f"a source of kind {self.kind} needs a path")
        if self.field is None and self.kind not in RECORDS:
            raise ValueError(f"a source of kind {self.kind} needs a field; null is for {', '.join(RECORDS)}")
        if (self.min_characters or 0) > (self.max_characters or self.min_characters or 0):
            raise ValueError(
                f"min_characters={self.min_characters} is more than max_characters={self.max_characters};"
                " lower it"
            )
        for name in ("include", "exclude"):
            if not all(pattern.strip("/") for pattern in getattr(self, name) or ()):
                raise ValueError(f"{name} has an empty pattern; remove it")
        return self

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """The points of a weight that changes; none of one that does not."""
        return self.weight if isinstance(self.weight, tuple) else ()


class DataConfig(Section):
    """Sources, tokenizer and packing."""

    conditions = (Condition(fields=("near_duplicate_similarity",), other="deduplicate", values=("near",)),)

    sources: tuple[SourceConfig, ...] = Field(default=(SourceConfig(),), strict=False)
    """What is read; several are mixed by weight, row by row."""
    temperature: PositiveFloat | None = None
    """Weights of sources are multiplied by their rows to the power of 1 over it: 1 draws rows as they come,
    more evens sources out (T5, arXiv 1910.10683, section 3.5.2). Null: weights are shares as they stand."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a Hugging Face tokenizer.json (`stack data tokenizer` trains one)."""
    sequence_length: PositiveInt = 1024
    """Tokens per row; documents are packed into rows, attention stays inside a document."""
    packed: bool = True
    """False: one document per row, the rest of the row is padding."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Documents of which but one is kept, over all sources: `exact`: those of equal text; `near`: also those
    of nearly equal text (MinHash, arXiv 2107.06499). A held-out one is kept before one to train on, then the
    first."""
    near_duplicate_similarity: float = Field(default=0.8, ge=0.1, le=1.0)
    """`deduplicate: near`: share in common of all runs of five words of two texts (Jaccard), as estimated
    from 128 hashes, from which they are nearly equal."""
    heldout_fraction: float = Field(default=0.01, ge=0.0, lt=1.0)
    """Share of documents, chosen by the hash of their text, that are never trained on; where so few are
    there that none is chosen, as of one large file, that share of the text, at its end."""
    shuffle: bool = True
    """A new permutation of all rows each epoch, from the seed; false reads in order."""
    cache_dir: str = "~/.cache/stack/data"
    """Where tokenized and packed corpora are kept, keyed by content and tokenizer."""
    workers: PositiveInt | None = None
    """Threads that tokenize; null: one per CPU core."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sources:
            raise ValueError("sources is empty; give at least one source")
        if self.temperature is not None and len(self.sources) < 2:
            raise ValueError(
                f"temperature={self.temperature:g} evens out several sources, and there is one; remove it"
            )
        rows = sorted({row for source in self.sources for row, _ in source.points}) or [0]
        for row in rows:
            if sum(weight_at(source.weight, row) for source in self.sources) <= 0:
                where = f" at row {row}" if len(rows) > 1 else ""
                raise ValueError(f"every source has weight 0{where}; give one of them a positive weight")
        return self

    @property
    def read_sources(self) -> tuple[SourceConfig, ...]:
        """The sources that have a weight at some time; no other is read."""
        return tuple(
            source
            for source in self.sources
            if any(weight for _, weight in source.points or [(0, source.weight)])
        )
