"""What the model reads."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from stack.config.condition import Condition
from stack.config.section import Section


class SourceConfig(Section):
    """One stream of documents."""

    conditions = (
        Condition(fields=("path",), other="kind", values=("text", "jsonl", "parquet", "tokens")),
        Condition(fields=("field",), other="kind", values=("jsonl", "parquet")),
        Condition(fields=("encoding",), other="kind", values=("text", "jsonl")),
    )

    large = frozenset({"max_bytes"})

    kind: Literal["python", "text", "jsonl", "parquet", "tokens", "synthetic"] = "python"
    """`python`: the documentation and standard library installed with the interpreter; `text`: one
    document per file; `jsonl`, `parquet`: one per record; `tokens`: a memory-mapped token file;
    `synthetic`: documents made from the seed, for tests and benchmarks."""
    path: str | None = None
    """File, folder or glob pattern; not for `python` and `synthetic`."""
    field: str = "text"
    """`jsonl`, `parquet`: the field or column that holds the text."""
    weight: NonNegativeFloat = 1.0
    """Share of training rows drawn from this source, relative to the others'."""
    max_bytes: PositiveInt | None = None
    """Read documents, in order, until this many bytes of text; null: all."""
    encoding: str = "utf-8"
    """`text`, `jsonl`: character encoding on disk; undecodable bytes are an error that names the file."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind not in ("python", "synthetic") and self.path is None:
            raise ValueError(f"a source of kind {self.kind} needs a path")
        return self


class DataConfig(Section):
    """Sources, tokenizer and packing."""

    sources: tuple[SourceConfig, ...] = Field(default=(SourceConfig(),), strict=False)
    """What is read; several are mixed by weight, row by row."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a Hugging Face tokenizer.json (`stack data tokenizer` trains one)."""
    sequence_length: PositiveInt = 1024
    """Tokens per row; documents are packed into rows, attention stays inside a document."""
    packed: bool = True
    """False: one document per row, the rest of the row is padding."""
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
        if sum(source.weight for source in self.sources) <= 0:
            raise ValueError("every source has weight 0; give one of them a positive weight")
        return self
