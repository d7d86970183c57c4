"""A config becomes rows with sizes, a fingerprint, and refusals that say what to do."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer

from stack.config import Config
from stack.config.errors import ConfigError
from stack.data import Data, open_data
from stack.data.split import is_heldout
from stack.objectives.causal import Causal


def open_with(tmp_path: Path, *sources: dict[str, object], batch_size: int = 2, **data: object) -> Data:
    tree = {
        "data": {
            "sources": sources or [{"kind": "synthetic", "max_bytes": 50_000}],
            "sequence_length": 64,
            "heldout_fraction": 0.1,
            "cache_dir": str(tmp_path / "cache"),
            **data,
        },
        "model": {"vocab_size": 300},
        "train": {"batch_size": batch_size},
    }
    return open_data(Config.model_validate(tree), show_progress=False)


def text_source(folder: Path, texts: list[str]) -> dict[str, object]:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text)
    return {"kind": "text", "path": str(folder)}


def test_sizes_add_up_to_the_text(tmp_path: Path) -> None:
    texts = [f"document {i} " * (i % 7 + 1) for i in range(100)]
    data = open_with(tmp_path, text_source(tmp_path / "text", texts))
    sides = (data.train, data.heldout)
    assert sum(side.num_documents for side in sides) == 100
    assert sum(side.num_bytes for side in sides) == sum(map(len, texts))
    assert sum(side.num_tokens for side in sides) == sum(map(len, texts)) + 100  # and each one's end
    assert sorted(text.decode() for side in sides for text in side.texts()) == sorted(texts)
    real = sum((side.read(np.arange(side.num_rows), Causal.fields)["labels"] >= 0).sum() for side in sides)
    assert real == sum(side.num_tokens for side in sides)
    assert data.train.fill == pytest.approx(data.train.num_tokens / (data.train.num_rows * 64))


def test_rows_of_several_sources_are_numbered_one_after_another(tmp_path: Path) -> None:
    first = text_source(tmp_path / "a", ["a" * 200] * 3 + [f"a{i}" for i in range(50)])
    second = text_source(tmp_path / "b", [f"b{i}" for i in range(50)])
    train = open_with(tmp_path, first, second).train
    split = train.parts[0].num_rows
    batch = train.read(np.array([split, 0, -1, train.num_rows - 1]), Causal.fields)
    assert ord("b") in batch["tokens"][0]
    assert ord("a") not in batch["tokens"][0]
    assert ord("a") in batch["tokens"][1]
    assert ord("b") in batch["tokens"][3]
    assert (batch["labels"][2] == -1).all()
    assert (batch["segments"][2] == 0).all()


def test_equal_texts_of_two_sources_are_on_the_same_side(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(300)]
    data = open_with(tmp_path, text_source(tmp_path / "a", texts), text_source(tmp_path / "b", texts[::-1]))
    assert set(data.train.texts()).isdisjoint(data.heldout.texts())


def test_a_source_of_weight_zero_is_not_read(tmp_path: Path) -> None:
    data = open_with(
        tmp_path,
        {"kind": "synthetic", "max_bytes": 50_000},
        {"kind": "text", "path": str(tmp_path / "nowhere"), "weight": 0.0},
    )
    assert len(data.train.parts) == 1


def test_fingerprint_tells_what_changed(tmp_path: Path) -> None:
    texts = [f"text {i}" * 20 for i in range(100)]
    source = text_source(tmp_path / "text", texts)
    first = open_with(tmp_path, source)
    assert open_with(tmp_path, source).fingerprint == first.fingerprint
    moved = open_with(tmp_path, text_source(tmp_path / "moved", texts))
    assert moved.fingerprint == first.fingerprint
    longer = open_with(tmp_path, source, sequence_length=32)
    assert changed(first, longer) == {"packing"}
    (tmp_path / "text" / "0000.txt").write_text("new")
    assert changed(first, open_with(tmp_path, source)) == {"corpus"}


def changed(one: Data, other: Data) -> set[str]:
    return {name for name, value in one.fingerprint.items() if other.fingerprint[name] != value}


def test_less_text_than_a_batch_is_refused_with_both_numbers(tmp_path: Path) -> None:
    source = text_source(tmp_path / "text", [f"text {i} " * 10 for i in range(20)])
    rows = open_with(tmp_path, source).train.num_rows
    open_with(tmp_path, source, batch_size=rows)
    with pytest.raises(ConfigError, match=rf"fills {rows} rows .* train\.batch_size={rows + 1};"):
        open_with(tmp_path, source, batch_size=rows + 1)


def test_one_large_text_is_held_out_by_its_place(tmp_path: Path) -> None:
    text = "".join(f"line {i}: ä€😀\n" for i in range(1000))
    data = open_with(tmp_path, text_source(tmp_path / "text", [text]), heldout_fraction=0.1)
    (train,), (heldout,) = (list(side.texts()) for side in (data.train, data.heldout))
    # The character before is what the first of the held-out ones is predicted from.
    assert text.encode().startswith(train)
    assert train + heldout[-data.heldout.num_bytes :] == text.encode()
    assert data.train.num_bytes + data.heldout.num_bytes == len(text.encode())
    assert data.train.num_tokens + data.heldout.num_tokens == len(text.encode()) + 1
    assert data.heldout.num_bytes == pytest.approx(0.1 * len(text.encode()), rel=0.01)
    assert [note for note in data.notes if "the last 0.1 of the text is held out" in note]
    labels = data.heldout.read(np.arange(data.heldout.num_rows), Causal.fields)["labels"]
    assert (
        bytes(int(label) for label in labels[labels >= 0] if label < 256)
        == heldout[-data.heldout.num_bytes :]
    )


def test_a_place_between_two_documents_cuts_neither(tmp_path: Path) -> None:
    texts = [text for i in range(1000, 1100) if not is_heldout((text := f"text {i}").encode(), 0.5)][:2]
    data = open_with(tmp_path, text_source(tmp_path / "text", texts), batch_size=1, heldout_fraction=0.5)
    assert [list(side.texts()) for side in (data.train, data.heldout)] == [[text.encode()] for text in texts]
    assert (data.train.num_bytes, data.heldout.num_bytes) == (9, 9)
    assert (data.train.num_tokens, data.heldout.num_tokens) == (10, 10)


def test_several_sources_whose_documents_all_train_are_each_cut(tmp_path: Path) -> None:
    sources = [text_source(tmp_path / name, [name * 2000]) for name in ("one", "two")]
    data = open_with(tmp_path, *sources, heldout_fraction=0.05)
    assert [part.num_bytes for part in data.heldout.parts] == [300, 300]
    assert sum(part.num_bytes for part in data.train.parts) == 2 * 5700


def test_nothing_is_held_out_where_nothing_is_asked_for(tmp_path: Path) -> None:
    source = text_source(tmp_path / "text", ["one text " * 100])
    data = open_with(tmp_path, source, heldout_fraction=0.0)
    assert data.heldout.num_rows == 0
    assert data.notes == ()


def test_what_is_not_read_is_told_with_its_number(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    records = [{"text": f"record {i} " * 20} for i in range(40)] + [{"text": None}, {"text": ""}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "b.json").write_text("[]")
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    notes = open_with(tmp_path, {"kind": "jsonl", "path": str(folder)}).notes
    assert notes == (
        f"data.sources: {folder}: 2 files are not read: b.json, gone.jsonl",
        f"data.sources: {folder}: 2 documents without text are left out",
    )
    assert open_with(tmp_path, {"kind": "jsonl", "path": str(folder)}).notes == notes, "from the cache too"


def words_tokenizer(path: Path, *, lowercase: bool = False) -> str:
    model = tokenizers.Tokenizer(WordLevel({"[UNK]": 0, "[EOS]": 1, "the": 2, "cat": 3}, unk_token="[UNK]"))
    model.add_special_tokens(["[UNK]", "[EOS]"])
    if lowercase:
        model = tokenizers.Tokenizer(BPE())
        model.add_special_tokens(["[EOS]"])
        model.pre_tokenizer = ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        model.train_from_iterator(
            ["the cat"], BpeTrainer(special_tokens=["[EOS]"], initial_alphabet=ByteLevel.alphabet())
        )
        model.normalizer = Lowercase()
    else:
        model.pre_tokenizer = Whitespace()
    model.save(str(path))
    return str(path)


def test_a_tokenizer_that_does_not_know_the_words_flatters_nobody(tmp_path: Path) -> None:
    source = text_source(tmp_path / "text", ["the cat sat on a mat " * 20 for _ in range(9)] + ["the dog"])
    data = open_with(tmp_path, source, tokenizer=words_tokenizer(tmp_path / "words.json"))
    assert not data.heldout.is_lossless
    assert any("does not know 0.6" in note and "no nats per byte" in note for note in data.notes)


def test_a_tokenizer_that_changes_the_text_is_told(tmp_path: Path) -> None:
    source = text_source(tmp_path / "text", ["The Cat SAT " * 20 + str(i) for i in range(10)])
    name = words_tokenizer(tmp_path / "lower.json", lowercase=True)
    data = open_with(tmp_path, source, tokenizer=name)
    assert not data.heldout.is_lossless
    assert any("changes the text" in note for note in data.notes)
    assert open_with(tmp_path, source).heldout.is_lossless


def test_a_source_held_out_whole_is_named(tmp_path: Path) -> None:
    one = next(text for i in range(1000) if is_heldout((text := f"text {i}").encode(), 0.1))
    with pytest.raises(ConfigError, match=r"every document of .*one is held out; lower"):
        open_with(tmp_path, {"kind": "synthetic"}, text_source(tmp_path / "one", [one]))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    config = Config.model_validate({"model": {"vocab_size": 200}, "data": {"cache_dir": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"model\.vocab_size=200"):
        open_data(config)


@pytest.mark.parametrize(
    ("constant", "part"), [("stack.data.packing.VERSION", "rows"), ("stack.data.mixture.VERSION", "order")]
)
def test_rows_made_or_ordered_in_another_way_are_other_data(tmp_path, monkeypatch, constant, part):
    source = text_source(tmp_path / "text", [f"document {i} " * 5 for i in range(40)])
    before = open_with(tmp_path, source)
    monkeypatch.setattr(constant, 2)
    assert changed(before, open_with(tmp_path, source)) == {part}
