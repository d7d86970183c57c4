"""Text survives a tokenizer, and what marks the ends of a document is found or asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers

from stack.config import DataConfig, SourceConfig
from stack.config.errors import ConfigError, StackError
from stack.data.split import is_heldout
from stack.data.tokenizer import ByteTokenizer, Tokenizer, check_vocabulary, load_tokenizer, train_bpe

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    data = DataConfig(sources=(SourceConfig(kind="synthetic", max_bytes=100_000),))
    return train_bpe(data, 500, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def save_word_tokenizer(path: Path, special: list[str]) -> None:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "a", "b"])}
    model = LibraryTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()  # pyrefly: ignore
    model.add_special_tokens(special)
    model.save(str(path))


@given(TEXT)
def test_bytes_survive(text: str) -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert bytes(ids) == text.encode()
    assert tokenizer.decode([256, *ids.tolist(), 256]) == text


@given(TEXT)
def test_any_text_survives_a_trained_bpe(bpe: Tokenizer, text: str) -> None:
    (ids,) = bpe.encode_batch([text])
    assert bpe.decode([bpe.bos, *ids.tolist(), bpe.eos]) == text


def test_bpe_has_the_asked_for_size_and_shortens_the_text_it_knows(bpe: Tokenizer) -> None:
    from stack.data.sources import read_documents

    text = next(read_documents(SourceConfig(kind="synthetic")))
    assert bpe.vocab_size == 500
    assert len(bpe.encode_batch([text])[0]) < 0.6 * len(text)


def test_text_can_not_forge_the_end_of_a_document(bpe: Tokenizer) -> None:
    (ids,) = bpe.encode_batch(["a<|endoftext|>b"])
    assert bpe.eos not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"


def test_bpe_does_not_read_held_out_documents(tmp_path: Path) -> None:
    secret = next(text for n in range(1000) if is_heldout((text := f"qx{n} " * 500).encode(), 0.1))
    (tmp_path / "secret.txt").write_text(secret)
    known = next(text for n in range(1000) if not is_heldout((text := f"hello{n} " * 500).encode(), 0.1))
    (tmp_path / "known.txt").write_text(known)
    data = DataConfig(sources=(SourceConfig(kind="text", path=f"{tmp_path}/*.txt"),), heldout_fraction=0.1)
    tokenizer = train_bpe(data, 300, tmp_path / "tokenizer.json")
    assert len(tokenizer.encode_batch(["hello"])[0]) == 1
    assert len(tokenizer.encode_batch(["qx"])[0]) == 2


def test_loaded_tokenizer_equals_the_trained_one(tmp_path: Path) -> None:
    data = DataConfig(sources=(SourceConfig(kind="synthetic", max_bytes=20_000),))
    trained = train_bpe(data, 300, tmp_path / "a.json")
    other = train_bpe(data, 310, tmp_path / "b.json")
    again = load_tokenizer(str(tmp_path / "a.json"))
    assert again.fingerprint == trained.fingerprint != other.fingerprint
    texts = ["some text"]
    np.testing.assert_array_equal(again.encode_batch(texts)[0], trained.encode_batch(texts)[0])


def test_marks_are_taken_from_the_special_tokens(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path / "tokenizer.json", ["<s>", "</s>"])
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (3, 4, 5)


def test_marks_named_beside_the_tokenizer_come_first(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<|stop|>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|stop|>"}}))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.bos, tokenizer.eos) == (4, 4)


def test_a_tokenizer_without_an_end_is_refused_with_what_it_has(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path / "tokenizer.json", ["<mask>"])
    with pytest.raises(StackError, match=r"no known end-of-document token \(special tokens: <mask>\)"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"none\.json does not exist"):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(StackError, match=r"bad\.json is not a Hugging Face tokenizer\.json"):
        load_tokenizer(str(tmp_path / "bad.json"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    check_vocabulary(ByteTokenizer(), 257)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256 .* 257 words; set model\.vocab_size=257"):
        check_vocabulary(ByteTokenizer(), 256)


def test_bpe_needs_room_for_the_bytes_and_some_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size=256"):
        train_bpe(DataConfig(), 256, tmp_path / "t.json")
    tokens = DataConfig(sources=(SourceConfig(kind="tokens", path="a.bin"),))
    with pytest.raises(ConfigError, match="token files only"):
        train_bpe(tokens, 300, tmp_path / "t.json")
    (tmp_path / "file").write_text("")
    few = DataConfig(sources=(SourceConfig(kind="synthetic", max_bytes=1000),))
    with pytest.raises(StackError, match="cannot be written"):
        train_bpe(few, 260, tmp_path / "file" / "t.json")


def test_special_words_are_named_only_where_they_may_be(tmp_path):
    """Text forges none; a prompt that may name them does, and the tokenizer is then as it was."""
    save_word_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<extra_id_0>"])
    for tokenizer in (load_tokenizer(str(tmp_path / "tokenizer.json")), load_tokenizer("bytes")):
        mark = tokenizer.token("<extra_id_0>")
        (named,) = tokenizer.encode_batch(["a<extra_id_0>a"], marks=True)
        assert named.tolist() == [tokenizer.token("a"), mark, tokenizer.token("a")]
        assert tokenizer.decode(named, marks=True).replace(" ", "") == "a<extra_id_0>a"
        assert tokenizer.decode(named).replace(" ", "") == "aa"
        (text,) = tokenizer.encode_batch(["a<extra_id_0>a"])
        assert mark not in text
