"""A folder of transformers becomes a run, and a run such a folder: `stack import`, `stack export`."""

import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from model_folders import save, write_tokenizer
from safetensors import safe_open

from stack import StackError, Trainer
from stack.cli import main
from stack.config import Config, DecoderConfig, LanguageConfig
from stack.data.tokenizer import ByteTokenizer, load_tokenizer
from stack.interop import hugging_face_files
from stack.interop.hugging_face import config_from_hf, params_from_hf
from stack.interop.hugging_face_files import config_to_hf
from stack.interop.safetensors_folder import INDEX, SINGLE, open_folder
from stack.transfer.exporting import export
from stack.transfer.importing import load_weights

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "qwen3_window", "gemma2", "gemma3")


@pytest.fixture
def saved(tmp_path, golden) -> Path:
    """What `save_pretrained` writes: config.json and model.safetensors, with a tokenizer."""
    return save(tmp_path / "saved", golden)


def bring_in(folder: Path, run: Path, *overrides: str, devices: int = 1) -> Trainer:
    for _ in load_weights(folder, run, overrides, devices=jax.devices()[:devices]):
        pass
    return Trainer.from_run(run, devices=jax.devices()[:devices])


def read(folder: Path) -> dict[str, np.ndarray]:
    """As the library does."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="flax") as file:
            tensors |= {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return tensors


def assert_equal(tensors, want) -> None:
    assert tensors.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(tensors[name], tensor, strict=True, err_msg=name)


def resolved(config: LanguageConfig) -> LanguageConfig:
    """With widths written out, and without what only training needs."""
    widths = {"head_dim": config.head_width, "num_kv_heads": config.kv_heads, "mlp_dim": config.mlp_width}
    return config.model_copy(update=widths | {"position_init_std": 0.0, "scale_residual_init": False})


@pytest.mark.parametrize(
    "golden",
    ["gpt2", "llama", *(pytest.param(name, marks=pytest.mark.full) for name in FAMILIES[2:])],
    indirect=True,
)
def test_a_model_goes_in_and_out_bit_by_bit(golden, saved, tmp_path) -> None:
    trainer = bring_in(saved, tmp_path / "runs" / "in")
    want = params_from_hf(golden.weights, config_from_hf(golden.config))
    assert trainer.state is not None
    jax.tree.map(np.testing.assert_array_equal, trainer.state["params"], want)
    list(export(trainer, tmp_path / "out"))
    assert_equal(read(tmp_path / "out"), golden.weights)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert resolved(config_from_hf(config)) == resolved(config_from_hf(golden.config))


@pytest.mark.parametrize("golden", ["gpt2", pytest.param("qwen2", marks=pytest.mark.full)], indirect=True)
def test_on_a_mesh_and_in_several_files_too(golden, saved, tmp_path) -> None:
    """In files of a few tensors each, and back from there."""
    trainer = bring_in(saved, tmp_path / "run", "mesh.fsdp=2", "mesh.tensor=2", devices=4)
    assert trainer.state is not None
    kernel = trainer.state["params"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    list(export(trainer, tmp_path / "out", most_bytes=20_000))
    assert_equal(read(tmp_path / "out"), golden.weights)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in golden.weights.values())
    assert_equal({name: np.array(a) for name, a in open_folder(tmp_path / "out").items()}, golden.weights)


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.full)])
def test_a_checkpoint_of_sixteen_bits_goes_in_and_out_bit_by_bit(golden, tmp_path, dtype) -> None:
    stored = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    weights = {name: weight.astype(stored) for name, weight in golden.weights.items()}
    if dtype == "bfloat16":  # Which the library does not write from NumPy.
        trainer = bring_in(save(tmp_path / "saved", golden), tmp_path / "run")
        list(export(trainer, tmp_path / "in", dtype=dtype))
        shutil.copy(tmp_path / "saved/config.json", tmp_path / "in/config.json")
    else:
        save(tmp_path / "in", golden, weights)
    list(export(bring_in(tmp_path / "in", tmp_path / "again"), tmp_path / "out", dtype=dtype))
    assert_equal(read(tmp_path / "out"), weights)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("golden", ["gpt2"], indirect=True)
def test_a_run_that_came_in_is_trained_evaluated_and_sampled(saved, tmp_path, capsys) -> None:
    run = tmp_path / "runs" / "in"
    assert main(["import", str(saved), "--to", str(run), "mesh.data=8"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"imported  {saved}: ")
    assert f"run       {run} at step 0" in told
    for number in range(40):
        text = " ".join(f"w{(number + word) % 60}" for word in range(100))
        (tmp_path / f"{number}.txt").write_text(text)
    data = [
        *("data.sources.0.kind=text", f"data.sources.0.path={tmp_path}/*.txt"),
        *(f"data.cache_dir={tmp_path}/cache", "data.heldout_fraction=0.2"),
    ]
    assert main(["eval", str(run), *data]) == 0
    first = float(capsys.readouterr().out.split()[1])
    assert main(["sample", str(run), "w1 w2", "--length", "3"]) == 0
    more = ("train.steps=20", "optimizer.schedule.warmup_steps=2", "optimizer.learning_rate=0.01")
    capsys.readouterr()
    assert main(["train", str(run), *data, *more]) == 0
    told = capsys.readouterr().out
    assert "learning rate goes" not in told
    assert float(told.split("held-out: loss ")[1].split()[0]) < first
    with pytest.raises(StackError, match=r"began otherwise: model\.norm_epsilon "):
        Trainer.from_run(run, ["model.norm_epsilon=1e-3"], devices=jax.devices()[:8])


def test_bytes_become_a_tokenizer_that_reads_and_writes_them(tmp_path) -> None:
    """Every byte its own number, as it was trained; a text begins as a document does."""
    hugging_face_files.write_files(tmp_path, Config(), ByteTokenizer(), "float32")
    text = "naïve\n\x00\t🙂  <|endoftext|> of bytes"
    ours = ByteTokenizer().encode_batch([text])[0].tolist()
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.encode_batch([text])[0].tolist() == ours
    assert (loaded.bos, loaded.eos, loaded.vocab_size) == (256, 256, 257)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.encode_special_tokens = True
    assert model.encode(text).ids == [256, *ours]
    assert model.decode(model.encode(text).ids) == text


LLAMA = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu"} | dict.fromkeys(
    ("qkv_bias", "out_bias", "mlp_bias"), False
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mlp": "gelu", "mlp_dim": 100},
        LLAMA | {"rope": {"scaling": "llama3", "factor": 8.0}, "num_kv_heads": 4},
        LLAMA | {"rope": {"scaling": "yarn", "factor": 4.0, "original_length": 32768}},
        LLAMA
        | {"rope": {"scaling": "yarn", "factor": 2.0, "whole_channels": False, "attention_factor": 1.5}}
        | {"sliding_window": 7},
    ],
)
def test_a_config_survives_the_way_out_and_in(change) -> None:
    config = DecoderConfig.model_validate(change)
    assert resolved(config_from_hf(config_to_hf(config))) == resolved(config)


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_a_text_ends_there_where_it_ends_here(saved, tmp_path) -> None:
    """What ends a text is written, and what no text can end with is refused, before anything is there."""
    run = bring_in(saved, tmp_path / "run").folder
    for name, ends in (("w7", [60, 7]), ("no such", None)):
        trainer = Trainer.from_run(run, [f"sample.end_tokens=['{name}']"], devices=jax.devices()[:1])
        if ends is None:
            with pytest.raises(StackError, match=r"sample\.end_tokens: 'no such' is no token of"):
                list(export(trainer, tmp_path / "out2"))
            assert not [path.name for path in tmp_path.iterdir() if "out2" in path.name]
        else:
            list(export(trainer, tmp_path / "out"))
            told = json.loads((tmp_path / "out/generation_config.json").read_text())
            assert told["eos_token_id"] == ends


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_weights_too_large_for_the_dtype_are_named_and_nothing_is_left(golden, saved, tmp_path) -> None:
    weights = dict(golden.weights)
    name = next(name for name in weights if "mlp" in name)
    weights[name] = weights[name] * 0 + 1e5
    safetensors.numpy.save_file(weights, saved / SINGLE)
    trainer = bring_in(saved, tmp_path / "run")
    with pytest.raises(StackError, match=rf"^{name} has 100000, too large for float16; export it as bfl"):
        list(export(trainer, tmp_path / "out", dtype="float16"))
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def spoil(folder: Path, how: str) -> None:
    path = folder / SINGLE
    match how:
        case "cut":
            path.write_bytes(path.read_bytes()[:-10])
        case "empty":
            path.write_bytes(b"")
        case "header":
            path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
        case "pickle":
            path.rename(folder / "pytorch_model.bin")
        case "part":
            path.rename(folder / "model-00001-of-00002.safetensors")
        case "index":
            (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
        case "elsewhere":
            (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
        case "config":
            (folder / "config.json").write_text((folder / "config.json").read_text()[:40])
        case "no config":
            (folder / "config.json").unlink()
        case "tokenizer":
            (folder / "tokenizer.json").unlink()
        case "small":
            write_tokenizer(folder, 80)
        case "shape":
            weights = safetensors.numpy.load_file(path)
            name = next(name for name in weights if "mlp" in name)
            safetensors.numpy.save_file(weights | {name: weights[name][..., :-1]}, path)
        case "nothing":
            path.unlink()


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("cut", r"model.safetensors is damaged or no safetensors file: .*; fetch it again"),
        ("empty", r"model.safetensors is damaged or no safetensors file: "),
        ("header", r"model.safetensors is damaged or no safetensors file: "),
        (
            "pickle",
            r"saved holds pytorch_model.bin, a pickle, which could run any code; where it is trusted, con",
        ),
        (
            "part",
            r"saved holds model-00001-of-00002.safetensors, but neither model.safetensors nor model.saf",
        ),
        (
            "index",
            r"saved lacks model-00002-of-00002.safetensors, which its model.safetensors.index.json nam",
        ),
        ("elsewhere", r"index.json is no index of safetensors files: .*outside"),
        ("config", r"config.json is no JSON: .*; fetch it again"),
        ("no config", r"config.json cannot be read: No such file"),
        ("tokenizer", r"saved has no tokenizer.json; give one with data.tokenizer=FILE"),
        ("small", r"model.vocab_size=61 is smaller than the tokenizer's 80 words"),
        ("shape", r"mlp\S+ has shape .*, the config asks for .*; it is not of the model"),
        ("nothing", r"saved holds no model.safetensors; give a folder that `save_pretrained` has written"),
    ],
)
def test_what_is_wrong_is_named_and_no_run_is_made(saved, tmp_path, capsys, how, told) -> None:
    spoil(saved, how)
    assert main(["import", str(saved), "--to", str(tmp_path / "run"), "mesh.data=8"]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(told, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_what_cannot_be_asked_for_is_refused(saved, tmp_path, capsys) -> None:
    run = str(tmp_path / "run")
    for words, told in (
        (["import", str(saved), "--to", str(saved)], "saved exists; give a run that does not, or delete it"),
        (["import", str(saved), "--to", run, "model.rope.theta=3"], "model.rope is what "),
        (["import", str(saved), "--to", run, "name=x"], "name and output_dir are those of --to"),
        (["import", str(tmp_path / "no"), "--to", run], "no is no folder; give one with a config.json"),
        (
            ["export", run, "--to", "onnx", str(tmp_path / "out")],
            "--to onnx: there is only hf and adapter",
        ),
        (["export", run, "--to", "hf", str(tmp_path / "out")], "run"),
    ):
        assert main(words) in (1, 2), words
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert told in error, error
