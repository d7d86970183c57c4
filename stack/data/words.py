"""The words of a vocabulary: what an id means, and how a tokenizer gets more of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stack.config.errors import ConfigError, StackError
from stack.config.paths import check_writable, expand
from stack.data.tokenizer import (
    ByteTokenizer,
    document_marks,
    load_tokenizer,
    write_file,
)

if TYPE_CHECKING:
    import tokenizers


def bytes_as_bpe() -> "tokenizers.Tokenizer":
    """Bytes as a byte-level BPE of 256 letters and no merges (GPT-2, section 2.2), each its own id."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    own = ByteTokenizer()
    words = own.words()
    ids = {word: number for number, word in words.items() if number < own.vocab_size}
    model = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[]))
    # The libraries' classes fill these properties although their types do not say so.
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyrefly: ignore
    model.decoder = decoders.ByteLevel()  # pyrefly: ignore
    model.add_special_tokens([words[own.eos]])
    return model


def check_same_words(old: Mapping[int, str], new: Mapping[int, str], *, names: tuple[str, str]) -> None:
    """Refuses a tokenizer in which an id means another word; it may have more of them, or fewer.

    Args:
        old: words by id, of the tokenizer that weights were trained with.
        new: those of the one that they are to be used with.
        names: of both, for people.

    Raises:
        StackError: some id does; with the first, and both words.
    """
    for number in sorted(old.keys() & new.keys()):
        if old[number] != new[number]:
            raise StackError(
                f"id {number} is {old[number]!r} in {names[0]} and {new[number]!r} in {names[1]}; take the"
                " tokenizer of the weights, or one that adds words to it (`stack data extend`)"
            )


def extend(
    tokenizer: str, path: str | Path, *, special: Sequence[str] = (), words: Sequence[str] = ()
) -> Iterator[str]:
    """Writes a tokenizer with more words at the end of its vocabulary; every old id keeps its word.

    Args:
        tokenizer: `bytes` or the path of a tokenizer.json.
        path: of the tokenizer.json to write; a tokenizer_config.json comes beside it where one is needed
            to name its marks.
        special: tokens that no text can forge, as `<|user|>`: encoding never makes them of text.
        words: plain ones, which encoding finds in any text before the tokenizer's own pieces.

    Yields:
        What was done, in lines.

    Raises:
        ConfigError: there is nothing to add, or a word twice or already there.
        StackError: the tokenizer cannot be read, or nothing written there.
    """
    target, added = expand(path), [*special, *words]
    if not added:
        raise ConfigError("there is nothing to add; give --special or --word, each as often as needed")
    old = load_tokenizer(tokenizer)
    for number, word in enumerate(added):
        if not word or word in added[:number]:
            raise ConfigError(f"{word!r} is {'given twice' if word else 'no word'}; leave it out")
        if word in (there := {text: one for one, text in old.words().items()}):
            raise ConfigError(f"{word!r} is in {tokenizer} already, as id {there[word]}; leave it out")
    if target.exists() and tokenizer != "bytes" and target.samefile(expand(tokenizer)):
        raise ConfigError(f"{target} is what is read; give --out another file")
    check_writable(target)
    import tokenizers

    # Anew: with settings that are left out where text is encoded.
    is_bytes = tokenizer == "bytes"
    model = bytes_as_bpe() if is_bytes else tokenizers.Tokenizer.from_file(str(expand(tokenizer)))
    model.add_special_tokens(list(special))
    model.add_tokens(list(words))
    ids = [model.token_to_id(word) for word in added]
    if ids != list(range(old.vocab_size, old.vocab_size + len(added))):
        raise StackError(f"{tokenizer} has unused ids, which new words would get; take one without gaps")
    last = old.vocab_size + len(added) - 1
    names = target.with_name("tokenizer_config.json")
    if not names.exists():
        marks = {"bos_token": old.words()[old.bos], "eos_token": old.words()[old.eos]}
        write_file(names, json.dumps(marks, indent=2) + "\n")
    elif document_marks(model, target) != (old.bos, old.eos):
        raise StackError(f"{names} names other marks than {tokenizer} has; give --out another folder")
    write_file(target, model.to_str(pretty=True))
    told = ", ".join(f"{word} {number}" for word, number in zip(added, ids, strict=True))
    yield f"{target}: {last + 1:,} words, {len(added):,} of them new: {told}"
    yield f"a model needs model.vocab_size={last + 1}; init_from has new words begin at the mean of the old"


def words_of(path: Path) -> dict[int, str]:
    """Every token of a tokenizer.json by its id, whatever its marks are.

    Raises:
        StackError: it cannot be read.
    """
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise StackError(f"{path} is not a Hugging Face tokenizer.json: {error}; fetch it again") from error
    return {number: word for word, number in model.get_vocab(with_added_tokens=True).items()}
