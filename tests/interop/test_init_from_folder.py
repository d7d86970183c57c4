"""A run of a config begins with the weights in a folder of transformers, as an import of them does."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from model_folders import save, write_tokenizer

from stack import StackError, Trainer, load
from stack.config import Config
from stack.interop.hugging_face import config_from_hf, params_from_hf
from stack.interop.safetensors_folder import SINGLE
from stack.train import starting
from stack.transfer.importing import load_weights


@pytest.fixture
def saved(tmp_path, golden) -> Path:
    return save(tmp_path / "saved", golden)


def config_of(saved: Path, *overrides: str) -> Config:
    """A config of the model in a folder, with the weights there."""
    model = config_from_hf(json.loads((saved / "config.json").read_text()))
    fields = {
        "name": "new",
        "output_dir": str(saved.parent / "runs"),
        "init_from": str(saved),
        "model": model.model_dump(mode="json"),
        "data": {"tokenizer": str(saved / "tokenizer.json"), "sequence_length": min(32, model.max_length)},
    }
    return Config.model_validate(fields).replace(*overrides)


def begin(config: Config, devices: int = 1) -> tuple[dict, dict, list[str]]:
    made = Trainer(config, devices=jax.devices()[:devices])
    notes: list[str] = []
    starting.check(made.program, made.ledger.store, lambda: made.tokenizer)
    state, origin = starting.begin(made.program, made.tokenizer, notes.append)
    return state["params"], dict(origin), notes


@pytest.mark.parametrize(
    "golden",
    ["gpt2", *(pytest.param(name, marks=pytest.mark.full) for name in ("llama", "qwen3"))],
    indirect=True,
)
def test_its_parameters_are_those_of_the_folder_on_any_mesh(golden, saved) -> None:
    want = params_from_hf(golden.weights, config_from_hf(golden.config))
    params, origin, notes = begin(config_of(saved, "mesh.fsdp=4", "mesh.data=2"), devices=8)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert notes == []
    assert origin["source"] == str(saved)
    assert begin(config_of(saved))[1] == origin


@pytest.mark.parametrize("golden", ["gpt2"], indirect=True)
def test_its_first_steps_are_those_of_an_import(saved, tmp_path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(" ".join(f"w{(number + word) % 60}" for word in range(100)))
    options = (
        *("data.sources.0.kind=text", f"data.sources.0.path={tmp_path}/*.txt", "data.heldout_fraction=0"),
        *(f"data.cache_dir={tmp_path}/cache", "train.steps=1", "optimizer.schedule.warmup_steps=0"),
        *("sample.at_end=false", "train.log_every=1"),
    )
    runs = tmp_path / "runs"
    for _ in load_weights(saved, runs / "imported", devices=jax.devices()[:1]):
        pass
    imported = Trainer(load(runs / "imported", options), devices=jax.devices()[:1])
    new = Trainer(
        load(runs / "imported", [*options, "name=new", f"init_from={saved}"]), devices=jax.devices()[:1]
    )
    for trainer in (imported, new):
        trainer.fit(progress=False)
    assert new.history.curve("loss") == imported.history.curve("loss")
    assert new.history.curve("grad_norm") == imported.history.curve("grad_norm")
    for folder in (new.folder, imported.folder):
        assert json.loads((folder / "init_from.json").read_text())["source"] == str(saved)


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_words_are_added_to_both_tables(golden, saved, tmp_path) -> None:
    """Within no room: 61 words and as many rows; the head has rows of its own."""
    write_tokenizer(tmp_path, 61)
    model = json.loads((tmp_path / "tokenizer.json").read_text())
    model["added_tokens"] += [{**model["added_tokens"][0], "id": 61, "content": "<|user|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    more = ("model.vocab_size=62", f"data.tokenizer={tmp_path}/tokenizer.json")
    params, _, notes = begin(config_of(saved, *more))
    for name, table in (("model.embed_tokens.weight", params["embed"]), ("lm_head.weight", params["head"])):
        old, rows = golden.weights[name], np.asarray(table["table"])
        np.testing.assert_array_equal(rows[:61], old)
        np.testing.assert_allclose(rows[61], old.mean(0, dtype=np.float64), rtol=2**-23, atol=0)
        assert not rows[62:].any()
    assert notes == [
        "init_from: resized embed.table, head.table: 61 -> 62 words, 1 new, at the mean of the 61 old"
    ]


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_without_a_tokenizer_nobody_knows_what_ids_mean_and_it_is_told(saved, tmp_path) -> None:
    shutil.move(saved / "tokenizer.json", tmp_path / "tokenizer.json")
    _, _, notes = begin(config_of(saved, f"data.tokenizer={tmp_path}/tokenizer.json"))
    assert notes == [
        f"init_from: {saved} has no tokenizer: whether ids mean the same words there, nobody knows"
    ]


def spoil(folder: Path, how: str) -> None:
    path = folder / SINGLE
    weights = safetensors.numpy.load_file(path)
    name = next(name for name in weights if "mlp" in name)
    match how:
        case "cut":
            path.write_bytes(path.read_bytes()[:-10])
        case "config":
            (folder / "config.json").write_text((folder / "config.json").read_text()[:40])
        case "no config":
            (folder / "config.json").unlink()
        case "pickle":
            path.rename(folder / "pytorch_model.bin")
        case "shape":
            safetensors.numpy.save_file(weights | {name: weights[name][..., :-1]}, path)
        case "type":
            safetensors.numpy.save_file(weights | {name: weights[name].astype(np.int8)}, path)
        case "missing":
            del weights[name]
            safetensors.numpy.save_file(weights, path)
        case "nan":
            safetensors.numpy.save_file(weights | {name: weights[name] * np.nan}, path)
        case "word":
            text = (folder / "tokenizer.json").read_text()
            (folder.parent / "tokenizer.json").write_text(text)
            (folder / "tokenizer.json").write_text(text.replace('"w7"', '"other"'))


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("cut", r"saved/model.safetensors is damaged or no safetensors file: .*; fetch it again"),
        ("config", r"saved/config.json is no JSON: .*; fetch it again"),
        (
            "no config",
            r"saved/config.json cannot be read: No such file or directory; give a folder that has it",
        ),
        ("pickle", r"saved holds pytorch_model.bin, a pickle, which could run any code"),
        ("shape", r"saved: \S*mlp\S+ has shape .*, the config asks for .*; it is not of the model"),
        (
            "type",
            r"saved: \S*mlp\S+ is of int8, but weights are float16, bfloat16, float32, float64; convert",
        ),
        ("missing", r"saved: the checkpoint lacks \S*mlp\S+; it is not of the model the config describes"),
        ("word", r"id 7 is 'other' in \S+saved and 'w7' in data.tokenizer=\S+; take the tokenizer of the w"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(saved, tmp_path, how, told) -> None:
    config = config_of(saved)
    spoil(saved, how)
    if how == "word":
        config = config.replace(f"data.tokenizer={tmp_path}/tokenizer.json")
    with pytest.raises(StackError) as error:
        Trainer(config, devices=jax.devices()[:1]).fit(progress=False)
    assert re.match(f"init_from: .*{told}", str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_weights_that_are_not_finite_are_named(saved) -> None:
    spoil(saved, "nan")
    with pytest.raises(StackError, match=r"^init_from: \S+saved: \S*mlp\S+ holds NaN or infinity in float32"):
        begin(config_of(saved))


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_another_family_is_refused_by_the_fields_that_make_it_so(saved) -> None:
    model = {"vocab_size": 61, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "max_length": 32}
    config = Config.model_validate(config_of(saved).model_dump(mode="json") | {"model": model})
    told = (
        r"saved is of another family of models: model.position rotary -> learned, model.norm rmsnorm -> "
        r"layernorm, model.mlp swiglu -> gelu_tanh; take weights of the config's own"
    )
    with pytest.raises(StackError, match=told):
        begin(config)
