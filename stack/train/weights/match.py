"""How weights fit a model: by the names of parameters, their shapes, and the words of the vocabulary."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from stack.config import StackError
from stack.data.tokenizer import Tokenizer
from stack.data.words import check_same_words
from stack.step.adapter import is_of_adapter, is_of_task
from stack.step.program import Program
from stack.train.checkpoint.checkpoints import named_leaves
from stack.train.record import differences
from stack.train.weights.source import Source

_FAMILY = ("kind", "position", "norm", "mlp")
"""Of a model: with another of these, the same numbers under the same names mean nothing."""
_SHAPES = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_length")
"""What shapes tell of."""
_NAMES = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tied_embeddings")
"""What the names of parameters tell of."""
_FREE = (
    *("vocab_size", "vocab_multiple", "dtype", "attention", "scan_unroll"),
    *("embedding_dropout", "attention_dropout", "residual_dropout"),
    *("init_std", "position_init_std", "scale_residual_init"),
)
"""What the weights do not depend on."""
_MOST = 6  # Names told of a longer list.


@dataclass(frozen=True, kw_only=True)
class Match:
    """What becomes of every parameter; names are dotted."""

    loaded: tuple[str, ...]
    """Taken as they are."""
    tables: tuple[str, ...]
    """Those of words, with new words or another padding."""
    longer: tuple[str, ...]
    """Tables of positions with more rows than there are weights for."""
    missing: tuple[str, ...]
    """Left as initialised."""
    unused: tuple[str, ...]
    """Weights without a parameter."""
    old_rows: np.ndarray
    """[words of the weights] bool: the rows of words that their tokenizer knew."""
    new_words: np.ndarray
    """Ids that begin at the mean of those rows, ascending."""
    notes: tuple[str, ...] = field(default=())
    """What a person should know of it."""


def match(program: Program, source: Source, tokenizer: Tokenizer) -> Match:
    """Compares weights with the model of a program; reads none.

    Args:
      program: of the run that begins with them.
      source: of the weights.
      tokenizer: of that run.

    Raises:
      StackError: they are of another family of models, a shape differs in more than words or positions, the
        vocabulary would shrink, an id means another word, or nothing fits.
    """
    config = program.config.model
    changed = {
        name: (old, new)
        for name, old, new in differences(source.model, config.model_dump(mode="json"))
        if name.partition(".")[0] != "rope" or config.position == "rotary"
    }
    if other := [name for name in _FAMILY if name in changed]:
        raise StackError(
            f"{source.name} is of another family of models: {_told(changed, other)}; take weights of the"
            " config's own, or set the config to theirs"
        )
    old_rows, new_words, notes = _words(program, source, tokenizer)
    likes = {name: like.shape for name, like in named_leaves(program.parameters).items()}
    axes: dict[str, Any] = dict(flatten_dict(program.axes, sep="."))
    groups: dict[str, list[str]] = {"loaded": [], "tables": [], "longer": []}
    wrong = []
    shapes = source.shapes
    if any(is_of_task(name) for name in likes.keys() & shapes.keys()) and _head_differs(program, source):
        shapes = {name: shape for name, shape in shapes.items() if not is_of_task(name)}
        notes.append("the head of the weights is of another task or of other labels; it begins anew")
    for name in likes.keys() & shapes.keys():
        there, here = source.shapes[name], likes[name]
        first = axes[name][0] if axes[name] else None
        if first == "vocab" and there[1:] == here[1:]:
            is_same = there == here and len(old_rows) == config.vocab_size and not len(new_words)
            groups["loaded" if is_same else "tables"].append(name)
        elif there == here:
            groups["loaded"].append(name)
        elif first == "length" and there[1:] == here[1:] and there[0] < here[0]:
            groups["longer"].append(name)
        else:
            wrong.append(f"{name} is {list(there)} in it and {list(here)} in the config")
    if wrong:
        fields = [name for name in changed if name in _SHAPES]
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise StackError(
            f"{source.name} is of another shape: {', '.join(sorted(wrong)[:3])}{more}; set the model to what"
            f" it was ({_told(changed, fields)}), or take weights of this one"
        )
    if not any(groups.values()):
        raise StackError(
            f"{source.name} has none of the config's parameters: it has {_some(list(source.shapes))}, the"
            f" config has {_some(list(likes))}"
        )
    told_otherwise = {*_SHAPES, *_NAMES, *_FREE}
    if config.position != "learned" and config.max_length > int(source.model["max_length"]):
        told_otherwise -= {"max_length"}  # Of no shape there, but longer than what was seen.
    if known := [name for name in changed if name not in told_otherwise]:
        notes.append(f"the model is not quite that of the weights: {_told(changed, known)}")
    order = {name: tuple(one for one in likes if one in names) for name, names in groups.items()}
    missing = tuple(name for name in likes if name not in shapes)
    _check_adapter(program, source, missing)
    return Match(
        **order,
        missing=missing,
        unused=tuple(name for name in source.shapes if name not in likes),
        old_rows=old_rows,
        new_words=new_words,
        notes=tuple(notes),
    )


def _head_differs(program: Program, source: Source) -> bool:
    """Whether the rows of a task's head mean something else than those of the weights."""
    theirs = getattr(source, "objective", None)
    return theirs is not None and _head(theirs) != _head(program.config.objective.model_dump(mode="json"))


def _head(objective: Mapping[str, Any]) -> Any:
    """What decides the rows of a head."""
    tasks = [(each["name"], _head(each["objective"])) for each in objective.get("tasks") or ()]
    labels = objective.get("labels") or ()
    return objective.get("kind"), labels if isinstance(labels, str) else list(labels), tasks


def lines(match: Match, program: Program, source: Source) -> list[str]:
    """What is not simply loaded, a line each."""
    config, there = program.config.model, len(match.old_rows)
    told = []
    if match.tables:
        size = f"{there} -> {config.vocab_size}" if there != config.vocab_size else f"{there}"
        new = f"{len(match.new_words)} new, at the mean of the {match.old_rows.sum()} old"
        told.append(
            f"resized {_some(match.tables)}: {size} words, {new if len(match.new_words) else 'none new'}"
        )
    for name in match.longer:
        rows = source.shapes[name][0], named_leaves(program.parameters)[name].shape[0]
        told.append(f"resized {name}: {rows[0]} -> {rows[1]} positions, the later ones left as initialised")
    if missing := [name for name in match.missing if not is_of_adapter(name)]:
        told.append(f"left as initialised: {_some(missing)}")
    if match.unused:
        told.append(f"not used: {_some(match.unused)}")
    return [*told, *match.notes]


def _check_adapter(program: Program, source: Source, missing: Collection[str]) -> None:
    """Refuses an adapter of the weights that the config has not, and one of its own beside random weights."""
    likes = named_leaves(program.parameters)
    if others := [name for name in source.shapes if is_of_adapter(name) and name not in likes]:
        raise StackError(
            f"{source.name} holds an adapter that the config has not: {_some(others)}; take what"
            " `stack export --to hf` makes of both, or the section adapter of its config"
        )
    frozen = {".".join(path) for path in program.frozen}
    random = [name for name in missing if name in frozen and not is_of_adapter(name)]
    if program.config.adapter is not None and random:
        raise StackError(
            f"{source.name} has no {_some(random)}, which an adapter would leave as initialised, at random;"
            " name it in adapter.train"
        )


def _words(
    program: Program, source: Source, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Which rows of the weights are of words, which ids are new, and what is to be said of that."""
    size, there = program.config.model.vocab_size, int(source.model["vocab_size"])
    if size < there:
        raise StackError(
            f"{source.name} has rows for {there} words, model.vocab_size={size} for less; words are added,"
            f" never taken away: set model.vocab_size={there} or more"
        )
    old_rows, new, notes = np.ones(there, bool), set(range(there, size)), []
    then, now = source.words(tokenizer), tokenizer.words()
    if then is None:
        notes.append(f"{source.name} has no tokenizer: whether ids mean the same words there, nobody knows")
    else:
        then = {number: word for number, word in then.items() if number < there}
        check_same_words(then, now, names=(source.name, f"data.tokenizer={program.config.data.tokenizer}"))
        old_rows[:] = False
        old_rows[list(then)] = True
        new |= {number for number in now.keys() - then.keys() if number < size}
    return old_rows, np.array(sorted(new), np.int64), notes


def _told(changed: Mapping[str, tuple[str, str]], names: Collection[str]) -> str:
    return ", ".join(f"model.{name} {' -> '.join(changed[name])}" for name in names)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
