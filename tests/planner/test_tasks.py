"""Plans of tasks: no words are scored, and no parameters are there that would."""

import jax
import pytest
from task_cases import tree

from stack.config import Config, ConfigError
from stack.planner.formula import workload
from stack.planner.formula.memory import memory
from stack.planner.formula.shapes import num_parameters
from stack.step import program as programs

LABELS = {"labels": ["a", "b", "c"], "class_weights": "none"}


@pytest.mark.parametrize("trunk", ["decoder", "encoder"])
def test_a_plan_holds_what_the_task_holds(trunk):
    made = tree("classification", "nowhere", trunk, objective=LABELS, model={"tied_embeddings": False})
    config = Config(**made)
    work = workload.from_config(config, 1)
    program = programs.build(config, jax.devices()[:1])
    # An encoder's bias over words is of no size, as a task's own head.
    head, words = 16 * 3 + 3, work.model.vocab_size if trunk == "encoder" else 0
    assert num_parameters(work.model) == program.num_parameters - head + words
    assert work.scored_tokens == work.loss_chunk == 0
    if trunk == "decoder":
        scores = Config(**made | {"objective": {}, "data": {"sequence_length": 64}})
        assert memory(work).total < memory(workload.from_config(scores, 1)).total


def test_labels_that_only_records_would_tell_are_asked_for():
    made = tree("classification", "nowhere", objective={"class_weights": "none"})
    program = programs.build(Config(**made), jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"objective\.labels is empty: name them"):
        _ = program.num_parameters
