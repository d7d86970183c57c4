"""A small model of transformers as `save_pretrained` writes it, from the files of tests/goldens."""

import json
from pathlib import Path

import safetensors.numpy
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from stack.interop.safetensors_folder import SINGLE


def write_tokenizer(folder: Path, words: int) -> None:
    vocabulary = {f"w{number}": number for number in range(words - 1)} | {"<|endoftext|>": words - 1}
    model = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    model.pre_tokenizer = Whitespace()
    model.add_special_tokens(["<|endoftext|>"])
    model.save(str(folder / "tokenizer.json"))


def save(folder: Path, golden, weights=None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(golden.config))
    safetensors.numpy.save_file(weights or golden.weights, folder / SINGLE)
    write_tokenizer(folder, 61)
    return folder
