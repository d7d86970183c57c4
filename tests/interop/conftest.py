"""What transformers computed for small models, from the files of tests/goldens."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

GOLDENS = Path(__file__).parents[1] / "goldens"
FAMILIES = ("gpt2", "llama", "llama_yarn", "mistral", "qwen2", "qwen3", "qwen3_window", "gemma2", "gemma3")
ENCODERS = ("bert", "roberta", "bert_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Golden:
    config: dict
    weights: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    results: dict[str, np.ndarray]


def read(family):
    with np.load(GOLDENS / f"hugging_face_{family}.npz") as file:
        arrays = dict(file)
    config = json.loads(str(arrays.pop("config")))
    groups = {"weight": {}, "gradient": {}, "": {}}
    for name, array in arrays.items():
        group, _, rest = name.rpartition("/")
        groups[group][rest] = array
    return Golden(config=config, weights=groups["weight"], gradients=groups["gradient"], results=groups[""])


@pytest.fixture(params=FAMILIES)
def golden(request):
    return read(request.param)


@pytest.fixture(params=ENCODERS)
def encoder(request):
    return read(request.param)


@pytest.fixture
def bert():
    return read("bert")


@pytest.fixture
def roberta():
    return read("roberta")


@pytest.fixture
def gpt2():
    return read("gpt2")


@pytest.fixture
def llama():
    return read("llama")


@pytest.fixture(params=["t5", "t5_v1_1"])
def t5_golden(request):
    return read(request.param)


@pytest.fixture
def t5_v1_1():
    return read("t5_v1_1")
