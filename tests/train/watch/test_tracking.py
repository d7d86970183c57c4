"""Weights & Biases and MLflow have each step of a run once, whatever ends it and whoever is away."""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import wandb_server
from tiny_runs import config, run, start, wait_for_step

from stack import Config, ConfigError, StackError
from stack.train.watch.listeners import Listeners
from stack.train.watch.metrics import TIMING, MetricsLog, read_history
from stack.train.watch.tracking import listener
from stack.train.watch.tracking.follow import History
from stack.train.watch.tracking.listener import Tracking

OPTIONS = ("eval.every=4", "sample.at_end=true", "sample.prompt=x")
Rows = list[tuple[int, dict[str, float]]]


def written(folder: Path) -> Rows:
    """What metrics.jsonl holds, a row for each step."""
    rows: dict[int, dict[str, float]] = {}
    for record in read_history(folder):
        row = rows.setdefault(record["step"], {})
        row |= {f"{record['kind']}/{k}": v for k, v in record.items() if k not in ("kind", "step", "time")}
    return sorted(rows.items())


def rows_of_wandb(folder: Path) -> Rows:
    """What wandb reads in its own files, of all starts of a run."""
    rows = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        printed = subprocess.run(command, capture_output=True, check=True).stdout
        records = [json.loads(line) for line in printed.splitlines() if b'"type":"history"' in line]
        rows += [_row(record["history"]["item"]) for record in records]
    return rows


def _row(item: dict[str, Any]) -> tuple[int, dict[str, float]]:
    return int(item["_step"]), {name: float(v) for name, v in item.items() if not name.startswith("_")}


def run_of_mlflow(place: Path) -> Any:
    """The only run of the store."""
    client = mlflow_client(place)
    (one,) = client.search_runs([client.get_experiment_by_name("stack").experiment_id])
    return one


def mlflow_client(place: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"file:{place}", registry_uri=f"file:{place}")


def rows_of_mlflow(place: Path) -> Rows:
    """As its client gives them; a value that a step has twice fails."""
    one, client = run_of_mlflow(place), mlflow_client(place)
    rows: dict[int, dict[str, float]] = {}
    for name in one.data.metrics:
        if not name.startswith("final/"):
            for metric in client.get_metric_history(one.info.run_id, name):
                assert name not in rows.setdefault(metric.step, {}), f"{name} of step {metric.step} twice"
                rows[metric.step][name] = metric.value
    return sorted(rows.items())


@pytest.fixture(autouse=True)
def _a_store_of_files(monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run that both were told of."""
    folder = tmp_path_factory.mktemp("tracking")
    run(folder, "a", *OPTIONS, "tracking.wandb=offline", f"tracking.mlflow=file:{folder}/store")
    return folder


def test_both_have_every_step_as_the_history_has_it(folder) -> None:
    want = written(folder / "runs" / "a")
    assert [step for step, _ in want] == list(range(1, 9))
    assert [step for step, row in want if "heldout/loss" in row] == [4, 8]
    assert rows_of_wandb(folder / "runs" / "a") == want
    assert rows_of_mlflow(folder / "store") == want


def test_both_have_the_config_and_what_the_run_ended_with(folder) -> None:
    (path,) = (folder / "runs" / "a" / "wandb").glob("offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert (shown["name"], shown["project"], shown["state"]) == ("a", "stack", "finished")
    assert shown["config"]["optimizer"]["learning_rate"] == 0.01
    assert shown["config"]["run"]["parameters"] == 22_016
    assert "tracking" not in shown["config"], "a URI may hold a password"
    one = run_of_mlflow(folder / "store")
    assert (one.info.run_name, one.info.status) == ("a", "FINISHED")
    assert one.data.params["optimizer.learning_rate"] == "0.01"
    assert one.data.params["run.parameters"] == "22016"
    final = {name: value for name, value in shown["summary"].items() if name.startswith("final/")}
    numbers = {name: value for name, value in one.data.metrics.items() if name.startswith("final/")}
    texts = {name: value for name, value in one.data.tags.items() if name.startswith("final/")}
    assert final == numbers | texts
    assert final["final/prompt"] == "x"
    assert final["final/sample"]
    assert final["final/loss"] == written(folder / "runs" / "a")[-1][1]["heldout/loss"]
    assert not [name for name in final if "rows" in name or "longer" in name]


@pytest.mark.full
def test_a_run_that_is_longer_goes_on_with_the_same_curve_and_what_changed_is_told(folder) -> None:
    shutil.copytree(folder, folder / "copy")
    there = folder / "copy"
    places = [f"output_dir={there}/runs", "tracking.wandb=offline", f"tracking.mlflow=file:{there}/store"]
    run(folder, "a", *OPTIONS, *places, "train.steps=12")
    want = written(there / "runs" / "a")
    assert [step for step, _ in want] == list(range(1, 13))
    assert rows_of_wandb(there / "runs" / "a") == want
    assert rows_of_mlflow(there / "store") == want
    one = run_of_mlflow(there / "store")
    assert (one.data.params["train.steps"], one.data.tags["train.steps"]) == ("8", "12")


class Run:
    """The listeners of a run without its training: the log, and who follows it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        settings = config(folder, "b", *overrides)
        self.folder = folder / "runs" / "b"
        self.warnings: list[str] = []
        self.log, self.tracking = MetricsLog(self.folder), Tracking(settings, self.folder)
        self._listeners = Listeners([self.log, self.tracking])
        self.tracking.warn = self.warnings.append

    def start(self, step: int = 0, kept: dict[str, Any] | None = None) -> None:
        self._listeners.on_start({"step": step, "steps": 8, "kept": kept or {}, "heldout_tokens": 0})

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self._listeners.on_metrics(step, {"loss": 1 / step, "grad_norm": 2.0})

    def save(self, step: int) -> dict[str, Any]:
        kept = dict(self._listeners.on_save(step))
        self._listeners.on_checkpoint(step)
        return kept

    def end(self, summary: dict[str, Any] | None = None) -> float:
        """The seconds that it took."""
        begin = time.monotonic()
        self._listeners.on_end({"rows": [], "goodput": 0.5} if summary is None else summary)
        return time.monotonic() - begin


@pytest.mark.full
def test_a_service_that_is_away_is_told_once_and_has_all_when_it_is_back(tmp_path) -> None:
    store = tmp_path / "store"
    store.write_text("a file where the folder should be")
    one = Run(tmp_path, f"tracking.mlflow=file:{store}")
    one.start()
    one.train(1, 4)
    log = one.folder / "tracking-mlflow.log"
    _wait(lambda: log.read_text().count("\n") >= 2)  # Two tries.
    store.unlink()
    one.train(5, 8)
    one.end()
    (warning,) = one.warnings
    assert warning.startswith("mlflow is not told: ")
    assert warning.endswith(f"; the run goes on, and it is tried again; see {log}")
    assert rows_of_mlflow(store) == written(one.folder)
    assert len(written(one.folder)) == 8


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("tracking.mlflow=htp://nowhere", "unsupported URI 'htp://nowhere'"),
        ("tracking.mlflow=http://127.0.0.1:9", "127.0.0.1"),
        ("tracking.wandb=online", "No API key configured"),
    ],
)
@pytest.mark.full
def test_a_service_that_cannot_be_ends_no_run(tmp_path, monkeypatch, override, why) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    one = Run(tmp_path, override)
    one.start()
    one.train(1, 8)
    one.end()
    assert all(why in warning and "\n" not in warning for warning in one.warnings)
    assert "is sent when the run is started again" in one.warnings[-1]
    assert len(one.warnings) <= 2
    assert len(written(one.folder)) == 8


@pytest.fixture
def silence() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.full
@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_service_that_never_answers_is_left_behind(tmp_path, monkeypatch, silence, service) -> None:
    monkeypatch.setitem(listener._LAST_SECONDS, "finished", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
    monkeypatch.setenv("WANDB_BASE_URL", silence)
    target = "online" if service == "wandb" else silence
    one = Run(tmp_path, f"tracking.{service}={target}")
    one.start()
    one.train(1, 8)
    assert one.end() < 20, "seconds, of which it waits for 2"
    log = one.folder / f"tracking-{service}.log"
    assert one.warnings == [f"{service} took too long; what it lacks is sent when the run is started again"]
    _wait(lambda: not _processes_with(str(log)))


def _processes_with(path: str) -> list[str]:
    """Those that have a file open, but for this one."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            try:
                if any(os.readlink(file) == path for file in (process / "fd").iterdir()):
                    found.append(process.name)
            except OSError:
                continue
    return found


def _wait(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_after_a_kill_no_step_is_told_twice(tmp_path) -> None:
    """The process that tells outlives the one that trains for a moment; the next one waits for it."""
    override = f"tracking.mlflow=file:{tmp_path}/store"
    first, second = Run(tmp_path, override), Run(tmp_path, override)
    first.start()
    first.train(1, 4)
    kept = first.save(4)
    first.train(5, 7)
    (follower,) = first.tracking._followers
    assert follower._process.stdin is not None
    follower._process.stdin.close()  # As the system does when a process is gone.
    first.log.on_end({})
    second.start(4, kept)
    second.train(5, 8)
    second.end()
    assert follower.end(time.monotonic() + 60) == [], "it has let go of the log, and may still be ending"
    want = written(second.folder)
    assert [step for step, _ in want] == list(range(1, 9))
    assert rows_of_mlflow(tmp_path / "store") == want
    assert second.warnings == []


def test_the_last_row_waits_for_the_evaluation_of_its_step(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"")
    history = History(path, steps=6, eval_every=4)

    def told(text: str, **options: bool) -> list[tuple[int, list[str]]]:
        with path.open("a") as file:
            file.write(text)
        return [(row.step, list(row.metrics)) for rows in history.rows(**options) for row in rows]

    def line(step: int, kind: str = "train") -> str:
        return f'{{"kind": "{kind}", "step": {step}, "time": 1.5, "loss": "nan"}}\n'

    assert told(line(1) + line(2)[:20]) == [(1, ["train/loss"])]
    assert told(line(2)[20:]) == [(2, ["train/loss"])]
    assert told(line(4)) == []
    assert told(line(4, "heldout")) == [(4, ["train/loss", "heldout/loss"])]
    assert told(line(5) + "no record\n") == [(5, ["train/loss"])]
    assert told(line(6)) == []
    assert told("", is_over=True) == [(6, ["train/loss"])]
    history.rewind()
    assert [(row.step, row.time) for rows in history.rows() for row in rows] == [
        (step, 1.5) for step in (1, 2, 4, 5)
    ]
    history.close()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    one = Run(tmp_path, f"tracking.{name}=offline")
    with pytest.raises(StackError) as error:
        one.start()
    one.end()
    assert str(error.value) == (
        f"tracking.{name}=offline needs {name}; install it with: pip install 'stack[{name}]', or set"
        f" tracking.{name}=null"
    )


def test_nothing_is_imported_or_started_for_a_run_that_is_not_tracked(tmp_path) -> None:
    one = Run(tmp_path)
    one.start()
    assert one.save(1).keys() == {"history", "history_digest"}
    one.end()
    assert [path.name for path in one.folder.iterdir()] == ["metrics.jsonl"]
    code = "import sys, stack.train.watch.tracking.listener; print({'wandb', 'mlflow'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_only_process_0_tells(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    one = Run(tmp_path, "tracking.wandb=offline")
    one.start()
    assert one.save(1).keys() == {"history", "history_digest"}
    one.end()
    assert not one.folder.exists()


def test_a_project_without_a_service_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"project=x is not read without a service; set tracking\.wandb or"):
        Config().replace("tracking.project=x")


def test_the_id_of_a_run_is_kept_and_is_of_no_other(tmp_path) -> None:
    settings = config(tmp_path, "b", "tracking.wandb=offline")

    def identify(folder: Path, settings: Config, step: int = 0, kept: Any = None) -> dict[str, str]:
        folder.mkdir(exist_ok=True)
        return Tracking(settings, folder)._identify({"step": step, "kept": kept or {}})

    here = tmp_path / "here"
    first = identify(here, settings)
    assert identify(here, settings) == first, "killed before its first checkpoint"
    longer = settings.replace("train.steps=99")
    assert identify(here, longer, step=4) == first
    assert identify(tmp_path / "elsewhere", settings, 4, {"tracking": first}) == first, "from a checkpoint"
    others = [
        identify(shutil.copytree(here, tmp_path / "begun anew"), longer),
        identify(shutil.copytree(here, tmp_path / "copy"), settings.replace("name=copy"), step=4),
        identify(tmp_path / "new", settings),
    ]
    (here / "tracking.json").write_text("{")
    others.append(identify(here, settings, step=4))
    assert len({first["id"], *(one["id"] for one in others)}) == 5
    assert re.fullmatch("[0-9a-f]{16}", first["id"])


@pytest.mark.full
def test_the_next_process_waits_for_the_one_of_a_run_that_was_killed(tmp_path, monkeypatch) -> None:
    """Else both would send the same rows; it is the one before that holds the log."""
    one = Run(tmp_path, f"tracking.mlflow=file:{tmp_path}/store")
    one.folder.mkdir(parents=True)
    with (one.folder / "tracking-mlflow.log").open("ab") as log, monkeypatch.context() as patch:
        patch.setitem(listener._LAST_SECONDS, "finished", 4.0)
        fcntl.flock(log, fcntl.LOCK_EX)
        log.write(b"of the one before")
        log.flush()
        one.start()
        one.train(1, 8)
        one.end()
    assert ["took too long" in warning for warning in one.warnings] == [True]
    assert (one.folder / "tracking-mlflow.log").read_bytes() == b"of the one before"
    assert not (tmp_path / "store").exists()
    one.start(8)
    one.end()
    assert rows_of_mlflow(tmp_path / "store") == written(one.folder)


@pytest.mark.full
def test_a_training_that_is_killed_and_started_again_draws_one_curve(tmp_path) -> None:
    overrides = [
        *("checkpoint.every=10", "eval.every=25", "tracking.wandb=offline"),
        f"tracking.mlflow=file:{tmp_path}/store",
    ]
    process = start(tmp_path, "a", *overrides, "train.steps=1000000")
    folder = tmp_path / "runs" / "a"
    wait_for_step(tmp_path, "a", 25, process)
    files = "runs/a/wandb/offline-run-*/*.wandb", "store/*/*/*/train/loss"
    _wait(lambda: all(any(tmp_path.glob(file)) for file in files))
    process.kill()
    process.communicate()
    killed_at = written(folder)[-1][0]
    last = killed_at + 20
    process = start(tmp_path, "a", *overrides, f"train.steps={last}")
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert "not told" not in error
    want = written(folder)
    assert [step for step, _ in want] == list(range(1, last + 1))
    for rows in (rows_of_wandb(folder), rows_of_mlflow(tmp_path / "store")):
        assert [step for step, _ in rows] == list(range(1, last + 1))
        assert [untimed(row) for _, row in rows] == [untimed(row) for _, row in want]
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2


def untimed(row: dict[str, float]) -> dict[str, float]:
    """Without what clocks say: a step that was taken twice has other times, and the same numbers."""
    return {name: value for name, value in row.items() if name.split("/")[1] not in TIMING}


@pytest.mark.full
def test_wandb_online_goes_on_after_the_last_step_that_its_server_has(tmp_path, monkeypatch) -> None:
    with wandb_server.serving() as server:
        monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        one = Run(tmp_path, "tracking.wandb=online", "tracking.project=team/stack")
        one.start()
        one.train(1, 5)
        one.end({"error": "a kill, between checkpoints"})
        again = Run(tmp_path, "tracking.wandb=online", "tracking.project=team/stack")
        again.start(2, {"tracking": one.tracking._identity})
        again.train(3, 8)
        again.end()
        ((name, _),) = server.runs.items()
        assert name == one.tracking._identity["id"]
        assert [_row(item) for item in server.history(name)] == written(again.folder)
        assert server.config["optimizer"]["value"]["learning_rate"] == 0.01
        assert one.warnings == again.warnings == []
        server.refuses = True
        refused = Run(tmp_path, "tracking.wandb=online", "tracking.project=team/stack")
        refused.start(8)
        refused.end()
        assert "the key is refused" in refused.warnings[-1]


@pytest.mark.full
def test_wandb_offline_asks_nobody_and_its_sync_makes_one_curve_of_all_starts(tmp_path, monkeypatch) -> None:
    with wandb_server.serving() as server:
        monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        one = Run(tmp_path, "tracking.wandb=offline")
        for first, last in ((1, 4), (5, 8)):
            one.start(first - 1)
            one.train(first, last)
            one.end()
        assert server.requests == 0
        command = [sys.executable, "-m", "wandb", "sync", "--yes", str(one.folder / "wandb")]
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, timeout=100)
        (name,) = server.runs
        assert [_row(item) for item in server.history(name)] == written(one.folder)
        assert [step for step, _ in written(one.folder)] == list(range(1, 9))
