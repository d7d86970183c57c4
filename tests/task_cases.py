"""Small records of every task, configs that read them, and what a program makes of a batch."""

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stack import Config
from stack.data import open_data
from stack.data.loader import training_batches
from stack.doctor.numerics import Numbers
from stack.objectives.labels import with_labels
from stack.objectives.task import Task
from stack.parallel import mesh as meshes
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import eval_step, loss_gradient

LENGTH = 64
STEP = 3
_WORDS = ["red", "green", "blue", "cat", "dog", "fish", "runs", "sits", "eats", "far", "near"]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "classification": {"kind": "classification", "class_weights": "balanced", "label_smoothing": 0.1},
    "pairs": {"kind": "classification", "second": "other", "pooling": "mean"},
    "multi_label": {"kind": "classification", "multi_label": True, "label_smoothing": 0.2},
    "tagging": {"kind": "tagging", "label_smoothing": 0.1},
    "span_answers": {"kind": "span_answers", "stride": 8},
    "key_sentences": {"kind": "key_sentences", "taken": 2},
    "retrieval": {
        "kind": "retrieval",
        "negatives": "negatives",
        "widths": [8],
        "symmetric": True,
        "head_dropout": 0.1,
        "temperature": 0.2,
    },
    "reranking": {"kind": "reranking", "most_passages": 3},
}
"""Of each kind of task one, with all that its loss can have."""
TRUNKS: dict[str, dict[str, Any]] = {
    # The soft cap gives the key bias a gradient: without it the softmax takes it out.
    "decoder": {"kind": "decoder", "attention_softcap": 1.0},
    "encoder": {"kind": "encoder", "num_types": 2, "pooler": True, "attention_softcap": 1.0},
    "encoder_decoder": {"kind": "encoder_decoder", "qkv_bias": False},
}


def records(name: str, number: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Of a kind of task."""
    draw = random.Random(f"{name} {seed}")

    def words(most: int, least: int = 1) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(least, most)))

    def one() -> dict[str, Any]:
        text = words(4, 2)
        match name:
            case "classification":
                return {"text": text, "label": draw.choice("aab") if draw.random() < 0.8 else "c"}
            case "pairs":
                return {"text": text, "other": words(2), "label": draw.random() < 0.4}
            case "multi_label":
                return {"text": text, "label": draw.sample("abc", draw.randint(0, 3))}
            case "tagging":
                start = text.index(" ") + 1
                end = text.find(" ", start) if text.count(" ") > 1 else len(text)
                entity = {"start": start, "end": end, "label": draw.choice("XY")}
                return {"text": text, "entities": [entity] if draw.random() < 0.8 else []}
            case "span_answers":
                some = words(9, 3).split()
                place = draw.randrange(len(some))
                start = len(" ".join([*some[:place], ""]))
                answers = [{"start": start, "text": some[place]}]
                known = answers if draw.random() < 0.7 else []
                return {"question": words(2), "context": " ".join(some), "answers": known}
            case "key_sentences":
                labels = [int(draw.random() < 0.2) for _ in range(3)]
                return {"sentences": [f"{words(2)}." for _ in labels], "labels": labels}
            case "retrieval":
                # Few words: some passages are those of several queries.
                return {"query": words(1), "passage": words(1), "negatives": [words(2), "never read"]}
            case "reranking":
                right = draw.sample(range(3), draw.randint(1, 2))
                return {"query": words(1), "passages": [words(1) for _ in range(3)], "relevant": right}
        raise ValueError(name)

    return [one() for _ in range(number)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def tree(name: str, folder: Path | str, trunk: str = "encoder", **sections: Any) -> dict[str, Any]:
    """A config of a kind of task, as YAML has it; sections are added to what is there."""
    model = {
        "vocab_size": 257,
        "num_layers": 2,
        "embed_dim": 16,
        "num_heads": 4,
        "max_length": LENGTH,
        "dtype": "float32",
        "init_std": 0.2,
    }
    made: dict[str, Any] = {
        "model": model | TRUNKS[trunk],
        "objective": OBJECTIVES[name],
        "data": {
            "sources": [{"kind": "jsonl", "path": f"{folder}/{name}.jsonl", "field": None}],
            "sequence_length": LENGTH,
            "cache_dir": f"{folder}/cache",
            "heldout_fraction": 0.0,
        },
        "train": {"batch_size": 8},
    }
    for section, values in sections.items():
        made[section] = made.get(section, {}) | values if isinstance(values, dict) else values
    return made


def config(name: str, folder: Path, trunk: str = "encoder", **sections: Any) -> Config:
    """The same, checked, with the labels of its records, which are written if there are none."""
    if not (folder / f"{name}.jsonl").exists():
        write(folder / f"{name}.jsonl", records(name))
    return with_labels(Config.model_validate(tree(name, folder, trunk, **sections)))


@dataclass(frozen=True, kw_only=True)
class Made:
    """What one layout makes of a batch, on the host."""

    numbers: Numbers
    batch: dict[str, np.ndarray]
    sums: dict[str, float]
    outputs: dict[str, np.ndarray]
    program: programs.Program

    @property
    def task(self) -> Task:
        assert isinstance(self.program.objective, Task)
        return self.program.objective


def compute(settings: Config, num_devices: int = 1, params: Any = None) -> Made:
    """Loss and gradients of the second batch, and what an evaluation tells of it.

    Args:
      settings: with labels.
      num_devices: that the mesh has.
      params: on the host, by name, in place of initial ones.
    """
    program = programs.build(settings, jax.devices()[:num_devices])
    data = open_data(settings, examples=program.objective.examples, show_progress=False)
    with meshes.use(program.mesh):
        batch = training_batches(
            data.train,
            fields=program.objective.fields,
            batch_size=settings.train.batch_size,
            seed=settings.seed,
            shuffle=True,
            layout=program.layout,
        )(1)
        if params is None:
            placed = states.init_params(program)
        else:
            names = leaves(program.parameters)
            like = dict(zip(names, jax.tree.leaves(program.parameters), strict=True))
            arrays = [jax.device_put(params[name], like[name].sharding) for name in names]
            placed = jax.tree.unflatten(jax.tree.structure(program.parameters), arrays)
        trained, frozen = program.split(placed)
        step = jax.device_put(np.int32(STEP), program.layout.sharding())
        gradient, sums = jax.jit(partial(loss_gradient, program))(trained, step, batch, frozen or None)
        told, outputs = jax.jit(partial(eval_step, program))(placed, batch)
        numbers = Numbers(loss=float(sums["loss"]), params=leaves(placed), gradient=leaves(gradient))
        return Made(
            numbers=numbers,
            batch={name: np.asarray(values) for name, values in batch.items()},
            sums={name: float(value) for name, value in told.items()},
            outputs={name: np.asarray(values) for name, values in outputs.items()},
            program=program,
        )


def leaves(values: Any) -> dict[str, Any]:
    """By name; arrays on the host."""
    found = jax.tree_util.tree_flatten_with_path(values)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        if isinstance(leaf, jax.ShapeDtypeStruct)
        else np.asarray(leaf)
        for path, leaf in found
    }
