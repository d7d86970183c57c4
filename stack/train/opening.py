"""A run that is opened to be read: with its own parameters, or an adapter beside those of a base."""

import logging
import os
import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from flax.traverse_util import flatten_dict, unflatten_dict

from stack.config import Config, StackError, load
from stack.config.paths import expand
from stack.data.tokenizer import load_tokenizer
from stack.parallel import mesh as meshes
from stack.step import state as states
from stack.train import starting
from stack.train.checkpoint.checkpoints import Checkpoints, named_leaves
from stack.train.weights.adapter import find_adapter

if TYPE_CHECKING:
    from stack.train.trainer import Trainer


def open_run[T: "Trainer"](
    make: Callable[..., T],
    folder: str,
    overrides: Sequence[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    step: int | Literal["best"] | None = None,
    **options: Any,
) -> T:
    """The trainer of a run folder; see `Trainer.from_run`.

    Args:
      make: makes a trainer of a config and the options.
      folder: of the run; with an adapter anything that `init_from` may be.
      overrides: of its config, or of the adapter's.
      adapter: a folder with one, or None.
      step: of the checkpoint that is read; None: of the newest.
      options: of a trainer.
    """
    if adapter is not None:
        if step is not None:
            raise StackError("a checkpoint by its step, or the best, is of a run's own; leave --adapter out")
        return _open_adapter(partial(make, **options), folder, os.fspath(adapter), overrides)
    trainer = make(load(folder, overrides), **options)
    parts = states.without_training(states.abstract(trainer.program))
    with Checkpoints(trainer.ledger.store) as checkpoints:
        warn = logging.getLogger("stack").warning
        trainer.state = trainer.ledger.restore(checkpoints, parts, data=None, warn=warn, of=step)
    if trainer.state is None:
        command = shlex.join(["stack", "train", folder, *overrides])
        raise StackError(f"{trainer.folder} holds no checkpoint yet; train it first: {command}")
    return trainer


def _open_adapter[T: "Trainer"](
    make: Callable[[Config], T], base: str, adapter: str, overrides: Sequence[str]
) -> T:
    """The base gives the weights, the adapter all else: config, objective, tokenizer."""
    found = find_adapter(adapter, tuple(overrides))
    trainer = make(Config.model_validate(found.config.model_dump(mode="json") | {"init_from": base}))
    if found.tokenizer.is_file():
        trainer.tokenizer = load_tokenizer(str(found.tokenizer))
    program = trainer.program

    def warn(text: str) -> None:  # What the base has not, the adapter has.
        if not text.startswith("init_from: left as initialised: "):
            logging.getLogger("stack").warning(text)

    try:
        state, origin = starting.begin(program, trainer.tokenizer, warn)
    except StackError as error:
        told = str(error).removeprefix("init_from: ")
        raise StackError(f"{found.name}: {told}") from error
    if origin["digest"] != found.base["digest"]:
        raise StackError(
            f"{found.name} is an adapter of {found.base['source']} (digest {found.base['digest']}), not of"
            f" {origin['source']} (digest {origin['digest']}); give the base it was trained beside"
            f"{_still_there(base, found.base['source'])}"
        )
    with meshes.use(trainer.mesh):
        paths = {".".join(path): path for path in flatten_dict(state["params"])}
        arrays = found.read(named_leaves(states.abstract(program)["params"]))
        state["params"] = unflatten_dict({path: arrays[name] for name, path in paths.items()})
    state.pop("ema", None)  # What was kept is the average, where there is one.
    trainer.state, trainer.ledger.origin = state, origin
    return trainer


def _still_there(base: str, source: str) -> str:
    """Where the checkpoint lies that an adapter was trained beside, if it is an older one of the base."""
    told = re.fullmatch(r"(.+) at step ([\d,]+)", source)
    if told is None or expand(told[1]).resolve() != expand(base).resolve():
        return ""
    place = expand(base) / "checkpoints" / told[2].replace(",", "")
    return f", which is {place}" if place.is_dir() else ""
