"""What is measured is what it says: shapes, right numbers by formulas in float64, and settings that fit."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from stack.bench import command, data, models
from stack.bench.case import Machine
from stack.bench.serve import UnableError
from stack.bench.suites import attention, cross_entropy, grouped_matmul, matmul, step
from stack.bench.suites.machine import describe
from stack.config import load
from stack.hardware import chip as chips
from stack.kernels.attention import KERNELS, Request
from stack.planner.formula.shapes import num_parameters

GPU = Machine(
    platform="gpu",
    device_kind="NVIDIA H100 80GB HBM3",
    compute_capability=9.0,
    memory_bytes=79e9,
    processor="a processor",
    cores=16,
    versions={},
    client="cuda",
)
CONFIGS = Path(__file__).parents[2] / "configs"
ABOUT = {"platform": "cpu", "device_kind": "cpu", "compute_capability": None}


@pytest.mark.parametrize("name", ["gpt2_124m", "gpt2_1_5b", "quickstart", "nanogpt_cpu", "llama3_8b"])
def test_models_are_those_of_the_recipes(name):
    recipe = load(CONFIGS / f"{name}.yaml").model
    assert models.config(name, length=recipe.max_length).model == recipe


def test_a_llama_of_3b_has_as_many_parameters_as_the_published_one():
    assert num_parameters(models.config("llama3_3b", length=8192).model) == 3_212_749_824


def test_documents_of_a_row_begin_at_0_and_no_label_crosses_them():
    batch = data.batch(3, 64, 50, packed=True)
    assert batch["segments"].max() > 2
    starts = np.diff(batch["segments"], axis=1, prepend=0) == 1
    assert (batch["positions"][starts] == 0).all()
    assert (np.diff(batch["positions"], axis=1)[~starts[:, 1:]] == 1).all()
    ends = np.roll(starts, -1, axis=1)
    ends[:, -1] = True
    assert (batch["labels"][ends] == -1).all()
    follows = np.roll(batch["tokens"], -1, axis=1)[~ends]
    assert (batch["labels"][~ends] == follows).all()
    assert (data.batch(3, 64, 50, packed=False)["labels"] >= 0).all()


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_are_those_that_see_each_other(packed):
    segments = data.segments(2, 40, packed=packed)
    seen = (segments[:, :, None] == segments[:, None, :]) & np.tri(40, dtype=bool)
    assert data.pairs(2, 40, packed=packed) == seen.sum()


def made(suite, machine_of: Machine | None = None, **changes) -> dict:
    (case, *_) = suite.cases(machine_of or describe(), tiny=True)
    return case.spec | ABOUT | changes


@pytest.mark.parametrize("packed", [True, False])
def test_attention_is_held_against_its_formula(packed):
    """The result and all gradients, in float64."""
    problem = attention._Problem(made(attention, packed=packed, length=24, rows=2, kv_heads=2, heads=4))
    query, key, value, cotangent = (
        np.asarray(x, np.float64) for x in (problem.query, problem.key, problem.value, problem.cotangent)
    )
    key, value = (np.repeat(x, 2, axis=2) for x in (key, value))
    segments = np.asarray(problem.segments)
    seen = (segments[:, :, None] == segments[:, None, :]) & np.tri(24, dtype=bool)
    scale = query.shape[-1] ** -0.5
    scores = np.where(seen[:, None], np.einsum("bqhd,bkhd->bhqk", query, key) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    result = np.einsum("bhqk,bkhd->bqhd", weights, value)
    slopes = np.einsum("bqhd,bkhd->bhqk", cotangent, value)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * scale
    of_query = np.einsum("bhqk,bkhd->bqhd", slopes, key)
    of_key = np.einsum("bhqk,bqhd->bkhd", slopes, query).reshape(2, 24, 2, 2, -1).sum(3)
    of_value = np.einsum("bhqk,bqhd->bkhd", weights, cotangent).reshape(2, 24, 2, 2, -1).sum(3)
    for right, exact in zip(problem.right, (result, of_query, of_key, of_value), strict=True):
        np.testing.assert_allclose(right, exact, rtol=1e-4, atol=1e-5)


def test_the_loss_is_held_against_its_formula():
    problem = cross_entropy._Problem(made(cross_entropy))
    words = problem.spec["words"]
    hidden, table = np.asarray(problem.hidden, np.float64), np.asarray(problem.table, np.float64)
    labels = np.asarray(problem.labels)
    scores = hidden @ table[:words].T
    normaliser = np.log(np.exp(scores).sum(1))
    loss = (normaliser - scores[np.arange(len(labels)), labels]).mean()
    slopes = np.exp(scores - normaliser[:, None])
    slopes[np.arange(len(labels)), labels] -= 1
    slopes /= len(labels)
    of_table = np.zeros_like(table)
    of_table[:words] = slopes.T @ hidden
    for right, exact in zip(problem.right, (loss, slopes @ table[:words], of_table), strict=True):
        np.testing.assert_allclose(right, exact, rtol=1e-4, atol=1e-7)


def test_products_of_experts_are_held_against_their_formula():
    problem = grouped_matmul._Problem(made(grouped_matmul))
    tokens, weights, slope = (
        np.asarray(x, np.float64) for x in (problem.tokens, problem.weights, problem.slope)
    )
    result, of_tokens, of_weights = np.zeros_like(slope), np.zeros_like(tokens), np.zeros_like(weights)
    ends = np.cumsum(problem.sizes)
    assert ends[-1] == len(tokens)
    for group, (begin, end) in enumerate(zip(ends - problem.sizes, ends, strict=True)):
        result[begin:end] = tokens[begin:end] @ weights[group]
        of_tokens[begin:end] = slope[begin:end] @ weights[group].T
        of_weights[group] = tokens[begin:end].T @ slope[begin:end]
    for right, exact in zip(
        problem.right, problem.project(*map(jnp.asarray, (result, of_tokens, of_weights))), strict=True
    ):
        np.testing.assert_allclose(right, exact, rtol=1e-4, atol=1e-4)


def test_a_product_of_a_wrong_expert_is_seen(monkeypatch):
    multiply = grouped_matmul._multiply

    def shifted(name, tokens, weights, sizes):
        return multiply(name, tokens, weights, sizes.at[0].add(-1))

    makers = grouped_matmul.makers(made(grouped_matmul), [])
    assert makers["xla_chunked, with gradients"]().facts["ok"]
    monkeypatch.setattr(grouped_matmul, "_multiply", shifted)
    makers = grouped_matmul.makers(made(grouped_matmul), [])
    assert not makers["xla_chunked, forward"]().facts["ok"]


@pytest.mark.parametrize("name", KERNELS)
def test_contestants_are_all_implementations_those_that_cannot_with_their_reasons(name):
    makers = attention.makers(made(attention), [])
    wanted = Request(platform="cpu", dtype="float32", head_dim=8)
    if obstacles := KERNELS[name].obstacles(wanted):
        with pytest.raises(UnableError, match=re.escape(obstacles[0])):
            makers[name]()
    else:
        assert {f"{name}, forward", f"{name}, with gradients"} <= makers.keys()


def test_a_product_is_named_by_its_shape_and_a_gpu_has_two_ways():
    spec = matmul.ceilings(GPU, tiny=False).spec
    assert matmul.precisions(GPU) == ("bfloat16", "float8")
    names = matmul.makers(spec | ABOUT | {"platform": "gpu"}, []).keys()
    assert "float8 8192 x 8192 x 8192, no Triton" in names
    assert "copy of 1024 MiB" in names
    assert len(names) == 9


@pytest.mark.parametrize(("capability", "blocks"), [(9.0, "block"), (10.0, "mx"), (8.9, None)])
def test_a_product_of_a_layer_in_8_bits_is_taken_in_blocks_too(capability, blocks):
    case = next(case for case in matmul.cases(GPU, tiny=False) if "gpt2_1_5b" in case.title)
    about = ABOUT | {"platform": "gpu", "compute_capability": capability}
    names = matmul.makers(case.spec | about, ["torch"]).keys()
    found = {name.rpartition(", ")[2] for name in names if name.startswith("up float8")}
    assert found == {"up float8 16384 x 1600 x 6400", "no Triton", *([blocks] if blocks else [])}


def test_a_product_in_blocks_is_held_to_its_definition():
    spec = {"shape": [64, 96, 40], "precision": "float8", "device_kind": "cpu", "group": ""}
    facts = matmul._blocks(spec, "mx").facts
    assert facts["ok"]
    assert facts["error"] < 0.004


def test_an_error_is_a_share_of_what_is_right_and_no_number_is_never_right():
    right = jnp.array([3.0, 4.0])
    assert attention.relative_error(jnp.array([3.0, 4.5]), right) == pytest.approx(0.1)
    assert not attention.relative_error(jnp.array([math.nan, 4.0]), right) <= 0.02
    assert attention._badness(math.nan) == math.inf


def test_steps_on_a_gpu_fit_and_cover_models_lengths_and_rows_of_both_kinds():
    cases = step.cases(GPU, tiny=False)
    chip = chips.load("h100")
    for case in cases:
        config = step._config(case.spec)
        assert step._plan(config, chip)[1] < 79e9
        assert (config.data.packed, config.model.dtype) == (case.spec["packed"], "bfloat16")
        precision = "float8" if config.kernels.matmul == "fp8" else "bfloat16"
        assert case.spec["peak_flops"] == chip.peak_flops[precision]
    seen = {(case.spec["model"], case.spec["length"], case.spec["packed"]) for case in cases}
    for name in ("gpt2_1_5b", "gpt2_124m", "llama3_3b"):
        assert {packed for model, _, packed in seen if model == name} == {True, False}
    assert {length for _, length, _ in seen} == {2048, 8192, 16_384}
    # The best two settings of each, the likelier to be fast first.
    (first, second, *eight) = (case for case in cases if case.title.startswith("gpt2_1_5b, 2,048 whole"))
    assert {case.spec["precision"] for case in eight} == {"float8"}
    assert first.priority < second.priority
    assert (first.spec["rows"], first.spec["remat"]) != (second.spec["rows"], second.spec["remat"])


def test_a_device_nobody_knows_gets_the_safest_setting():
    unknown = dataclasses.replace(GPU, device_kind="NVIDIA H300")
    cases = step.cases(unknown, tiny=False)
    assert {case.spec["remat"] for case in cases} == {"full"}
    assert matmul.precisions(unknown) == ("bfloat16", "float8")


def test_little_is_needed_beside_jax_flax_and_optax():
    """What a machine with a GPU may lack."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("grain", "tokenizers", "array_record", "pyarrow", "datasets"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import stack.bench.command, stack.bench.child, stack.bench.suites.machine
from stack.cli.run import run
sys.exit(run(["bench", "--help"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for suite in command.SUITES:
        assert suite in done.stdout
