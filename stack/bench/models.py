"""The models that are measured: real shapes, so that what is fast here is fast in a run."""

from typing import Any

from stack.config import Config

_GPT2 = {"vocab_size": 50_257}
_LLAMA = {
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "position": "rotary",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
}
_LLAMA_3 = _LLAMA | {"vocab_size": 128_256, "rope": {"theta": 500_000.0}, "scale_residual_init": False}
_ON_CPU = {"num_layers": 4, "embed_dim": 128, "num_heads": 4, "vocab_size": 257, "dtype": "float32"}

MODELS: dict[str, dict[str, Any]] = {
    # The released models (Radford et al. 2019, table 2).
    "gpt2_124m": _GPT2 | {"num_layers": 12, "embed_dim": 768, "num_heads": 12},
    "gpt2_1_5b": _GPT2 | {"num_layers": 48, "embed_dim": 1600, "num_heads": 25},
    # Llama 3.2 3B: the shapes of its config.json; its stretched wavelengths cost nothing, and are left out.
    "llama3_3b": _LLAMA_3
    | {"num_layers": 28, "embed_dim": 3072, "num_heads": 24, "num_kv_heads": 8, "mlp_dim": 8192},
    # The Llama 3 Herd of Models (arXiv 2407.21783, table 3).
    "llama3_8b": _LLAMA_3
    | {
        "num_layers": 32,
        "embed_dim": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "mlp_dim": 14_336,
        "tied_embeddings": False,
    },
    # As in configs/quickstart.yaml and configs/nanogpt_cpu.yaml.
    "quickstart": _LLAMA | _ON_CPU | {"mlp_dim": 384, "scan_unroll": 4},
    "nanogpt_cpu": _ON_CPU
    | {
        "mlp": "gelu",
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "position_init_std": 0.02,
        "scan_unroll": 4,
    },
    "tiny": _LLAMA | _ON_CPU | {"num_layers": 2, "embed_dim": 32, "num_kv_heads": 2, "mlp_dim": 64},
}
"""The fields of `model` of each, without the length."""


def config(
    name: str,
    *,
    length: int,
    rows: int = 1,
    packed: bool = False,
    remat: str = "none",
    changes: dict[str, dict[str, Any]] | None = None,
) -> Config:
    """The config of a training step on one device.

    Args:
        name: in `MODELS`.
        length: tokens of a row.
        rows: of a step, which is one micro-batch.
        packed: whether documents share a row.
        remat: as `train.remat`.
        changes: fields by section, over what follows from the others.
    """
    tree: dict[str, Any] = {
        "name": name,
        "model": MODELS[name] | {"max_length": length},
        "data": {"sequence_length": length, "packed": packed},
        "train": {"batch_size": rows, "remat": remat},
    }
    for section, fields in (changes or {}).items():
        tree[section] = tree.get(section, {}) | fields
    return Config.model_validate(tree)
