"""How a run begins: with the parameters of its seed, or with weights that are there."""

from collections.abc import Callable, Mapping
from typing import Any

from stack.config import StackError
from stack.data.tokenizer import Tokenizer
from stack.parallel import mesh as meshes
from stack.step import state as states
from stack.step.adapter import is_of_adapter
from stack.step.program import Program
from stack.storage.store import Store
from stack.train.bits import fingerprint
from stack.train.checkpoint.checkpoints import Checkpoints, named_leaves
from stack.train.checkpoint.manifest import DamagedError
from stack.train.weights.load import load
from stack.train.weights.match import Match, lines, match
from stack.train.weights.source import Source, find


def check(program: Program, store: Store, tokenizer: Callable[[], Tokenizer]) -> None:
    """Refuses weights that a new run could not begin with; reads their names and shapes.

    Args:
      program: of the run.
      store: of its checkpoints; with one, it begins no more.
      tokenizer: gives its tokenizer.

    Raises:
      StackError: what is wrong with them.
    """
    if program.config.init_from is not None and Checkpoints(store).latest() is None:
        words = tokenizer()
        _first_sound(program, lambda source: match(program, source, words), lambda _: None)


def begin(
    program: Program, tokenizer: Tokenizer, warn: Callable[[str], None]
) -> tuple[states.State, Mapping[str, Any]]:
    """The state at step 0, and where its parameters come from: plain values, empty if from the seed.

    Args:
      program: of the run.
      tokenizer: of the run.
      warn: told what is not simply loaded, a line each.

    Raises:
      StackError: what is wrong with the weights.
    """
    if program.config.init_from is None:
        return states.init(program), {}

    def tell(text: str) -> None:
        warn(f"init_from: {text}")

    return _first_sound(program, lambda source: begin_with(program, source, tokenizer, tell), tell)


def begin_with(
    program: Program, source: Source, tokenizer: Tokenizer, warn: Callable[[str], None]
) -> tuple[states.State, Mapping[str, Any]]:
    """The same with the weights of a source."""
    found: Match = match(program, source, tokenizer)
    with meshes.use(states.concrete(program)):
        params = load(program, found, source)
    flat = {name: leaf for name, leaf in named_leaves(params).items() if not is_of_adapter(name)}
    taken = flat.keys() & {*found.loaded, *found.tables, *found.longer}
    told = lines(found, program, source)
    origin = {
        "source": source.name,
        "taken": len(taken),
        "parameters": len(flat),
        "notes": told,
        "digest": _digest(found, params),
    }
    for text in told:
        warn(text)
    return states.init(program, params), origin


def again(program: Program, tokenizer: Tokenizer, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a run began with, read once more; they lie as `program.parameters`.

    Args:
      program: of the run.
      tokenizer: of the run.
      origin: what `begin` told.

    Raises:
      StackError: they are no longer where they were.
    """

    def read(source: Source) -> dict[str, Any]:
        found = match(program, source, tokenizer)
        params = load(program, found, source)
        if _digest(found, params) != origin["digest"]:
            raise DamagedError(f"{source.name} is not what the run began with, {origin['source']}")
        return params

    return _first_sound(program, read, lambda _: None)


def _digest(found: Match, params: dict[str, Any]) -> str:
    """Of the parameters that come from the weights."""
    taken = {*found.loaded, *found.tables, *found.longer}
    return fingerprint({name: leaf for name, leaf in named_leaves(params).items() if name in taken})


def _first_sound[T](program: Program, use: Callable[[Source], T], warn: Callable[[str], None]) -> T:
    """What the first weights give that are not damaged."""
    damaged: list[str] = []
    try:
        for opens in find(str(program.config.init_from)):
            try:
                source = opens()
                result = use(source)
            except DamagedError as error:
                damaged.append(str(error))
                continue
            for text in damaged:
                warn(f"{text}; {source.name} is sound, and is taken")
            return result
        raise StackError(f"{'; '.join(damaged)}; give weights that are sound")
    except StackError as error:
        raise StackError(f"init_from: {error}") from error
