"""Files of token ids made elsewhere, read through a memory map.

`name.bin`: nothing but ids, little endian, with `name.json` beside it that says `{"dtype": "uint16"}` or
`uint32`. `name.npy`: a one-dimensional integer array of NumPy. In both the tokenizer's end-of-document
id closes every document; a begin-of-document id before it is allowed.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data.sources import source_files
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


def open_token_file(path: Path) -> np.ndarray:
    """The ids of a .bin or .npy file [tokens], memory-mapped.

    Raises:
        StackError: a missing or wrong sidecar, a truncated file, an array that is not one of ids.
    """
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
            f'{path}: no {sidecar.name} beside it; write one that says {{"dtype": "uint16"}} or uint32'
        )
    try:
        name = json.loads(sidecar.read_text("utf-8"))["dtype"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StackError(f'{sidecar}: gives no dtype; write {{"dtype": "uint16"}} or uint32') from error
    if name not in ("uint16", "uint32"):
        raise StackError(f"{sidecar}: dtype {name!r} is not uint16 or uint32")
    return np.dtype(name).newbyteorder("<")


def _documents(path: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    tokens = open_token_file(path)
    start = 0
    for offset in range(0, len(tokens), _BLOCK):
        block = tokens[offset : offset + _BLOCK]
        wrong = np.flatnonzero((block < 0) | (block >= tokenizer.vocab_size))
        if len(wrong):
            raise StackError(
                f"{path}: token {offset + wrong[0]} is {block[wrong[0]]}, the tokenizer has"
                f" {tokenizer.vocab_size} words; set data.tokenizer to the one the file was made with"
            )
        for end in (offset + np.flatnonzero(block == tokenizer.eos)).tolist():
            yield from _content(tokens[start:end], tokenizer.bos)
            start = end + 1
    yield from _content(tokens[start:], tokenizer.bos)


def _content(document: np.ndarray, bos: int) -> Iterator[np.ndarray]:
    content = document[1:] if len(document) and document[0] == bos else document
    if len(content):
        yield np.asarray(content)
