"""Losses of tasks against NumPy in float64, over batches as they are read; their gradients too."""

import itertools
import json
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_cases import LENGTH, OBJECTIVES, compute, config, leaves, records

from stack.data import open_data
from stack.objectives.retrieval import NEGATIVE, PASSAGE, QUERY
from stack.objectives.task import pool
from stack.parallel import mesh as meshes
from stack.step import program as programs

WIDTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def opened(folder):
    """Program, and all rows of a kind of task behind each other, with two rows of padding."""
    made = {}

    def get(name: str):
        if name not in made:
            program = programs.build(config(name, folder, data={"shuffle": False}), jax.devices()[:1])
            task: Any = program.objective
            data = open_data(program.config, examples=task.examples, show_progress=False).train
            number = data.num_rows
            draws = np.zeros((number, 3), np.int64)
            rows = data.examples.read(data, np.arange(number), draws, task.fields)
            batch = {}
            for field in task.fields:
                read = np.arange(number) if field.name == "example" else rows[field.name]
                batch[field.name] = np.pad(
                    read, [(0, 2), *[(0, 0)] * (read.ndim - 1)], constant_values=field.padding
                )
            made[name] = program, task, batch, data
        return made[name]

    return get


def scores_of(name: str, task: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random ones, in the shape of the task's."""
    rng = np.random.default_rng(7)
    rows, units = len(batch["tokens"]), task.sizes["units"]
    shapes = {
        "tagging": (rows, LENGTH, task.sizes.get("classes")),
        "span_answers": (rows, LENGTH, 2),
        "key_sentences": (rows, LENGTH),
        "retrieval": (rows, units, WIDTH),
        "reranking": (rows, units),
    }
    shape = shapes.get(name, (rows, units, task.sizes.get("classes")))
    key = "vectors" if name == "retrieval" else "scores"
    return {key: rng.normal(size=shape).astype(np.float32)}


def log_softmax(x: np.ndarray) -> np.ndarray:
    most = x.real.max()
    return x - most - np.log(np.exp(x - most).sum())


def cross_entropies(scores, labels, smoothing=0.0, weights=None):
    """Sum and count over all that has a label, one by one."""
    loss = count = 0.0
    for place in zip(*np.nonzero(labels >= 0), strict=True):
        label, shares = labels[place], log_softmax(scores[place])
        weight = 1.0 if weights is None else weights[label]
        loss -= weight * ((1 - smoothing) * shares[label] + smoothing * shares.mean())
        count += weight
    return loss, count


def yes_or_no(scores, labels, smoothing=0.0):
    share = 1 / (1 + np.exp(-scores))
    wanted = labels * (1 - smoothing) + smoothing / 2
    return -(wanted * np.log(share) + (1 - wanted) * np.log(1 - share))


def spans(scores, batch):
    loss = count = 0.0
    for row, unit in zip(*np.nonzero(batch["start"] >= 0), strict=True):
        able = (batch["segments"][row] == unit + 1) & (batch["answers"][row] >= 0)
        places = np.flatnonzero(able)
        for number, name in enumerate(("start", "end")):
            wanted = list(places).index(batch[name][row, unit])
            loss -= log_softmax(scores[row, places, number])[wanted] / 2
        count += 1
    return loss, count


def retrieved(vectors, batch, options):
    """Every query among all passages, every passage among all queries; equal texts are no wrong answers.

    Holomorphic in the vectors.
    """
    kinds, names = batch["kinds"].ravel(), batch["names"].ravel()
    rows = np.repeat(np.arange(len(vectors)), vectors.shape[1])
    records = list(zip(rows, batch["records"].ravel(), strict=True))
    flat, loss, widths = vectors.reshape(-1, vectors.shape[-1]), 0.0, (*options.widths, vectors.shape[-1])
    sides = [(QUERY, PASSAGE, (PASSAGE, NEGATIVE)), (PASSAGE, QUERY, (QUERY,))]
    for width in widths:
        some = flat[:, :width]
        with np.errstate(invalid="ignore"):  # Units that are none are of zeros.
            some = some / np.sqrt((some**2).sum(1, keepdims=True))
        for asking, own, among in sides:
            for one in np.flatnonzero(kinds == asking):
                (right,) = (each for each in np.flatnonzero(kinds == own) if records[each] == records[one])
                able = np.isin(kinds, among) & (names != names[right])
                cosines = some[[right, *np.flatnonzero(able)]] @ some[one]
                loss -= log_softmax(cosines / options.temperature)[0] / len(sides) / len(widths)
    return loss, (kinds == QUERY).sum()


def lists(scores, batch):
    loss = count = 0.0
    for row, record in {*zip(*np.nonzero(batch["labels"] >= 0), strict=True)}:
        number = batch["records"][row, record]
        here = (batch["records"][row] == number) & (batch["labels"][row] >= 0)
        if np.flatnonzero(here)[0] == record:  # Once a list.
            shares = log_softmax(scores[row, here])
            loss -= shares[batch["labels"][row, here] > 0].mean()
            count += 1
    return loss, count


def by_numpy(name: str, task: Any, batch: dict[str, np.ndarray], scores: Any) -> tuple[Any, Any]:
    labels: Any = batch.get("labels")
    match name:
        case "classification":
            return cross_entropies(scores, labels, 0.1, task.options.class_weights)
        case "pairs":
            return cross_entropies(scores, labels)
        case "tagging":
            return cross_entropies(scores, labels, 0.1)
        case "multi_label":
            known = labels[..., 0] >= 0
            return yes_or_no(scores[known], labels[known], 0.2).mean(-1).sum(), known.sum()
        case "key_sentences":
            return yes_or_no(scores[labels >= 0], labels[labels >= 0]).sum(), (labels >= 0).sum()
        case "span_answers":
            return spans(scores, batch)
        case "retrieval":
            return retrieved(scores, batch, task.options)
    return lists(scores, batch)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_their_gradients_are_those_of_numpy(name, opened):
    program, task, batch, _ = opened(name)
    scores = scores_of(name, task, batch)
    run, (key,) = program.execution(), scores
    arrays = {field: jnp.asarray(values) for field, values in batch.items()}
    grad = jax.value_and_grad(lambda values: task.losses({key: values}, arrays, run)[0])
    loss, gradient = grad(jnp.asarray(scores[key]))
    exact = scores[key].astype(np.float64)
    expected, count = by_numpy(name, task, batch, exact)
    assert count > 10
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(task.count(arrays)) == pytest.approx(count, rel=1e-6)
    # Along some directions, by central differences in float64.
    rng, step = np.random.default_rng(1), 1e-4
    for _ in range(3):
        way = rng.normal(size=exact.shape)
        up, down = (by_numpy(name, task, batch, exact + sign * step * way)[0] for sign in (1, -1))
        assert float((np.float64(gradient) * way).sum()) == pytest.approx((up - down) / 2 / step, rel=1e-4)


def test_the_rows_hold_several_texts_and_some_are_of_padding(opened):
    for name in OBJECTIVES:
        segments = opened(name)[2]["segments"]
        assert segments.max() >= 2, name
        assert not segments[-2:].any()


def said(name: str, task: Any, row: dict[str, np.ndarray], tokenizer: Any) -> list[Any]:
    """What a row says of its records, from its arrays alone."""
    texts, units = [], []
    for unit in range(int(row["segments"].max())):
        here = np.flatnonzero(row["segments"] == unit + 1)
        assert row["positions"][here].tolist() == list(range(len(here)))
        bounds = [0, *np.flatnonzero(row["tokens"][here] == tokenizer.eos)[1:]]
        parts = [here[a + 1 : b] for a, b in itertools.pairwise(bounds)]
        units.append((here, parts))
        texts.append([tokenizer.decode(row["tokens"][part]) for part in parts])
    labels: Any = row.get("labels")
    names = getattr(task.options, "labels", ())
    numbers = range(len(units))
    match name:
        case "classification" | "pairs":
            return [(*texts[unit], names[labels[unit]]) for unit in numbers]
        case "multi_label":
            return [
                (*texts[unit], *(label for label, yes in zip(names, labels[unit], strict=True) if yes))
                for unit in numbers
            ]
        case "tagging":
            told = []
            for text, (_, (part,)) in zip(texts, units, strict=True):
                tags = labels[part]
                where = np.flatnonzero(tags > 0)
                assert not len(where) or tags[where[0]] % 2 == 1
                first = where[:1].tolist()
                told.append((*text, *((a, where[-1] + 1, names[(tags[a] - 1) // 2]) for a in first)))
            return told
        case "span_answers":
            told = []
            for unit, (here, parts) in enumerate(units):
                start, end = row["start"][unit], row["end"][unit]
                answer = "" if start == here[0] else tokenizer.decode(row["tokens"][start : end + 1])
                assert (start == here[0]) == (end == here[0])
                told.append((*texts[unit], start - parts[1][0] if answer else None, answer))
            return told
        case "key_sentences":
            told = []
            for text, (_, (part,)) in zip(texts, units, strict=True):
                ends = np.flatnonzero(labels[part] >= 0) + 1
                pieces = [text[0][a:b].strip() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
                told.append((*pieces, *labels[part][ends - 1].tolist()))
            return told
    told = {}
    for unit in numbers:
        kind = row["kinds"][unit] if name == "retrieval" else labels[unit]
        told.setdefault(row["records"][unit], []).append((int(kind), *texts[unit]))
    return [tuple(each) for each in told.values()]


def written(name: str, record: dict[str, Any]) -> Any:
    """The same of a record."""
    match name:
        case "classification":
            return record["text"], record["label"]
        case "pairs":
            return record["text"], record["other"], str(record["label"]).lower()
        case "multi_label":
            return record["text"], *sorted(record["label"])
        case "tagging":
            return record["text"], *(
                (each["start"], each["end"], each["label"]) for each in record["entities"]
            )
        case "span_answers":
            answers = record["answers"]
            answer = (answers[0]["start"], answers[0]["text"]) if answers else (None, "")
            return record["question"], record["context"], *answer
        case "key_sentences":
            return *record["sentences"], *record["labels"]
        case "retrieval":
            negative = (NEGATIVE, record["negatives"][0])
            return (QUERY, record["query"]), (PASSAGE, record["passage"]), negative
    return tuple(
        (int(number in record["relevant"]), record["query"], text)
        for number, text in enumerate(record["passages"])
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_say_what_the_records_say(name, opened):
    _, task, batch, data = opened(name)
    told: Counter[Any] = Counter()
    for row in range(len(batch["tokens"]) - 2):
        values = {field: whole[row] for field, whole in batch.items()}
        told.update(said(name, task, values, data.tokenizer))
    assert told == Counter(written(name, json.loads(json.dumps(record))) for record in records(name))


@pytest.mark.parametrize("how", ["first", "last", "mean"])
def test_pooling_is_that_of_a_plain_loop(how, opened):
    program, task, batch, _ = opened("pairs")
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(*batch["tokens"].shape, WIDTH)).astype(np.float32)
    arrays = {name: jnp.asarray(values) for name, values in batch.items()}
    number = task.sizes["units"]
    made = pool(jnp.asarray(hidden), arrays, number, how, program.execution())
    expected = np.zeros((len(hidden), number, WIDTH))
    for row in range(len(hidden)):
        for unit in range(batch["segments"][row].max(initial=0)):
            here = hidden[row, batch["segments"][row] == unit + 1].astype(np.float64)
            expected[row, unit] = {"first": here[0], "last": here[-1], "mean": here.mean(0)}[how]
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)


def test_in_batch_negatives_over_devices_give_the_gradient_of_the_global_batch(folder):
    settings = config("retrieval", folder, "encoder", objective={"head_dropout": 0.0, "symmetric": True})
    one = compute(settings)
    many = compute(settings.replace("mesh.data=2", "mesh.fsdp=4", "mesh.zero=3"), 8, one.numbers.params)
    for made in (one, many):
        vectors = np.float64(made.outputs["vectors"])
        loss, count = retrieved(vectors, made.batch, made.task.task)
        assert made.sums["nll"] == pytest.approx(loss, rel=1e-5)
        assert made.sums["count"] == count
        assert made.numbers.loss == pytest.approx(loss / count, rel=1e-5)
    # In float64 by complex steps over the vectors, and from there through the trunk of one device.
    program, task = one.program, one.task
    vectors = np.float64(one.outputs["vectors"])
    wanted = np.zeros_like(vectors)
    for place in zip(*np.nonzero(vectors), strict=True):
        moved = vectors.astype(complex)
        moved[place] += 1e-20j
        wanted[place] = retrieved(moved, one.batch, task.task)[0].imag / 1e-20 / one.sums["count"]
    batch = {name: jnp.asarray(values) for name, values in one.batch.items()}

    @jax.jit
    def back(params: Any, above: Any) -> Any:
        def score(values: Any) -> Any:
            return task.score(program.merge(values), batch, program.execution())["vectors"]

        return jax.vjp(score, params)[1](above)[0]

    with meshes.use(program.mesh):
        tree = jax.tree.structure(program.parameters)
        params = jax.tree.unflatten(tree, list(map(jnp.asarray, one.numbers.params.values())))
        expected = leaves(back(params, jnp.asarray(wanted, jnp.float32)))
    for made in (one, many):
        for name, gradient in expected.items():
            error = np.abs(made.numbers.gradient[name] - gradient).max() / np.abs(gradient).max()
            assert error < 1e-5, name
