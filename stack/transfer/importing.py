"""A folder of transformers as a run: its weights straight onto the mesh, and a first checkpoint of them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from stack.config import Config, ConfigError, EncoderConfig, EncoderDecoderConfig, ModelConfig, StackError
from stack.config.paths import expand
from stack.data.dataset import digest
from stack.data.tokenizer import FILE, named_marks
from stack.interop.families import bert
from stack.train import starting
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.lock import only_writer
from stack.train.record import Record
from stack.train.trainer import Trainer
from stack.train.weights.folder import CONFIG, Folder

_FREE = {
    *("dtype", "scan_unroll", "vocab_multiple"),
    *("embedding_dropout", "attention_dropout", "residual_dropout"),
}
"""What of a model its numbers are not of."""

_OBJECTIVES = {"decoder": "causal", "encoder_decoder": "span_corruption"}
"""What a model of a shape is trained for, unless an override says otherwise."""


def load_weights(
    folder: str | os.PathLike[str],
    to: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[str]:
    """Makes a run of the model in a folder, at step 0; every process of a run calls it.

    A host holds one tensor at a time beside its devices' shards. Nothing is written before all is read.

    Args:
        folder: with config.json, safetensors files and a tokenizer.json.
        to: the folder of the run, which does not exist yet.
        overrides: of its config, as `mesh.fsdp=8`; not of the model's mathematics, which the folder gives.
        devices: by default all.

    Yields:
        What was done, in lines.

    Raises:
        ConfigError: an override that cannot be.
        StackError: the run exists or cannot be written, or what is in the folder is not of a model that Stack
            has.
    """
    source, target = expand(folder), expand(to)
    if target.exists():
        raise StackError(f"{target} exists; give a run that does not, or delete it")
    if jax.process_count() > 1:  # The first makes it when all have looked.
        multihost_utils.sync_global_devices("the folder of an import")
    weights = Folder(source)
    config = _config(weights, source, target, overrides)
    trainer = Trainer(config, devices=devices)
    tokenizer = trainer.tokenizer
    notes: list[str] = [*weights.notes]
    trainer.state, origin = starting.begin_with(trainer.program, weights, tokenizer, notes.append)
    trainer.ledger.origin = origin
    words = {"tokenizer": digest(tokenizer.fingerprint)}
    record = Record(
        config={"model": config.model_dump(mode="json")["model"]}, data=words, rows=0, origin=origin
    )
    with only_writer(trainer.folder), Checkpoints(trainer.ledger.store, config.checkpoint) as checkpoints:
        checkpoints.save(0, trainer.state, record.as_dict())
        checkpoints.wait()
        if checkpoints.failure:
            raise StackError(checkpoints.failure)
        if jax.process_index() == 0:
            trainer.ledger.write(words, tokenizer)
    program = trainer.program
    yield f"imported  {source}: {program.num_parameters:,} parameters in {weights.num_tensors:,} tensors"
    yield f"run       {trainer.folder} at step 0; {program.attention}"
    yield from (f"note      {note}" for note in notes)


def _config(weights: Folder, source: Path, target: Path, overrides: Sequence[str]) -> Config:
    model = weights.config
    tokenizer = source / FILE
    given = any(word.startswith("data.tokenizer=") for word in overrides)
    if not given and not tokenizer.is_file():
        raise StackError(f"{source} has no {FILE}; give one with data.tokenizer=FILE")
    config = Config.model_validate(
        {
            "name": target.name,
            "output_dir": str(target.parent),
            "model": model.model_dump(mode="json"),
            "objective": _trained_for(model, source),
            "data": {
                "tokenizer": str(tokenizer),
                "sequence_length": min(model.max_length, Config().data.sequence_length),
            },
        }
    ).replace(*overrides)
    if expand(config.output_dir) / config.name != target:
        raise ConfigError(f"name and output_dir are those of --to {target}; leave them out")
    then, now = model.model_dump(), config.model.model_dump()
    for name in now.keys() - _FREE:
        if now[name] != then.get(name):
            raise ConfigError(f"model.{name} is what {source / CONFIG} says; leave it out")
    return config


def _trained_for(model: ModelConfig, source: Path) -> dict[str, Any]:
    """The objective of a model, unless an override says otherwise."""
    if isinstance(model, EncoderConfig):
        return bert.objective(model, named_marks(source / "tokenizer_config.json"))
    return {"kind": "span_corruption" if isinstance(model, EncoderDecoderConfig) else "causal"}
