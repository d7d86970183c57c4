"""Every command of the pages runs as it is written, in order, in one folder; long ones are only shortened."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

_FEW = "train.steps=40 eval.baselines=false eval.batches=2 data.sources.0.max_bytes=300000"
_QUICKSTART = "stack train configs/quickstart.yaml"
_SOME = "train.steps=12 optimizer.schedule.warmup_steps=4 eval.batches=2"
SHORTER = {
    _QUICKSTART: _FEW,
    f"{_QUICKSTART} name=deeper train.steps=300 model.num_layers=6": _FEW,
    "stack train runs/quickstart train.steps=800": "train.steps=50",
    f"{_QUICKSTART} name=chat init_from=runs/quickstart data.tokenizer=chat/tokenizer.json"
    " model.vocab_size=259 train.steps=100": _FEW,
}
"""What is added to a command that takes long; it shortens, and changes nothing else."""

ELSEWHERE = {
    "uv run pytest -n 2": "this suite",
    "uv run pytest -n 2 -m full": "this suite",
    "sbatch launch/slurm.sbatch configs/llama3_8b.yaml": "needs a Slurm",
    "stack plan --validate my_runs.csv": "tests/planner/test_validate.py, with a table of one's own",
    "python3.12 -m venv .venv && .venv/bin/pip install -e .": "makes another environment",
    "uv sync --no-dev": "makes another environment",
    "uv sync --extra cuda13": "needs a GPU",
    "uv sync --extra lm-eval": "makes another environment",
    "stack train runs/quickstart train.steps=800 optimizer.schedule.decay_steps=370": "what a run prints;"
    " another that goes on with it is run",
    "stack doctor --faults": "tests/doctor/test_faults.py",
    "launch/local.sh -n 2 -d 2 configs/quickstart.yaml name=two": "tests/test_processes.py",
    "stack eval runs/quickstart --tasks my_tasks/ --json capitals.json": "tests/evaluation/test_harness.py",
    "stack eval runs/quickstart --tasks hellaswag,lambada_openai --limit 200": "needs a network",
}
"""Commands that are not run here, and why or where else."""

README, DATA, PLANNER = ROOT / "README.md", ROOT / "docs" / "data.md", ROOT / "docs" / "planner.md"
INIT_FROM = ROOT / "docs" / "init_from.md"
LAUNCH, WEIGHTS = ROOT / "docs" / "launch.md", ROOT / "docs" / "hugging_face.md"
HEADS, SEARCH = ROOT / "docs" / "heads.md", ROOT / "docs" / "search.md"
OBJECTIVES, FINE_TUNING = ROOT / "docs" / "objectives.md", ROOT / "docs" / "fine_tuning.md"

EVALUATION = ROOT / "docs" / "evaluation.md"
TRACKING = ROOT / "docs" / "tracking.md"
_WORDS = ("stack ", "uv ", "launch/", "sbatch ", "source ", ".ci/", "python3.12 ")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines of unlabelled blocks, and whole commands in sentences; comments cut off, no `...`."""
    text = page.read_text()
    fenced = [line for language, block in blocks(page) if not language for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    whole = [re.split(r" +# ", line)[0].strip() for line in (*fenced, *filter(_is_whole, inline))]
    once = {line.removeprefix("uv run "): line for line in reversed(whole)}
    lines = [line for line in dict.fromkeys(whole) if line in once.values()]
    return [line for line in lines if line.startswith(_WORDS) and "..." not in line]


def _is_whole(command: str) -> bool:
    """Not the mere name of a command, or the form of one."""
    return not re.fullmatch(r"(uv run )?(stack|uv run)( [a-z]+)?( --[a-z]+)*( [A-Z]+)*", command)


def run(command: str, folder: Path) -> str:
    """Runs it in a shell, as in an activated environment."""
    shown = command
    for long, more in SHORTER.items():
        if command.removeprefix("uv run ") == long:
            shown = f"{command} {more}"
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES",)}
    environment |= {"HOME": str(folder / "home"), "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", shown.removeprefix("uv run ")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{shown}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr, shown
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a clone holds of what the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("configs", "launch"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "home").mkdir()
    return folder


def test_every_page_of_the_list_is_linked() -> None:
    links = set(re.findall(r"\]\(([\w./-]+)\)", README.read_text()))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= links
    assert all((ROOT / link).exists() for link in links)


def test_what_is_shortened_or_left_out_is_on_a_page() -> None:
    written = {
        command.removeprefix("uv run ")
        for page in (README, DATA, PLANNER, INIT_FROM, EVALUATION)
        for command in commands(page)
    }
    for command in (*SHORTER, *ELSEWHERE):
        assert command.removeprefix("uv run ") in written, command


def test_the_plan_in_the_readme_is_what_is_printed(folder) -> None:
    printed = run("uv run stack plan configs/llama3_8b.yaml --hardware h100 --devices 8", folder)
    shown = next(block for _, block in blocks(README) if block.startswith("llama3_8b on 8 x"))
    assert shown == printed


@pytest.mark.full
def test_the_commands_of_the_readme_run_in_order(folder) -> None:
    outputs = {}
    for command in commands(README):
        if command not in ELSEWHERE and not command.startswith("source "):
            outputs[command] = run(command, folder)
    assert len(outputs) >= 15
    assert "def " in outputs['stack sample runs/quickstart "def " "class " --length 300 --temperature 0.7']
    for name in ("loss.png", "curve.png", "mine.yaml", "tokenizer.json"):
        assert (folder / name).is_file()


@pytest.mark.full
def test_the_commands_of_the_page_on_hugging_face_run(folder) -> None:
    """After those of the README, whose run they take."""
    shutil.rmtree(folder / "quickstart-hf", ignore_errors=True)
    shutil.rmtree(folder / "runs" / "again", ignore_errors=True)
    if not (folder / "runs" / "quickstart").exists():
        run(_QUICKSTART, folder)
    some = [command for command in commands(WEIGHTS) if "quickstart-hf" in command or "again" in command]
    outputs = [run(command, folder) for command in some]
    assert len(outputs) == 3
    assert outputs[2].startswith("def ")


@pytest.mark.full
def test_the_commands_of_the_page_on_init_from_run(folder) -> None:
    """After those of the README, whose run they take."""
    if not (folder / "runs" / "quickstart").exists():
        run(_QUICKSTART, folder)
    shutil.rmtree(folder / "runs" / "chat", ignore_errors=True)
    outputs = [run(command, folder) for command in commands(INIT_FROM) if "chat" in command]
    assert len(outputs) == 3
    for told in ("weights   11 of 11 parameter arrays", "embed.table: 257 -> 259 words, 2 new, at the mean"):
        assert told in outputs[1]


@pytest.mark.full
def test_the_snippet_of_the_readme_runs(folder) -> None:
    (snippet,) = (block for language, block in blocks(README) if language == "python")
    (folder / "snippet.py").write_text(
        snippet.replace('"train.steps=100"', '"train.steps=40", "eval.batches=2"')
    )
    printed = run("python snippet.py", folder)
    assert "memory of a device, GB" in printed
    assert "step 40/40" in printed
    assert (folder / "snippet.png").is_file()


@pytest.mark.full
def test_the_page_on_data_runs_from_top_to_bottom(folder) -> None:
    for language, block in blocks(DATA):
        if language == "yaml":
            name = re.match(r"# (\S+)\n", block)
            assert name, "a config says its name"
            (folder / name[1]).write_text(block)
        else:
            run(block, folder)
    for name in ("mine", "folder", "records", "words"):
        assert (folder / "runs" / name / "metrics.jsonl").is_file()


@pytest.mark.full
def test_the_page_on_evaluation_runs(folder) -> None:
    """After the README, whose run it takes."""
    if not (folder / "runs" / "quickstart").exists():
        run(_QUICKSTART, folder)
    (folder / "passages.txt").write_text("return the value of the name\nraise an error if it is not\n")
    shutil.copy(README, folder)
    (command,) = (command for command in commands(EVALUATION) if command not in ELSEWHERE)
    assert "last_word_accuracy" in run(command, folder)
    snippet, _ = (block for language, block in blocks(EVALUATION) if language == "python")
    (folder / "likely.py").write_text(snippet)
    assert len(run("python likely.py", folder).splitlines()) == 2


def run_page(page: Path, folder: Path) -> str:
    """What the blocks of a page print, after the README, whose run they begin with; some runs are shorter."""
    if not (folder / "runs" / "quickstart").exists():
        run(_QUICKSTART, folder)
    printed = ""
    for language, block in blocks(page):
        if language == "yaml":
            name = re.match(r"# (\S+)\n", block)
            assert name, "a config says its name"
            (folder / name[1]).write_text(block)
        elif language == "python":
            (folder / "snippet.py").write_text(block)
            printed += run("python snippet.py", folder)
        else:
            printed += run(re.sub(r"(stack train \w+\.yaml)", rf"\1 {_SOME}", block), folder)
    return printed


@pytest.mark.full
def test_the_page_on_heads_runs_from_top_to_bottom(folder) -> None:
    printed = run_page(HEADS, folder)
    assert "macro_f1" in printed
    assert "20 records in predicted.jsonl" in printed
    assert "20 records in several.jsonl" in printed


@pytest.mark.full
def test_the_page_on_search_runs_from_top_to_bottom(folder) -> None:
    printed = run_page(SEARCH, folder)
    assert (
        len(re.findall(r"^   [123]  0\.\d{4}  library/\w+\.py:\d+  \[\d+:\d+\]$", printed, re.MULTILINE)) == 6
    )
    assert "3 queries in found.jsonl" in printed
    assert len(re.findall(r"^0\.\d+ \w+\.py \d+ ", printed, re.MULTILINE)) == 3


@pytest.mark.full
def test_the_page_on_fine_tuning_runs_from_top_to_bottom(folder) -> None:
    printed = run_page(FINE_TUNING, folder)
    assert "):⏎    ⟦" in printed, "what is predicted begins after the prompt"
    assert "of them trained" in printed, "the first line of a run with an adapter"
    assert "domains   perplexity of held-out text, before and after\n          python " in printed
    for name in ("functions", "conversations", "preferred", "small", "domain"):
        assert (folder / "runs" / name / "metrics.jsonl").is_file()


@pytest.mark.full
def test_the_commands_of_the_planner_page_run(folder) -> None:
    some = [command for command in commands(PLANNER) if command not in ELSEWHERE]
    for command in some:
        run(command, folder)
    assert len(some) >= 5


@pytest.mark.full
def test_the_commands_of_the_page_on_launching_run(folder) -> None:
    jobs = [command for command in commands(LAUNCH) if command.startswith("stack launch render ")]
    submit = [run(command, folder).split()[-1] for command in jobs]
    assert submit == ["job.yaml", "job.yml", "job.sbatch"]
    assert all((folder / name).is_file() for name in submit)


@pytest.mark.full
def test_the_commands_of_the_page_on_objectives_run(folder) -> None:
    spans, masked = (block for language, block in blocks(OBJECTIVES) if language == "sh")
    assert "⟦<extra_id_0>" in run(spans, folder)
    assert "⟦[MASK] → " in run(masked, folder)


@pytest.mark.full
def test_the_page_on_tracking_runs(folder) -> None:
    """What needs no server and is run nowhere else; the listener as it stands there, of a shorter run."""
    few = f"{_FEW} model.num_layers=1 eval.batches=2 sample.at_end=false"
    (command,) = (command for command in commands(TRACKING) if "offline" in command)
    run(f"{command} {few}", folder)
    assert list((folder / "runs" / "later" / "wandb").glob("offline-run-*/run-*.wandb"))
    (snippet,) = (block for language, block in blocks(TRACKING) if language == "python")
    shorter = ", ".join(f'"{override}"' for override in few.split())
    (folder / "heard.py").write_text(snippet.replace('"name=heard"', f'"name=heard", {shorter}'))
    run("python heard.py", folder)
    lines = (folder / "best.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["20", "40"]


@pytest.mark.full
def test_the_page_on_pipelines_runs_and_shows_what_is_printed(folder) -> None:
    page = ROOT / "docs" / "pipelines.md"
    ((_, config), (_, commands), (_, shown)) = blocks(page)
    (folder / "staged.yaml").write_text(config)
    printed = run(re.sub(r"(stack train \w+\.yaml)", rf"\1 {_SOME}", commands), folder)
    assert shown in printed
    assert (folder / "schedule.png").is_file()
    assert "pipeline  1f1b, 4 stages of 2 layers, 8 micro-batches, bubble 27%" in printed


@pytest.mark.full
def test_the_page_on_averaging_runs(folder) -> None:
    (_, one), (_, first), (_, two), (_, second) = blocks(ROOT / "docs" / "averaging.md")
    (folder / "diloco.yaml").write_text(one)
    (folder / "apart.yaml").write_text(two)
    few = r"\1 train.steps=20 eval.batches=2 eval.baselines=false data.sources.0.max_bytes=300000"
    printed = [run(re.sub(r"(stack train \w+\.yaml)", few, lines), folder) for lines in (first, second)]
    assert "average   4 instances, every 10 steps an outer step of rate 0.7, momentum 0.9" in printed[0]
    told = [json.loads(line) for line in (folder / "runs/first/metrics.jsonl").read_text().splitlines()]
    other = [json.loads(line) for line in (folder / "runs/second/metrics.jsonl").read_text().splitlines()]
    losses = [[line["loss"] for line in lines if line["kind"] == "heldout"] for lines in (told, other)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1
