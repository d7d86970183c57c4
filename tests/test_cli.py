"""The command line: verbs, overrides, exit statuses, and how little it loads."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stack.cli import main
from stack.config import load, parse

STACK = [sys.executable, "-m", "stack"]
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\ntrain: {steps: 200}\n")
    return str(path)


def status_and_error(capsys, *argv: str) -> tuple[int, str]:
    """The exit status and the one line on standard error."""
    status = main(list(argv))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    return status, captured.err.removeprefix("error: ").rstrip("\n")


def test_config_show_prints_the_resolved_tree(capsys, run_file):
    assert main(["config", "show", run_file, "model.num_layers=4", "mesh.tensor=2"]) == 0
    shown = parse(capsys.readouterr().out)
    assert shown == load(run_file, ["model.num_layers=4", "mesh.tensor=2"])
    assert (shown.seed, shown.model.num_layers, shown.mesh.tensor) == (3, 4, 2)


def test_overrides_may_follow_options(capsys, run_file):
    assert main(["config", "show", run_file, "seed=4", "--devices", "8", "train.steps=300"]) == 0
    shown = parse(capsys.readouterr().out)
    assert (shown.seed, shown.train.steps) == (4, 300)


def test_config_schema_prints_the_schema_that_editors_read(capsys):
    assert main(["config", "schema"]) == 0
    assert capsys.readouterr().out == (QUICKSTART.parent / "schema.json").read_text()


def test_without_a_verb_the_verbs_are_shown(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for verb in ("train", "eval", "sample", "show", "import", "export", "config", "data", "doctor"):
        assert f"\n    {verb} " in shown


def test_the_version_names_jax(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("stack 0.")


VERBS = (
    "train, launch, plan, kernels, eval, predict, search, sample, show, import, export, checkpoint, config,"
    " data, doctor, bench"
)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["trian"], "'trian' is not a command; did you mean `stack train`?"),
        (
            ["zzz"],
            f"'zzz' is not a command; it is one of {VERBS}",
        ),
        (["eval"], "the following arguments are required: RUN; see `stack eval --help`"),
        (["config"], "the following arguments are required: COMMAND; see `stack config --help`"),
        (
            ["train", "a.yaml", "--seed=3"],
            "unknown option --seed=3; an override is written seed=3; see `stack train --help`",
        ),
        (["sample", "run", "--lenght", "3"], "unknown option --lenght; see `stack sample --help`"),
        (["doctor", "now"], "'now' is one argument too many; see `stack doctor --help`"),
    ],
)
def test_a_bad_command_line_is_told_in_one_line_with_status_2(capsys, argv, told):
    assert status_and_error(capsys, *argv) == (2, told)


def test_a_bad_config_is_told_in_one_line_with_status_2(capsys, run_file):
    told = "override 'model.num_layer=4': model.num_layer is not a field; did you mean model.num_layers?"
    for verb in (["config", "show"], ["train"]):
        assert status_and_error(capsys, *verb, run_file, "model.num_layer=4") == (2, told)


def test_what_fails_while_running_has_status_1(capsys, tmp_path, run_file):
    source = [f"data.sources.0.path={tmp_path}/missing.txt", "data.sources.0.kind=text"]
    out = ["--vocab-size", "300", "--out", str(tmp_path / "tokenizer.json")]
    status, told = status_and_error(capsys, "data", "tokenizer", run_file, *source, *out)
    assert status == 1
    assert "missing.txt" in told


def test_what_needs_an_extra_names_it_before_anything_is_read(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "stack.evaluation.harness", raising=False)
    monkeypatch.delitem(sys.modules, "stack.evaluation.harness_tasks", raising=False)
    status, told = status_and_error(capsys, "eval", "no/run", "--tasks", "lambada_openai")
    assert status == 1
    assert told.endswith("(lm_eval is missing); install the extra: pip install 'stack[lm-eval]'")


def test_data_tokenizer_writes_a_tokenizer(capsys, tmp_path, run_file):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the rat sat on the cat\n" * 20)
    out = tmp_path / "tokenizer.json"
    source = ["data.sources.0.kind=text", f"data.sources.0.path={text}", "data.heldout_fraction=0"]
    assert main(["data", "tokenizer", run_file, *source, "--vocab-size", "265", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 265 words\n"
    assert out.is_file()


# In a process of its own.


def test_python_m_stack_is_stack():
    done = subprocess.run([*STACK, "config", "show", QUICKSTART, "seed=5"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert parse(done.stdout) == load(QUICKSTART, ["seed=5"])


def test_a_bad_config_ends_the_process_with_status_2():
    done = subprocess.run([*STACK, "train", "missing.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: missing.yaml: no such file")


def test_an_interrupt_ends_the_process_with_status_130(tmp_path):
    """It comes while the command waits for a config from a pipe."""
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen([*STACK, "config", "show", pipe], stderr=subprocess.PIPE, text=True)
    with pipe.open("w"):  # returns when the process has opened its end
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert (process.returncode, error) == (130, "interrupted\n")


def test_a_reader_that_has_enough_is_no_error():
    command = f"{sys.executable} -m stack config schema; echo status $? >&2"
    done = subprocess.run(["sh", "-c", f"({command}) | true"], capture_output=True, text=True)
    assert done.stderr == "status 0\n"


@pytest.mark.parametrize(
    "statement",
    ["import stack", "import stack; stack.load", "import stack.cli", "import stack.launch.render"],
)
def test_nothing_heavy_is_loaded_before_it_is_used(statement):
    heavy = ["jax", "flax", "optax", "orbax", "grain", "tokenizers", "pyarrow", "numpy", "rich"]
    code = f"{statement}; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_machine_without_a_gpu_is_no_error():
    """With the extra `plan`, which looks like a GPU to JAX."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["JAX_COMPILATION_CACHE_DIR"] = os.environ["JAX_COMPILATION_CACHE_DIR"]
    show = ["config", "show", QUICKSTART, "--sharding"]
    done = subprocess.run([*STACK, *show], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_public_name_is_an_attribute_error():
    import stack

    with pytest.raises(AttributeError, match="module 'stack' has no attribute 'Trianer'"):
        stack.Trianer  # noqa: B018
    assert set(stack.__all__) <= set(dir(stack))


@pytest.mark.parametrize(
    ("screen", "status", "told"),
    [
        (
            "> /dev/full",
            1,
            "error: standard output: No space left on device; check its disk and permissions",
        ),
        (">&-", 0, ""),
    ],
)
def test_a_screen_that_takes_nothing_is_one_line_at_most(screen, status, told):
    command = f"{sys.executable} -m stack config show {QUICKSTART} {screen}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr.rstrip("\n")) == (status, told)


def test_large_devices_of_a_layout_are_those_of_the_plan(capsys):
    llama = str(QUICKSTART.with_name("llama3_8b.yaml"))
    assert main(["config", "show", llama, "--sharding", "--devices", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "on data 8 x fsdp 8, zero 3" in lines[-1]
    assert max(map(len, lines)) <= 122
    assert main(["config", "show", llama, "--sharding", "--devices", "0"]) == 2
    assert capsys.readouterr().err == "error: 0 devices are too few; give at least 1\n"


SWALLOWS = """
import sys, time
from stack.cli import main
from stack import environment
def swallow():
    print("there", flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
environment.prepare = swallow
sys.exit(main(["--version"]))
"""


CHANGES = SWALLOWS.replace("pass", "raise ImportError('the extension')")
# Python drops what a finalizer raises, as it does with what the collector's callbacks do.
DROPS = SWALLOWS.replace("pass", "raise").replace(
    "= swallow", "= type('', (), {'__del__': lambda _: swallow()})"
)


@pytest.mark.parametrize("code", [SWALLOWS, CHANGES, DROPS], ids=["swallows", "changes", "drops"])
def test_an_interrupt_is_not_lost_in_code_that_swallows_or_changes_it(code):
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "interrupted\n")
