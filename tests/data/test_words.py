"""A tokenizer gets more words; what its ids meant they mean, and its text is what it was."""

import json
import re
from pathlib import Path

import pytest
import tokenizers

from stack.cli import main
from stack.config import DataConfig, SourceConfig
from stack.config.errors import ConfigError, StackError
from stack.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from stack.data.words import check_same_words, extend, words_of

TEXT = "naïve\n\x00\t🙂  Stack <|user|> of bytes"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(DataConfig(sources=(SourceConfig(kind="synthetic", max_bytes=50_000),)), 300, path)
    return path


@pytest.mark.parametrize("old", ["bytes", "bpe"])
def test_old_ids_keep_their_words_and_new_ones_follow(bpe, tmp_path, capsys, old) -> None:
    spec = "bytes" if old == "bytes" else str(bpe)
    before, out = load_tokenizer(spec), tmp_path / "new" / "tokenizer.json"
    size = before.vocab_size
    options = ["--special", "<|user|>", "--word", "Stack", "--out", str(out)]
    assert main(["data", "extend", spec, *options]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{out}: {size + 2} words, 2 of them new: <|user|> {size}, Stack {size + 1}"
    assert f"model.vocab_size={size + 2};" in told[1]
    after = load_tokenizer(str(out))
    kept = {number: word for number, word in before.words().items() if number < size}
    assert after.words() == kept | {size: "<|user|>", size + 1: "Stack"} == words_of(out)
    assert (after.bos, after.eos) == (before.bos, before.eos)
    check_same_words(kept, after.words(), names=("old", "new"))
    ids = after.encode_batch([TEXT])[0].tolist()
    assert ids.count(size + 1) == 1, "a plain word is found in text"
    assert size not in ids, "a special one is not"
    assert after.decode(ids) == TEXT
    rest = TEXT.replace("Stack", "")
    assert after.encode_batch([rest])[0].tolist() == before.encode_batch([rest])[0].tolist()


def test_settings_of_the_file_stay(bpe, tmp_path) -> None:
    model = tokenizers.Tokenizer.from_file(str(bpe))
    model.enable_truncation(7)
    model.save(str(tmp_path / "old.json"))
    list(extend(str(tmp_path / "old.json"), tmp_path / "new.json", special=["<|user|>"]))
    old, new = (json.loads((tmp_path / name).read_text()) for name in ("old.json", "new.json"))
    assert new["truncation"] == old["truncation"]
    assert new["model"] == old["model"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "there is nothing to add; give --special or --word, each as often as needed"),
        (["--special", "<|endoftext|>"], "'<|endoftext|>' is in TOKENIZER already, as id 0; leave it out"),
        (["--word", "a", "--word", "a"], "'a' is in TOKENIZER already, as id "),
        (["--word", "xyzzy", "--special", "xyzzy"], "'xyzzy' is given twice; leave it out"),
        (["--word", ""], "'' is no word; leave it out"),
    ],
)
def test_what_cannot_be_added_is_told_and_nothing_is_written(bpe, tmp_path, capsys, options, told) -> None:
    out = tmp_path / "new.json"
    assert main(["data", "extend", str(bpe), *options, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told.replace("TOKENIZER", str(bpe)) in error
    assert list(tmp_path.iterdir()) == []


def test_it_overwrites_neither_its_source_nor_the_marks_of_another(bpe, tmp_path) -> None:
    text = bpe.read_text()
    with pytest.raises(ConfigError, match="is what is read; give --out another file"):
        list(extend(str(bpe), bpe, special=["<|user|>"]))
    assert bpe.read_text() == text
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|user|>"}')
    with pytest.raises(StackError, match=r"tokenizer_config\.json names other marks than"):
        list(extend(str(bpe), tmp_path / "new.json", special=["<|user|>"]))
    assert not (tmp_path / "new.json").exists()


def test_a_vocabulary_with_gaps_is_refused(bpe, tmp_path) -> None:
    tree = json.loads(bpe.read_text())
    last = max(tree["model"]["vocab"], key=tree["model"]["vocab"].get)
    tree["model"]["vocab"][last] += 5
    (tmp_path / "gaps.json").write_text(json.dumps(tree))
    with pytest.raises(StackError, match="has unused ids, which new words would get; take one without gaps"):
        list(extend(str(tmp_path / "gaps.json"), tmp_path / "new" / "new.json", special=["<|user|>"]))
    assert not (tmp_path / "new" / "new.json").exists()


def test_the_first_id_that_means_another_word_is_named() -> None:
    old = ByteTokenizer().words()
    with pytest.raises(StackError, match=re.escape("id 65 is 'A' in the run and 'Z' in mine.json; take the")):
        check_same_words(old, old | {65: "Z", 70: "Y"}, names=("the run", "mine.json"))
    check_same_words(old, {65: "A", 400: "new"}, names=("the run", "mine.json"))
