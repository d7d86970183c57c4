"""What a run has trained beside the weights it began with, as a small folder."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from stack.config import StackError
from stack.config.paths import expand
from stack.interop.safetensors_folder import SINGLE, write_folder
from stack.step import state as states
from stack.storage import durable
from stack.train.ledger import TOKENIZER
from stack.train.trainer import Trainer
from stack.train.weights.adapter import ABOUT, ARRAYS, FORMAT, digest_of


def export_adapter(trainer: Trainer, folder: str | os.PathLike[str]) -> Iterator[str]:
    """Writes all that a run has trained in float32, its config and its tokenizer; every process calls it.

    The folder appears when all of it is written. It belongs to the weights that the run began with, whose
    digest it holds.

    Args:
        trainer: of `Trainer.from_run`.
        folder: that does not exist yet.

    Yields:
        What was done, in lines.

    Raises:
        StackError: the run has no adapter, or the folder exists or cannot be written.
    """
    target = expand(folder)
    if trainer.config.adapter is None:
        raise StackError(f"{trainer.folder} has no adapter; export it whole: --to hf FOLDER")
    if target.exists():
        raise StackError(f"{target} exists; give a folder that does not, or delete it")
    state, origin = trainer.state, trainer.ledger.origin
    assert state is not None, "a run that was opened has parameters"
    arrays: dict[str, Any] = dict(flatten_dict(state.get("ema", state["params"]), sep="."))
    step, is_first = int(state["step"]), jax.process_index() == 0
    about: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "base": {name: origin[name] for name in ("source", "digest")},
        "config": trainer.config.model_dump(mode="json"),
    }
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        if is_first:
            durable.make_folder(hidden)
            trainer.words.save(hidden / TOKENIZER)
        sizes = [(name, array.shape) for name, array in arrays.items()]
        whole = sum(array.nbytes for array in arrays.values())
        for _ in write_folder(
            hidden,
            sizes,
            np.dtype(np.float32),
            lambda name: states.to_host(arrays[name]),
            most_bytes=whole + 1,
            write=is_first,
        ):
            pass
        if is_first:
            (hidden / SINGLE).rename(hidden / ARRAYS)
            about["arrays"] = digest_of(hidden / ARRAYS)
            (hidden / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
            durable.sync_tree(hidden)
            hidden.rename(target)
            durable.sync(target.parent)
    except OSError as error:
        raise StackError(f"{target} cannot be written: {error.strerror}; give another folder") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    yield f"exported  {trainer.folder} at step {step:,}: {trainer.program.num_trained:,} trained parameters"
    yield f"folder    {target}: {ARRAYS} of {whole:,} bytes, {ABOUT}"
    yield f"base      {about['base']['source']} (digest {about['base']['digest']})"
