"""bfloat16 itself, against float32: what every layout shares no comparison of layouts can see."""

import importlib
from functools import cache, partial
from typing import get_args

import jax
import numpy as np
import pytest

from stack.config import Config
from stack.doctor.numerics import BFLOAT16_LIMIT, ONE_DEVICE, STEP, Family, compute, config_of, leaf_errors
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import loss_gradient

ROWS, LENGTH = 64, 128
FAMILIES: tuple[Family, ...] = ("gpt", "llama")


@cache
def text() -> np.ndarray:
    """8,192 bytes of the language reference and the one after them: `e` and the blank are a fifth."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return np.frombuffer(topics["assignment"].encode()[: ROWS * LENGTH + 1], np.uint8).astype(np.int32)


def gradient(family: Family, dtype: str) -> dict[str, np.ndarray]:
    tree = config_of(ONE_DEVICE, family, dtype).model_dump(mode="json")
    tree["model"] |= {"vocab_size": 257, "max_length": LENGTH}
    tree["data"] |= {"sequence_length": LENGTH}
    program = programs.build(Config.model_validate(tree), jax.devices()[:1])
    whole = np.arange(LENGTH, dtype=np.int32) + np.zeros((ROWS, 1), np.int32)
    batch = {
        "tokens": text()[:-1].reshape(ROWS, LENGTH),
        "labels": text()[1:].reshape(ROWS, LENGTH),
        "segments": np.ones_like(whole),
        "positions": whole,
        "example": np.arange(ROWS, dtype=np.int32),
    }
    with meshes.use(program.mesh):
        params = states.init_params(program)
        gradient, _ = jax.jit(partial(loss_gradient, program))(params, np.int32(5), batch)
    leaves = jax.tree_util.tree_flatten_with_path(gradient)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in leaves}


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_far_from_float32_on_real_text(family):
    """The word table was 17.6% off, as its gradient was added up in bfloat16."""
    errors = leaf_errors(gradient(family, "bfloat16"), gradient(family, "float32"))
    assert {name: error for name, error in errors.items() if error > BFLOAT16_LIMIT} == {}


@pytest.mark.full
@pytest.mark.parametrize("family", get_args(Family))
def test_no_parameter_of_the_contract_is_far_from_float32(family):
    """Over four steps: of one, a gradient may be small by chance, and its error a large share of it."""

    def gradients(dtype: str) -> dict[str, np.ndarray]:
        each = [compute(ONE_DEVICE, family, dtype, step=step).gradient for step in range(STEP, STEP + 4)]
        return {name: np.stack([gradient[name] for gradient in each]) for name in each[0]}

    errors = leaf_errors(gradients("bfloat16"), gradients("float32"))
    assert {name: error for name, error in errors.items() if error > BFLOAT16_LIMIT} == {}
