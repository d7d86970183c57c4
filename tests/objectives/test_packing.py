"""Texts that share a row cost what they cost alone; held-out rows are always the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import Config
from stack.data import Data, open_data
from stack.data.loader import heldout_batches, training_batches
from stack.data.tokenizer import ByteTokenizer
from stack.doctor.numerics import LIMIT
from stack.kernels.attention import Kind, row_mask
from stack.kernels.attention.intervals import intervals
from stack.objectives import build
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import loss_gradient

LENGTH = 48
KINDS = [
    ("prefix_lm", "decoder"),
    ("span_corruption", "parallel_decoder"),
    ("masked_words", "encoder"),
    ("unilm", "encoder"),
]


def config(kind: str, model: str, folder: str, *, packed: bool = True, seed: int = 0) -> Config:
    more = {"num_types": 4, "norm_placement": "post"} if model == "encoder" else {}
    return Config.model_validate(
        {
            "seed": seed,
            "model": {
                "kind": model,
                "vocab_size": 361,
                "max_length": LENGTH,
                "num_layers": 2,
                "embed_dim": 32,
                "num_heads": 4,
                "init_std": 0.4,
                "position_init_std": 0.4,
                "qkv_bias": False,
                "dtype": "float32",
                **more,
            },
            "objective": {"kind": kind, **({"rate": 0.4} if kind == "span_corruption" else {})},
            "data": {
                "sources": [{"kind": "text", "path": f"{folder}/texts"}],
                "cache_dir": f"{folder}/cache",
                "sequence_length": LENGTH,
                "packed": packed,
                "heldout_fraction": 0.2,
            },
            "train": {"batch_size": 4},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts").mkdir()
    random = np.random.default_rng(0)
    for number in range(120):
        words = ["".join(map(chr, random.integers(97, 123, random.integers(1, 5)))) for _ in range(4)]
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words))
    return str(folder)


def opened(tree: Config) -> Data:
    return open_data(tree, tokenizer=ByteTokenizer(), examples=build(tree).examples, show_progress=False)


def alone(rows: dict[str, np.ndarray], most: int) -> dict[str, np.ndarray]:
    """The texts of packed rows, each at the start of a row of its own; `most` of them, the rest padding."""
    texts = []
    for number in range(len(rows["tokens"])):
        for text in range(1, rows["segments"][number].max() + 1):
            places = np.flatnonzero(rows["segments"][number] == text)
            one = {}
            for name, values in rows.items():
                if name == "example":
                    continue
                if name in ("masked", "labels") and "masked" in rows:
                    mine = np.isin(rows["masked"][number], places) & (rows["labels"][number] >= 0)
                    chosen = values[number][mine] - (places[0] if name == "masked" else 0)
                else:
                    chosen = values[number][places]
                fill = -1 if name == "labels" else 0
                one[name] = np.pad(chosen, (0, values.shape[1] - len(chosen)), constant_values=fill)
            texts.append(one)
    assert len(texts) <= most
    nothing = {name: np.full_like(values, -1 if name == "labels" else 0) for name, values in texts[0].items()}
    texts += [nothing] * (most - len(texts))
    stacked = {name: np.stack([one[name] for one in texts]) for name in texts[0]}
    return stacked | {"example": np.arange(most, dtype=np.int32)}


def numbers(tree: Config, rows: dict[str, np.ndarray]):
    program = programs.build(tree, jax.devices()[:1])
    with meshes.use(program.mesh):
        params = states.init_params(program)
        gradient, sums = jax.jit(partial(loss_gradient, program))(params, jnp.int32(0), rows)
        return sums, gradient


@pytest.mark.parametrize(
    ("kind", "model"),
    [pytest.param(*KINDS[i], marks=[pytest.mark.full] if i in (1, 2) else []) for i in range(len(KINDS))],
)
def test_texts_that_share_a_row_cost_what_they_cost_alone(folder, kind, model):
    tree = config(kind, model, folder)
    data, objective = opened(tree), build(tree)
    draws = np.stack([np.zeros(4, int), np.zeros(4, int), np.arange(4)], axis=1)
    rows = dict(data.train.examples.read(data.train, np.arange(4), draws, objective.fields))
    rows["example"] = np.arange(4, dtype=np.int32)
    assert rows["segments"].max() >= 2, "several texts share a row"
    packed, expected = numbers(tree, rows)
    for other in (True, False):
        sums, gradient = numbers(config(kind, model, folder, packed=other), alone(rows, 16))
        assert float(sums["tokens"]) == float(packed["tokens"]) > 8
        np.testing.assert_allclose(float(sums["nll"]), float(packed["nll"]), rtol=1e-6)
        for one, exact in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, exact, atol=LIMIT * float(jnp.abs(exact).max()))


@pytest.mark.parametrize(("kind", "model"), KINDS)
def test_what_a_token_of_a_real_row_sees_is_one_run_of_columns(folder, kind, model):
    """Kernels that go by blocks rely on it."""
    tree = config(kind, model, folder)
    data, objective = opened(tree), build(tree)
    draws = np.stack([np.zeros(8, int), np.zeros(8, int), np.arange(8)], axis=1)
    rows = data.train.examples.read(data.train, np.arange(8), draws, objective.fields)
    segments, positions = (jnp.asarray(rows[name]) for name in ("segments", "positions"))
    kinds: list[Kind] = ["prefix"] if "prefix" in rows else ["causal", "full"]
    prefix = jnp.asarray(rows["prefix"]) if "prefix" in rows else None
    for mask in (row_mask(segments, positions, packed=True, kind=each, prefix=prefix) for each in kinds):
        real = np.asarray(segments) > 0
        told = np.asarray(intervals(mask).allowed(LENGTH))
        np.testing.assert_array_equal(told[real], np.asarray(mask.allowed())[real])


@pytest.mark.parametrize(("kind", "model"), KINDS)
def test_held_out_rows_are_the_same_for_every_seed_and_training_rows_are_not(folder, kind, model):
    layout = programs.build(config(kind, model, folder), jax.devices()[:1]).layout

    def batches(seed: int):
        tree = config(kind, model, folder, seed=seed)
        data, fields = opened(tree), build(tree).fields
        heldout, _ = heldout_batches(data.heldout, fields=fields, batch_size=4, layout=layout)
        train = training_batches(
            data.train, fields=fields, batch_size=4, seed=seed, shuffle=False, layout=layout
        )
        return jax.tree.map(np.asarray, (heldout(0), train(0)))

    (heldout, train), (same, other) = batches(0), batches(1)
    for name, values in heldout.items():
        np.testing.assert_array_equal(values, same[name])
    assert any((values != other[name]).any() for name, values in train.items()), "drawn anew with a seed"


def test_a_row_is_drawn_anew_in_every_epoch(folder):
    tree = config("masked_words", "encoder", folder)
    data, fields = opened(tree), build(tree).fields
    layout = programs.build(tree, jax.devices()[:1]).layout
    rows = data.train.num_rows
    batch = training_batches(data.train, fields=fields, batch_size=rows, seed=0, shuffle=False, layout=layout)
    first, second = batch(0), batch(1)
    np.testing.assert_array_equal(first["segments"], second["segments"])
    assert (np.asarray(first["masked"]) != np.asarray(second["masked"])).mean() > 0.5


def test_a_batch_is_of_its_step_and_not_of_the_processes(folder):
    tree = config("unilm", "encoder", folder)
    data, fields = opened(tree), build(tree).fields

    def made(devices: int):
        layout = programs.build(tree.replace(f"mesh.data={devices}"), jax.devices()[:devices]).layout
        batch = training_batches(data.train, fields=fields, batch_size=4, seed=0, shuffle=True, layout=layout)
        return jax.tree.map(np.asarray, batch(3))

    one, four = made(1), made(4)
    for name, values in one.items():
        np.testing.assert_array_equal(values, four[name])
