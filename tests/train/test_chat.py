"""A run that learns to answer goes on with the template it began with, and no other."""

import json
from functools import partial
from pathlib import Path

import jax
import pytest

from stack import Config, StackError, Trainer

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("goldens", "chat.json").read_text("utf-8"))


def test_another_chat_template_is_refused_and_the_runs_own_is_kept(tmp_path):
    conversation = GOLDEN["conversations"][0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizer"]))
    template = tmp_path / "chat_template.jinja"
    template.write_text(conversation["template"])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": conversation["messages"]}) + "\n")
    tree = {
        "name": "chat",
        "output_dir": str(tmp_path / "runs"),
        "model": {"vocab_size": 261, "num_layers": 1, "embed_dim": 16, "num_heads": 2, "dtype": "float32"},
        "objective": {"kind": "chat"},
        "data": {
            "sources": [{"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), "field": None}],
            "tokenizer": str(tmp_path / "tokenizer.json"),
            "sequence_length": 64,
            "heldout_fraction": 0.0,
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {"steps": 1, "batch_size": 1},
        "optimizer": {"schedule": {"warmup_steps": 0}},
        "sample": {"at_end": False},
    }
    config = Config(**tree)
    one = partial(Trainer, devices=jax.devices()[:1])
    one(config).fit(progress=False)
    folder = tmp_path / "runs" / "chat"
    template.write_text("{{ bos_token }}" + conversation["template"])
    with pytest.raises(StackError, match="the run began with another chat template than"):
        one(config.replace("train.steps=2")).fit(progress=False)
    template.unlink()
    (tmp_path / "tokenizer.json").unlink()
    own = Trainer.from_run(folder, devices=jax.devices()[:1]).tokenizer
    assert own.chat_template == conversation["template"], "kept with the run"
