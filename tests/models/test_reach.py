"""Which tokens a hidden state depends on, found by changing one after another: what masks mean."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import TypeAdapter

from stack.config.model import AnyModel
from stack.models import model_class
from stack.models.stack import Execution

LENGTH = 14
SEGMENTS = np.array([1] * 5 + [2] * 7 + [0] * 2, np.int32)
POSITIONS = np.array([*range(5), *range(7), 0, 0], np.int32)
PREFIX = np.array([1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0], np.int32)
"""Two tokens of the first text are its prefix, three of the second's."""


def hidden(kind: str, fields: dict[str, np.ndarray], **model) -> Any:
    """The function from tokens [length] to hidden states of one layer, [length, embed]."""
    tree = {
        "kind": kind,
        "vocab_size": 50,
        "max_length": LENGTH,
        "num_layers": 1,
        "embed_dim": 16,
        "num_heads": 2,
        "init_std": 0.5,
        "dtype": "float32",
        **model,
    }
    config = TypeAdapter(AnyModel).validate_python(tree)
    made: Any = model_class(config)(config, rngs=nnx.Rngs(0))
    rows = {name: jnp.asarray(values)[None] for name, values in fields.items()}
    graph, params = nnx.split(made)

    @jax.jit
    def call(tokens):
        return nnx.merge(graph, params)(rows | {"tokens": tokens[None]}, Execution()).hidden[0]

    return call


def reach(call: Any) -> np.ndarray:
    """[queries, keys] bool: whether the state at a place changes with the token at another."""
    tokens = np.random.default_rng(0).integers(0, 50, LENGTH).astype(np.int32)
    before = np.asarray(call(tokens))
    seen = []
    for place in range(LENGTH):
        changed = tokens.copy()
        changed[place] = (changed[place] + 7) % 50
        seen.append(np.abs(np.asarray(call(changed)) - before).max(1) > 1e-6)
    return np.stack(seen, axis=1)


def expected(*, both_ways: np.ndarray | bool, window: int | None = None) -> np.ndarray:
    """By definition: of its own text, those before it, and those that all of the text sees."""
    allowed = np.zeros((LENGTH, LENGTH), bool)
    for query in range(LENGTH):
        for key in range(LENGTH):
            same = SEGMENTS[query] == SEGMENTS[key]
            distance = POSITIONS[query] - POSITIONS[key]
            seen = distance >= 0 or bool(np.broadcast_to(both_ways, LENGTH)[key])
            allowed[query, key] = same and seen and (window is None or abs(distance) < window)
    return allowed


ROWS = {"segments": SEGMENTS, "positions": POSITIONS}
CASES: dict[str, tuple[str, dict[str, np.ndarray], dict[str, Any], dict[str, Any]]] = {
    "decoder": ("decoder", {}, {}, {"both_ways": False}),
    "decoder, prefix": ("decoder", {"prefix": PREFIX}, {}, {"both_ways": PREFIX > 0}),
    "parallel decoder, prefix": ("parallel_decoder", {"prefix": PREFIX}, {}, {"both_ways": PREFIX > 0}),
    "encoder": ("encoder", {}, {}, {"both_ways": True}),
    "encoder, window": ("encoder", {}, {"sliding_window": 3}, {"both_ways": True, "window": 3}),
    "encoder, UniLM": (
        "encoder",
        {"prefix": PREFIX, "types": 2 + (1 - PREFIX)},
        {"num_types": 4, "norm_placement": "post"},
        {"both_ways": PREFIX > 0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_token_sees_what_its_mask_says(case):
    kind, fields, model, rule = CASES[case]
    seen = reach(hidden(kind, ROWS | fields, **model))
    used = SEGMENTS > 0
    np.testing.assert_array_equal(seen[used][:, used], expected(**rule)[used][:, used])
    assert not seen[used][:, ~used].any(), "padding is seen by nobody"
