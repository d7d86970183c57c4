"""`mesh: auto` and `remat: auto`: the planner chooses what is left to it, and nothing else."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import pytest

from stack.config import Config, ConfigError, dump, schema
from stack.config.document import framed
from stack.hardware import chip as chips
from stack.planner.formula.memory import memory
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import from_config
from stack.planner.search import auto
from stack.planner.search.layouts import REMATS
from stack.planner.search.search import RUNNABLE, rank, release_layout
from stack.train.trainer import Trainer

FIELDS: dict[str, Any] = {
    "model": {"num_layers": 2, "embed_dim": 32, "num_heads": 2, "max_length": 64, "vocab_size": 257},
    "data": {
        "sources": [{"kind": "synthetic", "max_bytes": 40_000}],
        "sequence_length": 64,
        "heldout_fraction": 0.1,
    },
    "train": {"steps": 2, "batch_size": 16, "log_every": 1},
    "optimizer": {"schedule": {"kind": "constant"}},
    "sample": {"at_end": False},
}


def config(tmp_path: Path, *overrides: str) -> Config:
    places = (f"output_dir={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache", "model.dtype=float32")
    return Config.model_validate(FIELDS).replace(*places, *overrides)


def chip_file(tmp_path: Path, **fields: Any) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(["base: cpu", "title: This CPU", *(f"{k}: {v}" for k, v in fields.items())]))
    return path


def test_a_config_that_leaves_nothing_open_is_returned_as_it_is(tmp_path):
    whole = config(tmp_path)
    assert auto.resolve(whole, jax.devices()) is whole


def test_mesh_auto_changes_the_mesh_alone(tmp_path):
    start = config(tmp_path, "mesh=auto", "train.accumulation=2", "train.remat=dots", "eval.batch_size=8")
    resolved = auto.resolve(start, jax.devices())
    assert not resolved.mesh.auto
    assert resolved.mesh.data * resolved.mesh.fsdp * resolved.mesh.tensor == 8
    assert resolved.model_copy(update={"mesh": start.mesh}) == start
    work = from_config(resolved, 8, chips.load("cpu"))
    assert work.remat == "dots"
    assert work.accumulation == 2


def test_remat_auto_takes_the_fastest_that_fits_and_leaves_the_mesh(tmp_path):
    start = config(tmp_path, "mesh={fsdp: 4, tensor: 2, zero: 2}", "train.remat=auto")
    assert auto.resolve(start, jax.devices()).train.remat == "none"
    works = {
        remat: from_config(start.replace(f"train.remat={remat}"), 8, chips.load("cpu")) for remat in REMATS
    }
    needs = {remat: 1.05 * memory(work).program + memory(work).reserve for remat, work in works.items()}
    assert needs["full"] < needs["none"]
    # The formula may be wrong by a twentieth.
    limit = (needs["full"] + needs["none"]) / 2
    small = start.replace(f"target={{hardware: {chip_file(tmp_path, memory_bytes=f'{limit:.1f}')}}}")
    resolved = auto.resolve(small, jax.devices())
    fitting = [remat for remat in REMATS if needs[remat] <= limit]
    chip = chips.load("cpu")
    assert resolved.train.remat == min(fitting, key=lambda remat: step_time(works[remat], chip).total)
    assert resolved.train.remat != "none"
    assert resolved.mesh == start.mesh


STAGED = (
    *("mesh=auto", "model.num_heads=1", "model.num_layers=8", "model.embed_dim=128", "train.remat=full"),
    *("train.batch_size=16", "train.accumulation=8", "data.sequence_length=16", "eval.batch_size=8"),
)
"""One head, so that no tensor parallelism divides it."""


def test_a_pipeline_is_chosen_and_run_where_nothing_else_fits(tmp_path):
    chip, start = chips.load("cpu"), config(tmp_path, *STAGED)
    space = dataclasses.replace(RUNNABLE, accumulation=8, remat=("full",))
    every = rank(release_layout(start, chip), hardware=chip, devices=2, space=space)
    needs = {
        is_staged: min(
            1.05 * one.memory.program + one.memory.reserve
            for one in every
            if (one.work.stage > 1) == is_staged
        )
        for is_staged in (False, True)
    }
    assert needs[True] < needs[False]
    file = chip_file(tmp_path, memory_bytes=f"{(needs[True] + needs[False]) / 2:.1f}")
    trainer = Trainer(start.replace(f"target={{hardware: {file}}}"), devices=jax.devices()[:2])
    assert (trainer.config.mesh.stage, trainer.config.mesh.zero) == (2, 1)
    assert trainer.config.train.accumulation == 8
    trainer.fit()
    history = (trainer.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["step"] == 2


def test_a_pipeline_is_chosen_where_it_is_predicted_the_fastest(tmp_path):
    """Slow links carry activations sooner than weights, if there are micro-batches to fill the stages."""
    file = chip_file(tmp_path, domain_bandwidth="1e7")
    start = config(tmp_path, *STAGED, f"target={{hardware: {file}}}")
    assert auto.resolve(start, jax.devices()[:2]).mesh.stage == 2
    one = start.replace("train.accumulation=1", "model.embed_dim=8", "data.sequence_length=64")
    assert auto.resolve(one, jax.devices()[:2]).mesh.stage == 1


def test_what_cannot_fit_is_refused_and_not_claimed(tmp_path):
    file = chip_file(tmp_path, memory_bytes="1e6")
    for open_field in ("mesh=auto", "train.remat=auto"):
        with pytest.raises(ConfigError, match="no layout fits with the formula's margin of 5%"):
            auto.resolve(config(tmp_path, open_field, f"target={{hardware: {file}}}"), jax.devices())


def test_an_evaluation_batch_that_cannot_be_split_rules_layouts_out(tmp_path):
    resolved = auto.resolve(config(tmp_path, "mesh=auto", "eval.batch_size=4"), jax.devices())
    assert 4 % (resolved.mesh.data * resolved.mesh.fsdp) == 0
    assert resolved.eval.batch_size == 4
    with pytest.raises(ConfigError, match=r"eval.batch_size=1 "):
        auto.resolve(config(tmp_path, "mesh=auto", "eval.batch_size=1"), jax.devices())


def test_a_chip_is_known_by_its_kind_or_by_the_target(tmp_path):
    def device(kind: str, platform: str = "gpu") -> jax.Device:
        return cast("jax.Device", SimpleNamespace(device_kind=kind, platform=platform))

    def name_of(chip: chips.Hardware | None) -> str | None:
        return chip.name if chip else None

    plain = config(tmp_path)
    assert name_of(auto.chip_of(plain, device("NVIDIA H100 80GB HBM3"))) == "h100"
    assert name_of(auto.chip_of(plain, device("NVIDIA Unheard 9"))) is None
    assert name_of(auto.chip_of(plain, jax.devices()[0])) == "cpu"
    mine = tmp_path / "ours.yaml"
    mine.write_text("base: h100\ntitle: Our H100\nnetwork_bandwidth: 6.25e9\n")
    with_target = config(tmp_path, f"target={{hardware: {mine}}}")
    assert name_of(auto.chip_of(with_target, device("NVIDIA H100 80GB HBM3"))) == "ours"
    assert name_of(auto.chip_of(with_target, device("NVIDIA H200"))) == "h200", "the target is another chip"
    assert name_of(auto.chip_of(with_target, jax.devices()[0])) == "cpu"
    with pytest.raises(ConfigError, match=r"NVIDIA Unheard 9, which is not in the table of chips; .*target"):
        auto.resolve(config(tmp_path, "mesh=auto"), [device("NVIDIA Unheard 9")])


def test_editors_accept_the_bare_word():
    assert schema()["$defs"]["MeshConfig"]["anyOf"][0] == {"const": "auto"}


def test_a_run_saves_what_was_chosen_and_goes_on_with_it(tmp_path):
    start = config(tmp_path, "mesh=auto", "train.remat=auto")
    trainer = Trainer(start, devices=jax.devices()[:2])
    assert not auto.is_auto(trainer.config)
    trainer.fit()
    folder = trainer.folder
    assert (folder / "config.yaml").read_text() == framed(dump(trainer.config))
    assert Trainer.from_run(folder, devices=jax.devices()[:2]).config == trainer.config
    # A folder that holds another choice: it stays, whatever would be chosen now.
    other = trainer.config.replace("mesh={data: 2, fsdp: 2, tensor: 2, zero: 1}", "train.remat=dots")
    assert other.mesh != trainer.config.mesh
    (folder / "config.yaml").write_text(dump(other))
    again = auto.resolve(start.replace("train.steps=4"), jax.devices())
    assert (again.mesh, again.train.remat) == (other.mesh, "dots")
    assert again.train.steps == 4
    fewer = auto.resolve(start, jax.devices()[:4])
    assert fewer.mesh.data * fewer.mesh.fsdp * fewer.mesh.tensor == 4, "it fits no more"


def choice(output_dir: str) -> dict[str, Any]:
    resolved = auto.resolve(config(Path(output_dir), "mesh=auto", "train.remat=auto"), jax.devices())
    return resolved.mesh.model_dump() | {"remat": resolved.train.remat}


@pytest.mark.full
def test_every_process_makes_the_same_choice(tmp_path, run_processes):
    one, other = run_processes(choice, str(tmp_path))
    assert one == other
    assert one["data"] * one["fsdp"] * one["tensor"] == 8


def test_the_allocators_limit_stands_before_the_chips_memory():
    class Device(SimpleNamespace):
        def memory_stats(self) -> dict[str, int] | None:
            return self.stats

    chip = dataclasses.replace(chips.load("h100"), memory_bytes=80e9)
    devices = [
        Device(process_index=0, stats={"bytes_limit": 60 * 10**9}),
        Device(process_index=0, stats=None),
    ]
    assert auto.memory_limit(chip, cast("list[jax.Device]", devices)) == 60e9
    assert auto.memory_limit(chip, jax.devices()) == 80e9
