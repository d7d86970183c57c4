"""Every objective makes of a text what its definition says, again and again the same."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stack.config import Config, ConfigError
from stack.data import open_data
from stack.data.examples import HELDOUT, TRAINING, generator, longest
from stack.data.tokenizer import BYTE_MARKS, ByteTokenizer
from stack.objectives import build
from stack.objectives.pairs import Pair, PairExamples
from stack.objectives.removal import take_out
from stack.objectives.sentence_removal import SentenceRemoval, sentence_ends, sentence_marks
from stack.objectives.span_corruption import SpanCorruption
from stack.objectives.unilm import BIDIRECTIONAL, LEFT_TO_RIGHT, SOURCE, TARGET

TOKENIZER = ByteTokenizer()
MARK = {name: 257 + number for number, name in enumerate(BYTE_MARKS)}
SENTENCES = 'It rains. Does it? He said: "No!" Then 3.14 was\nwritten. And so'
LENGTH = 64


def config(
    kind: str, *, shape: str = "decoder", length: int = LENGTH, folder: str = "nowhere", **objective
) -> Config:
    return Config.model_validate(
        {
            "model": {"kind": shape, "vocab_size": 361, "max_length": 512, "num_layers": 1, "embed_dim": 32}
            | {"num_heads": 4}
            | ({"num_types": 4} if shape == "encoder" else {}),
            "objective": {"kind": kind, **objective},
            "data": {
                "sources": [{"kind": "jsonl", "path": f"{folder}/texts.jsonl"}],
                "sequence_length": length,
                "heldout_fraction": 0.1,
                "cache_dir": f"{folder}/cache",
            },
            "train": {"batch_size": 4},
        }
    )


def examples(kind: str, **options) -> Any:
    return build(config(kind, **options)).examples(TOKENIZER)


def pieces(number: int, seed: int = 0) -> list[np.ndarray]:
    """Stored pieces of documents: some begin one, some end one, one has a single token."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        text = random.integers(97, 123, int(random.integers(1, LENGTH - 4)))
        text[random.random(len(text)) < 0.15] = 32
        ends = np.flatnonzero(random.random(len(text) - 1) < 0.08) if len(text) > 1 else []
        text[ends], text[np.add(ends, 1).astype(int)] = 46, 32
        begin, end = random.random(2) < 0.5
        made.append(np.concatenate([[256] * int(begin), text, [256 if end else 120]]).astype(np.int32))
    return [piece for piece in made if len(piece) > 1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(kind, options) -> the objective, and data packed for it."""
    folder = tmp_path_factory.mktemp("data")
    texts = [TOKENIZER.decode(piece) for piece in pieces(1500)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    @cache
    def make(kind: str, shape: str = "decoder") -> tuple:
        tree = config(kind, shape=shape, folder=str(folder))
        objective = build(tree)
        return objective, open_data(tree, examples=objective.examples, show_progress=False)

    return make


def read(objective, data: Any, numbers, places, *, purpose=TRAINING, seed=0) -> Any:
    numbers, places = np.array(numbers), np.array(places)
    draws = np.stack([np.full_like(places, seed), np.full_like(places, purpose), places], axis=1)
    return data.train.examples.read(data.train, numbers, draws, objective.fields)


KINDS = [
    ("prefix_lm", "decoder"),
    ("fill_in_middle", "decoder"),
    ("span_corruption", "decoder"),
    ("sentence_removal", "decoder"),
    ("masked_words", "encoder"),
    ("unilm", "encoder"),
]


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_a_row_is_a_function_of_seed_and_place(made, kind, shape):
    objective, data = made(kind, shape)
    some = np.arange(20)
    rows = read(objective, data, [*some, -1], [*some, 99])
    again = read(objective, data, [5, 2], [5, 2])
    other = {
        "place": read(objective, data, some, some + 100),
        "seed": read(objective, data, some, some, seed=1),
        "purpose": read(objective, data, some, some, purpose=HELDOUT),
    }
    for name, values in rows.items():
        np.testing.assert_array_equal(values[[5, 2]], again[name])
    for what, differently in other.items():
        assert any((differently[name] != rows[name][:-1]).any() for name in rows), what
    assert (rows["labels"][-1] == -1).all()
    assert not rows["tokens"][-1].any()
    assert not rows["segments"][-1].any()
    assert rows.keys() == {field.name for field in objective.fields} - {"example"}


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_texts_of_a_row_have_their_own_numbers_and_positions(made, kind, shape):
    objective, data = made(kind, shape)
    rows = read(objective, data, range(6), range(6))
    for segments, positions in zip(rows["segments"], rows["positions"], strict=True):
        used = segments > 0
        assert used[: used.sum()].all(), "padding comes last"
        assert (np.diff(segments[used]) >= 0).all()
        for number in np.unique(segments[used]):
            np.testing.assert_array_equal(
                positions[segments == number], np.arange((segments == number).sum())
            )


def pairs(kind: str, **options) -> tuple[PairExamples, list[tuple[np.ndarray, Pair]]]:
    made = examples(kind, **options)
    return made, [
        (piece, made.split(piece, generator(np.array([0, 0, place]))))
        for place, piece in enumerate(pieces(200))
    ]


def test_a_prefix_and_the_rest_are_the_text_and_every_place_is_as_likely():
    _, split = pairs("prefix_lm")
    for piece, pair in split:
        np.testing.assert_array_equal(np.concatenate(pair), piece)
        assert len(pair.read)
        assert len(pair.written)
    made, piece = examples("prefix_lm"), pieces(1)[0][:6]
    lengths = [len(made.split(piece, generator(np.array([0, 0, i]))).read) for i in range(2000)]
    counts = np.bincount(lengths, minlength=6)
    assert counts[0] == 0
    assert (abs(counts[1:6] - 400) < 5 * np.sqrt(400)).all()


@pytest.mark.parametrize("suffix_first_rate", [0.0, 1.0])
def test_a_middle_that_is_moved_back_gives_the_text(suffix_first_rate):
    _, split = pairs("fill_in_middle", rate=1.0, suffix_first_rate=suffix_first_rate)
    before, behind, middle = (MARK[f"<fim_{part}>"] for part in ("prefix", "suffix", "middle"))
    for piece, (nothing, text) in split:
        assert not len(nothing)
        where = {mark: int(np.flatnonzero(text == mark)[0]) for mark in (before, behind, middle)}
        begin = text[: where[before]]
        end = text[-1:] if piece[-1] == 256 else text[:0]
        last = len(text) - len(end)
        suffix = text[where[behind] + 1 : where[middle]]
        if suffix_first_rate:
            assert where[behind] == where[before] + 1
            inside = text[where[middle] + 1 : last]
        else:
            inside = np.concatenate([text[where[before] + 1 : where[behind]], text[where[middle] + 1 : last]])
        np.testing.assert_array_equal(np.concatenate([begin, inside, suffix, end]), piece)


def test_as_many_texts_are_rearranged_as_asked():
    made, piece = examples("fill_in_middle", rate=0.25), pieces(1)[0]
    texts = [made.split(piece, generator(np.array([0, 0, i]))).written for i in range(2000)]
    share = np.mean([len(text) > len(piece) for text in texts])
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)


def put_back(pair: Pair) -> np.ndarray:
    """The text that a removal was made of, by reading what is written after each sentinel."""
    first, last = MARK["<extra_id_0>"], MARK["<extra_id_99>"]
    taken: dict[int, list[int]] = {}
    for token in pair.written[:-1].tolist():
        if first <= token <= last:
            taken[token] = []
        else:
            taken[list(taken)[-1]].append(token)
    text: list[int] = []
    for token in pair.read[:-1].tolist():
        text += taken.pop(token) if token in taken else [token]
    assert not taken
    assert pair.read[-1] == pair.written[-1] == 256
    return np.array(text)


@pytest.mark.parametrize("kind", ["span_corruption", "sentence_removal"])
def test_what_was_removed_put_back_gives_the_text(kind):
    _, split = pairs(kind)
    removed = 0
    for piece, pair in split:
        text = piece[int(piece[0] == 256) : -1]
        if len(pair.written):
            np.testing.assert_array_equal(put_back(pair), text)
            sentinels = pair.read[pair.read > 256]
            np.testing.assert_array_equal(sentinels, MARK["<extra_id_0>"] + np.arange(len(sentinels)))
            removed += 1
        else:
            np.testing.assert_array_equal(pair.read, text)
    assert removed > (190 if kind == "span_corruption" else 20)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_taking_out_and_putting_back_any_runs_gives_the_text(removed):
    text = np.arange(len(removed), dtype=np.int32)
    sentinels = np.arange(MARK["<extra_id_0>"], MARK["<extra_id_99>"], dtype=np.int32)
    left, taken = take_out(text, np.array(removed), sentinels)
    end = np.array([256])
    np.testing.assert_array_equal(put_back(Pair(np.append(left, end), np.append(taken, end))), text)


def test_spans_are_those_of_t5():
    """512 places take 568 tokens, of which 85 go in 28 spans and are written in 114: T5's figures."""
    objective = build(config("span_corruption", length=512))
    assert isinstance(objective, SpanCorruption)
    assert longest(lambda lengths: objective.split_sizes(lengths).read, 512) == 568
    removed, spans = objective.counts(np.array([568]))
    assert (removed, spans) == (85, 28)
    assert objective.split_sizes(np.array([568])) == (512, 114, None)
    choose = objective.chooser(TOKENIZER)
    text = np.full(568, 97, np.int32)
    masks = np.array([choose(text, generator(np.array([0, 0, i]))) for i in range(400)])
    assert (masks.sum(1) == 85).all()
    starts = masks & ~np.pad(masks[:, :-1], ((0, 0), (1, 0)))
    assert (starts.sum(1) == 28).all()
    assert not masks[:, 0].any()
    assert masks[:, -1].all()
    middle = masks[:, 20:-20].mean(0)
    assert abs(middle.mean() - 85 / 568) < 0.01
    assert middle.std() < 3 * np.sqrt(0.15 * 0.85 / 400), "no place is preferred"


def test_whole_sentences_are_removed_up_to_the_share():
    objective = build(config("sentence_removal", rate=0.4, shortest=6))
    assert isinstance(objective, SentenceRemoval)
    choose = objective.chooser(TOKENIZER)
    text = np.frombuffer(SENTENCES.encode(), np.uint8).astype(np.int32)
    starts = [0, 9, 18, 33, 48, 56]
    seen = set()
    for place in range(200):
        removed = choose(text, generator(np.array([0, 0, place])))
        assert removed.sum() <= 0.4 * len(text)
        for low, high in zip(starts, [*starts[1:], len(text)], strict=True):
            assert removed[low:high].all() or not removed[low:high].any(), "whole ones"
        seen |= {low for low in starts if removed[low]}
    assert seen == {0, 9, 18, 33, 48}, "each at some time, but the last, which may be half of one"


def test_sentences_end_with_marks_before_white_space_and_with_lines():
    tokens = np.frombuffer(SENTENCES.encode(), np.uint8).astype(np.int32)
    ends = np.flatnonzero(sentence_ends(tokens, sentence_marks(TOKENIZER))) + 1
    sentences = [SENTENCES[low:high] for low, high in zip([0, *ends], [*ends, None], strict=True)]
    assert sentences == [
        "It rains.",
        " Does it?",
        ' He said: "No!"',
        " Then 3.14 was\n",
        "written.",
        " And so",
    ]


@pytest.mark.parametrize(("kind", "shape"), KINDS[:4])
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, LENGTH), min_size=1, max_size=8))
def test_no_text_takes_more_room_than_it_was_packed_for(kind, shape, seed, lengths):
    made = examples(kind, shape=shape)
    most = longest(made.room, LENGTH)
    random = np.random.default_rng(seed)
    for length in (min(length, most) for length in lengths):
        piece = random.integers(97, 123, length + 1).astype(np.int32)
        piece[random.random(length + 1) < 0.1] = 46
        piece[0] = random.choice([97, 256])
        pair = made.split(piece, random)
        assert len(pair.read) + len(pair.written) - 1 <= int(made.room(np.array([length]))[0])
        assert made.room(np.array([length]))[0] <= LENGTH


@pytest.mark.parametrize(("kind", "shape"), KINDS[:4])
def test_rows_in_one_row_predict_what_is_written_and_no_more(made, kind, shape):
    objective, data = made(kind, shape)
    made_of = data.train.examples
    rows = read(objective, data, range(8), range(8))
    for number in range(8):
        random = generator(np.array([0, TRAINING, number]))
        pairs = [made_of.split(piece, random) for piece in data.train.pieces(number)]
        labels, column, text = rows["labels"][number], 0, 0
        for pair in pairs:
            if not len(pair.written):
                continue
            text += 1
            whole = np.concatenate(pair)
            places = slice(column, column + len(whole) - 1)
            np.testing.assert_array_equal(rows["tokens"][number, places], whole[:-1])
            expected = whole[1:].copy()
            expected[: max(len(pair.read) - 1, 0)] = -1
            np.testing.assert_array_equal(labels[places], expected)
            assert (rows["segments"][number, places] == text).all()
            if "prefix" in rows:
                np.testing.assert_array_equal(
                    rows["prefix"][number, places], np.arange(len(whole) - 1) < len(pair.read)
                )
            column += len(whole) - 1
        assert (labels[column:] == -1).all()


def masked_rows(made):
    """Rows with hidden words, and the rows they were."""
    objective, data = made("masked_words", "encoder")
    rows = read(objective, data, range(40), range(40))
    packed = data.train.read(np.arange(40), objective_fields())
    return rows, packed


def objective_fields():
    from stack.objectives.words import PACKED

    return PACKED[:-1]


def test_masked_words_are_hidden_by_their_shares(made):
    rows, packed = masked_rows(made)
    tokens = rows["tokens"].copy()
    seen, labels = [], []
    for number in range(40):
        counts = rows["labels"][number] >= 0
        places = rows["masked"][number][counts]
        assert (np.diff(places) > 0).all()
        seen += tokens[number, places].tolist()
        labels += rows["labels"][number][counts].tolist()
        tokens[number, places] = rows["labels"][number][counts]
        may_be = (packed["segments"][number] > 0) & (packed["tokens"][number] != 256)
        assert abs(len(places) - 0.15 * may_be.sum()) < 1
    np.testing.assert_array_equal(tokens, packed["tokens"], err_msg="labels in their places give the text")
    assert 256 not in labels, "no special word is hidden"
    seen, labels = np.array(seen), np.array(labels)
    number = len(seen)
    masked, kept = (seen == MARK["[MASK]"]).mean(), (seen == labels).mean()
    assert abs(masked - 0.8) < 5 * np.sqrt(0.8 * 0.2 / number)
    assert abs(kept - 0.1) < 5 * np.sqrt(0.1 * 0.9 / number) + 0.1 / 256
    assert (seen[seen != MARK["[MASK]"]] < 256).all(), "a random word is never a special one"


def test_whole_words_are_hidden_or_not_at_all():
    made = examples("masked_words", shape="encoder", whole_words=True, rate=0.4)
    text = b"one fine day, the r\xc3\xa4tsel was solved!"
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    segments = np.ones(len(tokens), np.int32)
    words = [0, 3, 8, 12, 13, 17, 25, 29, 36, 37]
    chosen = np.zeros(len(tokens))
    for place in range(500):
        hidden = made.choose(tokens, segments, 20, generator(np.array([0, 0, place])))
        for low, high in zip(words, [*words[1:], len(tokens)], strict=False):
            inside = np.isin(np.arange(low, min(high, len(tokens))), hidden)
            assert inside.all() or not inside.any(), text[low:high]
        chosen[hidden] += 1
    assert (chosen > 0).all()


def test_unilm_draws_a_kind_for_each_text(made):
    objective, data = made("unilm", "encoder")
    rows = read(objective, data, range(60), range(60))
    kinds = np.zeros(3)
    for types, prefix, segments in zip(rows["types"], rows["prefix"], rows["segments"], strict=True):
        for number in range(1, segments.max() + 1):
            mine, seen = types[segments == number], prefix[segments == number]
            if mine[0] in (BIDIRECTIONAL, LEFT_TO_RIGHT):
                assert (mine == mine[0]).all()
                assert (seen == (mine[0] == BIDIRECTIONAL)).all()
            else:
                assert mine[0] == SOURCE
                assert (np.diff(mine) >= 0).all()
                assert set(mine.tolist()) <= {SOURCE, TARGET}
                np.testing.assert_array_equal(seen, mine == SOURCE)
            kinds[mine[0]] += 1
    assert (abs(kinds / kinds.sum() - 1 / 3) < 5 * np.sqrt(2 / 9 / kinds.sum())).all()
    hidden = read(objective, data, range(60), range(60))["labels"]
    plain = made("masked_words", "encoder")
    np.testing.assert_array_equal(hidden, read(plain[0], plain[1], range(60), range(60))["labels"])


def test_every_token_is_read_or_written_once(made):
    for kind, shape in KINDS[:1]:
        objective, data = made(kind, shape)
        stored = sum(len(part.corpus.tokens) for part in data.train.parts)
        predicted = sum(
            len(piece) - 1 for row in range(data.train.num_rows) for piece in data.train.pieces(row)
        )
        heldout = sum(
            len(piece) - 1 for row in range(data.heldout.num_rows) for piece in data.heldout.pieces(row)
        )
        documents = data.train.num_documents + data.heldout.num_documents
        assert predicted + heldout == stored - documents
        assert objective.sizes == {"length": LENGTH}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"kind": "masked_words", "shape": "encoder", "mask_token": "<mask>"},
            "mask_token: the tokenizer has no word '<mask>'",
        ),
        ({"kind": "fill_in_middle", "middle_token": "<m>"}, "middle_token: the tokenizer has no word '<m>'"),
        (
            {"kind": "span_corruption", "sentinel": "<s{}>"},
            "sentinel: rows of 64 tokens need 3 words, .* no word '<s0>'",
        ),
        (
            {"kind": "span_corruption", "length": 511, "rate": 0.6, "mean_span": 1.0},
            "no word '<extra_id_100>'",
        ),
    ],
)
def test_a_tokenizer_without_a_word_is_told(changes, words):
    with pytest.raises(ConfigError, match=words.replace("(", "\\(")):
        examples(**changes)


def test_a_model_without_a_row_for_a_word_is_told():
    tree = config("masked_words", shape="encoder").replace("model.vocab_size=257")
    with pytest.raises(ConfigError, match=r"is word 257 of the tokenizer.*set model.vocab_size=258 or more"):
        build(tree).examples(TOKENIZER)


def test_rows_too_short_for_what_is_added_are_told():
    with pytest.raises(ConfigError, match=r"sequence_length=3 has no room for a token.*4 places"):
        longest(examples("fill_in_middle", length=3).room, 3)


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        (
            "causal",
            "encoder",
            "objective.kind=causal trains no model.kind=encoder; set objective.kind to masked_words",
        ),
        (
            "unilm",
            "decoder",
            "objective.kind=unilm trains no model.kind=decoder; set objective.kind to causal or",
        ),
    ],
)
def test_an_objective_for_another_model_is_refused(kind, shape, words):
    with pytest.raises(ConfigError, match=words):
        Config(model={"kind": shape, "num_types": 4} if shape == "encoder" else {}, objective={"kind": kind})
