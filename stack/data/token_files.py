"""Files of token ids made elsewhere, read through a memory map.

`name.bin`: nothing but ids, little endian, with `name.json` beside it that says `{"dtype": "uint16"}` or
`uint32`, or with Megatron's `name.idx` (see `stack.data.megatron`). `name.npy`: a one-dimensional integer
array of NumPy. In all of them the tokenizer's end-of-document id closes a document; one of begin-of-document
before it is allowed. The documents of an index end where it says too, with or without that id.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data.files import source_files
from stack.data.megatron import open_megatron
from stack.data.tokenizer import Tokenizer

_BLOCK = 1 << 22  # tokens looked at in one go


def read_token_documents(source: SourceConfig, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of each document of a `tokens` source, without bos and eos, empty ones left out.

    `max_bytes` counts the UTF-8 bytes of the decoded text, as for every source.

    Raises:
        StackError: a file that is not as described above, or an id the tokenizer does not have.
    """
    total = 0
    for path in source_files(source):
        for document in _documents(path, tokenizer):
            yield document
            if source.max_bytes is not None:
                total += len(tokenizer.decode(document).encode())
                if total >= source.max_bytes:
                    return


def partners(path: Path) -> list[Path]:
    """The files that say how a file of tokens is read."""
    beside = (path.with_suffix(suffix) for suffix in (".json", ".idx"))
    return [file for file in beside if path.suffix == ".bin" and file.is_file()]


def open_token_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a .bin or .npy file [tokens], memory-mapped, and the places [ends] where documents end.

    Those are all that an index names; otherwise the end of the file alone.

    Raises:
        StackError: a missing or wrong file beside it, a truncated one, an array that is not one of ids.
    """
    match [file.suffix for file in partners(path)]:
        case [".json", ".idx"]:
            raise StackError(
                f"{path}: both {path.stem}.json and {path.stem}.idx lie beside it; remove the one it was not"
                " written with"
            )
        case [".idx"]:
            return open_megatron(path)
    if path.suffix == ".idx":
        raise StackError(f"{path}: an index; give the .bin beside it")
    tokens = _open_plain(path)
    return tokens, np.array([len(tokens)])


def _open_plain(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise StackError(f"{path}: not a whole .npy file ({error}); write it again") from error
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise StackError(
                f"{path}: holds {tokens.dtype} of shape {tokens.shape}; a token file is one row of integers"
            )
        return tokens
    dtype = _sidecar_dtype(path)
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise StackError(
            f"{path}: {size} bytes are no whole number of {dtype}; it is truncated, or dtype is wrong"
        )
    return np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)


def _sidecar_dtype(path: Path) -> np.dtype:
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        raise StackError(
            f"{path}: no {sidecar.name} beside it; write one that says"
            f' {{"dtype": "uint16"}} or uint32, or give a .bin with the .idx of Megatron'
        )
    try:
        name = json.loads(sidecar.read_text("utf-8"))["dtype"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StackError(f'{sidecar}: gives no dtype; write {{"dtype": "uint16"}} or uint32') from error
    if name not in ("uint16", "uint32"):
        raise StackError(f"{sidecar}: dtype {name!r} is not uint16 or uint32")
    return np.dtype(name).newbyteorder("<")


def _documents(path: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    tokens, edges = open_token_file(path)
    start = 0
    for offset in range(0, len(tokens), _BLOCK):
        block = tokens[offset : offset + _BLOCK]
        wrong = np.flatnonzero((block < 0) | (block >= tokenizer.vocab_size))
        if len(wrong):
            raise StackError(
                f"{path}: token {offset + wrong[0]} is {block[wrong[0]]}, the tokenizer has"
                f" {tokenizer.vocab_size} words; set data.tokenizer to the one the file was made with"
            )
        closed = offset + np.flatnonzero(block == tokenizer.eos) + 1
        here = slice(*np.searchsorted(edges, [offset, offset + len(block)], side="right"))
        for end in np.union1d(closed, edges[here]).tolist():
            yield from _content(tokens[start:end], tokenizer)
            start = end


def _content(document: np.ndarray, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    content = document[:-1] if len(document) and document[-1] == tokenizer.eos else document
    content = content[1:] if len(content) and content[0] == tokenizer.bos else content
    if len(content):
        yield np.asarray(content)
