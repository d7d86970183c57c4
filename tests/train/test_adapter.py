"""A run with an adapter: its base stays as it was, it goes on exactly, is merged, is chosen beside a base."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_runs import config, run, saved_state

from stack import StackError, Trainer
from stack.cli import main
from stack.step import state as states
from stack.train import starting
from stack.train.checkpoint.checkpoints import named_leaves
from stack.train.watch.listeners import Listener
from stack.transfer.adapter import export_adapter
from stack.transfer.exporting import export

MESH = ("mesh.fsdp=4", "mesh.tensor=2")
QUICK = ("eval.batches=2",)


def adapter(folder: Path, kind: str, more: str = "", base: str = "base") -> list[str]:
    targets = "targets: [{modules: [layers.*], rank: 4}]"
    return [f"init_from={folder}/runs/{base}", f"adapter={{kind: {kind}, {targets}{more}}}", "train.steps=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    run(folder, "base", "train.steps=4")
    run(folder, "dora", *adapter(folder, "dora", ", train: [final_norm.*]"), "checkpoint.every=3")
    return folder


def opened(folder: Path, name: str, *overrides: str, **options: Any) -> Trainer:
    return Trainer.from_run(folder / "runs" / name, overrides, devices=jax.devices()[:1], **options)


def values(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(trainer.trained).items()}


def test_the_base_is_as_it_was_and_the_rest_is_trained(folder) -> None:
    base, dora = values(opened(folder, "base")), values(opened(folder, "dora"))
    changed = {name for name, leaf in base.items() if not np.array_equal(dora[name], leaf)}
    assert changed == {"final_norm.scale", "final_norm.bias"}
    new = dora.keys() - base.keys()
    assert len(new) == 3 * 6
    assert all(np.abs(dora[name]).max() > 0 for name in new)


class Heard(Listener):
    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.texts: list[str] = []

    def on_start(self, info) -> None:
        self.info = info

    def on_warning(self, text) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("kind", ["dora", pytest.param("lora", marks=pytest.mark.full)])
def test_it_begins_as_its_base_and_goes_on_exactly(folder, kind) -> None:
    options = [*adapter(folder, kind, ", train: [final_norm.*]"), "checkpoint.every=3"]
    if kind == "lora":
        run(folder, "lora", *options)
    heard = Heard()
    run(
        folder,
        f"{kind}-half",
        *options,
        "train.steps=3",
        "optimizer.schedule.kind=constant",
        listeners=[heard],
    )
    run(folder, f"{kind}-half", *options)
    assert saved_state(folder, f"{kind}-half") == saved_state(folder, kind)
    whole = run(folder, f"{kind}-full", f"init_from={folder}/runs/base", "train.steps=1")
    _, losses = opened(folder, kind).history.curve("loss")
    assert losses[0] == pytest.approx(whole.history.curve("loss")[1][0], rel=0 if kind == "lora" else 1e-6)
    assert losses[1] != losses[0]
    assert heard.info["trained"] < heard.info["parameters"] / 5
    assert heard.info["weights"].startswith("20 of 20 parameter arrays from")
    assert not [text for text in heard.texts if "init_from" in text], "an adapter is new, as it should be"
    with pytest.raises(StackError, match=r"the run began otherwise: adapter\.targets\.0\.alpha 16"):
        run(folder, f"{kind}-half", *options, "adapter.targets.0.alpha=8")


def test_magnitudes_are_those_of_the_base_on_any_mesh(folder) -> None:
    found = []
    for devices in (1, 8):
        overrides = adapter(folder, "dora", ", base_dtype: bfloat16")
        made = Trainer(
            config(folder, "new", *overrides, *MESH[: devices // 4]), devices=jax.devices()[:devices]
        )
        state, origin = starting.begin(made.program, made.tokenizer, lambda _: None)
        found.append((named_leaves(states.join(state)), origin["digest"]))
    (one, digest), (several, other) = found
    assert digest == other
    for name, leaf in one.items():
        np.testing.assert_array_equal(np.asarray(several[name]), np.asarray(leaf), err_msg=name)
    kernel = values(opened(folder, "base"))["layers.mlp.up.kernel"].astype("bfloat16").astype(np.float64)
    length = np.sqrt((kernel**2).sum(1))
    np.testing.assert_allclose(one["layers.mlp.up.dora_magnitude"], length, rtol=1e-6)


def test_what_is_exported_is_one_model_with_the_same_numbers(folder) -> None:
    trained = opened(folder, "dora")
    told = list(export(trained, folder / "merged"))
    assert told[-1] == "note      the adapter is merged into the 6 matrices it was trained beside"
    base = opened(folder, "base")
    assert f"{base.program.num_parameters:,} parameters" in told[0]
    alone = Trainer(config(folder, "alone", f"init_from={folder}/merged"), devices=jax.devices()[:1])
    alone.state, _ = starting.begin(alone.program, alone.tokenizer, lambda _: None)
    expected, before = trained.evaluate(), base.evaluate()
    assert alone.evaluate()["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert abs(before["loss"] - expected["loss"]) > 1e-4


def test_an_adapter_by_itself_is_small_and_is_chosen_beside_its_base(folder, capsys) -> None:
    trained, small = opened(folder, "dora"), folder / "small"
    shutil.rmtree(small, ignore_errors=True)
    assert main(["export", str(trained.folder), "--to", "adapter", str(small)]) == 0
    assert "trained parameters\n" in capsys.readouterr().out
    assert sorted(path.name for path in small.iterdir()) == ["adapter.json", "adapter.safetensors"]
    about = json.loads((small / "adapter.json").read_text())
    assert about["step"] == 6
    assert about["config"]["adapter"]["kind"] == "dora"
    for place in (small, trained.folder):
        beside = opened(folder, "base", adapter=place)
        assert beside.state is not None
        assert trained.state is not None
        for part in ("params", "frozen"):
            jax.tree.map(np.testing.assert_array_equal, beside.state[part], trained.state[part])
    assert beside.evaluate() == trained.evaluate()
    assert main(["sample", str(folder / "runs/base"), "a", "--adapter", str(small)]) == 0
    assert capsys.readouterr().out == f"a{trained.generate('a')[0]}\n"


@pytest.mark.full
def test_it_is_read_on_a_mesh_and_with_the_average_of_its_weights(folder) -> None:
    overrides = [*adapter(folder, "lora", ", base_dtype: bfloat16"), "optimizer.ema_decay=0.9"]
    run(folder, "average", *overrides)
    trained = opened(folder, "average")
    list(export_adapter(trained, folder / "averaged"))
    beside = Trainer.from_run(folder / "runs/base", MESH, adapter=folder / "averaged")
    assert beside.evaluate()["loss"] == pytest.approx(trained.evaluate()["loss"], rel=1e-5)
    assert beside.state is not None
    assert beside.state["frozen"]["layers"]["mlp"]["up"]["kernel"].dtype == "bfloat16"
    more = [*adapter(folder, "lora", base="average"), "train.steps=1"]
    again = run(folder, "again", *more)
    assert again.history.curve("loss")[1][0] > 0
    for name, leaf in values(again).items():
        if "lora" not in name:
            np.testing.assert_array_equal(leaf, values(trained)[name].astype(np.float32), err_msg=name)


def test_one_whose_base_was_trained_on_names_the_checkpoint(folder) -> None:
    run(folder, "moved", "train.steps=4")
    run(folder, "beside", *adapter(folder, "lora", base="moved"), "train.steps=1")
    run(folder, "moved", "train.steps=6")
    place = folder / "runs/moved/checkpoints/4"
    with pytest.raises(StackError, match=rf"give the base it was trained beside, which is {place}$"):
        opened(folder, "moved", adapter=folder / "runs/beside")
    beside = Trainer.from_run(place, devices=jax.devices()[:1], adapter=folder / "runs/beside")
    assert beside.state is not None


def test_one_of_another_base_is_refused_with_both(folder, capsys) -> None:
    run(folder, "other", "train.steps=4", "seed=1")
    told = (
        r"^\S+runs/dora at step 6 is an adapter of \S+runs/base at step 4 \(digest \w+\), not of \S+runs"
        r"/other at step 4 \(digest \w+\); give the base it was trained beside$"
    )
    with pytest.raises(StackError, match=told):
        opened(folder, "other", adapter=folder / "runs/dora")
    for place, said in (
        (folder / "runs/base", "runs/base: this run has none; give one whose config has `adapter`"),
        (folder / "runs", "runs holds neither: give the folder of a run that has an adapter, or one that"),
        (folder / "nowhere", "nowhere does not exist: give the folder of a run"),
    ):
        with pytest.raises(StackError, match=re.escape(said)):
            opened(folder, "base", adapter=place)
    assert main(["export", str(folder / "runs/base"), "--to", "adapter", str(folder / "none")]) == 1
    assert "runs/base has no adapter; export it whole: --to hf FOLDER" in capsys.readouterr().err
    with pytest.raises(StackError, match=r"dora at step 6 holds an adapter that the config has not: lay"):
        run(folder, "refused", f"init_from={folder}/runs/dora")
    untied = [*adapter(folder, "lora"), "model.tied_embeddings=false"]
    with pytest.raises(StackError, match=r"has no head\.table, which an adapter would leave as initialised"):
        run(folder, "refused", *untied)


def test_a_folder_that_is_damaged_is_told(folder) -> None:
    whole, hurt = folder / "whole", folder / "hurt"
    shutil.rmtree(whole, ignore_errors=True)
    list(export_adapter(opened(folder, "dora"), whole))
    with pytest.raises(StackError, match=r"whole exists; give a folder that does not"):
        list(export_adapter(opened(folder, "dora"), whole))

    def hurts(name: str, text: str | None, told: str) -> None:
        shutil.rmtree(hurt, ignore_errors=True)
        shutil.copytree(whole, hurt)
        (hurt / name).unlink() if text is None else (hurt / name).write_text(text)
        with pytest.raises(StackError, match=told):
            opened(folder, "base", adapter=hurt)

    about = json.loads((whole / "adapter.json").read_text())
    hurts("adapter.json", "{", r"hurt/adapter\.json is not what `stack export` wrote")
    hurts("adapter.json", json.dumps(about | {"format": 9}), r"adapter\.json is of format 9")
    hurts("adapter.safetensors", None, r"adapter\.safetensors is missing; export the adapter again")
    hurts("adapter.safetensors", "x" * 99, r"adapter\.safetensors is damaged or no safetensors file")
    shutil.rmtree(hurt)
    shutil.copytree(whole, hurt)
    flipped = bytearray((whole / "adapter.safetensors").read_bytes())
    flipped[-1] ^= 1
    (hurt / "adapter.safetensors").write_bytes(flipped)
    with pytest.raises(StackError, match=r"damaged: its bytes are not those whose digest adapter\.json has"):
        opened(folder, "base", adapter=hurt)
    about["config"]["adapter"]["targets"][0]["rank"] = 2
    hurts("adapter.json", json.dumps(about), r"hurt at step 6: layers\.\S+ is \[1, 32, 4\], not \[1, 32, 2\]")
