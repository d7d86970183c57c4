"""Greedy generation with a cache writes what Hugging Face transformers writes, token by token."""

import jax

from stack.config import Config
from stack.inference.generate import generate
from stack.interop.hugging_face import config_from_hf, params_from_hf
from stack.step.program import build


def test_greedy_text_is_that_of_transformers(golden):
    model = config_from_hf(golden.config).model_copy(update={"dtype": "float32"})
    config = Config.model_validate({"model": model, "data": {"sequence_length": 16}})
    program = build(config, jax.devices()[:1])
    params = jax.device_put(params_from_hf(golden.weights, model), jax.tree.map(sharding, program.parameters))
    # They are padded on the left.
    prompts = [
        row[len(row) - length :].tolist()
        for row, length in zip(golden.results["prompts"], golden.results["prompt_lengths"], strict=True)
    ]
    theirs = golden.results["generated"].tolist()
    assert generate(program, params, prompts, length=len(theirs[0])) == theirs


def sharding(leaf):
    return leaf.sharding
