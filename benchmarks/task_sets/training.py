"""A small trunk on every set: from its seed, from pretrained weights, by adapters, and frozen."""

import json
import platform
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from stack import Config, StackError, Trainer, load
from stack.data.tokenizer import load_tokenizer
from stack.evaluation.predict import predict

from . import scores
from .scores import Scores
from .splits import read_jsonl

Rows = list[dict[str, Any]]
MODES = ("seed", "full", "lora", "frozen")
"""Where a run begins and what it trains: all, from the seed; all, pretrained; adapters; the head alone."""


class Recipe(NamedTuple):
    """How a set is trained."""

    objective: Mapping[str, Any]
    length: int
    """Tokens of a row."""
    batch: int
    """Rows of a batch."""
    steps: int
    metric: str
    """The figure that is compared."""


_BOTH = {"bidirectional": True}
_RERANK = {"kind": "reranking", "most_passages": 4, "too_long": "cut", **_BOTH}
_SEARCH = {"kind": "retrieval", "too_long": "cut", "negatives": "negatives", **_BOTH}
_CLASSES = {"kind": "classification", "too_long": "cut", **_BOTH}
RECIPES = {
    "sentiment": Recipe(_CLASSES, 128, 16, 200, "accuracy"),
    "section": Recipe(_CLASSES, 160, 16, 300, "accuracy"),
    "facets": Recipe({**_CLASSES, "multi_label": True}, 160, 16, 300, "micro_f1"),
    "describes": Recipe({**_CLASSES, "text": "first", "second": "second"}, 128, 16, 300, "accuracy"),
    "names": Recipe({"kind": "tagging", "whole_words": True, **_BOTH}, 64, 8, 600, "f1"),
    "addresses": Recipe({"kind": "tagging", "whole_words": True, **_BOTH}, 64, 8, 600, "f1"),
    "questions": Recipe({"kind": "span_answers", "stride": 32, **_BOTH}, 256, 8, 600, "f1"),
    "key_sentences": Recipe({"kind": "key_sentences", "summary": "summary", **_BOTH}, 512, 4, 300, "rougeL"),
    "code_search": Recipe(_SEARCH, 384, 12, 150, "mrr"),
    "code_search_rerank": Recipe(_RERANK, 512, 4, 150, "mrr"),
    "rfc_search": Recipe(_SEARCH, 384, 12, 150, "mrr"),
    "rfc_search_rerank": Recipe(_RERANK, 512, 4, 150, "mrr"),
    "summaries": Recipe({"kind": "completion", "too_long": "cut"}, 192, 16, 200, "rougeL"),
    "translations": Recipe({"kind": "completion", "too_long": "cut"}, 128, 16, 200, "chrf"),
}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "seed": {"kind": "muon", "learning_rate": 4e-3},
    "full": {"kind": "muon", "learning_rate": 2e-3},
    "lora": {"learning_rate": 5e-3},
    "frozen": {"learning_rate": 5e-3},
}
"""Rules and their peak rates; the trunk was trained by Muon."""
_ADAPTER = {"kind": "lora", "targets": [{"modules": ["layers.*"], "rank": 8, "alpha": 16}]}
_MOST_WRITTEN = 200
"""Rows of which texts are written."""


def run(
    folder: Path,
    trunk: Path,
    record: Path,
    *,
    only: Sequence[str] | None = None,
    modes: Sequence[str] = MODES,
    seeds: Sequence[int] = (0, 1, 2),
) -> None:
    """Trains and scores, and adds a line of JSON to a record after each run; those that it has are left out.

    Args:
        folder: What `tasks.py data` wrote.
        trunk: The run of `configs/tasks_trunk.yaml`.
        record: The file of JSON lines.
        only: Names of sets, or all.
        modes: Some of `MODES`.
        seeds: Of the head, the order of the data and dropout.

    Raises:
        StackError: If there is no set or no mode of a name.
    """
    for name in only or ():
        if name not in RECIPES:
            raise StackError(f"there is no set {name}, only {', '.join(RECIPES)}")
    for mode in modes:
        if mode not in MODES:
            raise StackError(f"there is no mode {mode}, only {', '.join(MODES)}")
    lines = record.read_text().splitlines() if record.exists() else []
    done = {(line["set"], line["mode"], line["seed"]) for line in map(json.loads, lines)}
    for seed in seeds:
        for name in only or RECIPES:
            for mode in modes:
                if mode == "frozen" and RECIPES[name].objective["kind"] in ("completion", "retrieval"):
                    continue  # There is no head to train.
                if (name, mode, seed) not in done:
                    # In a process of its own, whose memory is that of this run.
                    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                        line = pool.submit(_measure, folder, trunk, name, mode, seed).result()
                    with record.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    told = "  ".join(f"{key} {value:.3f}" for key, value in line["figures"].items())
                    print(f"{name:18} {mode:7} {seed}  {told}  ({line['seconds']:.0f} s)", flush=True)


def _measure(folder: Path, trunk: Path, name: str, mode: str, seed: int) -> dict[str, Any]:
    recipe = RECIPES[name]
    config = config_of(folder, trunk, name, mode, seed)
    start = time.perf_counter()
    trainer = Trainer(config)
    trainer.fit(progress=False)
    trained = time.perf_counter() - start
    figures = _figures(trainer, folder / name, recipe)
    return {
        "set": name,
        "mode": mode,
        "seed": seed,
        "figures": {key: round(value, 4) for key, value in figures.items()},
        "seconds": round(trained, 1),
        "scored_seconds": round(time.perf_counter() - start - trained, 1),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def config_of(folder: Path, trunk: Path, name: str, mode: str, seed: int) -> Config:
    """The config of one run."""
    recipe, base = RECIPES[name], load(trunk)
    tree: dict[str, Any] = {
        "name": f"{name}-{mode}-{seed}",
        "output_dir": str(folder / "runs"),
        "seed": seed,
        "init_from": None if mode == "seed" else str(trunk),
        "model": base.model.model_dump(mode="json"),
        "objective": dict(recipe.objective),
        "data": {
            "sources": [{"kind": "jsonl", "path": str(folder / name / "train.jsonl"), "field": None}],
            "tokenizer": str(folder / "tokenizer.json"),
            "sequence_length": recipe.length,
            "heldout_fraction": 0.0,
        },
        "optimizer": {
            **_OPTIMIZERS[mode],
            "beta2": 0.98,
            "weight_decay": 0.01,
            "schedule": {"kind": "linear", "final_fraction": 0.0, "warmup_steps": recipe.steps // 10},
        },
        "train": {"steps": recipe.steps, "batch_size": recipe.batch},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
    }
    if mode == "frozen":
        tree["optimizer"]["frozen"] = ["embed.*", "layers.*", "final_norm.*"]
    if mode == "lora":
        tree["adapter"] = _ADAPTER
    if recipe.objective["kind"] == "completion":
        tree["sample"] = {"temperature": 0.0, "length": 40, "at_end": False}
    return Config(**tree)


def _figures(trainer: Trainer, folder: Path, recipe: Recipe) -> Scores:
    """The figures of the test rows, as those of the classical methods are made."""
    test = read_jsonl(folder / "test.jsonl")
    if recipe.objective["kind"] == "completion":
        test = test[:_MOST_WRITTEN]
    if recipe.objective["kind"] == "retrieval":
        return _search(trainer, folder)
    answers = _predicted(trainer, test)
    match recipe.objective["kind"]:
        case "classification" if recipe.objective.get("multi_label"):
            names = list(answers[0]["probabilities"])
            truth = np.array([[float(name in row["label"]) for name in names] for row in test])
            return scores.of_label_sets(truth, _chances(answers, names))
        case "classification":
            names = list(answers[0]["probabilities"])
            return scores.of_classes([row["label"] for row in test], _chances(answers, names), names)
        case "tagging":
            return scores.of_entities(
                [row["entities"] for row in test], [answer["entities"] for answer in answers]
            )
        case "span_answers":
            truth = [[answer["text"] for answer in row["answers"]] for row in test]
            return scores.of_answers(truth, [answer["answer"] or "" for answer in answers])
        case "key_sentences":
            return scores.of_extracts(test, [answer["sentences"] for answer in answers], size=3)
        case "reranking":
            ranks = [
                answer["order"].index(row["relevant"][0]) + 1
                for row, answer in zip(test, answers, strict=True)
            ]
            return scores.of_ranks(ranks)
    return scores.of_texts([row["completion"] for row in test], [answer["text"] for answer in answers])


def _predicted(trainer: Trainer, rows: Rows) -> list[dict[str, Any]]:
    run = trainer.program, trainer.trained, load_tokenizer(trainer.config.data.tokenizer)
    return list(predict(*run, rows))


def _chances(answers: Rows, names: Sequence[str]) -> np.ndarray:
    return np.array([[answer["probabilities"][name] for name in names] for answer in answers])


def _search(trainer: Trainer, folder: Path) -> Scores:
    """Over the whole corpus."""
    corpus, queries = read_jsonl(folder / "corpus.jsonl"), read_jsonl(folder / "queries.jsonl")
    passages = _predicted(trainer, [{"passage": row["text"]} for row in corpus])
    asked = _predicted(trainer, [{"query": row["query"]} for row in queries])
    vectors = np.array([answer["passage_vector"] for answer in passages])
    alike = np.array([answer["query_vector"] for answer in asked]) @ vectors.T
    names = {row["id"]: place for place, row in enumerate(corpus)}
    right = [names[row["relevant"][0]] for row in queries]
    return scores.of_ranks([int((row >= row[place]).sum()) for row, place in zip(alike, right, strict=True)])


def table(record: Path, baselines: Path) -> list[str]:
    """Two tables in Markdown: figures beside the best classical method, and time and memory.

    Figures are means and deviations over seeds; seconds of training are the least, as other work can only add
    to them, and the peak memory of a run's process is the median.
    """
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    known = json.loads(baselines.read_text())["figures"] if baselines.exists() else {}
    told = [f"| set | figure | {' | '.join(MODES)} | best classical |", "|---" * (len(MODES) + 3) + "|"]
    for name, recipe in RECIPES.items():
        cells = []
        for mode in MODES:
            values = [
                line["figures"][recipe.metric]
                for line in lines
                if (line["set"], line["mode"]) == (name, mode)
            ]
            cells.append(_spread(values))
        method, best = max(
            (
                (method, values.get(recipe.metric, -1.0))
                for method, values in known.get(name, {}).items()
                if method != "oracle"
            ),
            key=lambda pair: pair[1],
            default=("", float("nan")),
        )
        told.append(f"| {name} | {recipe.metric} | {' | '.join(cells)} | {best:.3f} ({method}) |")
    told += ["", f"| set | {' | '.join(MODES)} |", "|---" * (len(MODES) + 1) + "|"]
    for name in RECIPES:
        cells = []
        for mode in MODES:
            own = [line for line in lines if (line["set"], line["mode"]) == (name, mode)]
            if not own:
                cells.append("-")
                continue
            seconds = min(line["seconds"] for line in own)
            memory = statistics.median(line["memory_mb"] for line in own)
            cells.append(f"{seconds:.0f} s, {memory:,.0f} MB")
        told.append(f"| {name} | {' | '.join(cells)} |")
    return told


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread} ({len(values)})"
