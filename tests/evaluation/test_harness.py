"""A run answers the lm-evaluation-harness as the harness's own Hugging Face model does."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from stack import StackError, Trainer
from stack.cli import main
from stack.interop.safetensors_folder import SINGLE
from stack.transfer.importing import load_weights

lm_eval = pytest.importorskip("lm_eval", reason="the lm-evaluation-harness: pip install 'stack[lm-eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402

from stack.evaluation.harness import StackLM  # noqa: E402
from stack.evaluation.harness_tasks import evaluate_tasks  # noqa: E402

GOLDENS = Path(__file__).parents[1] / "goldens"


class Golden:
    """What tests/goldens/make_harness.py wrote, and a run of its model."""

    def __init__(self, name: str, folder: Path) -> None:
        with np.load(GOLDENS / f"harness_{name}.npz") as file:
            weights = {key: file[key] for key in file.files if key != "content"}
            content = json.loads(str(file["content"]))
        self.asked, self.told = content["asked"], content["told"]
        saved = folder / "saved"
        saved.mkdir()
        for part in ("config", "tokenizer", "tokenizer_config"):
            (saved / f"{part}.json").write_text(json.dumps(content[part]))
        safetensors.numpy.save_file(weights, saved / SINGLE)
        self.run = folder / "run"
        for _ in load_weights(saved, self.run, ["model.dtype=float32"], devices=jax.devices()[:1]):
            pass

    def model(self, *overrides: str, devices: int = 1, **options: Any) -> StackLM:
        trainer = Trainer.from_run(self.run, overrides, devices=jax.devices()[:devices])
        return StackLM(trainer.program, trainer.trained, trainer.words, **options)

    def check(self, model: Any, kind: str) -> None:
        answers, told = ask(model, kind, self.asked[kind]), self.told[kind]
        if kind == "loglikelihood":
            assert [is_greedy for _, is_greedy in answers] == [is_greedy for _, is_greedy in told]
            answers, told = [each for each, _ in answers], [each for each, _ in told]
        if kind == "generate_until":
            assert answers == told
        else:
            np.testing.assert_allclose(answers, told, rtol=0, atol=1e-4)


def ask(model: Any, kind: str, requests: list[Any]) -> list[Any]:
    instances = [Instance(kind, {}, tuple(each), number) for number, each in enumerate(requests)]
    return getattr(model, kind)(instances)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def golden(request, tmp_path_factory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(golden) -> StackLM:
    return golden.model("eval.batch_size=4")


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_the_answers_are_those_of_the_harness_own_model(golden, model, kind):
    golden.check(model, kind)
