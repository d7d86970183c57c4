"""Text to token ids and back: bytes, any Hugging Face tokenizer.json, and a byte-level BPE of one's own."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from stack.config import DataConfig
from stack.config.errors import ConfigError, StackError
from stack.config.paths import check_writable, expand
from stack.data.sources import read_documents
from stack.data.split import is_heldout
from stack.storage import durable

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
"""Of Hugging Face's `tokenizers`."""
TEMPLATE = "chat_template.jinja"
"""Where transformers keeps a chat template that stands by itself."""
MOST_WORDS = 10_000_000
"""Of a tokenizer that is trained here."""
END_OF_DOCUMENT = "<|endoftext|>"
"""The special token of tokenizers trained here; it ends a document and starts the next."""

BYTE_MARKS = (
    "[MASK]",
    "<fim_prefix>",
    "<fim_suffix>",
    "<fim_middle>",
    *(f"<extra_id_{number}>" for number in range(100)),
)
"""Special words of the tokenizer `bytes` that no text has, from 257 on."""
_MARK = re.compile(f"({'|'.join(map(re.escape, BYTE_MARKS))})")
_INSIDE = "##"
"""Before a piece of WordPiece that does not begin a word."""
_SPACES = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\n", "\u0109": "\t"})
"""How byte-level BPE and Unigram write white space."""

# Names in use, for a tokenizer.json without a tokenizer_config.json beside it.
_EOS_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "[CLS]")


@runtime_checkable
class Tokenizer(Protocol):
    """What the stack asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def bos(self) -> int:
        """Id that starts every document; may be the same as `eos`."""
        ...

    @property
    def eos(self) -> int:
        """Id that ends every document."""
        ...

    @property
    def unknown(self) -> int:
        """Id that stands for every word it does not know; -1: it knows all text."""
        ...

    @property
    def spellings(self) -> Sequence[str | None]:
        """The text of each word by id, with the space it begins with; None for special words."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever any text could be tokenized differently."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that lays out a conversation; None: it has none."""
        ...

    def encode_batch(self, texts: Sequence[str], *, marks: bool = False) -> list[np.ndarray]:
        """Ids of each text, without bos and eos.

        Text can not forge a special token, unless `marks` says that it may name them.
        """
        ...

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, Integer[np.ndarray, "tokens 2"]]:
        """Ids of a text, without bos and eos, and the characters of it that each is of: first, and last + 1.

        Of a character in several tokens, each is of all of it.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes what `load_tokenizer` reads back as its equal, if it needs a file."""
        ...

    def token(self, text: str) -> int | None:
        """The id of one token as the vocabulary writes it, None if there is none."""
        ...

    def words(self) -> dict[int, str]:
        """Every token by its id, as the vocabulary writes it; bytes as a byte-level BPE does (GPT-2)."""
        ...

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " ids"], *, marks: bool = False) -> str:
        """The text of ids; special tokens leave nothing, or their names, broken UTF-8 leaves U+FFFD."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """Every UTF-8 byte is a token; 256 ends a document and starts the next.

    Words from 257 on are there for objectives that need them, and for a model that has rows for them: none
    is part of any text.
    """

    vocab_size: int = 257
    bos: int = 256
    eos: int = 256
    unknown: int = -1
    fingerprint: str = "bytes"
    chat_template: None = None

    @property
    def spellings(self) -> Sequence[str | None]:
        """Each byte as a letter of Latin-1."""
        return [*map(chr, range(256)), None]

    def encode_batch(self, texts: Sequence[str], *, marks: bool = False) -> list[np.ndarray]:
        """The bytes of each text, uint8; with `marks`, and `BYTE_MARKS` in it, int32."""
        if not marks:
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        # What splits the text is every second part.
        parts = [enumerate(_MARK.split(text)) for text in texts]
        ids = [[[self.token(part)] if i % 2 else list(part.encode()) for i, part in some] for some in parts]
        return [np.array(list(itertools.chain(*some)), np.int32) for some in ids]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, Integer[np.ndarray, "tokens 2"]]:
        """Each byte is of its character."""
        of = np.repeat(np.arange(len(text)), [len(letter.encode()) for letter in text])
        return np.frombuffer(text.encode(), np.uint8), np.stack([of, of + 1], axis=1)

    def save(self, folder: Path) -> None:
        """Bytes need no file."""

    def token(self, text: str) -> int | None:
        """The id of one byte, or of one of `BYTE_MARKS`."""
        if text in BYTE_MARKS:
            return self.vocab_size + BYTE_MARKS.index(text)
        encoded = text.encode()
        return encoded[0] if len(encoded) == 1 else None

    def words(self) -> dict[int, str]:
        """A letter for every byte, the end of document, and `BYTE_MARKS`."""
        # Those that print are their own.
        prints = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in prints]
        letters = {byte: chr(byte) for byte in prints}
        letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
        return letters | {self.eos: END_OF_DOCUMENT} | dict(enumerate(BYTE_MARKS, self.vocab_size))

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " ids"], *, marks: bool = False) -> str:
        """The text of ids; see `Tokenizer`."""
        values = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        names = dict(enumerate((END_OF_DOCUMENT, *BYTE_MARKS), self.eos)) if marks else {}
        text = b"".join(bytes([i]) if i < 256 else names.get(i, "").encode() for i in values.tolist())
        return text.decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer:
    """A tokenizer.json, run by the `tokenizers` library."""

    model: "tokenizers.Tokenizer"
    vocab_size: int
    bos: int
    eos: int
    unknown: int
    fingerprint: str
    chat_template: str | None = None

    @cached_property
    def spellings(self) -> Sequence[str | None]:
        """Of WordPiece, byte-level BPE and Unigram, as each marks the beginning of a word."""
        special = {i for i, token in self.model.get_added_tokens_decoder().items() if token.special}
        names = [self.model.id_to_token(i) for i in range(self.vocab_size)]
        inside = any(name is not None and name.startswith(_INSIDE) for name in names)

        def spelling(number: int, name: str | None) -> str | None:
            if name is None or number in special:
                return None
            if inside:
                return name.removeprefix(_INSIDE) if name.startswith(_INSIDE) else f" {name}"
            return name.translate(_SPACES)

        return [spelling(*item) for item in enumerate(names)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickles it; the library leaves out how special tokens in a text are taken."""
        self.__dict__.update(state)
        _take_all_as_text(self.model)

    def encode_batch(self, texts: Sequence[str], *, marks: bool = False) -> list[np.ndarray]:
        """The ids of each text, uint32; releases the interpreter lock, so threads run side by side."""
        model = self.with_marks() if marks else self.model
        # One text a call: a longer batch is spread over every core, whatever data.workers says, and
        # the plain `encode` keeps the lock.
        encodings = (model.encode_batch_fast([text], add_special_tokens=False)[0] for text in texts)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, Integer[np.ndarray, "tokens 2"]]:
        """As the library has them, which some tokenizers let begin with the space before a word."""
        encoding = self.model.encode_batch([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, np.uint32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def with_marks(self) -> "tokenizers.Tokenizer":
        """The library's model that takes special words in a text for those words.

        A copy: threads share `model`.
        """
        model = type(self.model).from_str(self.model.to_str())
        _take_all_as_text(model, marks=True)
        return model

    def save(self, folder: Path) -> None:
        """Writes a tokenizer.json, the tokenizer_config.json that names its marks, and the chat template."""
        words = {"bos_token": self.bos, "eos_token": self.eos}
        marks = {mark: self.model.id_to_token(number) for mark, number in words.items()}
        durable.make_folder(folder)
        durable.write_text(folder / "tokenizer_config.json", json.dumps(marks, indent=2) + "\n")
        if self.chat_template is not None:
            durable.write_text(folder / TEMPLATE, self.chat_template)
        durable.write_text(folder / FILE, self.model.to_str(pretty=True))

    def token(self, text: str) -> int | None:
        """The id of one token as the vocabulary writes it, None if there is none."""
        return self.model.token_to_id(text)

    def words(self) -> dict[int, str]:
        """Every token by its id."""
        return {number: word for word, number in self.model.get_vocab(with_added_tokens=True).items()}

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " ids"], *, marks: bool = False) -> str:
        """The text of ids; see `Tokenizer`. Ids of a padded vocabulary's unused words are passed over."""
        return self.model.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=not marks)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer `data.tokenizer` names: `bytes` or the path of a tokenizer.json.

    Begin and end of document are those of the tokenizer_config.json beside it if there is one, else
    the special token with one of the names in use; without a begin the end serves as both.

    Raises:
        StackError: no such file, not a tokenizer.json, or no token that ends a document.
    """
    if spec == "bytes":
        return ByteTokenizer()
    import tokenizers

    path = expand(spec)
    if not path.is_file():
        raise StackError(f"data.tokenizer: {path} does not exist; give bytes or the path of a tokenizer.json")
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise StackError(f"data.tokenizer: {path} is not a Hugging Face tokenizer.json: {error}") from error
    _take_all_as_text(model)
    bos, eos = document_marks(model, path)
    content = f"{model.to_str()} {bos} {eos}".encode()
    return HuggingFaceTokenizer(
        model=model,
        vocab_size=max(model.get_vocab(with_added_tokens=True).values()) + 1,
        bos=bos,
        eos=eos,
        unknown=_unknown(model),
        fingerprint=hashlib.blake2b(content, digest_size=16).hexdigest(),
        chat_template=_chat_template(path),
    )


def _take_all_as_text(model: "tokenizers.Tokenizer", *, marks: bool = False) -> None:
    """What no tokenizer.json says: no text is cut or filled up, "<|endoftext|>" written in one is text.

    With `marks` it is the special word.
    """
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = not marks


def _unknown(model: "tokenizers.Tokenizer") -> int:
    """Id of what stands for unknown words, -1 if there is none."""
    settings = json.loads(model.to_str())["model"]
    word, number = settings.get("unk_token"), settings.get("unk_id")
    if word is not None:
        number = model.token_to_id(word)
    return -1 if number is None else number


def continuation(
    tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], *, marks: bool = False
) -> str:
    """The text of new tokens after those of a prompt, with the names of special words if `marks` says so.

    Decoded together, as some tokenizers drop a space at the start of what they decode.
    """
    before = tokenizer.decode(prompt, marks=marks)
    whole = tokenizer.decode([*prompt, *new], marks=marks)
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(new, marks=marks)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ConfigError if the tokenizer has words the model has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} words;"
            f" set model.vocab_size={tokenizer.vocab_size}"
        )


def train_bpe(data: DataConfig, vocab_size: int, path: str | Path, *, seed: int = 0) -> Tokenizer:
    """Train a byte-level BPE (arXiv 1508.07909, GPT-2 section 2.2) on the training text; write it to path.

    The vocabulary is the 256 bytes, `<|endoftext|>` and the merges found; held-out documents are not
    read, `seed` makes the text of synthetic sources. Text that is too short gives fewer words than
    asked for: look at `vocab_size` of the result.

    Raises:
        ConfigError: `vocab_size` below 257, or no source of text.
        StackError: what the sources raise, or a path that can not be written.
    """
    if vocab_size < 257:
        raise ConfigError(f"vocab_size={vocab_size} has no room for the 256 bytes and the end of document")
    if vocab_size > MOST_WORDS:
        raise ConfigError(f"vocab_size={vocab_size} is more than {MOST_WORDS:,}; ask for fewer words")
    target = expand(path)
    check_writable(target)
    texts = [source for source in data.sources if source.kind != "tokens"]
    if not texts:
        raise ConfigError("data.sources holds token files only; a tokenizer is trained on text")
    if any(source.field is None and source.kind != "arrayrecord" for source in texts):
        raise ConfigError(
            "data.sources: field=null is a whole record; a tokenizer is trained on text: name its field"
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    # The libraries' classes fill these properties although their types do not say so.
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyrefly: ignore
    model.decoder = decoders.ByteLevel()  # pyrefly: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )

    def documents() -> Iterator[str]:
        for source in texts:
            for text in read_documents(source, seed=seed):
                if not is_heldout(text.encode(), data.heldout_fraction):
                    yield text

    model.train_from_iterator(documents(), trainer)
    write_file(target, model.to_str(pretty=True))
    return load_tokenizer(str(path))


def write_file(path: Path, text: str) -> None:
    """Writes a file of a tokenizer, and the folder it is in.

    Raises:
        StackError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, text)
    except OSError as error:
        raise StackError(f"{path}: cannot be written: {error.strerror}; give another path") from error


def document_marks(model: "tokenizers.Tokenizer", path: Path) -> tuple[int, int]:
    """Ids of begin and end of document, of a tokenizer that lies at a path."""
    special = {token.content: i for i, token in model.get_added_tokens_decoder().items() if token.special}
    named = named_marks(path.with_name("tokenizer_config.json"))
    ids = {}
    for mark, usual in (("bos_token", _BOS_NAMES), ("eos_token", _EOS_NAMES)):
        names = (named[mark],) if mark in named else usual
        ids[mark] = next((special[name] for name in names if name in special), None)
    if ids["eos_token"] is None:
        present = ", ".join(special) or "none"
        raise StackError(
            f"data.tokenizer: {path} has no known end-of-document token (special tokens: {present});"
            " put a tokenizer_config.json with eos_token beside it"
        )
    bos = ids["bos_token"]
    return ids["eos_token"] if bos is None else bos, ids["eos_token"]


def _chat_template(path: Path) -> str | None:
    """Of a tokenizer that lies at a path: a file of its own, or in its tokenizer_config.json."""
    try:
        return path.with_name(TEMPLATE).read_text("utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise StackError(f"{path.with_name(TEMPLATE)}: cannot be read: {error}; mend or remove it") from error
    template = _settings(path.with_name("tokenizer_config.json")).get("chat_template")
    if isinstance(template, list):  # Several, by name.
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def named_marks(path: Path) -> dict[str, str]:
    """bos_token, eos_token and mask_token of a tokenizer_config.json, where it gives them.

    Raises:
        StackError: it is no JSON of a tokenizer.
    """
    settings = _settings(path)
    marks = {mark: settings.get(mark) for mark in ("bos_token", "eos_token", "mask_token")}
    contents = {mark: token["content"] if isinstance(token, dict) else token for mark, token in marks.items()}
    return {mark: content for mark, content in contents.items() if content}


def _settings(path: Path) -> dict[str, Any]:
    """A tokenizer_config.json; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__} instead of an object")
    except (ValueError, RecursionError) as error:
        raise StackError(f"data.tokenizer: {path} is not JSON of a tokenizer: {error}") from error
    return settings
