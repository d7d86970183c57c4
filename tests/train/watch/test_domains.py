"""A run that begins with weights tells of each source what it made of its held-out text, before and after."""

import json
from dataclasses import replace
from typing import Any

import pytest
from tiny_runs import config, run, trainer

from stack import Trainer
from stack.train.watch.domains import Domains
from stack.train.watch.listeners import Listener


class Heard(Listener):
    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def on_end(self, summary) -> None:
        self.summary = summary


def test_each_source_is_evaluated_before_and_after_also_by_a_run_that_goes_on(tmp_path, capsys) -> None:
    run(tmp_path, "base", "train.steps=4")
    path = tmp_path / "law.jsonl"
    lines = ["".join(f"section {number}.{part}: " for part in range(9)) for number in range(80)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options = (
        f"init_from={tmp_path}/runs/base",
        f"data.sources.1={{kind: jsonl, path: {path}, weight: 3}}",
        "train.steps=6",
    )
    base = trainer(tmp_path, "base")
    other = Trainer.from_run(base.folder, options[1:2], accept=["data"])
    heldout = other.data.heldout
    before = [
        other.evaluate(replace(heldout, parts=heldout.parts[some : some + 1]))["perplexity"]
        for some in (0, 1)
    ]
    heard = Heard()
    run(tmp_path, "law", *options, "train.steps=3")
    made = Trainer(config(tmp_path, "law", *options), listeners=[heard])
    made.fit()
    after = [
        made.evaluate(replace(heldout, parts=heldout.parts[some : some + 1]))["perplexity"] for some in (0, 1)
    ]
    told = heard.summary["domains"]
    assert list(told) == ["synthetic", str(path)]
    assert [list(pair) for pair in told.values()] == [
        pytest.approx(pair, rel=1e-5) for pair in zip(before, after, strict=True)
    ]
    assert after[1] < 0.8 * before[1], "it has learned the new one"
    (said,) = (text for label, text in heard.summary["rows"] if label == "domains")
    first, *lines = said.splitlines()
    assert first == "perplexity of held-out text, before and after"
    for line, (name, (old, new)) in zip(lines, told.items(), strict=True):
        assert line.split() == [name, f"{old:.4f}", "->", f"{new:.4f}"]
    assert "domains   perplexity of held-out text, before and after\n" in capsys.readouterr().out


@pytest.mark.parametrize(("overrides", "info"), [([], {"step": 0}), (["init_from=x"], {"step": 0})])
def test_a_run_of_one_source_or_from_the_seed_is_not_evaluated(tmp_path, overrides, info) -> None:
    listener = Domains(trainer(tmp_path, "new", *overrides))
    listener.on_start(info)
    assert listener.on_save(1) is None
    assert listener.on_end({"rows": []}) is None
