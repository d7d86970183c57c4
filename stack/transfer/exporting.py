"""A run as a folder that transformers, and what loads like it, reads."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from stack.config import ConfigError, DecoderConfig, EncoderConfig, EncoderDecoderConfig, StackError
from stack.config.paths import expand
from stack.interop.hugging_face import tensors
from stack.interop.hugging_face_files import write_files
from stack.interop.safetensors_folder import write_folder
from stack.layers.adapter import merged
from stack.step import state as states
from stack.storage import durable
from stack.train.trainer import Trainer

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_MOST_BYTES = 5 * 10**9


def export(
    trainer: Trainer, folder: str | os.PathLike[str], *, dtype: str = "float32", most_bytes: int = _MOST_BYTES
) -> Iterator[str]:
    """Writes weights, config, tokenizer and generation settings; every process of a run calls it.

    A host holds one tensor at a time beside its devices' shards. The folder appears when all of it is
    written.

    Args:
        trainer: of `Trainer.from_run`.
        folder: that does not exist yet.
        dtype: that weights are stored in: `float32` (as they are), `bfloat16` or `float16`.
        most_bytes: of a file.

    Yields:
        What was done, in lines.

    Raises:
        ConfigError: no such dtype.
        StackError: the folder exists or cannot be written, transformers has no such model, the run is of a
            task, or a weight does not fit the dtype.
    """
    target = expand(folder)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is none of {', '.join(DTYPES)}")
    if target.exists():
        raise StackError(f"{target} exists; give a folder that does not, or delete it")
    config = trainer.config
    if not isinstance(config.model, DecoderConfig | EncoderConfig | EncoderDecoderConfig):
        raise StackError(f"model.kind={config.model.kind} has no counterpart in transformers")
    if not config.objective.scores_words:
        raise StackError(
            f"objective.kind={config.objective.kind}: the head of a task is not exported; use the run itself,"
            " with: stack predict RUN --input FILE.jsonl --output FILE.jsonl"
        )
    plan = {tensor.name: tensor for tensor in tensors(config.model)}
    assert trainer.state is not None, "a run that was opened has parameters"
    trainer.ledger.check_tokenizer(trainer.tokenizer)
    read, merged_into = reader(trainer), len(trainer.program.adapters)
    is_first = jax.process_index() == 0
    notes: list[str] = []
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        if is_first:
            durable.make_folder(hidden)
            notes = write_files(hidden, config, trainer.tokenizer, dtype)
        names = write_folder(
            hidden,
            [(name, tensor.shape) for name, tensor in plan.items()],
            DTYPES[dtype],
            lambda name: plan[name].make(read),
            most_bytes=most_bytes,
            write=is_first,
        )
        files = list(names)
        if is_first:
            durable.sync_tree(hidden)
            hidden.rename(target)
            durable.sync(target.parent)
    except OSError as error:
        raise StackError(f"{target} cannot be written: {error.strerror}; give another folder") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    number = "1 file" if len(files) == 1 else f"{len(files)} files"
    step = int(trainer.state["step"])
    yield f"exported  {trainer.folder} at step {step:,}: {trainer.program.num_base_parameters:,} parameters"
    yield f"folder    {target}: {number} of {dtype}"
    if merged_into:
        notes.append(f"the adapter is merged into the {merged_into} matrices it was trained beside")
    yield from (f"note      {note}" for note in notes)


def reader(trainer: Trainer) -> Callable[[str, int | None], np.ndarray]:
    """Reads a parameter of a trainer, or what one layer has of it, by path; with adapters merged into it.

    Args:
        trainer: with parameters.
    """
    assert trainer.state is not None, "a run that was opened has parameters"
    arrays: dict[str, Any] = dict(flatten_dict(states.join(trainer.state), sep="/"))
    adapters = {name.replace(".", "/"): one for name, one in trainer.program.adapters.items()}

    def read(path: str, layer: int | None) -> np.ndarray:
        owner, _, last = path.rpartition("/")
        if last != "kernel" or owner not in adapters:
            return _read(arrays, path, layer).astype(np.float32, copy=False)
        kernel, a, b = (_read(arrays, f"{owner}/{name}", layer) for name in ("kernel", "lora_a", "lora_b"))
        adapter = adapters[owner]
        magnitude = _read(arrays, f"{owner}/dora_magnitude", layer) if adapter.has_magnitude else None
        return merged(kernel, a, b, magnitude, adapter.scale)

    return read


def _read(arrays: dict[str, Any], path: str, layer: int | None) -> np.ndarray:
    """A parameter, or what one layer has of it, whole on this host."""
    return states.to_host(arrays[path], layer)
