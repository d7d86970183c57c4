"""Evaluations and predictions of a file of one's own."""

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.config.paths import check_writable, expand
from stack.config.section import is_text
from stack.data.atomic import cache_folder
from stack.data.cache import open_corpus
from stack.data.dataset import Dataset
from stack.data.packing import pack_corpus
from stack.data.records import Record, read_jsonl
from stack.data.tokenizer import Tokenizer
from stack.evaluation.evaluate import evaluate
from stack.evaluation.predict import Given, asked_task, predict
from stack.objectives.multi_task import MixedExamples
from stack.objectives.protocol import Referenced
from stack.parallel import mesh as meshes
from stack.parallel.messages import from_first
from stack.parallel.processes import first
from stack.step.program import Program
from stack.step.step import eval_step

_TEXTS = {".txt", ".md", ".rst"}


def evaluate_file(
    program: Program,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    path: str,
    *,
    answers: bool = False,
    task: str | None = None,
    complete: Callable[[Dataset], Dataset] | None = None,
) -> dict[str, float]:
    """What the objective tells of all of a file, as of held-out text.

    Args:
      program: of the run.
      params: that lie as `program.parameters`.
      tokenizer: of the run.
      path: .jsonl with a record in each line, or a text in its field `text`; or .txt, .md or .rst.
      answers: compare what is predicted of each record as well, where the objective does: texts that are
        written, extracts with summaries.
      task: of several, the one that the records are of.
      complete: adds to rows what the model that the run began with tells of them, as
        `stack.train.reference.completed` does; objectives that compare with it need that.

    Raises:
      StackError: the file cannot be read, a record has not what is asked for, nothing more is compared, or
        what completes rows is needed and missing.
    """
    config, objective = program.config, program.objective
    source = _source(path, reads_records=config.objective.reads_records)
    one, made = asked_task(program, task), objective.examples(tokenizer)
    if isinstance(made, MixedExamples):
        made = made.of(str(task))
    root = cache_folder(config.data.cache_dir)
    corpus = open_corpus(source, tokenizer, root, encoder=made.encoder_of(task))
    rows, _ = pack_corpus(
        corpus,
        root,
        sequence_length=config.data.sequence_length,
        packed=config.data.packed,
        heldout_fraction=0.0,
        examples=made,
    )
    whole = Dataset(
        parts=(rows,), weights=(1.0,), tokenizer=tokenizer, examples=made, is_lossless=corpus.changed == 0
    )
    if complete is not None:
        whole = complete(whole)
    elif isinstance(objective, Referenced):
        raise StackError(
            f"objective.kind={config.objective.kind} compares with the model that the run began with; ask"
            f" for: stack eval RUN --data {path}"
        )
    with meshes.use(program.mesh):
        step = jax.jit(partial(eval_step, program))
        told = evaluate(program, step, params, whole, every_batch=True)
    if corpus.left_out:
        told["left_out"] = float(corpus.left_out)
    if answers:
        compare: Callable[..., dict[str, float]] | None = getattr(one, "compare", None)
        if compare is None:
            raise StackError(
                f"objective.kind={config.objective.kind} compares no answers; leave --answers out"
            )
        given = list(read_given(path))
        made_of = list(predict(program, params, tokenizer, given, task=task))
        told |= compare([each.record for each in given], made_of)
    return told


def predict_file(
    program: Program,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    paths: tuple[str, str],
    *,
    name: str,
    task: str | None = None,
) -> int:
    """Writes each record of a file with its `prediction`; goes on where an earlier call was ended.

    Until it is done the lines stand in a file beside, named after the model that makes them.

    Args:
      program: of the run.
      params: that lie as `program.parameters`.
      tokenizer: of the run.
      paths: .jsonl with a record in each line, and the .jsonl to write.
      name: of the model: another one's answers are not gone on with.
      task: of several, the one that is asked.

    Returns:
      Records that are written, those of earlier calls too.

    Raises:
      StackError: a file cannot be read or written, the output is there or of other records, or a record is
        not as it should be; what is written stays.
    """
    source, target = expand(paths[0]), expand(paths[1])
    if target.exists():
        raise StackError(f"{target} is there already; remove it, or give --output another name")
    check_writable(target)
    mark = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    part = target.with_name(f"{target.name}.{mark}.part")
    total = sum(1 for _ in read_given(str(source)))
    done = from_first(_check_done(part, source) if first() else 0)
    records = (given for number, given in enumerate(read_given(str(source))) if number >= done)
    given, again = itertools.tee(records)
    console = Console(stderr=True)
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shows = first() and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shows) as progress:
        bar = progress.add_task("", total=total, completed=done)
        file = _opened(part) if first() else None
        try:
            for answer in predict(program, params, tokenizer, given, task=task):
                asked = next(again)
                if "prediction" in asked.record:
                    place = getattr(asked.text, "place", "a record")
                    raise StackError(f"{place}: it has a field 'prediction' already; rename or remove it")
                if file is not None:
                    file.write(_line(asked.record | {"prediction": answer}))
                    file.flush()
                progress.advance(bar)
        except OSError as error:
            raise StackError(f"{part}: cannot be written: {error.strerror}; make room on its disk") from error
        except KeyboardInterrupt:
            kept = int(progress.tasks[bar].completed)
            raise KeyboardInterrupt(
                f"interrupted: {kept:,} of {total:,} records are kept; the same command goes on there"
            ) from None
        finally:
            if file is not None:
                file.close()
    if first():
        part.replace(target)
    return total


def _opened(part: Path) -> TextIO:
    """The file, for this process alone."""
    file = part.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StackError(f"{part} is being written by another process; wait for it, or end it") from None
    return file


def _line(record: dict[str, Any]) -> str:
    """As JSON, with its letters as they are where they can be written."""
    line = json.dumps(record, ensure_ascii=False)
    return (line if is_text(line) else json.dumps(record)) + "\n"


def _check_done(part: Path, source: Path) -> int:
    """Whole lines of an unfinished output, which are of the first records; what is cut is taken away."""
    if not part.exists():
        return 0
    content = part.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(part, whole)
    lines = content[:whole].splitlines()
    remedy = f"remove {part.name}, or give --output another name"
    given = itertools.islice(read_given(str(source)), len(lines))
    number = 0
    for number, (line, each) in enumerate(zip(lines, given, strict=False), start=1):
        try:
            before = json.loads(line)
            before.pop("prediction", None)
        except (ValueError, AttributeError):
            raise StackError(f"{part}:{number} is no record; {remedy}") from None
        if before != {name: value for name, value in each.record.items() if name != "prediction"}:
            place = each.text.place  # pyrefly: ignore[missing-attribute]
            raise StackError(f"{part}:{number} is of another record than {place}; {remedy}")
    if number < len(lines):
        raise StackError(f"{part} has {len(lines):,} records and {source} {number:,}; {remedy}")
    return len(lines)


def read_given(path: str) -> Iterator[Given]:
    """The records of a .jsonl file.

    Raises:
      StackError: it cannot be read, or a line is no object; with its place.
    """
    file = expand(path)
    if not file.is_file():
        raise StackError(f"{file}: there is no such file; give a .jsonl with a record in each line")
    for text in read_jsonl(SourceConfig(kind="jsonl", path=str(file), field=None), file):
        assert isinstance(text, Record)
        yield Given(json.loads(text), text)


def _source(path: str, *, reads_records: bool) -> SourceConfig:
    file = expand(path)
    if not file.is_file():
        raise StackError(f"{file}: there is no such file; give the path of one")
    is_jsonl = ".jsonl" in file.suffixes
    kind: Literal["jsonl", "text"] = "jsonl" if is_jsonl else "text"
    if not is_jsonl and (reads_records or file.suffix not in _TEXTS):
        wanted = ".jsonl with a record in each line" if reads_records else ".jsonl, .txt, .md or .rst"
        raise StackError(f"{file}: what it holds is not known by its name; give {wanted}")
    field = None if reads_records else "text"
    return SourceConfig(kind=kind, path=str(file), **({"field": field} if is_jsonl else {}))
