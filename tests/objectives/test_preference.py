"""Preferences: two answers in one row that see nothing of each other, and the loss of the formula."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import Config, ConfigError, StackError
from stack.data import open_data
from stack.data.records import Record
from stack.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from stack.inference.text import encode_prompts
from stack.models.protocol import Output
from stack.models.stack import Execution
from stack.objectives import build
from stack.objectives.preferred import PREDICTED, SECOND
from stack.parallel.rules import ONE_DEVICE

BOS = 256
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def config(
    folder: object = "nowhere", *, length: int = 64, kind: str = "preference", **changes: Any
) -> Config:
    tree = {
        "init_from": "somewhere",
        "model": {"vocab_size": 512, "num_layers": 1, "embed_dim": 16, "num_heads": 2, "dtype": "float32"},
        "objective": {"kind": kind, **changes.pop("objective", {})},
        "data": {
            "sources": [{"kind": "jsonl", "path": f"{folder}/rows.jsonl", "field": None}],
            "sequence_length": length,
            "heldout_fraction": 0.0,
            "cache_dir": f"{folder}/cache",
            "shuffle": False,
            **changes.pop("data", {}),
        },
        "train": {"batch_size": 2},
        **changes,
    }
    return Config(**tree)


def encode(record: object, tokenizer: Tokenizer | None = None, **changes: Any) -> Any:
    encoder: Any = build(config(**changes)).examples(tokenizer or ByteTokenizer()).encoder
    made = encoder([Record.at(json.dumps(record), "here:1")])[0]
    return made[0] if made else None


def texts(encoded: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens and marks of both texts, with bos and eos."""
    tokens = np.concatenate([[BOS], encoded.tokens, [BOS]])
    (middle,) = np.flatnonzero(encoded.marks & SECOND)
    marks = encoded.marks & PREDICTED
    return [(tokens[part].tolist(), marks[part].tolist()) for part in np.s_[:middle, middle:]]


PAIR = {"prompt": "ab", "chosen": "cde", "rejected": "f"}


def test_both_texts_have_the_prompt_and_their_answers_are_marked():
    assert texts(encode(PAIR)) == [
        ([BOS, *b"abcde", BOS], [0, 0, 0, 1, 1, 1, 1]),
        ([BOS, *b"abf", BOS], [0, 0, 0, 1, 1]),
    ]


def test_what_both_begin_with_is_the_prompt_where_none_is_given():
    both = {"chosen": "abcde", "rejected": "abcf"}
    assert texts(encode(both, objective={"prompt": None})) == [
        ([BOS, *b"abcde", BOS], [0, 0, 0, 0, 1, 1, 1]),
        ([BOS, *b"abcf", BOS], [0, 0, 0, 0, 1, 1]),
    ]


@pytest.mark.parametrize(("length", "lengths"), [(13, (8, 5)), (12, (7, 5)), (9, (4, 4))])
def test_long_pairs_are_cut_where_that_is_asked(length, lengths):
    record = {"prompt": "a", "chosen": "cdefgh", "rejected": "xyz"}
    cut = texts(encode(record, length=length, objective={"too_long": "cut"}))
    assert tuple(len(tokens) - 1 for tokens, _ in cut) == lengths
    for (tokens, marks), (whole, were) in zip(cut, texts(encode(record)), strict=True):
        assert (tokens[:-1], marks[:-1]) == (whole[: len(tokens) - 1], were[: len(tokens) - 1])
        assert bool(marks[-1]) == (len(tokens) == len(whole)), "the end of what is cut is not predicted"


def test_long_pairs_are_refused_or_left_out():
    with pytest.raises(StackError, match=r"here:1: 10 tokens in both texts, .* has room for 9; .*too_long"):
        encode(PAIR, length=9)
    assert encode(PAIR, length=9, objective={"too_long": "leave_out"}) is None
    assert encode(PAIR, length=10) is not None
    same = {"prompt": "", "chosen": "abcd", "rejected": "abce"}
    assert encode(same, length=6, objective={"too_long": "cut"}) is None, "what is left is the same"
    prompts = {"prompt": "abcdefgh", "chosen": "x", "rejected": "y"}
    assert encode(prompts, length=8, objective={"too_long": "cut"}) is None, "nothing is left to predict"


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat")
    from stack.cli import main

    path = folder / "tokenizer.json"
    words = ("--special", "<|turn|>", "--special", "<|end|>")
    assert main(["data", "extend", "bytes", *words, "--out", str(path)]) == 0
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(str(path))


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


EARLIER = [say("user", "a"), say("assistant", "b"), say("user", "c")]


@pytest.mark.parametrize(
    ("record", "prompt", "predicted"),
    [
        ({"prompt": "c", "chosen": "d", "rejected": "de"}, "prompt", ("d<|end|>", "de<|end|>")),
        (
            {"prompt": EARLIER, "chosen": [say("assistant", "d")], "rejected": "e"},
            "prompt",
            ("d<|end|>", "e<|end|>"),
        ),
        (
            {
                "chosen": [*EARLIER, say("assistant", "dx")],
                "rejected": [*EARLIER, say("assistant", "dy")],
            },
            None,
            ("x<|end|>", "y<|end|>"),
        ),
    ],
    ids=["texts", "messages", "conversations"],
)
def test_what_the_assistant_says_last_is_predicted(chat, record, prompt, predicted):
    encoded = encode(record, chat, length=128, kind="chat_preference", objective={"prompt": prompt})
    said = []
    for tokens, marks in texts(encoded):
        said.append(
            chat.decode([token for token, mark in zip(tokens[:-1], marks, strict=False) if mark], marks=True)
        )
        assert chat.decode(tokens[1:], marks=True).count("<|turn|>") == 2 * (1 + ("b" in str(record)))
    assert tuple(said) == predicted


def test_a_prompt_of_a_sample_is_what_a_user_says(chat):
    objective = build(config(kind="chat_preference"))
    (asked,) = encode_prompts(chat, ["hello"], objective)
    assert chat.decode(asked[1:], marks=True) == "<|turn|>user\nhello<|end|><|turn|>assistant\n"


@pytest.mark.parametrize(
    ("kind", "record", "changes", "words"),
    [
        ("preference", {"prompt": "a", "chosen": "b"}, {}, ["here:1", "'rejected'", "objective.rejected"]),
        ("preference", PAIR | {"chosen": "f"}, {}, ["here:1", "are the same", "remove the line"]),
        ("preference", PAIR | {"rejected": ""}, {}, ["here:1", "rejected answer is empty"]),
        ("preference", PAIR | {"chosen": [say("assistant", "b")]}, {}, ["here:1", "kind=chat_preference"]),
        (
            "preference",
            {"chosen": "ab", "rejected": "ab"},
            {"prompt": None},
            ["here:1", "are the same"],
        ),
        ("chat_preference", PAIR | {"chosen": []}, {}, ["here:1", "an empty list", "objective.chosen"]),
        ("chat_preference", PAIR | {"prompt": 3}, {}, ["here:1", "'prompt'", "objective.prompt"]),
        (
            "chat_preference",
            PAIR | {"chosen": [say("user", "ab"), say("assistant", "c")]},
            {},
            ["here:1", "'chosen' begins with a message of user", "objective.prompt=null"],
        ),
        (
            "chat_preference",
            {
                "chosen": [say("user", "a"), say("assistant", "c")],
                "rejected": [say("user", "b"), say("assistant", "c")],
            },
            {"prompt": None},
            ["here:1", "differ before what is predicted"],
        ),
        ("chat_preference", PAIR | {"chosen": "<|end|>"}, {}, ["here:1", "'<|end|>'", "remove it"]),
    ],
)
def test_a_record_that_is_no_pair_is_told_with_its_place(chat, kind, record, changes, words):
    with pytest.raises(StackError) as told:
        encode(record, chat, kind=kind, objective=changes)
    for word in words:
        assert word in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": None}, ["objective.kind=preference", "init_from"]),
        ({"objective": {"z_loss": 1e-4}}, ["z_loss", "set it to 0"]),
        ({"objective": {"label_smoothing": 0.5}}, ["label_smoothing"]),
        ({"model": {"kind": "encoder"}}, ["objective.kind=preference trains no model.kind=encoder"]),
        ({"data": {"sources": [{"kind": "jsonl", "path": "x"}]}}, ["data.sources.0", "field=null"]),
    ],
)
def test_what_preferences_cannot_do_is_refused(changes, words):
    with pytest.raises(ConfigError) as told:
        config(**changes)
    for word in words:
        assert word in str(told.value)


def test_a_tokenizer_without_a_template_is_told():
    with pytest.raises(ConfigError, match=r"chat template; .* preference"):
        build(config(kind="chat_preference")).examples(ByteTokenizer())


LINES = [
    {"prompt": "p" * n, "chosen": "c" * (1 + n % 4), "rejected": "r" * (1 + n % 3)} for n in range(1, 13)
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    settings = config(folder)
    objective = build(settings)
    data = open_data(settings, examples=objective.examples, show_progress=False)
    numbers = np.arange(-1, data.train.num_rows)
    draws = np.zeros((len(numbers), 3), np.int64)
    return objective, data, dict(data.train.examples.read(data.train, numbers, draws, objective.fields))


def test_a_row_holds_both_texts_of_a_pair_as_two_segments(rows):
    _, _, batch = rows
    assert (batch["labels"][0] == -1).all()
    assert not batch["segments"][0].any(), "a row of padding"
    found, most = [], batch["segments"].max()
    assert most >= 4, "some row holds several pairs"
    for row in range(1, len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            tokens, labels = batch["tokens"][row][here], batch["labels"][row][here]
            prompt = int((tokens == ord("p")).sum())
            np.testing.assert_array_equal(batch["positions"][row][here], np.arange(len(tokens)))
            answer = LINES[prompt - 1]["chosen" if segment % 2 else "rejected"]
            assert tokens.tolist() == [BOS, *b"p" * prompt, *answer.encode()]
            assert labels.tolist() == [*[-1] * prompt, *answer.encode(), BOS]
            found.append((prompt, segment % 2))
    assert sorted(found) == sorted((n, side) for n in range(1, 13) for side in (0, 1))


def test_what_the_reference_tells_goes_to_its_row(rows):
    objective, data, batch = rows
    assert np.isnan(batch["reference"][1:, 0]).all(), "it has told nothing yet"
    pieces = sum(len(data.train.piece_numbers(row)) for row in range(data.train.num_rows))
    assert pieces == len(LINES)
    told = data.train.examples.with_reference(np.arange(2 * pieces, dtype=np.float32))
    numbers = np.array([1, -1, 0])
    reference = told.read(data.train, numbers, np.zeros((3, 3), np.int64), objective.fields)["reference"]
    for row, values in zip(numbers, reference, strict=True):
        some = data.train.piece_numbers(int(row))
        expected = np.arange(2 * some.start, 2 * some.stop)
        np.testing.assert_array_equal(values[: len(expected)], expected)
        assert not values[len(expected) :].any()


def formula(
    hidden: np.ndarray, table: np.ndarray, batch: dict[str, np.ndarray], options: Any
) -> tuple[float, np.ndarray, np.ndarray]:
    """Equation 7 of the paper and its gradient, pair by pair in float64."""
    hidden_gradient, table_gradient = np.zeros_like(hidden), np.zeros_like(table)
    scores = hidden @ table.T
    normaliser = np.log(np.exp(scores).sum(-1))
    pairs = [
        (row, first) for row in range(len(hidden)) for first in range(1, batch["segments"][row].max() + 1, 2)
    ]
    loss = 0.0
    for row, first in pairs:
        places, ratios, counts = [], [], []
        for segment in (first, first + 1):
            here = np.flatnonzero((batch["segments"][row] == segment) & (batch["labels"][row] >= 0))
            label = batch["labels"][row][here]
            ratio = (scores[row, here, label] - normaliser[row, here]).sum() - batch["reference"][
                row, segment - 1
            ]
            counts.append(len(here) if options.length_normalised else 1)
            ratios.append(ratio / counts[-1])
            places.append((here, label))
        margin = options.beta * (ratios[0] - ratios[1])
        right, wrong = 1 / (1 + np.exp(-margin)), 1 / (1 + np.exp(margin))
        smoothing = options.label_smoothing
        loss += (-(1 - smoothing) * np.log(right) - smoothing * np.log(wrong)) / len(pairs)
        pull = options.beta * ((1 - smoothing) * wrong - smoothing * right) / len(pairs)
        for (here, label), count, sign in zip(places, counts, (1, -1), strict=True):
            probabilities = np.exp(scores[row, here] - normaliser[row, here][:, None])
            slope = sign * pull / count * (probabilities - np.eye(len(table))[label])
            hidden_gradient[row, here] += slope @ table
            table_gradient += slope.T @ hidden[row, here]
    return loss, hidden_gradient, table_gradient


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.7, "label_smoothing": 0.2},
        {"beta": 2.0, "length_normalised": True, "logits_bytes": 2**15},
    ],
    ids=["plain", "conservative", "by length, in chunks"],
)
def test_loss_and_gradient_are_those_of_the_formula(rows, options):
    _, _, batch = rows
    objective: Any = build(config(objective=options))
    random = np.random.default_rng(0)
    shape = batch["tokens"].shape
    hidden, table = random.normal(size=(*shape, 16)), 0.3 * random.normal(size=(512, 16))
    plain = batch | {"reference": random.normal(-20.0, 5.0, batch["reference"].shape).astype(np.float32)}
    arrays = {name: jnp.asarray(values) for name, values in plain.items()}
    divisor = objective.divisor(arrays)
    assert float(divisor) == len(LINES)

    def loss(hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, Any]:
        def model(*_: object) -> Output:
            return Output(hidden=hidden, table=table)

        return objective.loss(model, arrays, Execution(layout=ONE_DEVICE), divisor)

    values = jnp.asarray(hidden, jnp.float32), jnp.asarray(table, jnp.float32)
    (value, sums), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*values)
    expected, *expected_gradients = formula(
        hidden, table, plain, SimpleNamespace(**vars(objective.preferred))
    )
    np.testing.assert_allclose(float(value), expected, rtol=2e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=3e-6 * np.abs(wanted).max())
    told = {name: float(value) for name, value in objective.metrics(sums).items()}
    assert told["loss"] == pytest.approx(expected, rel=2e-6)
    assert told["margin"] == pytest.approx(told["chosen_reward"] - told["rejected_reward"], abs=1e-4)
    assert told["pairs"] == len(LINES)
    assert 0 < told["accuracy"] < 1
    evaluated = objective.evaluate({name: float(value) for name, value in sums.items()}, num_bytes=None)
    assert evaluated == pytest.approx(told, rel=1e-6)


def test_nothing_held_out_is_told(rows):
    objective, _, _ = rows
    with pytest.raises(StackError, match=r"no pair is held out; raise data\.heldout_fraction"):
        objective.evaluate({"pairs": 0.0, "tokens": 0.0}, num_bytes=None)
