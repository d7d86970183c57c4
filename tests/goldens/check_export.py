"""Checks both ways with Hugging Face transformers: `stack import`, `stack export`, `from_pretrained`.

Needs PyTorch and transformers, as `make_hugging_face.py` does, and an installed Stack:

    python tests/goldens/check_export.py .venv/bin/stack [FAMILY ...]

Random models of every family go in and out again in three dtypes: every tensor must be the same, bit for
bit, and the logits with it. Then a model of bytes is trained by Stack for some steps and exported; greedy
text of transformers, through the exported tokenizer, must be that of `stack sample`.

Encoders go the same way, BERT with its head of next sentences, which must be named and left out, and with
its pooler, whose output must be the same too. A masked model of bytes is trained and exported: its scores
of a masked text must be those of transformers.
"""

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from make_hugging_face import CONFIGS, ENCODERS, POOLED, T5_CONFIGS, encoder, make_t5, randomize, t5_keys
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

GEMMA = LLAMA | {
    "norm": "rmsnorm_zero_centered",
    "norm_placement": "both",
    "mlp": "geglu",
    "scale_embedding": True,
    "tied_embeddings": True,
    "sliding_window": 8,
    "attention_pattern": ["local", "global"],
}
TEXTS = {
    "gpt2": {},
    "llama": LLAMA,
    "gemma2": GEMMA | {"attention_softcap": 20.0, "logit_softcap": 10.0},
    "gemma3": GEMMA | {"qk_norm": True, "rope": {"theta": 1e6}, "local_rope_theta": 1e4},
}


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


SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
}


def write_tokenizer(folder: Path, special: tuple[str, ...] = ()) -> None:
    """Words w0 to w59 and an end of texts; or special ones in the place of the first."""
    words = {f"w{number}": number for number in range(60)} | {"</s>": 60}
    if special:
        words = {f"w{number}": number for number in range(len(special), 61)}
        words |= {word: number for number, word in enumerate(special)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w10"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(special) or ["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def load(
    folder: Path,
    dtype: torch.dtype,
    kind: type = transformers.AutoModelForCausalLM,
    others: tuple[str, ...] = (),
) -> transformers.PreTrainedModel:
    """A model that lacks no tensor of its files, beside whose tensors there are only heads of `others`."""
    model, about = kind.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    about["unexpected_keys"] = [key for key in about["unexpected_keys"] if not key.startswith(others)]
    lost = {name: keys for name, keys in about.items() if keys}
    assert not lost, lost
    return model.eval()


def same(one: transformers.PreTrainedModel, other: transformers.PreTrainedModel, what: object) -> None:
    """Every tensor, bit for bit."""
    assert one.state_dict().keys() == other.state_dict().keys(), what
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), (what, name)


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
        same(stored, back, (family, dtype))
        with torch.no_grad():
            assert torch.equal(stored(tokens).logits, back(tokens).logits), (family, dtype)
    # Of qwen2, transformers 5 takes Qwen's own pieces of text, whatever tokenizer.json says.
    kind = transformers.PreTrainedTokenizerFast if family == "qwen2" else transformers.AutoTokenizer
    assert kind.from_pretrained(target)("w1 w2")["input_ids"] == [60, 1, 2]
    print(f"{family}: in and out bit for bit, logits equal, in float32, bfloat16 and float16", flush=True)  # noqa: T201


def check_encoder(name: str, folder: Path) -> None:
    """In and out, in each dtype: logits, last states and what is pooled."""
    torch.manual_seed(0)
    config, pooler = ENCODERS[name], name in POOLED
    if pooler:
        model = transformers.AutoModelForPreTraining.from_config(config).eval()
        randomize(model)
    else:
        model = encoder(config, pooler=False)
    special = SPECIAL[config.model_type]
    tokens = torch.randint(5, 60, (2, 20))
    mask = torch.ones_like(tokens)
    mask[1, 15:] = 0
    given = {"attention_mask": mask, "token_type_ids": torch.randint(0, config.type_vocab_size, (2, 20))}
    heads = ("bert.pooler.", "cls.", "lm_head.")
    kinds = (transformers.AutoModelForMaskedLM, *([transformers.AutoModel] * pooler))
    for dtype in ("float32", "bfloat16", "float16"):
        kind = getattr(torch, dtype)
        source, run, target = (folder / f"{dtype}-{end}" for end in ("in", "run", "out"))
        copy.deepcopy(model).to(kind).save_pretrained(source)
        write_tokenizer(source, special)
        told = stack("import", source, "--to", run)
        assert ("not read, as Stack's models have none: cls.seq_relationship" in told) == pooler, told
        stack("export", run, "--to", "hf", target, "--dtype", dtype)
        for auto in kinds:
            stored, back = (load(place, kind, auto, heads) for place in (source, target))
            same(stored, back, (name, dtype))
            with torch.no_grad():
                pairs = zip(stored(tokens, **given).to_tuple(), back(tokens, **given).to_tuple(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs), (name, dtype, auto)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert tokenizer.mask_token == special[-1], tokenizer.mask_token
    begin = tokenizer.cls_token_id
    assert tokenizer(f"w7 {tokenizer.mask_token} w8")["input_ids"] == [begin, 7, 4, 8]
    print(f"{name}: in and out bit for bit, logits equal, in float32, bfloat16 and float16", flush=True)  # noqa: T201


SCORES = """
import sys
import jax, numpy as np
from flax import nnx
from stack import Trainer
from stack.kernels.linear_cross_entropy import logits
from stack.models.encoder import Encoder
from stack.models.stack import Execution

trainer = Trainer.from_run(sys.argv[1], devices=jax.devices()[:1])
config = trainer.config.model
text, tokenizer = sys.argv[2], trainer.tokenizer
first, last = text.split("[MASK]")
halves = [half.tolist() for half in tokenizer.encode_batch([first, last])]
tokens = np.array([[tokenizer.bos, *halves[0], tokenizer.token("[MASK]"), *halves[1]]], np.int32)
graph = nnx.graphdef(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))
model = nnx.merge(graph, jax.tree.map(np.asarray, trainer.state["params"]))
batch = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": np.arange(tokens.size)[None]}
output = model(jax.tree.map(jax.numpy.asarray, batch), Execution())
scores = logits(output.hidden, output.table, vocab_size=config.vocab_size, bias=output.bias)
np.savez(sys.argv[3], tokens=tokens, scores=scores[..., : config.vocab_size])
"""
MASKED = {
    "kind": "encoder",
    "vocab_size": 361,
    "norm_placement": "post",
    "num_types": 1,
    "mlp": "gelu",
    "norm_epsilon": 1e-12,
}


def check_masked(folder: Path) -> None:
    """Scores of a masked text by a run of Stack's own, through the exported tokenizer."""
    config = TINY | {"output_dir": str(folder), "model": TINY["model"] | MASKED}
    config |= {"objective": {"kind": "masked_words"}, "train": {"steps": 60, "batch_size": 8}}
    (folder / "run.yaml").write_text(json.dumps(config))
    stack("train", folder / "run.yaml")
    stack("export", folder / "run", "--to", "hf", folder / "out")
    text = "import nump[MASK] as np"
    python = Path(sys.argv[1]).with_name("python")
    subprocess.run([python, "-c", SCORES, folder / "run", text, folder / "scores.npz"], check=True)
    ours = np.load(folder / "scores.npz")
    model = load(folder / "out", torch.float32, transformers.AutoModelForMaskedLM)
    tokens = transformers.AutoTokenizer.from_pretrained(folder / "out")(text, return_tensors="pt")
    assert tokens["input_ids"].tolist() == ours["tokens"].tolist()
    with torch.no_grad():
        theirs = model(input_ids=tokens["input_ids"]).logits.numpy()
    worst = np.abs(ours["scores"] - theirs).max() / np.abs(theirs).max()
    assert worst < 1e-5, worst
    print(f"bert of bytes: scores of a masked text equal to {worst:.1e}", flush=True)  # noqa: T201


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
        for family in sys.argv[2:] or (*CONFIGS, *ENCODERS, *T5_CONFIGS):
            (Path(name) / family).mkdir()
            if family in ENCODERS:
                check_encoder(family, Path(name) / family)
            elif family in T5_CONFIGS:
                check_t5(family, Path(name) / family)
            else:
                check_family(family, Path(name) / family)
        for kind, check in (("masked", check_masked), ("spans", check_spans)):
            (Path(name) / kind).mkdir()
            check(Path(name) / kind)
        for kind, changes in TEXTS.items():
            folder = Path(name) / f"text-{kind}"
            folder.mkdir()
            check_text(kind, changes, folder)


if __name__ == "__main__":
    main()
