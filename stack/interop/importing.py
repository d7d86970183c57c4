"""A folder of transformers as a run: its weights straight onto the mesh, and a first checkpoint of them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stack.config import Config, ConfigError, StackError
from stack.config.paths import expand
from stack.data.dataset import digest
from stack.data.tokenizer import FILE
from stack.interop.hugging_face import Weights, config_from_hf
from stack.interop.safetensors_folder import open_folder
from stack.step import state as states
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.lock import only_writer
from stack.train.record import Record
from stack.train.trainer import Trainer

_FREE = {
    *("dtype", "attention", "scan_unroll", "vocab_multiple"),
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
    state = open_folder(source)
    config = _config(source, target, overrides)
    weights = Weights(state, config.model)
    trainer = Trainer(config, devices=devices)
    tokenizer = trainer.tokenizer
    likes: dict[str, Any] = dict(flatten_dict(trainer.program.parameters, sep="/"))
    arrays = {tuple(path.split("/")): _place(weights, path, likes[path].sharding) for path in weights.paths}
    trainer.state = states.init(trainer.program, unflatten_dict(arrays))
    words = {"tokenizer": digest(tokenizer.fingerprint)}
    record = Record(config={"model": config.model_dump(mode="json")["model"]}, data=words, rows=0)
    with only_writer(trainer.folder), Checkpoints(trainer.ledger.store, config.checkpoint) as checkpoints:
        checkpoints.save(0, trainer.state, record.as_dict())
        checkpoints.wait()
        if checkpoints.failure:
            raise StackError(checkpoints.failure)
        if jax.process_index() == 0:
            trainer.ledger.write(words, tokenizer)
    program = trainer.program
    yield f"imported  {source}: {program.num_parameters:,} parameters in {len(state):,} tensors"
    yield f"run       {trainer.folder} at step 0; {program.attention}"


def _config(source: Path, target: Path, overrides: Sequence[str]) -> Config:
    path = source / "config.json"
    try:
        keys = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise StackError(f"{path} cannot be read: {error.strerror}; give a folder that has it") from error
    except (ValueError, RecursionError) as error:
        raise StackError(f"{path} is no JSON: {error}; fetch it again") from error
    try:
        model = config_from_hf(keys)
    except StackError as error:
        raise StackError(f"{path}: {error}") from None
    tokenizer = source / FILE
    given = any(word.startswith("data.tokenizer=") for word in overrides)
    if not given and not tokenizer.is_file():
        raise StackError(f"{source} has no {FILE}; give one with data.tokenizer=FILE")
    config = Config.model_validate(
        {
            "name": target.name,
            "output_dir": str(target.parent),
            "model": model.model_dump(mode="json"),
            "objective": {"kind": _OBJECTIVES[model.shape]},
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
            raise ConfigError(f"model.{name} is what {path} says; leave it out")
    return config


def _place(weights: Weights, path: str, sharding: NamedSharding) -> jax.Array:
    """A parameter as it lies at rest, layer after layer."""
    layers = weights.layers(path)
    if not layers:
        return _spread(weights.read(path), sharding)
    assert isinstance(sharding.mesh, Mesh), "arrays are made on devices"
    auto = states.automatic(sharding.mesh)
    first = weights.read(path, 0)
    whole, one = NamedSharding(auto, sharding.spec), NamedSharding(auto, P(*sharding.spec[1:]))
    shape = (len(layers), *first.shape)
    array = jax.jit(partial(jnp.zeros, shape, jnp.float32), out_shardings=whole)()
    for layer in layers:
        array = _put(whole)(array, _spread(weights.read(path, layer) if layer else first, one), layer)
    return states.retype(array, sharding)


def _spread(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


@cache
def _put(whole: NamedSharding) -> Callable[..., jax.Array]:
    def put(array: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, layer, number, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=whole)
