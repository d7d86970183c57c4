"""From the config to rows that can be asked for by number, and the fingerprint of what they are."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Int32, Integer

from stack.config import Config, SourceConfig, Weight
from stack.config.errors import ConfigError
from stack.data import mixture, packing
from stack.data.atomic import cache_folder
from stack.data.cache import open_corpus
from stack.data.duplicates import Unique, unique_documents
from stack.data.examples import PLAIN, Examples
from stack.data.fields import Field
from stack.data.files import describe_names, list_files
from stack.data.packing import FIELDS, PackedRows, heldout_documents, pack_corpus
from stack.data.parallel import Threads, Workers
from stack.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

UNKNOWN = 1e-3
"""A larger share of unknown tokens than this makes a loss per byte another one's."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The train or the held-out side of all sources; their rows are numbered one source after another."""

    parts: tuple[PackedRows, ...]
    weights: tuple[Weight, ...]
    """Share of each part's rows in training."""
    tokenizer: Tokenizer
    examples: Examples = PLAIN
    """What the rows are packed for."""
    is_lossless: bool = True
    """Whether text comes back from its tokens, so that a loss per byte is one of the text."""

    @property
    def sequence_length(self) -> int:
        """Tokens in a row."""
        return self.parts[0].sequence_length

    @property
    def num_rows(self) -> int:
        """Rows of `sequence_length`."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return sum(len(part.documents) for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted: all but the first of every document."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text: summed loss over this is the loss per byte."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token; the rest is padding."""
        return self.num_tokens / max(1, self.num_rows * self.sequence_length)

    def read(
        self, rows: Integer[np.ndarray, " rows"], fields: Sequence[Field]
    ) -> dict[str, Integer[np.ndarray, "rows length"]]:
        """The fields that have a length, of rows by number [rows]: each [rows, length].

        A row number of -1 gives a row of padding. See `PackedRows.read`.

        Raises:
            ValueError: the data has no such field.
        """
        shape = (len(rows), self.sequence_length)
        padding = {field.name: field.padding for field in fields if "length" in field.axes}
        if unknown := padding.keys() - FIELDS:
            raise ValueError(
                f"the data has no field {', '.join(sorted(unknown))}; it has {', '.join(FIELDS)}"
            )
        batch = {
            field.name: np.full(shape, field.padding, field.dtype)
            for field in fields
            if field.name in padding
        }
        start = 0
        for part in self.parts:
            here = np.flatnonzero((rows >= start) & (rows < start + part.num_rows))
            if len(here):
                values = part.read(rows[here] - start, padding)
                for name in padding:
                    batch[name][here] = values[name]
            start += part.num_rows
        return batch

    def pieces(self, row: int) -> list[Int32[np.ndarray, " stored"]]:
        """The pieces of a row by number, none of -1; see `PackedRows.pieces`."""
        for part in self.parts:
            if 0 <= row < part.num_rows:
                return part.pieces(row)
            row -= part.num_rows
        return []

    def piece_numbers(self, row: int) -> range:
        """The numbers of a row's pieces, those of one part after those of another; none of -1."""
        before = 0
        for part in self.parts:
            if 0 <= row < part.num_rows:
                first, last = (int(place) for place in part.row_offsets[row : row + 2])
                return range(before + first, before + last)
            row, before = row - part.num_rows, before + len(part.piece_length)
        return range(0)

    def marks(self, row: int) -> list[Int32[np.ndarray, " stored"]]:
        """What the encoder said of the tokens of each piece; see `PackedRows.marks`."""
        for part in self.parts:
            if 0 <= row < part.num_rows:
                return part.marks(row)
            row -= part.num_rows
        return []

    def texts(self) -> Iterator[bytes]:
        """The UTF-8 text of every document, in order."""
        for part in self.parts:
            for document in part.token_documents():
                yield self.tokenizer.decode(document).encode()


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads."""

    tokenizer: Tokenizer
    train: Dataset
    heldout: Dataset
    fingerprint: dict[str, str]
    """Hashes of tokenizer, corpus and packing, and the versions of how rows are made and ordered: equal
    fingerprints give equal batches from one seed."""
    notes: tuple[str, ...] = ()
    """What a person should know of it, a line each."""


def open_data(
    config: Config,
    *,
    tokenizer: Tokenizer | None = None,
    examples: Callable[[Tokenizer], Examples] | None = None,
    workers: Workers | None = None,
    show_progress: bool = True,
) -> Data:
    """Tokenize and pack what `config.data` names, unless the cache holds it, and open it.

    Safe to call in all processes of a run at once: those that share a cache wait for the first.

    Args:
        config: of the run.
        tokenizer: by default the one it names.
        examples: what the objective makes of rows, with a tokenizer; by default every token is predicted.
        workers: tokenize; by default `data.workers` threads.
        show_progress: draw a bar on standard error.

    Raises:
        ConfigError: a tokenizer larger than the model's vocabulary, less training text than one batch.
        StackError: what sources, tokenizer and cache raise; no held-out text although evaluation asks
            for it.
    """
    data = config.data
    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    check_vocabulary(tokenizer, config.model.vocab_size)
    made = examples(tokenizer) if examples else PLAIN
    root = cache_folder(data.cache_dir)
    sources = data.read_sources
    workers = workers or (Threads(data.workers) if data.workers else Threads())
    damage: list[str] = []
    corpora = [
        open_corpus(
            source,
            tokenizer,
            root,
            seed=config.seed,
            workers=workers,
            show_progress=show_progress,
            sign=data.deduplicate == "near",
            encoder=made.encoder_of(source.task),
            warn=damage.append,
        )
        for source in sources
    ]
    weights = tuple(source.weight for source in sources)

    is_lossless = all(
        corpus.changed == 0 and corpus.unknown_tokens <= UNKNOWN * len(corpus.tokens) for corpus in corpora
    )

    def unique(by_place: bool) -> Sequence[Unique | None]:
        if data.deduplicate == "none":
            return [None] * len(corpora)

        def heldout() -> list[np.ndarray]:
            return [
                heldout_documents(corpus, data.heldout_fraction, tokenizer.decode, by_place=by_place)
                for corpus in corpora
            ]

        side = [data.heldout_fraction, by_place]
        return unique_documents(
            corpora, heldout, likeness=data.deduplicate, threshold=data.near_duplicate_similarity, side=side
        )

    def pack(*, by_place: bool) -> tuple[Dataset, Dataset]:
        sides = [
            pack_corpus(
                corpus,
                root,
                sequence_length=data.sequence_length,
                packed=data.packed,
                heldout_fraction=data.heldout_fraction,
                examples=made,
                by_place=by_place,
                decode=tokenizer.decode,
                unique=kept,
                warn=damage.append,
            )
            for corpus, kept in zip(corpora, unique(by_place), strict=True)
        ]
        side = partial(Dataset, weights=weights, tokenizer=tokenizer, examples=made, is_lossless=is_lossless)
        train, heldout = zip(*sides, strict=True)
        return side(parts=train), side(parts=heldout)

    train, heldout = pack(by_place=False)
    by_place = data.heldout_fraction > 0 and not heldout.num_rows
    if by_place:
        train, heldout = pack(by_place=True)
        if not heldout.num_rows:
            raise ConfigError(
                f"data.heldout_fraction={data.heldout_fraction} holds no record out, as there is but one; add"
                " records, or set it to 0"
            )
    _check_size(config, train)
    if data.temperature is not None:
        weights = tuple(
            mixture.times(weight, part.num_rows ** (1 / data.temperature))
            for weight, part in zip(weights, train.parts, strict=True)
        )
        train, heldout = (dataclasses.replace(each, weights=weights) for each in (train, heldout))
    choices = [data.sequence_length, data.packed, data.heldout_fraction, data.shuffle, weights]
    choices += [made.packing] * bool(made.packing)
    if data.deduplicate != "none":
        choices += [data.deduplicate, data.near_duplicate_similarity]
    return Data(
        tokenizer=tokenizer,
        train=train,
        heldout=heldout,
        fingerprint={
            "tokenizer": digest(tokenizer.fingerprint),
            "corpus": digest([corpus.fingerprint for corpus in corpora]),
            "packing": digest(choices),
            "rows": str(packing.VERSION),
            "order": mixture.version(weights),
            **({"records": digest(made.encoder.key)} if made.encoder else {}),
        },
        notes=(*damage, *_notes(config, sources, train.parts, by_place=by_place)),
    )


def _notes(
    config: Config, sources: Sequence[SourceConfig], parts: Sequence[PackedRows], *, by_place: bool
) -> Iterator[str]:
    """What is not read as one might think, a line each."""
    tokenizer = config.data.tokenizer
    for source, part in zip(sources, parts, strict=True):
        corpus, name = part.corpus, source.path or source.kind
        if others := list_files(source).passed_over:
            yield f"data.sources: {name}: {len(others):,} files are not read: {describe_names(others)}"
        if corpus.left_out and source.kind != "python":
            what = "documents without text" if corpus.marks is None else "records over data.sequence_length"
            if source.kind == "code":
                what = "files that are empty, binary or have too long a line"
            yield f"data.sources: {name}: {corpus.left_out:,} {what} are left out"
        if corpus.outside:
            bounds = [
                f"{field}={value}"
                for field, value in (
                    ("min_characters", source.min_characters),
                    ("max_characters", source.max_characters),
                )
                if value
            ]
            yield f"data.sources: {name}: {corpus.outside:,} documents are left out by {' and '.join(bounds)}"
        if part.duplicates:
            nearly = "equal or nearly equal" if config.data.deduplicate == "near" else "equal"
            yield f"data.deduplicate: {name}: {part.duplicates:,} documents {nearly} to others are left out"
        if corpus.unknown_tokens:
            share = corpus.unknown_tokens / len(corpus.tokens)
            hidden = "; no nats per byte are told, as they would flatter" if share > UNKNOWN else ""
            yield f"data.tokenizer: {tokenizer} does not know {share:.2g} of the tokens of {name}{hidden}"
        if corpus.changed:
            yield (
                f"data.tokenizer: {tokenizer} changes the text of {name} (case, spaces or characters do not"
                " come back from its tokens); no nats per byte are told, as they would flatter"
            )
    if by_place:
        last = f"the last {config.data.heldout_fraction:.3g} of the text is"
        if any(part.corpus.marks is not None for part in parts):
            last = "the last records are"
        yield f"data.heldout_fraction: as no document falls to the held-out side, {last} held out"


def _check_size(config: Config, train: Dataset) -> None:
    batch_size = config.train.batch_size
    if train.num_rows < batch_size:
        raise ConfigError(
            f"the training text fills {train.num_rows} rows of"
            f" data.sequence_length={config.data.sequence_length}, less than one batch of"
            f" train.batch_size={batch_size};"
            " add text, or lower train.batch_size or data.sequence_length"
        )
    for part, source in zip(train.parts, config.data.read_sources, strict=True):
        if not part.num_rows:
            raise ConfigError(
                f"data.sources: every document of {source.path or source.kind} is held out"
                f"{'' if config.data.deduplicate == 'none' else ' or like others'};"
                " lower data.heldout_fraction or add documents"
            )


def digest(value: object) -> str:
    """The hash of a plain value, as in `Data.fingerprint`."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
