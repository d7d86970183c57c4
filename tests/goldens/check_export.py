"""Checks both ways with Hugging Face transformers: `stack import`, `stack export`, `from_pretrained`.

Needs PyTorch and transformers, as `make_hugging_face.py` does, and an installed Stack:

    python tests/goldens/check_export.py .venv/bin/stack

Random models of every family go in and out again in three dtypes: every tensor must be the same, bit for
bit, and the logits with it. Then a model of bytes is trained by Stack for some steps and exported; greedy
text of transformers, through the exported tokenizer, must be that of `stack sample`.
"""

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from make_hugging_face import CONFIGS, T5_CONFIGS, make_t5, randomize, t5_keys
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

PROMPT = "def "
TINY = {
    "name": "run",
    "model": {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "max_length": 64, "dtype": "float32"},
    "data": {"sources": [{"kind": "python", "max_bytes": 200_000}], "sequence_length": 64},
    "train": {"steps": 60, "batch_size": 8},
    "optimizer": {"learning_rate": 3e-3},
    "eval": {"every": 0},
    "sample": {"at_end": False},
}
LLAMA = {
    "position": "rotary",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "num_kv_heads": 2,
    "mlp_dim": 96,
} | dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "tied_embeddings"), False)


T5 = {
    "position": "relative",
    "norm": "rmsnorm",
    "mlp": "geglu",
    "attention_scale": 1.0,
    "init": "fan_in",
    "init_std": 1.0,
    "scale_residual_init": False,
} | dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "tied_embeddings"), False)


def stack(*words: object) -> str:
    """What a command prints."""
    done = subprocess.run([sys.argv[1], *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"stack {' '.join(map(str, words))}: {done.stderr}")
    return done.stdout


def write_tokenizer(folder: Path) -> None:
    words = {f"w{number}": number for number in range(60)} | {"</s>": 60}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def load(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A model that lacks no tensor of its files and has none beside them."""
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    lost = {name: keys for name, keys in about.items() if keys}
    assert not lost, lost
    return model.eval()


def check_family(family: str, folder: Path) -> None:
    """In and out, in each dtype."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    randomize(model)
    tokens = torch.randint(0, 61, (2, 20))
    for dtype in ("float32", "bfloat16", "float16"):
        kind = getattr(torch, dtype)
        source, run, target = (folder / f"{dtype}-{name}" for name in ("in", "run", "out"))
        copy.deepcopy(model).to(kind).save_pretrained(source)
        write_tokenizer(source)
        stack("import", source, "--to", run)
        stack("export", run, "--to", "hf", target, "--dtype", dtype)
        stored, back = (load(place, kind) for place in (source, target))
        for name, tensor in stored.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[name]), (family, dtype, name)
        with torch.no_grad():
            assert torch.equal(stored(tokens).logits, back(tokens).logits), (family, dtype)
    # Of qwen2, transformers 5 takes Qwen's own pieces of text, whatever tokenizer.json says.
    kind = transformers.PreTrainedTokenizerFast if family == "qwen2" else transformers.AutoTokenizer
    assert kind.from_pretrained(target)("w1 w2")["input_ids"] == [60, 1, 2]
    print(f"{family}: in and out bit for bit, logits equal, in float32, bfloat16 and float16", flush=True)  # noqa: T201


def check_t5(family: str, folder: Path) -> None:
    """In and out, in each dtype, of a model that reads one row and writes another."""
    torch.manual_seed(0)
    config = T5_CONFIGS[family]
    model = make_t5(config)
    read, written = torch.randint(4, 61, (2, 20)), torch.randint(4, 61, (2, 9))
    for dtype in ("float32", "bfloat16", "float16"):
        kind = getattr(torch, dtype)
        source, run, target = (folder / f"{dtype}-{name}" for name in ("in", "run", "out"))
        copy.deepcopy(model).to(kind).save_pretrained(source)
        (source / "config.json").write_text(json.dumps(t5_keys(config)))
        write_tokenizer(source)
        stack("import", source, "--to", run)
        stack("export", run, "--to", "hf", target, "--dtype", dtype)
        stored, back = (
            transformers.T5ForConditionalGeneration.from_pretrained(place, dtype=kind).eval()
            for place in (source, target)
        )
        for name, tensor in model.to(kind).state_dict().items():
            assert torch.equal(tensor, stored.state_dict()[name]), (family, dtype, name)
            assert torch.equal(tensor, back.state_dict()[name]), (family, dtype, name)
        with torch.no_grad():
            first, second = (one(read, labels=written).logits for one in (stored, back))
        assert torch.equal(first, second), (family, dtype)
        model.float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert tokenizer("w1 w2")["input_ids"] == [1, 2, 60]
    print(f"{family}: in and out bit for bit, logits equal, in float32, bfloat16 and float16", flush=True)  # noqa: T201


def check_spans(folder: Path) -> None:
    """A run of Stack's own that writes what was removed of a text, greedily."""
    model = TINY["model"] | {"kind": "encoder_decoder", "vocab_size": 361} | T5
    config = TINY | {"output_dir": str(folder), "model": model, "objective": {"kind": "span_corruption"}}
    (folder / "run.yaml").write_text(json.dumps(config))
    stack("train", folder / "run.yaml")
    prompt = "def <extra_id_0>(self):"
    want = stack("sample", folder / "run", prompt, "--length", 40, "--temperature", 0)
    stack("export", folder / "run", "--to", "hf", folder / "out")
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    new = model.generate(
        **tokenizer(prompt, return_tensors="pt"), do_sample=False, temperature=None, max_new_tokens=40
    )[0, 1:]
    text = tokenizer.decode([number for number in new.tolist() if number != tokenizer.eos_token_id])
    assert f"{prompt}\n{text}\n" == want, (text, want)
    print(f"t5 of bytes: {len(new)} greedy words equal", flush=True)  # noqa: T201


def check_text(kind: str, changes: dict, folder: Path) -> None:
    """A run of Stack's own, greedily."""
    config = TINY | {"output_dir": str(folder), "model": TINY["model"] | changes}
    (folder / "run.yaml").write_text(json.dumps(config))
    stack("train", folder / "run.yaml")
    want = stack("sample", folder / "run", PROMPT, "--length", 40, "--temperature", 0)
    stack("export", folder / "run", "--to", "hf", folder / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    tokens = tokenizer(PROMPT, return_tensors="pt")
    new = model.generate(**tokens, do_sample=False, temperature=None, max_new_tokens=40)
    text = tokenizer.decode(new[0], skip_special_tokens=True)
    assert text + "\n" == want, (text, want)
    print(f"{kind} of bytes: {len(text) - len(PROMPT)} greedy letters equal", flush=True)  # noqa: T201


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        for family in CONFIGS:
            (Path(name) / family).mkdir()
            check_family(family, Path(name) / family)
        for family in T5_CONFIGS:
            (Path(name) / family).mkdir()
            check_t5(family, Path(name) / family)
        (Path(name) / "spans").mkdir()
        check_spans(Path(name) / "spans")
        for kind, changes in (("gpt2", {}), ("llama", LLAMA)):
            folder = Path(name) / f"text-{kind}"
            folder.mkdir()
            check_text(kind, changes, folder)


if __name__ == "__main__":
    main()
