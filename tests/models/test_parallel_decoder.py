"""Attention and MLP side by side, against the formula in float64; the model is one file and one line."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.config import Config, ParallelDecoderConfig
from stack.inference.generate import generate
from stack.models import model_class
from stack.models.parallel_decoder import ParallelBlock, ParallelDecoder
from stack.models.stack import Execution
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states

CONFIG = ParallelDecoderConfig(
    vocab_size=61,
    max_length=24,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=1,
    norm="rmsnorm",
    mlp="swiglu",
    position="rotary",
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    init_std=0.4,
    dtype="float32",
)
LENGTH = 9
ROW = {
    "tokens": np.random.default_rng(0).integers(0, 61, (1, LENGTH)).astype(np.int32),
    "positions": np.arange(LENGTH, dtype=np.int32)[None],
    "segments": np.ones((1, LENGTH), np.int32),
}


def normalise(x, scale):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + CONFIG.norm_epsilon) * scale


def rotate(x):
    """[length, heads, head_dim]; arXiv 2104.09864, equation 34, halves against each other."""
    half = x.shape[-1] // 2
    angle = np.arange(LENGTH)[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
    )


def block(x, layer):
    """x + attention(norm(x)) + mlp(norm(x)), [length, embed] in float64."""
    y = normalise(x, layer["norm"]["scale"])
    names = ("query", "key", "value")
    query, key, value = (np.einsum("le,ehd->lhd", y, layer["attention"][n]["kernel"]) for n in names)
    scores = np.einsum("qhd,kgd->hqk", rotate(query), rotate(key)) / np.sqrt(query.shape[-1])
    weights = np.exp(np.where(np.tri(LENGTH, dtype=bool), scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,kgd->qhd", weights, value)
    attention = np.einsum("qhd,hde->qe", mixed, layer["attention"]["out"]["kernel"])
    gate, up = (y @ layer["mlp"][name]["kernel"] for name in ("gate", "up"))
    return x + attention + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"]


def test_the_model_is_its_formula():
    model = ParallelDecoder(CONFIG, rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model)))
    x = params["embed"]["table"][ROW["tokens"][0]]
    for number in range(CONFIG.num_layers):
        x = block(x, jax.tree.map(lambda leaf: leaf[number], params["layers"]))  # noqa: B023
    hidden = model(jax.tree.map(jnp.asarray, ROW), Execution()).hidden[0]
    np.testing.assert_allclose(hidden, normalise(x, params["final_norm"]["scale"]), atol=2e-5)


def test_cached_generation_is_the_model_itself():
    config = Config.model_validate({"model": CONFIG, "data": {"sequence_length": 16}})
    program = programs.build(config, jax.devices()[:1])
    with meshes.use(program.mesh):
        params = states.init_params(program)
    (text,) = generate(program, params, [[5, 9]], length=LENGTH - 2)
    model = program.merge(params)
    for place, token in enumerate(text, start=1):
        tokens = jnp.asarray([[5, 9, *text, *[0] * LENGTH][:LENGTH]], jnp.int32)
        output = model(jax.tree.map(jnp.asarray, ROW) | {"tokens": tokens}, Execution())
        assert int((output.hidden[0, place] @ output.table[:61].T).argmax()) == token


def test_one_file_and_the_place_that_names_classes_are_all_of_it():
    """The worked example of CONTRIBUTING.md."""
    root = Path(__file__).parents[2] / "stack"
    mentions = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"parallel_decoder|ParallelDecoder", path.read_text("utf-8"))
    }
    assert mentions - {"config/__init__.py", "interop/hugging_face.py", "doctor/numerics.py"} == {
        "config/model.py",
        "models/parallel_decoder.py",
    }, "the rest export the name, refuse it, or prove it"


def test_the_section_of_a_kind_names_its_class():
    assert model_class(CONFIG) is ParallelDecoder
    assert ParallelDecoder.block is ParallelBlock
    with pytest.raises(ModuleNotFoundError):
        model_class(type("Missing", (), {"implementation": "stack.models.missing:Missing"})())  # pyrefly: ignore[bad-argument-type]
