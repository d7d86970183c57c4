"""Several tasks on one trunk: each counts its own rows, on any mesh; sources may be evened out."""

import json
import random
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from stack.config import Config, ConfigError, StackError
from stack.data import open_data
from stack.data.loader import training_batches
from stack.data.tokenizer import ByteTokenizer
from stack.evaluation.evaluate import evaluate
from stack.evaluation.files import evaluate_file, read_given
from stack.evaluation.predict import predict
from stack.objectives.labels import with_labels
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import eval_step, loss_gradient

WORDS = ["red", "green", "blue", "cat", "dog", "fish", "runs", "sits", "eats", "far", "near"]
TASKS = (
    ("tone", {"kind": "classification"}),
    ("facets", {"kind": "classification", "multi_label": True, "text": "body", "label": "tags"}),
    ("find", {"kind": "retrieval"}),
)


def write(folder: Path, name: str, records: list[dict]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def config(folder: Path, mesh: dict | None = None, **changes) -> Config:
    draw = random.Random(0)

    def words(number: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(number))

    write(folder, "tone", [{"text": words(3), "label": draw.choice("ab")} for _ in range(80)])
    tags = [draw.sample(["x", "y", "z"], draw.randint(0, 3)) for _ in range(40)]
    write(folder, "facets", [{"body": words(3), "tags": some} for some in tags])
    write(folder, "find", [{"query": words(2), "passage": words(3)} for _ in range(20)])
    sources = [
        {"kind": "jsonl", "path": f"{folder}/{name}.jsonl", "field": None, "task": name} for name, _ in TASKS
    ]
    data = {"sequence_length": 96, "cache_dir": f"{folder}/cache", "heldout_fraction": 0.2}
    tree = {
        "model": {
            "kind": "encoder",
            "vocab_size": 257,
            "num_layers": 1,
            "embed_dim": 16,
            "num_heads": 2,
            "dtype": "float32",
            "init_std": 0.2,
            # Without it the bias of keys has no gradient.
            "attention_softcap": 2.0,
        },
        "objective": {
            "kind": "multi_task",
            "tasks": [{"name": name, "objective": options} for name, options in TASKS],
        },
        "data": data | {"sources": sources} | changes.pop("data", {}),
        "mesh": mesh or {"fsdp": 1},
        "train": {"batch_size": 8},
        "eval": {"every": 0},
        **changes,
    }
    return with_labels(Config(**tree))


def gradient(made: Config, devices: int) -> tuple[float, dict, dict[str, np.ndarray]]:
    program = programs.build(made, jax.devices()[:devices])
    data = open_data(made, examples=program.objective.examples, show_progress=False)
    with meshes.use(program.mesh):
        batch = training_batches(
            data.train,
            fields=program.objective.fields,
            batch_size=8,
            seed=0,
            shuffle=True,
            layout=program.layout,
        )(0)
        params = states.init_params(program)
        found, sums = jax.jit(partial(loss_gradient, program))(params, np.int32(3), batch)
    leaves = jax.tree_util.tree_flatten_with_path(found)[0]
    values = {jax.tree_util.keystr(path): np.asarray(jax.device_get(leaf)) for path, leaf in leaves}
    return float(sums["loss"]), {name: float(value) for name, value in sums.items()}, values


def test_a_task_counts_as_many_rows_as_it_has_on_any_mesh(tmp_path) -> None:
    loss, sums, whole = gradient(config(tmp_path), 1)
    rows = {name: sums[f"{name}.rows"] for name, _ in TASKS}
    assert sum(rows.values()) == 8
    assert all(rows.values())
    shares = [rows[name] / 8 * sums[f"{name}.nll"] / sums[f"{name}.count"] for name, _ in TASKS]
    assert loss == pytest.approx(sum(shares), rel=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in whole.values())
    split, _, parts = gradient(config(tmp_path, {"fsdp": 4, "tensor": 2}), 8)
    assert split == pytest.approx(loss, rel=1e-6)
    for name, leaf in whole.items():
        assert np.abs(parts[name] - leaf).max() <= 1e-5 * np.abs(leaf).max(), name


def test_each_task_is_evaluated_and_asked_by_its_name(tmp_path) -> None:
    made = config(tmp_path)
    program = programs.build(made, jax.devices()[:1])
    data = open_data(made, examples=program.objective.examples, show_progress=False)
    with meshes.use(program.mesh):
        params = states.init_params(program)
        told = evaluate(program, jax.jit(partial(eval_step, program)), params, data.heldout)
    assert {"tone_accuracy", "facets_micro_f1", "find_mrr", "loss"} <= told.keys()
    run, path = (program, params, ByteTokenizer()), str(tmp_path / "tone.jsonl")
    own = evaluate_file(*run, path, task="tone")
    given = list(read_given(path))
    answers = list(predict(*run, given, task="tone"))
    right = [answer["label"] == each.record["label"] for answer, each in zip(answers, given, strict=True)]
    assert own["tone_accuracy"] == pytest.approx(np.mean(right))
    assert "find_mrr" not in own
    with pytest.raises(StackError, match="--head is missing: name one of the run's: tone, facets, find"):
        next(iter(predict(*run, given)))


@pytest.mark.parametrize(("temperature", "power"), [(1.0, 1.0), (2.0, 0.5)])
def test_temperature_evens_sources_out(tmp_path, temperature, power) -> None:
    made = config(tmp_path, data={"temperature": temperature})
    data = open_data(made, examples=programs.build(made, jax.devices()[:1]).objective.examples)
    rows = np.array([part.num_rows for part in data.train.parts])
    np.testing.assert_allclose(data.train.weights, rows**power)
    plain = config(tmp_path)
    other = open_data(plain, examples=programs.build(plain, jax.devices()[:1]).objective.examples)
    assert other.train.weights == (1.0, 1.0, 1.0)
    assert data.fingerprint["packing"] != other.fingerprint["packing"]


def test_names_that_do_not_meet_are_refused(tmp_path) -> None:
    made = config(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.task=tune: name one of objective\.tasks: tone"):
        made.replace("data.sources.0.task=tune")
    with pytest.raises(ConfigError, match=r"no source of data\.sources is of task 'facets'"):
        made.replace("data.sources.1.task=tone")
    with pytest.raises(ConfigError, match="tasks has 'tone' twice"):
        made.replace("objective.tasks.1.name=tone")


def test_what_a_head_drops_is_dropped_and_duplicates_are_refused(tmp_path) -> None:
    plain = {"objective": config(tmp_path).objective.model_dump(mode="json")}
    losses = {}
    for rate in (0.0, 0.5):
        for task in plain["objective"]["tasks"]:
            task["objective"]["head_dropout"] = rate
        losses[rate] = gradient(config(tmp_path, **plain), 1)[0]
    assert losses[0.0] != losses[0.5]
    with pytest.raises(
        ConfigError, match=r"data\.deduplicate=exact is not read with objective\.kind=multi_task"
    ):
        config(tmp_path, data={"deduplicate": "exact"})
