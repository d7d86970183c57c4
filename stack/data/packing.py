"""Documents packed into rows of one length, once; training then reads rows by number.

A document of n stored tokens (bos, text, eos) holds n - 1 predictions. It is cut into pieces of at most
`sequence_length` inputs, fewer where an objective adds to them; a piece is labelled with the tokens that
follow its inputs, the last of which may be the first of the next piece, so every token after a document's
first is predicted exactly once. Attention and positions start anew with each piece.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from stack.data.cache import Array, Corpus
from stack.data.duplicates import Unique
from stack.data.entry import EntryWriter, log, open_entry
from stack.data.examples import PLAIN, Examples, Placed, longest
from stack.data.split import heldout_mask

FIELDS = ("tokens", "labels", "segments", "positions")
"""What rows hold."""

VERSION = 1
"""Of how documents become rows; raise it when that changes: old indexes are then not found, and runs that
began with the old rows are told so, and not gone on with."""


class Cut(NamedTuple):
    """The share of one side where text is held out by its place, so that one document lies on both."""

    bounds: tuple[int, int]
    """Places, in the corpus, of the side's first token and of the one after its last."""
    bytes_beyond: int
    """UTF-8 bytes, of the document that is cut, on the other side."""


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """One side, train or held-out, of one corpus, as rows of `sequence_length` tokens."""

    corpus: Corpus
    sequence_length: int
    documents: Array
    """[documents] int64: numbers, within the corpus, of the documents on this side."""
    row_offsets: Array
    """[rows + 1] int64: row i is pieces row_offsets[i]:row_offsets[i + 1]."""
    piece_start: Array
    """[pieces] int64: place of a piece's first token in the corpus."""
    piece_length: Array
    """[pieces] int32: input tokens of a piece."""
    cut: Cut | None = None
    """Where a document lies on both sides, its part on this one."""
    duplicates: int = 0
    """Documents of the corpus that are on neither side, being like others."""

    @property
    def num_rows(self) -> int:
        """Rows of `sequence_length`."""
        return len(self.row_offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted."""
        return int(self.piece_length[:].sum(dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents' text."""
        beyond = self.cut.bytes_beyond if self.cut else 0
        return int(self.corpus.num_bytes[self.documents[:]].sum()) - beyond

    def read(
        self, rows: Integer[np.ndarray, " rows"], padding: Mapping[str, int]
    ) -> dict[str, Int32[np.ndarray, "rows length"]]:
        """Rows by number [rows], each field int32 [rows, length].

        Labels are the next token of the same document; segments number the pieces of a row from 1;
        positions count from 0 in each piece.

        Args:
            rows: their numbers.
            padding: the fields that are asked for, some of `FIELDS`, and what fills up their rows.
        """
        first = self.row_offsets[rows]
        pieces_per_row = self.row_offsets[rows + 1] - first
        pieces = np.repeat(first, pieces_per_row) + _count_up(pieces_per_row)
        lengths = self.piece_length[pieces].astype(np.int64)
        positions = _count_up(lengths)
        source = np.repeat(self.piece_start[pieces], lengths) + positions
        # Where each token lands: its row, and its place after the pieces before it in that row.
        row_of_piece = np.repeat(np.arange(len(rows)), pieces_per_row)
        filled = np.bincount(row_of_piece, lengths, len(rows)).astype(np.int64)
        target = np.repeat(np.arange(len(rows)) * self.sequence_length, filled) + _count_up(filled)

        def scatter(values: np.ndarray, padding: int) -> np.ndarray:
            flat = np.full(len(rows) * self.sequence_length, padding, np.int32)
            flat[target] = values
            return flat.reshape(len(rows), self.sequence_length)

        values = {
            "tokens": lambda: self.corpus.tokens[source],
            "labels": lambda: self.corpus.tokens[source + 1],
            "segments": lambda: np.repeat(1 + _count_up(pieces_per_row), lengths),
            "positions": lambda: positions,
        }
        return {name: scatter(values[name](), fill) for name, fill in padding.items()}

    def pieces(self, row: int) -> list[Int32[np.ndarray, " stored"]]:
        """The pieces of one row by number, each with the token that follows it in its document."""
        return self._pieces(row, self.corpus.tokens)

    def marks(self, row: int) -> list[Int32[np.ndarray, " stored"]]:
        """The marks of the tokens that `pieces` gives, of a corpus of records."""
        assert self.corpus.marks is not None, "its documents are texts"
        return self._pieces(row, self.corpus.marks)

    def _pieces(self, row: int, values: Array) -> list[Int32[np.ndarray, " stored"]]:
        first, last = self.row_offsets[row], self.row_offsets[row + 1]
        starts, lengths = self.piece_start[first:last], self.piece_length[first:last]
        return [
            np.asarray(values[start : start + length + 1], np.int32)
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]

    def token_documents(self) -> Iterator[np.ndarray]:
        """The stored tokens, bos and eos included, of each document on this side."""
        low, high = self.cut.bounds if self.cut else (0, len(self.corpus.tokens))
        for number in self.documents[:].tolist():
            start, end = self.corpus.offsets[number : number + 2].tolist()
            yield self.corpus.tokens[max(start, low) : min(end, high)]


def pack_corpus(
    corpus: Corpus,
    root: Path,
    *,
    sequence_length: int,
    packed: bool,
    heldout_fraction: float,
    examples: Examples = PLAIN,
    by_place: bool = False,
    decode: Callable[[np.ndarray], str] | None = None,
    unique: Unique | None = None,
    warn: Callable[[str], None] = log,
) -> tuple[PackedRows, PackedRows]:
    """The train and the held-out rows of a corpus; the index is made once and kept under `root`.

    Args:
        corpus: the documents.
        root: the cache.
        sequence_length: tokens per row.
        packed: whether several documents share a row.
        heldout_fraction: share of documents, or of the tokens, that are held out.
        examples: tells how many places of a row a piece takes.
        by_place: hold out the end of the text, wherever documents end, instead of documents by hash.
        decode: the tokenizer's, which counts the bytes of a document that lies on both sides; `by_place`
            needs it.
        unique: the documents that are kept; by default all.
        warn: told of a damaged index, which is made again.

    Raises:
        ConfigError: rows too short for any piece.
        StackError: a cache that can not be written.
    """
    most = longest(examples.room, sequence_length)
    parts = [
        VERSION,
        "named blocks",
        corpus.key,
        sequence_length,
        packed,
        heldout_fraction,
        *["by_place"] * by_place,
        *[examples.packing] * bool(examples.packing),
        *([unique.key] if unique else []),
    ]
    key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    folder = root / f"rows-{key}"

    def write(target: EntryWriter) -> None:
        offsets = corpus.offsets[:]
        heldout = heldout_mask(corpus.hashes[:], heldout_fraction)
        chosen = {"train": ~heldout, "heldout": heldout}
        kept = unique.choose() if unique else np.ones(len(heldout), bool)
        cuts = dict.fromkeys(chosen, Cut((0, int(corpus.offsets[-1])), 0))
        if by_place:
            assert decode is not None
            cuts = _cut_at_place(corpus, heldout_fraction, decode)
        for side, cut in cuts.items():
            low, high = cut.bounds
            inside = (offsets[1:] > low + 1) & (offsets[:-1] + 1 < high)
            on_side = np.flatnonzero(inside if by_place else chosen[side])
            beyond = cut.bytes_beyond
            if beyond and not kept[on_side[-1 if side == "train" else 0]]:  # The one that is cut.
                beyond = 0
            documents = on_side[kept[on_side]]
            start = np.maximum(offsets[documents], low)
            end = np.minimum(offsets[documents + 1], high)
            start, length = _cut(start, end, most)
            room = _room(corpus, examples, start, length)
            order, row_offsets = _rows(room, sequence_length) if packed else _one_each(length)
            target.whole(f"{side}-cut", [low, high, beyond])
            target.whole(f"{side}-documents", documents)
            target.whole(f"{side}-row_offsets", row_offsets)
            target.whole(f"{side}-piece_start", start[order])
            target.whole(f"{side}-piece_length", length[order].astype(np.int32))
        target.finish(duplicates=int((~kept).sum()))

    about, arrays = open_entry(folder, write, warn=warn)

    def side(name: str) -> PackedRows:
        mine = {key.removeprefix(f"{name}-"): array for key, array in arrays.items() if key.startswith(name)}
        low, high, beyond = mine.pop("cut").tolist()
        cut = Cut((low, high), beyond) if by_place else None
        return PackedRows(
            corpus=corpus,
            sequence_length=sequence_length,
            cut=cut,
            duplicates=about.get("duplicates", 0),
            **mine,
        )

    return side("train"), side("heldout")


def _room(
    corpus: Corpus,
    examples: Examples,
    start: Int64[np.ndarray, " pieces"],
    length: Int64[np.ndarray, " pieces"],
) -> Int64[np.ndarray, " pieces"]:
    """Places of a row that each piece takes."""
    if not isinstance(examples, Placed):
        return examples.room(length)
    assert corpus.marks is not None, "its documents are texts"
    # One at a time: all marks would not fit in memory.
    pieces = zip(start.tolist(), length.tolist(), strict=True)
    marked = [np.count_nonzero(corpus.marks[first : first + number + 1]) for first, number in pieces]
    return examples.places(length, np.array(marked, np.int64))


def heldout_documents(
    corpus: Corpus, fraction: float, decode: Callable[[np.ndarray], str], *, by_place: bool
) -> Bool[np.ndarray, " documents"]:
    """Which documents of a corpus are held out, in whole or in part; see `pack_corpus`."""
    if not by_place:
        return heldout_mask(corpus.hashes[:], fraction)
    low, _ = _cut_at_place(corpus, fraction, decode)["heldout"].bounds
    return corpus.offsets[1:] > low + 1


def _cut_at_place(corpus: Corpus, fraction: float, decode: Callable[[np.ndarray], str]) -> dict[str, Cut]:
    """Both sides of the place before which all but a fraction of the tokens lie."""
    total = int(corpus.offsets[-1])
    place = min(max(int(total * (1 - fraction)), 2), total - 2)
    if corpus.marks is not None:  # A record lies on one side, the only one on that which is trained on.
        last = len(corpus.offsets) - 2
        number = min(max(int(np.searchsorted(corpus.offsets[:], place)), 1), last) if last else 1
        while number < last and corpus.hashes[number] == corpus.hashes[number - 1]:  # Parts of one record.
            number += 1
        place = int(corpus.offsets[number])
        return {"train": Cut((0, place), 0), "heldout": Cut((place, total), 0)}
    document = int(np.searchsorted(corpus.offsets[:], place, side="right")) - 1
    start, end = (int(offset) for offset in corpus.offsets[document : document + 2])
    if place <= start + 1:  # Between two documents.
        return {"train": Cut((0, start), 0), "heldout": Cut((start, total), 0)}
    # Not within a character: its last bytes alone are no text.
    while place < end - 1 and decode(corpus.tokens[place : place + 8]).startswith("\ufffd"):
        place += 1
    before = len(decode(corpus.tokens[start:place]).encode())
    # The token before the place is what the first that is held out is predicted from.
    return {
        "train": Cut((0, place), int(corpus.num_bytes[document]) - before),
        "heldout": Cut((place - 1, total), before),
    }


def best_fit(lengths: Integer[np.ndarray, " items"], capacity: int) -> Int64[np.ndarray, " items"]:
    """The bin [items] of each item when the longest go first, each into the fullest bin that takes it.

    Best-fit decreasing (arXiv 2404.10830): at most 11/9 of the fewest possible bins and 6/9 more. All
    items of one length are placed together, so the work grows with the number of distinct lengths and
    not with the items: those go through NumPy. Lengths are from 1 to `capacity`.
    """
    bins = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    free: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # bins by the space left in them
    spaces = np.zeros(capacity + 1, bool)  # which of these lists hold any
    opened = placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        items = by_length[placed : placed + counts[length]]
        placed += len(items)
        while len(items):
            tightest = length + int(spaces[length:].argmax())
            if spaces[tightest]:
                open_bins = free[tightest].pop()
            else:
                tightest = capacity
                open_bins = np.arange(opened, opened + -(-len(items) // (capacity // length)))
                opened += len(open_bins)
            # Best fit fills one bin with this length until it takes no more, then turns to the next.
            each = tightest // length
            used = min(len(open_bins), -(-len(items) // each))
            taken = min(len(items), used * each)
            bins[items[:taken]] = np.repeat(open_bins[:used], each)[:taken]
            items = items[taken:]
            last = taken - (used - 1) * each  # items in the last bin used
            left = (
                (tightest, open_bins[used:]),
                (tightest - each * length, open_bins[: used - 1]),
                (tightest - last * length, open_bins[used - 1 : used]),
            )
            for space, some in left:
                if len(some):
                    free[space].append(some)
                spaces[space] = bool(free[space])
    return bins


def _cut(start: np.ndarray, end: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of every piece of documents at these places, in the order of the text."""
    predictions = end - start - 1
    pieces = -(-predictions // sequence_length)
    within = _count_up(pieces) * sequence_length
    length = np.minimum(np.repeat(predictions, pieces) - within, sequence_length)
    return np.repeat(start, pieces) + within, length


def _rows(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The pieces in the order of the rows, and where each row starts among them.

    Rows, and pieces in a row, are ordered by where they come from in the text.
    """
    bins = best_fit(lengths, sequence_length)
    num_rows = int(bins.max(initial=-1)) + 1
    first_piece = np.full(num_rows, len(bins))
    np.minimum.at(first_piece, bins, np.arange(len(bins)))
    row_of_bin = np.empty(num_rows, np.int64)
    row_of_bin[np.argsort(first_piece)] = np.arange(num_rows)
    rows = row_of_bin[bins]
    return np.argsort(rows, kind="stable"), np.cumsum([0, *np.bincount(rows, minlength=num_rows)])


def _one_each(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(lengths)), np.arange(len(lengths) + 1)


def _count_up(counts: np.ndarray) -> np.ndarray:
    """0 .. n - 1 for each count n, one after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
