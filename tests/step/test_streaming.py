"""Instances that are runs of their own: they meet in a folder, in turn, late, in few bits, and not always."""

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from plain_sgd import SGD, Params, PlainSgd, params_of
from tiny_runs import config, records, saved_state, start, wait_for_step

from stack import ConfigError, StackError, Trainer
from stack.parallel import mesh as meshes
from stack.parallel.meeting import LeftBehindError, Meeting
from stack.planner.plan import plan
from stack.train import starting
from stack.train.seeds import fit_seeds

DILOCO = (
    "average.every=4",
    "average.instances=2",
    "average.outer=nesterov",
    "model.num_layers=3",
    "mesh.fsdp=1",
)


def instance(folder: Path, number: int, *overrides: str) -> Trainer:
    """One of the runs, on a device of its own."""
    meets = (f"average.folder={folder / 'there'}", f"average.instance={number}", "average.wait_seconds=60")
    made = config(folder, f"run-{number}", *DILOCO, *meets, *overrides)
    return Trainer(made, devices=jax.devices()[number : number + 1])


def train(made: Trainer, steps: int) -> Params:
    with meshes.use(made.mesh):
        state = starting.begin(made.program, made.tokenizer, warn=print)[0]
        state, _ = made.steps.begin(state, 0, {})
        for step in range(steps):
            state, _ = made.steps.advance(step, state, made.batch(step))
        return params_of(state)


def train_all(folder: Path, steps: int, *overrides: str) -> list[Params]:
    """What each of two runs has as the average after so many steps; they train side by side."""
    found: dict[int, Params] = {}
    runs = [instance(folder, number, *overrides) for number in range(2)]

    def turn(number: int) -> None:
        found[number] = train(runs[number], steps)

    threads = [threading.Thread(target=turn, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(2)]


def test_runs_that_meet_have_the_numbers_of_one_run(tmp_path):
    mine, other = train_all(tmp_path, 8, *SGD)
    whole = train(Trainer(config(tmp_path, "whole", *DILOCO, *SGD), devices=jax.devices()[:1]), 8)
    for name, values in whole.items():
        np.testing.assert_array_equal(mine[name], other[name])
        np.testing.assert_allclose(mine[name], values, atol=5e-6, err_msg=name)


def by_hand(made: Trainer, steps: int, *, fragments: int, delay: int, kept: float) -> Params:
    """Streaming DiLoCo of plain SGD, in NumPy."""
    layers, gap = made.config.model.num_layers, made.config.average.every // fragments
    apart = PlainSgd(made.config, 2)
    outer, momentum = apart.begun, {name: np.zeros_like(values) for name, values in apart.begun.items()}
    inner, sent = [dict(outer) for _ in range(2)], {}

    def is_in(fragment: int, name: str) -> np.ndarray:
        if not name.startswith("layers."):
            return np.array(fragment == (0 if "table" in name else fragments - 1))
        return (np.arange(layers) % fragments == fragment).reshape(-1, *[1] * (outer[name].ndim - 1))

    for step in range(steps):
        apart.step(step, inner)
        if (step + 1) % gap == 0:
            means = {name: np.mean([params[name] for params in inner], axis=0) for name in outer}
            sent[step + 1] = {name: outer[name] - mean for name, mean in means.items()}
        for name, way in sent.pop(step + 1 - delay, {}).items():
            where = is_in(((step + 1 - delay) // gap - 1) % fragments, name)
            momentum[name] = np.where(where, 0.9 * momentum[name] + way, momentum[name])
            outer[name] = np.where(where, outer[name] - 0.7 * (0.9 * momentum[name] + way), outer[name])
            for params in inner:
                mixed = kept * params[name] + (1 - kept) * outer[name]
                params[name] = np.where(where, mixed, params[name])
    return outer


@pytest.mark.parametrize(
    ("fragments", "delay", "kept"), [(2, 1, 0.5), pytest.param(2, 0, 0.0, marks=pytest.mark.full)]
)
def test_fragments_in_turn_and_late_are_a_loop_in_numpy(tmp_path, fragments, delay, kept):
    how = (f"average.fragments={fragments}", f"average.delay={delay}")
    mine, other = train_all(tmp_path, 11, *SGD, *how)
    wanted = by_hand(instance(tmp_path, 0, *SGD, *how), 11, fragments=fragments, delay=delay, kept=kept)
    for name, values in wanted.items():
        np.testing.assert_array_equal(mine[name], other[name])
        np.testing.assert_allclose(mine[name], values, atol=5e-6, err_msg=name)


def test_what_is_sent_in_four_bits_is_an_eighth_and_still_an_average(tmp_path):
    exact, _ = train_all(tmp_path / "exact", 8)
    few, other = train_all(tmp_path / "few", 8, "average.sent_as=int4")
    for name, values in exact.items():
        np.testing.assert_array_equal(few[name], other[name])
        np.testing.assert_allclose(few[name], values, atol=0.02, err_msg=name)
    assert any((few[name] != values).any() for name, values in exact.items())
    whole, narrow = (np.load(tmp_path / name / "there" / "1" / "0.npz") for name in ("exact", "few"))
    with whole, narrow:
        sizes = [sum(sent[name].nbytes for name in sent if name != "names") for sent in (whole, narrow)]
    assert sizes[1] < sizes[0] / 6.5  # A scale for each 64, and of each array the last 64 are filled up.


def test_a_run_goes_on_while_an_average_is_on_its_way(tmp_path):
    """Bit for bit; alone, as the other instance never comes."""
    how = ("average.wait_seconds=0.01", "average.fragments=2", "average.delay=1", "eval.every=0")
    whole = instance(tmp_path / "whole", 0, *how)
    whole.fit(progress=False)
    for _ in range(7):
        made = instance(tmp_path / "parts", 0, *how, "train.stop_after_minutes=1e-9")
        with pytest.raises(StackError, match=r"train\.stop_after_minutes"):
            made.fit(progress=False)
    instance(tmp_path / "parts", 0, *how).fit(progress=False)
    assert saved_state(tmp_path / "parts", "run-0") == saved_state(tmp_path / "whole", "run-0")


def test_a_run_that_waits_for_others_can_be_stopped(tmp_path):
    """A real process, which then goes on to the bits of one that was not stopped."""
    how = (*DILOCO, f"average.folder={tmp_path / 'there'}", "eval.every=0", "train.log_every=1")
    waits = start(tmp_path, "run-0", *how, "average.wait_seconds=300")
    while not (tmp_path / "there" / "1" / "0.npz").exists():
        time.sleep(0.05)
    waits.send_signal(signal.SIGTERM)
    assert waits.communicate(timeout=60)[1].count("stopped at step 4") == 1
    assert waits.returncode == 75
    soon = ("average.wait_seconds=0.01", "eval.every=0", "train.log_every=1")
    instance(tmp_path, 0, *soon).fit(progress=False)
    instance(tmp_path / "whole", 0, *soon).fit(progress=False)
    assert saved_state(tmp_path, "run-0") == saved_state(tmp_path / "whole", "run-0")


@pytest.mark.parametrize("delay", [pytest.param(0, marks=pytest.mark.full), 3])
def test_an_instance_that_dies_is_left_out_and_comes_back(tmp_path, delay):
    """Real processes: the second is killed within a period, and started again."""
    there = tmp_path / "there"
    how = ("train.steps=120", "eval.every=0", "average.every=10", "average.instances=2", "mesh.fsdp=1")
    how += (
        "average.outer=nesterov",
        f"average.folder={there}",
        "average.wait_seconds=2",
        "train.log_every=1",
    )
    how += ("checkpoint.every=10", f"average.delay={delay}")
    first, second = (start(tmp_path, f"run-{n}", *how, f"average.instance={n}") for n in range(2))
    try:
        wait_for_step(tmp_path, "run-1", 23, second)
        second.send_signal(signal.SIGKILL)
        second.communicate()
        wait_for_step(tmp_path, "run-0", 41, first)
        second = start(tmp_path, "run-1", *how, "average.instance=1")
        outputs = [process.communicate(timeout=120) for process in (first, second)]
    finally:
        for process in (first, second):
            process.kill()
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    assert "was made without instance 1" in "".join(outputs[0])
    assert "the others made averages without this instance: it goes on from that of step" in "".join(
        outputs[1]
    )
    closed = {int(path.parent.name): json.loads(path.read_text()) for path in there.glob("*/instances.json")}
    assert closed[11] == [0, 1], closed
    mine, other = (saved_state(tmp_path, f"run-{n}") for n in range(2))
    common = [name for name in mine if name.startswith(("params.", "outer."))]
    assert common
    assert [mine[name] for name in common] == [other[name] for name in common]
    steps = [line["step"] for line in records(tmp_path, "run-1") if line["kind"] == "train"]
    assert steps[-1] == 120
    assert len(steps) < 120


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("average.instances=null",), "folder: set instances to how many meet there"),
        (("average.instance=2",), r"instance=2 must be below instances=2"),
        (("average.fragments=3",), r"fragments=3 does not divide every=4; set fragments=2"),
        (("average.every=8", "average.fragments=8"), r"average\.fragments=8: .* set it to 3"),
        (("average.delay=4",), r"delay=4 must be below the 4 steps"),
        (("average.kept=0.2",), r"kept=0\.2 is not read with delay=0"),
        (("average.folder=null", "average.fragments=2"), r"fragments=2 .*not read with folder=null"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(tmp_path, overrides, told):
    with pytest.raises(ConfigError, match=told):
        instance(tmp_path, 0, *overrides)


def test_instances_that_are_not_alike_do_not_meet(tmp_path):
    train_all(tmp_path, 1)
    with pytest.raises(StackError, match=r"began with optimizer\.learning_rate=0\.01, not 0\.02"):
        train(instance(tmp_path, 0, "optimizer.learning_rate=0.02"), 1)
    with pytest.raises(StackError, match="instance 0 there is another run, of the name run-0"):
        train(instance(tmp_path, 0, "name=another"), 1)


def test_a_place_is_that_of_one_run_not_of_its_name(tmp_path):
    """Started anew in a folder where others have met, a run would be given what is not of its training."""
    train_all(tmp_path, 4)
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(
        StackError, match=r"another run, of the name run-0; .* another folder for a new training"
    ):
        train(instance(tmp_path, 0), 1)


def test_who_comes_back_past_the_end_has_a_step_to_take(tmp_path):
    """What it ends with is saved, and is what the others ended with."""
    soon = ("average.wait_seconds=0.01", "eval.every=0")
    instance(tmp_path, 0, *soon).fit(progress=False)
    late = instance(tmp_path, 1, *soon)
    late.fit(progress=False)
    steps = [line["step"] for line in records(tmp_path, "run-1") if line["kind"] == "train"]
    assert steps == [5, 6, 7, 8]
    mine, other = (saved_state(tmp_path, f"run-{number}") for number in range(2))
    common = [name for name in mine if name.startswith(("params.", "outer."))]
    assert [mine[name] for name in common] == [other[name] for name in common]


def test_other_data_is_refused_by_what_is_in_it(tmp_path):
    for number, text in enumerate(("one text " * 900, "another one " * 900)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "text.txt").write_text(text)
    same = ("data.heldout_fraction=0", "average.wait_seconds=0.01")
    runs = [
        instance(
            tmp_path,
            number,
            *same,
            f'data.sources=[{{"kind": "text", "path": "{tmp_path}/{number}/text.txt"}}]',
        )
        for number in range(2)
    ]
    runs[0].fit(progress=False)
    with pytest.raises(StackError, match=r"began with content\.corpus"):
        runs[1].fit(progress=False)


def test_what_was_sent_stays_and_who_is_left_behind_is_told(tmp_path):
    first, late = (Meeting(tmp_path, instance=number, instances=2, wait_seconds=0.01) for number in range(2))
    for number in range(1, 7):
        first.send(number, {"values": np.arange(3) + number})
        first.close(number)
    first.send(6, {"values": np.zeros(3)})
    np.testing.assert_array_equal(first.sent(6, 0)["values"], np.arange(3) + 6)
    first.forget(5)
    with pytest.raises(LeftBehindError, match="the others are 5 averages ahead"):
        late.send(1, {"values": np.arange(3)})
    with pytest.raises(LeftBehindError, match="start this run again"):
        late.close(1)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut off"])
def test_what_is_damaged_is_named_and_left_out(tmp_path, data):
    first, second = (
        Meeting(tmp_path, instance=number, instances=2, wait_seconds=0.01) for number in range(2)
    )
    for number, meeting in enumerate((first, second)):
        meeting.send(1, {"values": np.arange(3) + number})
    (tmp_path / "1" / "1.npz").write_bytes(data)
    assert first.close(1) == (0,)
    with pytest.raises(StackError, match=r"1/1\.npz is damaged or gone"):
        first.sent(1, 1)
    (tmp_path / "1" / "instances.json").write_bytes(data)
    with pytest.raises(StackError, match=r"1/instances\.json is damaged"):
        first.close(1)


def test_a_folder_that_is_removed_is_told(tmp_path):
    meeting = Meeting(tmp_path / "there", instance=0, instances=2, wait_seconds=60)
    meeting.send(1, {"values": np.arange(3)})
    shutil.rmtree(tmp_path / "there")
    with pytest.raises(StackError, match="was removed while instances met there"):
        meeting.close(1)


def test_a_state_of_instances_is_no_state_of_one_model(tmp_path):
    """Whatever is accepted."""
    run = config(tmp_path, "run", *DILOCO, "eval.every=4")
    Trainer(run, devices=jax.devices()[:1]).fit(progress=False)
    plain = config(tmp_path, "run", "model.num_layers=3", "mesh.fsdp=1", "eval.every=4")
    other = Trainer(plain, devices=jax.devices()[:1], accept=["average"])
    with pytest.raises(StackError, match=r"is that of 2 instances with an outer momentum, not of one model"):
        other.fit(progress=False)


def test_a_round_is_closed_once_for_all(tmp_path):
    first, late = (Meeting(tmp_path, instance=number, instances=2, wait_seconds=0.05) for number in range(2))
    first.send(1, {"values": np.arange(3)})
    assert first.close(1) == (0,)
    late.send(1, {"values": np.arange(3)})
    assert late.close(1) == first.close(1) == (0,)
    assert first.newest(within=1, most=9) == 0
    first.keep(1, {"values": np.arange(3)})
    assert late.newest(within=1, most=9) == late.last() == 1
    assert late.newest(within=1, most=0) == 0
    kept = late.kept(1)
    assert kept is not None
    np.testing.assert_array_equal(kept["values"], np.arange(3))
    first.forget(2)
    assert late.closed(1) is None


def test_a_plan_of_one_instance_has_the_steps_of_the_run(tmp_path):
    alone = config(tmp_path, "run", "mesh.fsdp=1")
    meets = ("average.every=4", "average.instances=2", f"average.folder={tmp_path}")
    for run in (alone, alone.replace(*meets)):
        assert plan(run, hardware="h200", devices=1).steps == 8


def test_runs_of_several_seeds_do_not_meet(tmp_path):
    run = config(
        tmp_path, "run", *DILOCO, f"average.folder={tmp_path / 'there'}", "average.wait_seconds=0.01"
    )
    with pytest.raises(ConfigError, match="train each seed in another folder"):
        fit_seeds(run, 2, progress=False)
    assert not (tmp_path / "runs").exists()
