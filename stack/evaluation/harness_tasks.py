"""Tasks of the lm-evaluation-harness by name, pattern, file or folder, asked of a run."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jinja2

from stack.config.errors import StackError
from stack.config.explain import nearest
from stack.config.paths import expand
from stack.evaluation.harness import StackLM
from stack.storage import durable

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


def evaluate_tasks(
    model: StackLM,
    tasks: "Sequence[str | Task | Group]",
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: str | None = None,
    apply_chat_template: bool = False,
    bootstrap_iters: int = 100_000,
) -> dict[str, Any]:
    """Asks a run the tasks, as `lm_eval.simple_evaluate` does.

    Args:
      model: the run.
      tasks: what `load_tasks` takes, or has loaded.
      limit: documents of each task, its first ones; None: all.
      num_fewshot: examples before each question; None: what each task says.
      gen_kwargs: options of generation in place of the tasks' own, as `max_gen_toks=32,temperature=0`.
      apply_chat_template: lay questions out by the tokenizer's chat template.
      bootstrap_iters: of the standard errors that need resampling.

    Returns:
      The harness's own results: `results` has the metrics of each task. Every process of a run gets them;
      the harness gives nothing to one whose LOCAL_RANK is set and not 0.

    Raises:
      StackError: see `load_tasks` and `check_options`; or the tokenizer has no chat template.
    """
    check_options(limit=limit, num_fewshot=num_fewshot)
    if apply_chat_template:
        model.chat_template(True)
    from lm_eval import simple_evaluate

    chosen = [each for task in tasks for each in (load_tasks([task]) if isinstance(task, str) else [task])]
    if not chosen:
        raise StackError("no task is given; name one or several, as in --tasks lambada_openai,my_tasks/")
    try:
        results = simple_evaluate(
            model=model,
            tasks=chosen,
            limit=limit,
            num_fewshot=num_fewshot,
            gen_kwargs=gen_kwargs,
            apply_chat_template=apply_chat_template,
            bootstrap_iters=bootstrap_iters,
            log_samples=False,
        )
    except jinja2.TemplateError as error:
        raise StackError(f"a template of a task fails: {error}; mend the task") from error
    return cast("dict[str, Any]", results or {})


def table(results: dict[str, Any]) -> str:
    """Results as the harness prints them."""
    from lm_eval.utils import make_table

    columns = [name for name in ("results", "groups") if results.get(name)]
    return "\n".join(make_table(results, column) for column in columns).rstrip("\n")


def write_json(results: dict[str, Any], path: Path) -> None:
    """Writes all that the harness tells.

    Raises:
      OSError: it cannot be written.
    """
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    durable.write_text(path, text + "\n")


def check_options(*, limit: int | None, num_fewshot: int | None) -> None:
    """Refuses numbers that cannot be.

    Raises:
      StackError: no document, or fewer than no example.
    """
    if limit is not None and limit < 1:
        raise StackError(f"limit={limit} asks for no document; give at least 1, or leave it out for all")
    if num_fewshot is not None and num_fewshot < 0:
        raise StackError(f"num_fewshot={num_fewshot} is below 0; give a number of examples")


def load_tasks(words: Sequence[str]) -> "list[Task | Group]":
    """Tasks with their data.

    Args:
      words: names of tasks, groups or tags of the harness, patterns of them (`mmlu_*`), YAML files, or
        folders of them (`my_tasks/`).

    Raises:
      StackError: an unknown task, one that cannot be loaded, one that runs the model's code or shows
        pictures, or one that is asked for twice.
    """
    loaded, asked = [], {}
    for word in words:
        for each in _load(word):
            for task in each.get_all_tasks() if hasattr(each, "get_all_tasks") else [each]:
                name = task.task_name
                if name in asked:
                    raise StackError(f"task {name} is in {asked[name]} and again in {word}; leave out one")
                asked[name] = word
            loaded.append(each)
    return loaded


def _load(word: str) -> "Iterator[Task | Group]":
    """The tasks and groups that a word stands for."""
    from lm_eval.tasks import TaskManager

    if "/" not in word and not word.endswith((".yaml", ".yml")):
        manager = TaskManager()
        names = manager.match_tasks([word])
        if not names:
            raise StackError(_unknown(word, manager.all_tasks))
        for name in names:
            yield from _built(manager, name)
        return
    path = expand(word)
    if path.is_dir():
        manager = TaskManager(include_path=path, include_defaults=False)
        if not manager.all_subtasks:
            raise StackError(f"{path}: holds no .yaml of a task; give another folder")
        for name in manager.all_subtasks:
            yield from _built(manager, name)
    elif path.is_file():
        yield from _built(TaskManager(include_defaults=False), str(path))
    else:
        raise StackError(f"{path}: there is no such file or folder; give the .yaml of a task or their folder")


def _built(manager: "TaskManager", name: str) -> "Iterator[Task | Group]":
    """What the harness makes of a name, with its data."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # A task may do anything.
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise StackError(
            f"task {name} cannot be loaded: {told}; mend it, or, if its data is of the Hugging Face Hub,"
            " connect to that or keep the data in its cache (HF_HOME)"
        ) from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise StackError(
                f"task {name} runs code that the model writes; leave it out, or ask for it in Python with"
                " lm_eval.simple_evaluate(..., confirm_run_unsafe_code=True)"
            )
        if getattr(task, "MULTIMODAL", False):
            raise StackError(f"task {name} shows pictures, which the model does not read; leave it out")
    group = loaded.get("groups", {}).get(name)
    yield from [group] if group is not None else loaded["tasks"].values()


def _unknown(word: str, names: Sequence[str]) -> str:
    if Path(word).is_dir():
        return f"{word!r} is no task of the lm-evaluation-harness; write {word}/ for the folder"
    match = nearest(word, names)
    meant = f"did you mean {match}?" if match else "`lm-eval ls tasks` lists all; a file is written task.yaml"
    return f"{word!r} is no task of the lm-evaluation-harness; {meant}"
