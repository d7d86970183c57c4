"""Of documents that are alike one is kept: the held-out one, then the first; and it is told how many went."""

import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from stack.config import Config, SourceConfig
from stack.config.errors import ConfigError
from stack.data import Data, minhash, open_data
from stack.data.cache import open_corpus
from stack.data.parallel import Threads
from stack.data.split import is_heldout
from stack.data.tokenizer import ByteTokenizer

HELDOUT = 0.3


def text(number: int, *, changes: int = 0, words: int = 120) -> str:
    """A text of its own; with each change of a word it shares up to five runs of words less."""
    draw = np.random.default_rng(number)
    some = [f"w{draw.integers(10**6)}" for _ in range(words)]
    for change in range(changes):
        some[(change * 31 + 17) % words] = f"changed{change}"
    return " ".join(some)


def similarity(one: str, other: str) -> float:
    """Of the sets of runs of five words, counted."""
    runs = []
    for some in (one, other):
        words = re.findall(r"\w+", some.lower())
        runs.append({tuple(words[start : start + 5]) for start in range(len(words) - 4)})
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def source(folder: Path, texts: list[str]) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    for number, one in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(one)
    return {"kind": "text", "path": str(folder)}


def open_with(tmp_path: Path, *sources: dict[str, object], **data: object) -> Data:
    tree = {"sources": sources, "sequence_length": 256, "heldout_fraction": HELDOUT, **data}
    config = {"data": tree | {"cache_dir": str(tmp_path / "cache")}, "train": {"batch_size": 1}}
    return open_data(Config.model_validate(config), show_progress=False)


def sides(data: Data) -> tuple[list[str], list[str]]:
    train, heldout = ([one.decode() for one in side.texts()] for side in (data.train, data.heldout))
    return train, heldout


def is_out(one: str) -> bool:
    return is_heldout(one.encode(), HELDOUT)


def test_of_equal_documents_the_first_is_kept_over_all_sources(tmp_path: Path) -> None:
    texts = [text(number) for number in range(20)]
    one = source(tmp_path / "one", [*texts[:10], texts[3], texts[3]])
    two = source(tmp_path / "two", [texts[9], *texts[10:]])
    both = open_with(tmp_path, one, two)
    data = open_with(tmp_path, one, two, deduplicate="exact")
    train, heldout = sides(data)
    assert (train, heldout) == (
        [one for one in texts if not is_out(one)],
        [one for one in texts if is_out(one)],
    )
    assert min(len(train), len(heldout)) > 3
    assert data.notes == (
        f"data.deduplicate: {one['path']}: 2 documents equal to others are left out",
        f"data.deduplicate: {two['path']}: 1 documents equal to others are left out",
    )
    assert data.fingerprint["corpus"] == both.fingerprint["corpus"]
    assert data.fingerprint["packing"] != both.fingerprint["packing"]
    again = open_with(tmp_path, one, two, deduplicate="exact")
    assert (sides(again), again.notes) == (sides(data), data.notes), "from the cache too"
    assert len(sides(both)[0]) + len(sides(both)[1]) == 23


def test_of_nearly_equal_documents_the_held_out_one_is_kept_wherever_it_lies(tmp_path: Path) -> None:
    # Of each text a version for training, and one that is held out, as their hashes have it.
    pairs = []
    for number in range(400):
        versions = [text(number, changes=changes, words=300) for changes in range(3)]
        out = [one for one in versions if is_out(one)]
        trained = [one for one in versions if not is_out(one)]
        if out and trained:
            pairs.append((trained[0], out[0]))
        if len(pairs) == 12:
            break
    assert all(similarity(*pair) > 0.9 for pair in pairs)
    others = [one for number in range(1000, 1020) if not is_out(one := text(number))]
    first = source(tmp_path / "first", [*(pair[0] for pair in pairs), *others])
    second = source(tmp_path / "second", [pair[1] for pair in pairs] + ["one more to train on"])
    train, heldout = sides(open_with(tmp_path, first, second, deduplicate="near"))
    assert heldout == [pair[1] for pair in pairs]
    assert train == [*others, "one more to train on"]
    train, heldout = sides(open_with(tmp_path, first, second, deduplicate="exact"))
    assert len(train) == len(pairs) + len(others) + 1, "they are not equal"


def test_of_nearly_equal_documents_of_one_side_the_first_is_kept(tmp_path: Path) -> None:
    versions = [text(7, changes=changes) for changes in range(3)]
    far = text(7, changes=40)
    assert similarity(versions[0], far) < 0.2
    data = open_with(
        tmp_path, source(tmp_path / "a", [*versions, far]), deduplicate="near", heldout_fraction=0.0
    )
    assert sides(data) == ([versions[0], far], [])
    note = f"data.deduplicate: {tmp_path / 'a'}: 2 documents equal or nearly equal to others are left out"
    assert data.notes == (note,)
    closer = open_with(
        tmp_path,
        source(tmp_path / "a", [*versions, far]),
        deduplicate="near",
        near_duplicate_similarity=1.0,
        heldout_fraction=0.0,
    )
    assert len(sides(closer)[0]) == 4


def test_where_the_end_of_the_text_is_held_out_what_is_like_it_is_not_trained_on(tmp_path: Path) -> None:
    alike = [next(one for n in range(99) if not is_heldout((one := text(5) + " x" * n).encode(), 0.1))]
    alike.append(next(one for n in range(99) if not is_heldout((one := text(5) + " y" * n).encode(), 0.1)))
    middle = next(one for n in range(6, 99) if not is_heldout((one := text(n, words=1500)).encode(), 0.1))
    data = open_with(
        tmp_path,
        source(tmp_path / "a", [alike[0], middle, alike[1]]),
        deduplicate="near",
        heldout_fraction=0.1,
    )
    assert any("the last 0.1 of the text is held out" in note for note in data.notes)
    train, heldout = sides(data)
    assert len(train) == 1
    assert middle.startswith(train[0])
    assert alike[0] not in train
    assert heldout[-1] == alike[1]
    assert data.train.num_bytes + data.heldout.num_bytes == len(middle) + len(alike[1])


def test_a_document_that_is_cut_and_left_out_counts_on_neither_side(tmp_path: Path) -> None:
    cut, other = (
        next(one for n in range(a, 99) if not is_heldout((one := text(n)).encode(), 0.1)) for a in (0, 50)
    )
    one, two = source(tmp_path / "one", [cut]), source(tmp_path / "two", [other, cut])
    data = open_with(tmp_path, one, two, deduplicate="exact", heldout_fraction=0.1)
    assert [part.num_bytes for part in data.train.parts][1] == len(other)
    assert [part.num_bytes for part in data.heldout.parts][1] == 0
    assert data.train.num_bytes + data.heldout.num_bytes == len(cut) + len(other)


def test_a_source_that_only_repeats_others_is_named(tmp_path: Path) -> None:
    texts = [text(number) for number in range(10)]
    one, two = (source(tmp_path / name, texts) for name in ("one", "two"))
    with pytest.raises(ConfigError, match=r"every document of .*two is held out or like others; lower"):
        open_with(tmp_path, one, two, deduplicate="exact")


def test_lengths_are_told_and_are_part_of_the_key(tmp_path: Path) -> None:
    texts = [text(number, words=words) for number in range(40) for words in (10, 100)]
    folder = source(tmp_path / "a", texts)
    data = open_with(tmp_path, folder | {"min_characters": 200})
    assert sorted(chain(*sides(data))) == sorted(one for one in texts if len(one) >= 200)
    assert data.notes == (f"data.sources: {tmp_path / 'a'}: 40 documents are left out by min_characters=200",)
    whole = open_with(tmp_path, folder)
    assert len([*chain(*sides(whole))]) == 80
    assert data.fingerprint["corpus"] != whole.fingerprint["corpus"]


def test_token_files_are_measured_by_their_text(tmp_path: Path) -> None:
    texts = [text(0), text(0, changes=1), "short", text(1)]
    np.save(tmp_path / "a.npy", np.array([token for one in texts for token in (*one.encode(), 256)]))
    kinds: dict[str, object] = {"kind": "tokens", "path": str(tmp_path / "a.npy"), "min_characters": 6}
    data = open_with(tmp_path, kinds, deduplicate="near", heldout_fraction=0.0)
    assert sides(data)[0] == [texts[0], texts[3]]


def test_signatures_are_the_same_whoever_makes_them(tmp_path: Path) -> None:
    where = SourceConfig(kind="synthetic", max_bytes=1_500_000)
    corpora = [
        open_corpus(where, ByteTokenizer(), tmp_path / str(count), workers=Threads(count), sign=True)
        for count in (1, 3)
    ]
    one, two = (corpus.signatures for corpus in corpora)
    assert one is not None
    assert two is not None
    np.testing.assert_array_equal(one[:], two[:])
    assert len(one) == len(corpora[0].hashes) * minhash.HASHES
    plain = open_corpus(where, ByteTokenizer(), tmp_path / "1")
    assert plain.key != corpora[0].key
    assert plain.fingerprint == corpora[0].fingerprint


def test_a_signature_is_the_recorded_one() -> None:
    """Where this fails, raise `minhash.VERSION` and record anew."""
    assert minhash.VERSION == 1
    assert minhash.signature("The cat sat on the mat, and slept.")[:3].tolist() == RECORDED


RECORDED = [1231631338, 29386623, 99076893]


def test_similarities_are_estimated_without_bias() -> None:
    errors = []
    for number in range(60):
        one, other = text(number, words=300), text(number, words=300, changes=number % 30 + 1)
        true = similarity(one, other)
        estimate = (minhash.signature(one) == minhash.signature(other)).mean()
        errors.append((estimate - true) / np.sqrt(true * (1 - true) / minhash.HASHES))
    assert abs(np.mean(errors)) < 3 / np.sqrt(60)
    assert 0.7 < np.std(errors) < 1.3


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("Some words, to be read.", "some WORDS to be read", True),
        ("a b c d e", "a b c d f", False),
        ("one two", "one two", True),
        ("one two", "two one", False),
        ("...", "!!!", False),
        ("...", "...", True),
    ],
)
def test_short_texts_and_texts_without_words_have_a_signature(one, other, is_same) -> None:
    assert (minhash.signature(one) == minhash.signature(other)).all() == is_same


def test_a_long_text_is_looked_at_to_its_end() -> None:
    one, other = text(0, words=5000), text(0, words=5000) + " " + text(1, words=5000)
    assert (minhash.signature(one) == minhash.signature(other)).mean() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_every_pair_that_is_near_enough_is_found_and_no_other(threshold: float) -> None:
    draw = np.random.default_rng(0)
    signatures = draw.integers(0, 2**32, (600, minhash.HASHES), np.uint32)
    # Of 200 the next ones share some hashes, from none to all.
    for number in range(200):
        share = draw.permutation(minhash.HASHES)[: draw.integers(minhash.HASHES + 1)]
        signatures[200 + number, share] = signatures[number, share]
    near = minhash.near_earlier(lambda places, columns: signatures[places, columns], 600, threshold)
    agree = (signatures[:200] == signatures[200:400]).mean(axis=1)
    assert not near[:200].any()
    assert not near[400:].any()
    assert not (near[200:400] & (agree < threshold)).any()
    missed = (~near[200:400] & (agree >= threshold)).sum()
    assert missed <= 2, "1 in 100 at the threshold, fewer above"


def test_a_group_of_one_band_is_looked_at_to_its_end() -> None:
    """Two that are near each other are found though others that agree in their one band come before."""
    draw = np.random.default_rng(0)
    signatures = draw.integers(0, 2**32, (9, minhash.HASHES), np.uint32)
    signatures[:, :6] = 7
    signatures[8] = signatures[4]
    signatures[8, 6::6] += 1
    assert (signatures[4] == signatures[8]).mean() > 0.8
    near = minhash.near_earlier(lambda places, columns: signatures[places, columns], 9, 0.8)
    assert near.tolist() == [False] * 8 + [True]
