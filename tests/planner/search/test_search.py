"""A search finds what trying everything finds, says why the rest fails, and writes what runs."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import jax
import pytest

from stack.config import AXES, Config, ConfigError, StackError, load
from stack.config.layout import check_divides
from stack.config.pipeline import check_pipeline
from stack.hardware import chip as chips
from stack.planner.formula.memory import memory
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import from_config
from stack.planner.plan import plan
from stack.planner.search import layouts, search
from stack.planner.search.layouts import Rejections, Space, meshes, variants
from stack.planner.search.search import RUNNABLE, fastest_first, release_layout
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import train_step

CONFIGS = Path(__file__).parents[3] / "configs"

SMALL = Config.model_validate(
    {
        "name": "small",
        "model": {
            "vocab_size": 257,
            "num_layers": 4,
            "embed_dim": 48,
            "num_heads": 6,
            "num_kv_heads": 2,
            "mlp_dim": 96,
            "max_length": 64,
            "dtype": "float32",
        },
        "data": {"sources": [{"kind": "synthetic", "max_bytes": 20_000}], "sequence_length": 64},
        "train": {"batch_size": 24, "remat": "full"},
        "eval": {"batch_size": 6},
    }
)
CPU = chips.load("cpu")


@pytest.fixture(scope="module")
def llama() -> search.Search:
    config = load(CONFIGS / "llama3_8b.yaml", ["target=null", "mesh.data=-1", "train.accumulation=64"])
    return search.search(config, hardware=chips.load("h100"), devices=64)


def test_every_factorization_is_a_mesh_or_is_ruled_out():
    rejections = Rejections()
    result = list(meshes(release_layout(SMALL, CPU), 24, Space(), rejections))
    sizes = [sizes for sizes in itertools.product(layouts.divisors(24), repeat=5) if math.prod(sizes) == 24]
    assert len(result) + sum(one.count for one in rejections.values()) == len(sizes)
    assert len(set(result)) == len(result)
    assert all(mesh.devices == 24 for mesh in result)


def test_the_reasons_name_a_case():
    rejections = Rejections()
    list(meshes(release_layout(SMALL, CPU), 2 * 3 * 5 * 16, Space(), rejections))
    assert rejections["tensor does not divide the kv heads"].example == "tensor=3 does not divide 2 kv heads"
    example = "stage=5: there are 4 layers, and each stage needs one"
    assert rejections["no pipeline of so many stages"].example == example
    assert rejections["fsdp leaves a matrix whole"].example.startswith("fsdp=5 splits no axis of ")
    assert "rows over" in rejections["the batch does not divide over the replicas"].example


def test_every_runnable_layout_is_one_that_the_trainer_takes():
    start = release_layout(SMALL, CPU)
    works = [
        work
        for mesh in meshes(start, 8, RUNNABLE, Rejections())
        for works in variants(mesh, RUNNABLE)
        for work in works
    ]
    assert len(works) > 100
    staged = [work for work in works if work.stage > 1]
    assert {(work.schedule, work.virtual_stages) for work in staged} == {
        ("1f1b", 1),
        ("zero_bubble", 1),
        ("interleaved", 2),
    }
    for work in (*works[:: len(works) // 40], *staged[:: len(staged) // 40]):
        assert work.why_modelled() is None
        config = search.apply_layout(SMALL, work)
        assert from_config(config, 8, CPU) == work


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("init_from=some/run adapter={targets:[{modules:[layers.*]}]}", "adapter has no pipeline yet"),
        ("optimizer.frozen=[embed.*]", "optimizer.frozen has no pipeline yet"),
        ("train.offload_activations=true", "offload_activations has no pipeline yet"),
    ],
)
def test_what_has_no_pipeline_is_searched_without_one(override, why):
    config = SMALL.replace(*override.split(maxsplit=1))
    rejections = Rejections()
    every = list(meshes(release_layout(config, CPU), 8, RUNNABLE, rejections))
    assert every
    assert all(mesh.stage == 1 for mesh in every)
    assert rejections["no pipeline of so many stages"].example == why
    with pytest.raises(ConfigError, match="has no pipeline yet"):
        check_pipeline(config.replace("mesh={stage: 2, zero: 1}"), 2)


def test_the_rules_of_a_pipeline_are_the_configs():
    """Of sizes: what the planner refuses the config refuses, and nothing else."""
    start = dataclasses.replace(release_layout(SMALL, CPU), zero=1)
    refused = 0
    for stage, parts, accumulation in itertools.product((2, 3, 4, 5), (1, 2, 3), (1, 2, 3, 4)):
        schedule = "interleaved" if parts > 1 or stage == 3 else "zero_bubble"
        work = dataclasses.replace(
            start, stage=stage, virtual_stages=parts, schedule=schedule, micro_batch=24 // accumulation
        )
        config = SMALL.replace(
            f"mesh={{stage: {stage}, zero: 1, schedule: {schedule}, virtual_stages: {parts}}}",
            f"train.accumulation={accumulation}",
        )
        if work.why_no_pipeline() is None:
            check_pipeline(config, stage)
        else:
            refused += 1
            with pytest.raises(ConfigError):
                check_pipeline(config, stage)
    assert 0 < refused < 48


@pytest.mark.full
def test_the_best_is_the_best_of_all_that_the_trainer_takes():
    result = search.search(SMALL, hardware=CPU, devices=8)
    seconds = []
    for data, fsdp, tensor, stage in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2), (1, 2, 4)):
        if data * fsdp * tensor * stage != 8:
            continue
        pieces = [n for n in range(1, 25) if 24 % n == 0]
        schedules = [("1f1b", 1)]
        if stage > 1:
            schedules += [("gpipe", 1), ("zero_bubble", 1), ("interleaved", 1), ("interleaved", 4 // stage)]
        for zero, accumulation, remat, parallel, (schedule, parts) in itertools.product(
            (0, 1, 2, 3) if stage == 1 else (1,),
            pieces,
            ("none", "full", "dots", "save_qkv_proj"),
            (False, True),
            schedules,
        ):
            if schedule == "interleaved" and accumulation % stage:
                continue
            changes = [f"mesh={{data: {data}, fsdp: {fsdp}, tensor: {tensor}, zero: {zero}, stage: {stage}}}"]
            if stage > 1:
                changes += [f"mesh.schedule={schedule}", f"mesh.virtual_stages={parts}"]
            if parallel:
                changes.append("mesh.sequence_parallel=true")
            changes += [f"train.accumulation={accumulation}", f"train.remat={remat}", "eval.batch_size=null"]
            if (parallel and tensor == 1) or 24 % (data * fsdp * accumulation):
                continue
            work = from_config(SMALL.replace(*changes), 8, CPU)
            assert memory(work).total < CPU.memory_bytes
            seconds.append(step_time(work, CPU).total)
    assert result.best[0].time.total == pytest.approx(min(seconds), rel=1e-12)
    assert all(one.time.total < min(seconds) for one in result.modelled), "slower ones are not shown"


@pytest.mark.full
def test_what_is_returned_runs_fits_and_is_ranked(llama):
    assert len(llama.best) == 8
    assert [one.time.total for one in llama.best] == sorted(one.time.total for one in llama.best)
    for one in llama.best:
        assert one.work.why_modelled() is None
        assert one.work.devices == 64
        assert one.work.batch == 512
        assert one.memory.total <= llama.hardware.memory_bytes
        check_divides(
            search.apply_layout(llama.config, one.work), {axis: getattr(one.work, axis) for axis in AXES}
        )
    kinds = {(one.work.stage, one.work.tensor, one.work.zero) for one in llama.best}
    assert len(kinds) == 8


def test_what_only_the_model_knows_is_beside_and_faster(llama):
    assert llama.modelled
    for one in llama.modelled:
        assert one.work.why_modelled() or one.work.precision == "float8"
        assert one.time.total < llama.best[0].time.total
        assert one.memory.total <= llama.hardware.memory_bytes
    assert llama.modelled[-1].work.precision == "float8"
    eighth = search.search(llama.config, hardware=chips.load("a100-80gb"), devices=64)
    assert all(one.work.precision == "bfloat16" for one in eighth.modelled), "an A100 has no float8"


def test_the_configs_own_layout_is_what_a_plan_of_it_says(llama):
    own = plan(llama.config.replace("train.accumulation=8"), hardware="h100", devices=8)
    here = search.search(llama.config.replace("train.accumulation=8"), hardware=chips.load("h100"), devices=8)
    assert here.own is not None
    assert here.own.time == own.time
    assert here.own.memory == own.memory
    assert llama.own is not None
    assert llama.own.work.batch == 512
    assert (llama.own.work.micro_batch, llama.own.work.accumulation) == (1, 8), "its batch, on more devices"


def test_the_parts_of_a_step_add_up_to_it(llama):
    for one in (*llama.best, *llama.modelled):
        assert sum(one.time.parts.values()) == pytest.approx(one.time.total, rel=1e-12)


def test_a_search_is_printed_and_told_as_json(llama):
    text = "\n".join(search.lines(llama))
    assert search.describe(llama.best[0].work) in text
    assert "against the config's own 1." in text
    assert "does not fit, e.g. " in text
    assert " GB of 80" in text
    assert "tensor=16 does not divide 8 kv heads" in text
    assert "not run: " in text
    answer = json.loads(json.dumps(search.as_dict(llama)))
    assert answer["runnable"][0]["layout"]["fsdp"] == llama.best[0].work.fsdp
    assert answer["runnable"][0]["why_modelled"] is None
    assert answer["modelled_only"][0]["why_modelled"]
    assert answer["rejected"]["does not fit"]["count"] > 0


def test_where_nothing_fits_it_says_by_how_much_and_writes_nothing(tmp_path):
    tiny = dataclasses.replace(CPU, memory_bytes=1e6)
    result = search.search(SMALL, hardware=tiny, devices=8)
    assert result.best == ()
    assert " GB of 0" in result.rejections["does not fit"].example
    assert "nothing that runs fits" in search.lines(result)
    with pytest.raises(StackError, match="no layout that runs fits"):
        search.write(result, tmp_path / "chosen.yaml")
    with pytest.raises(ConfigError, match=r"the smallest is .* use more devices"):
        fastest_first([[release_layout(SMALL, CPU)]], tiny)


def test_devices_that_nothing_divides_get_the_nearest_that_work():
    with pytest.raises(ConfigError) as error:
        search.search(SMALL, hardware=CPU, devices=40)
    assert str(error.value) == (
        "no layout splits train.batch_size=24 over 40 devices; use 36 or 48 devices, or a train.batch_size "
        "that is a multiple of 20"
    )
    for devices, rows in ((36, 24), (48, 24), (40, 20)):
        config = SMALL.replace(f"train.batch_size={rows}", "eval.batch_size=null")
        assert search.search(config, hardware=CPU, devices=devices).best


def test_a_chip_that_cannot_train_it_still_gets_a_plan():
    config = load(CONFIGS / "turing_nlg_17b.yaml", ["target=null"])
    result = search.search(config, hardware=chips.load("v100-32gb"), devices=256)
    assert result.best == ()
    assert len(result.modelled) > 1
    assert all(one.work.precision == "float16" and one.work.why_modelled() for one in result.modelled)


@pytest.mark.parametrize(
    "on_base", [True, pytest.param(False, marks=pytest.mark.full)], ids=["on its base", "whole"]
)
def test_the_written_config_loads_and_its_step_runs(tmp_path, on_base):
    (tmp_path / "own").mkdir()
    base = tmp_path / "own" / "small.yaml"
    base.write_text(search.dump(SMALL))
    config = load(base, ["optimizer.learning_rate=0.01"])
    result = search.search(config, hardware=CPU, devices=8)
    path = tmp_path / "chosen.yaml"
    output = search.write(result, path, base=base if on_base else None)
    text = path.read_text()
    assert ("base: own/small.yaml" in text) == on_base
    assert ("num_layers" in text) == (not on_base)
    loaded = load(path)
    assert loaded == output
    assert loaded.optimizer.learning_rate == 0.01, "what the command line changed stays"
    assert loaded.model == SMALL.model
    planned = plan(loaded)
    assert planned.time == result.best[0].time
    assert planned.memory == result.best[0].memory
    assert f"{planned.time.total:.4g} s a step" in text
    if on_base:
        run_one_step(loaded)


def test_a_pipeline_that_is_written_loads_and_its_step_runs(tmp_path):
    slow = dataclasses.replace(CPU, domain_bandwidth=1e7)
    sizes = ("model.num_heads=1", "model.num_kv_heads=1", "model.embed_dim=96", "data.sequence_length=8")
    result = search.search(SMALL.replace(*sizes), hardware=slow, devices=8)
    assert result.best[0].work.stage > 1
    loaded = search.write(result, tmp_path / "chosen.yaml")
    assert load(tmp_path / "chosen.yaml") == loaded
    assert loaded.mesh.zero == 1
    work = result.best[0].work
    mesh = (loaded.mesh.stage, loaded.mesh.schedule, loaded.mesh.virtual_stages, loaded.train.accumulation)
    assert mesh == (work.stage, work.schedule, work.virtual_stages, work.accumulation)
    run_one_step(loaded)


def run_one_step(config: Config) -> None:
    program = programs.build(config, jax.devices())
    with jax.set_mesh(states.concrete(program)):
        state = states.init(program)
        rows = jax.device_put(
            jax.numpy.ones((config.train.batch_size, config.data.sequence_length), "int32"),
            program.layout.sharding("batch", "length"),
        )
        example = jax.device_put(rows[:, 0], program.layout.sharding("batch"))
        batch = dict.fromkeys(("tokens", "labels", "segments", "positions"), rows) | {"example": example}
        step = jax.jit(lambda state, batch: train_step(program, state, batch))
        _, metrics = step(state, batch)
        assert 0 < float(metrics["loss"]) < 20


def test_a_config_is_not_written_over_the_one_it_is_based_on(tmp_path):
    base = tmp_path / "small.yaml"
    base.write_text(search.dump(SMALL))
    result = search.search(load(base), hardware=CPU, devices=8)
    with pytest.raises(StackError, match="write to another file"):
        search.write(result, base, base=base)
    with pytest.raises(StackError, match="cannot write the config to"):
        search.write(result, tmp_path / "missing" / "chosen.yaml")
