"""A new run begins with the weights of another, bit for bit, and tells what it did not simply take."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_runs import config, run, saved_state, start, trainer, wait_for_step

from stack import StackError, Trainer
from stack.cli import main
from stack.step import state as states
from stack.train import starting
from stack.train.checkpoint.checkpoints import Checkpoints, named_leaves
from stack.train.replay import replay
from stack.train.watch.listeners import Listener
from stack.transfer.exporting import export

QUICK = ("data.heldout_fraction=0",)
AVERAGE = ("optimizer.ema_decay=0.9", "optimizer.frozen=[position.*]")
MESH = ("mesh.fsdp=4", "mesh.tensor=2")
TOLD = "init_from: resized embed.table: 257 -> 260 words, 3 new, at the mean of the 257 old"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    run(folder, "base", *QUICK, "train.steps=4", "checkpoint.every=2", "checkpoint.keep_last=9")
    run(folder, "average", *QUICK, "train.steps=2", *AVERAGE)
    return folder


def saved(folder: Path, name: str, step: int = 4) -> dict[str, np.ndarray]:
    """What a checkpoint holds, on the host."""
    made = trainer(folder, name, *(AVERAGE if name == "average" else ()))
    abstract = states.abstract(made.program)
    parts = {part: abstract[part] for part in ("params", "ema", "frozen") if part in abstract}
    with Checkpoints(made.ledger.store) as checkpoints:
        return {
            name: np.asarray(leaf) for name, leaf in named_leaves(checkpoints.restore(step, parts)).items()
        }


def begin(
    folder: Path, where: str, *overrides: str, devices: int = 1
) -> tuple[dict[str, Any], dict, list[str]]:
    """Parameters of a run that begins there, where they came from, and what is told."""
    made = Trainer(
        config(folder, "new", f"init_from={folder}/runs/{where}", *overrides), devices=jax.devices()[:devices]
    )
    notes: list[str] = []
    starting.check(made.program, made.ledger.store, lambda: made.tokenizer)
    state, origin = starting.begin(made.program, made.tokenizer, notes.append)
    assert int(state["step"]) == 0
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]
    assert not any(np.asarray(leaf).any() for leaf in moments)
    params = {name: np.asarray(leaf) for name, leaf in named_leaves(states.join(state)).items()}
    assert not (folder / "runs" / "new").exists()
    return params, dict(origin), notes


def assert_same(params: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert params.keys() == want.keys()
    for name, leaf in want.items():
        np.testing.assert_array_equal(params[name], leaf, strict=True, err_msg=name)


@pytest.mark.parametrize(
    ("where", "step", "devices"),
    [("base", 4, 1), ("base/checkpoints", 4, 1), ("base/checkpoints/2", 2, 8)],
)
def test_its_parameters_are_those_of_the_checkpoint_on_any_mesh(folder, where, step, devices) -> None:
    params, origin, notes = begin(folder, where, *MESH[: devices // 4], devices=devices)
    want = {name.removeprefix("params."): leaf for name, leaf in saved(folder, "base", step).items()}
    assert_same(params, want)
    assert notes == []
    assert origin["source"] == f"{folder}/runs/base at step {step}"
    assert (origin["taken"], origin["parameters"]) == (len(want), len(want))


def test_where_there_is_an_average_of_weights_it_is_taken(folder) -> None:
    params, origin, notes = begin(folder, "average", "optimizer.frozen=[embed.*]")
    leaves = saved(folder, "average", 2)
    want = {name.partition(".")[2]: leaf for name, leaf in leaves.items() if not name.startswith("params.")}
    assert_same(params, want)
    assert (params["embed.table"] != leaves["params.embed.table"]).any()
    assert origin["source"].endswith("runs/average at step 2, the average of its weights")
    assert notes == []


@pytest.fixture(scope="module")
def words(folder) -> str:
    """The tokenizer of bytes, with two words more."""
    path = folder / "tokenizer.json"
    assert (
        main(["data", "extend", "bytes", "--special", "<|user|>", "--word", "Stack", "--out", str(path)]) == 0
    )
    return f"data.tokenizer={path}"


def test_new_words_begin_at_the_mean_of_the_old_and_padding_is_zero(folder, words) -> None:
    overrides = (words, "model.vocab_size=260", "model.vocab_multiple=8")
    params, origin, notes = begin(folder, "base", *overrides, *MESH, devices=8)
    old, table = saved(folder, "base")["params.embed.table"], params["embed.table"]
    assert table.shape == (264, 32)
    np.testing.assert_array_equal(table[:257], old[:257])
    mean = old[:257].mean(0, dtype=np.float64)
    np.testing.assert_allclose(table[257:260], np.tile(mean, (3, 1)), rtol=2**-23, atol=0)
    assert not table[260:].any()
    assert notes == [TOLD]
    assert begin(folder, "base", *overrides)[1]["digest"] == origin["digest"], "on any mesh"


@pytest.mark.full
def test_new_words_within_the_room_of_the_vocabulary_are_new_too(folder) -> None:
    """The model had 300 rows for 258 words; the other 40 stay as they were."""
    few, more = folder / "few" / "tokenizer.json", folder / "more" / "tokenizer.json"
    assert main(["data", "extend", "bytes", "--special", "<|one|>", "--out", str(few)]) == 0
    assert (
        main(["data", "extend", str(few), "--special", "<|two|>", "--word", "Stack", "--out", str(more)]) == 0
    )
    run(folder, "roomy", "train.steps=2", "model.vocab_size=300", f"data.tokenizer={few}")
    params, _, notes = begin(folder, "roomy", f"data.tokenizer={more}", "model.vocab_size=300")
    made = trainer(folder, "roomy", "model.vocab_size=300")
    with Checkpoints(made.ledger.store) as checkpoints:
        old = np.asarray(
            checkpoints.restore(2, {"params": states.abstract(made.program)["params"]})["params"]["embed"][
                "table"
            ]
        )
    np.testing.assert_allclose(params["embed.table"][258:260], np.tile(old[:258].mean(0), (2, 1)), rtol=1e-5)
    for rows in (slice(258), slice(260, None)):
        np.testing.assert_array_equal(params["embed.table"][rows], old[rows])
    assert notes == ["init_from: resized embed.table: 300 words, 2 new, at the mean of the 258 old"]


def test_what_the_weights_lack_is_as_the_seed_has_it(folder) -> None:
    overrides = ("model.max_length=40", "model.tied_embeddings=false", "model.mlp_bias=false", *MESH)
    params, origin, notes = begin(folder, "base", *overrides, devices=8)
    seed = Trainer(config(folder, "seed", *overrides[:3]), devices=jax.devices()[:1])
    initial = {
        name: np.asarray(leaf) for name, leaf in named_leaves(states.init_params(seed.program)).items()
    }
    old = {name.removeprefix("params."): leaf for name, leaf in saved(folder, "base").items()}
    np.testing.assert_array_equal(params["head.table"], initial["head.table"])
    np.testing.assert_array_equal(params["position.table"][:32], old["position.table"])
    np.testing.assert_array_equal(params["position.table"][32:], initial["position.table"][32:])
    same = old.keys() - {"position.table", "layers.mlp.up.bias", "layers.mlp.down.bias"}
    assert_same({name: params[name] for name in same}, {name: old[name] for name in same})
    assert (origin["taken"], origin["parameters"]) == (18, 19)
    assert notes == [
        "init_from: resized position.table: 32 -> 40 positions, the later ones left as initialised",
        "init_from: left as initialised: head.table",
        "init_from: not used: layers.mlp.down.bias, layers.mlp.up.bias",
    ]


def test_a_model_that_computes_otherwise_is_told(folder) -> None:
    _, _, notes = begin(folder, "base", "model.norm_epsilon=1e-6", "model.logit_softcap=30")
    told = "model.logit_softcap null -> 30.0, model.norm_epsilon 1e-05 -> 1e-06"
    assert notes == [f"init_from: the model is not quite that of the weights: {told}"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["model.kind=parallel_decoder"],
            "runs/base at step 4 is of another family of models: model.kind decoder -> parallel_decoder; ",
        ),
        (
            ["model.position=rotary", "model.mlp=swiglu"],
            "of another family of models: model.position learned -> rotary, model.mlp gelu_tanh -> swiglu; ",
        ),
        (
            ["model.num_heads=4"],
            "is of another shape: layers.attention.key.bias is [1, 2, 16] in it and [1, 4, 8] in the config,",
        ),
        (
            ["model.num_layers=2"],
            "set the model to what it was (model.num_layers 1 -> 2), or take weights of",
        ),
        (
            ["model.max_length=31", "data.sequence_length=31"],
            "position.table is [32, 32] in it and [31, 32] in",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_written(folder, overrides, told) -> None:
    made = trainer(folder, "refused", f"init_from={folder}/runs/base", *overrides)
    with pytest.raises(StackError, match=r"^init_from: ") as error:
        made.fit(progress=False)
    assert told in str(error.value)
    assert not made.folder.exists()


def test_a_place_that_holds_no_weights_is_told(folder) -> None:
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    (folder / "runs" / "unborn").mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "runs/base/config.yaml", folder / "runs/unborn/config.yaml")
    for where, told in (
        (empty, "empty holds none of these: give the folder of a run, one of its checkpoints (runs/NAME/"),
        (folder / "nowhere", "nowhere does not exist: give the folder of a run"),
        (folder / "runs/unborn", "unborn/checkpoints holds no checkpoint yet; train that run first"),
        (folder / "runs/base/checkpoints/3", "checkpoints/3 does not exist"),
    ):
        with pytest.raises(StackError, match=re.escape(told)):
            run(folder, "refused", f"init_from={where}")
    with pytest.raises(
        StackError, match=r"has rows for 257 words, model\.vocab_size=256 for less; words are"
    ):
        starting.check(
            trainer(folder, "refused", f"init_from={folder}/runs/base", "model.vocab_size=256").program,
            trainer(folder, "refused").ledger.store,
            lambda: trainer(folder, "refused").tokenizer,
        )
    assert not (folder / "runs" / "refused").exists()


@pytest.mark.usefixtures("words")
@pytest.mark.full
def test_the_special_words_of_bytes_keep_their_ids(folder, words) -> None:
    """Trained with rows for them, a model would have its mask overwritten by the first new word."""
    if not (folder / "runs" / "marked").exists():
        run(folder, "marked", "train.steps=1", "model.vocab_size=361")
    with pytest.raises(StackError, match=r"id 257 is '\[MASK\]' in .* and '"):
        begin(folder, "marked", words, "model.vocab_size=361")


def test_an_id_that_means_another_word_is_refused_with_both(folder) -> None:
    path = folder / "other.json"
    text = (folder / "tokenizer.json").read_text()
    tree = json.loads(text)
    tree["model"]["vocab"] |= {"A": 66, "B": 65}
    path.write_text(json.dumps(tree))
    told = r"id 65 is 'A' in \S+runs/base at step 4 and 'B' in data\.tokenizer=\S+other\.json; take the "
    with pytest.raises(StackError, match=told):
        begin(folder, "base", f"data.tokenizer={path}", "model.vocab_size=260")


class Heard(Listener):
    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.texts: list[str] = []

    def on_start(self, info) -> None:
        self.info = info

    def on_warning(self, text) -> None:
        self.texts.append(text)


def test_a_run_goes_on_without_its_weights_as_the_unbroken_one(folder, words) -> None:
    """What it began with is in its record, and cannot be changed afterwards."""
    source = shutil.copytree(folder / "runs/base", folder / "runs/gone", dirs_exist_ok=True)
    options = (words, "model.vocab_size=260", *QUICK, "checkpoint.every=3", "optimizer.frozen=[layers.*]")
    heard = Heard()
    whole = run(folder, "whole", f"init_from={source}", *options, listeners=[heard])
    assert [text for text in heard.texts if "init_from" in text] == [TOLD.replace("base", "gone")]
    assert re.fullmatch(
        rf"20 of 20 parameter arrays from {source} at step 4 \(digest \w{{16}}\)", heard.info["weights"]
    )
    run(folder, "broken", f"init_from={source}", *options, "train.steps=3")
    shutil.rmtree(source)
    heard = Heard()
    broken = run(folder, "broken", f"init_from={source}", *options, listeners=[heard])
    assert not [text for text in heard.texts if "init_from" in text]
    assert heard.info["weights"].startswith("20 of 20 parameter arrays from")
    assert saved_state(folder, "broken") == saved_state(folder, "whole")
    steps, losses = whole.history.curve("loss")
    assert broken.history.curve("loss") == (steps, losses)
    assert whole.state is not None
    frozen = flatten_dict(whole.state["frozen"], sep=".")
    assert all(
        (np.asarray(leaf) == saved(folder, "base")[f"params.{name}"]).all() for name, leaf in frozen.items()
    )
    assert set(frozen) == {name[7:] for name in saved(folder, "base") if name.startswith("params.layers.")}
    for change in ("init_from=elsewhere", "init_from=null"):
        with pytest.raises(
            StackError, match=r"the run began otherwise: init_from \S+ -> (elsewhere|null); restore"
        ):
            run(folder, "broken", f"init_from={source}", *options, change)
    with pytest.raises(StackError, match="init_from null -> elsewhere"):
        run(folder, "base", *QUICK, "train.steps=4", "init_from=elsewhere")


def test_a_run_says_where_its_weights_came_from(folder, capsys) -> None:
    """After the test above, in whose folder it looks."""
    for verb in (["show"], ["checkpoint", "show"]):
        assert main([*verb, str(folder / "runs/whole")]) == 0
        told = capsys.readouterr().out
        assert re.search(
            r"^weights   20 of 20 parameter arrays from \S+gone at step 4 \(digest \w+\) at first$",
            told,
            re.M,
        )
    assert main(["show", str(folder / "runs/whole"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["init_from"]["notes"] == [TOLD.removeprefix("init_from: ")]


def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_taken(folder) -> None:
    source = shutil.copytree(folder / "runs/base", folder / "runs/hurt", dirs_exist_ok=True)
    file = source / "checkpoints/4/0/0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    params, _, notes = begin(folder, "hurt")
    assert_same(
        params, {name.removeprefix("params."): leaf for name, leaf in saved(folder, "base", 2).items()}
    )
    assert len(notes) == 1
    assert re.match(
        r"init_from: \S+checkpoints/4/0/0 is damaged: .*hurt at step 2 is sound, and is taken$", notes[0]
    )
    with pytest.raises(
        StackError, match=r"^init_from: \S+checkpoints/4/0/0 is damaged: .*; give weights that are s"
    ):
        begin(folder, "hurt/checkpoints/4")
    shutil.rmtree(source / "checkpoints/2")
    (source / "checkpoints/4/manifest.jsonl").write_text("{")
    with pytest.raises(StackError, match=r"4/manifest\.jsonl is damaged: .*; give weights that are sound"):
        begin(folder, "hurt")


@pytest.mark.full
def test_a_replay_begins_where_the_run_did(folder) -> None:
    source = shutil.copytree(folder / "runs/base", folder / "runs/origin", dirs_exist_ok=True)
    options = (f"init_from={source}", "train.steps=2")
    run(folder, "again", *options)
    first, *_, last = list(replay(trainer(folder, "again", *options), 2))
    assert first.startswith("replayed steps 1 to 2 from 20 of 20 parameter arrays from")
    assert last == "every bit is the same"
    shutil.rmtree(source / "checkpoints/4")
    told = (
        r"origin at step 2 \(digest \w+\) has other weights than this run began with, of \S+origin at step 4 "
    )
    with pytest.raises(StackError, match=told):
        list(replay(trainer(folder, "again", *options), 2))


def test_a_plan_needs_no_weights(folder, capsys) -> None:
    path = folder / "plan.yaml"
    path.write_text("init_from: /nowhere\nname: planned\n")
    assert main(["plan", str(path), "--hardware", "h100", "--devices", "1"]) == 0
    assert main(["config", "show", str(path)]) == 0
    assert "init_from: /nowhere" in capsys.readouterr().out


@pytest.mark.full
def test_killed_before_its_first_checkpoint_it_begins_with_its_weights_again(folder) -> None:
    options = (f"init_from={folder}/runs/base", "train.steps=60", "checkpoint.every=0")
    process = start(folder, "killed", *options)
    wait_for_step(folder, "killed", 4, process)
    process.kill()
    process.communicate()
    assert (folder / "runs/killed/config.yaml").is_file()
    killed, calm = (run(folder, name, *options) for name in ("killed", "calm"))
    assert saved_state(folder, "killed") == saved_state(folder, "calm")
    assert killed.history.curve("loss") == calm.history.curve("loss")


def digests_here(folder: Path, *overrides: str) -> list[tuple[str, int]]:
    """What runs begin with, and how many numbers of a kernel lie here."""
    told = []
    for where in ("runs/base", "exported"):
        made = Trainer(config(folder, "new", f"init_from={folder}/{where}", *overrides))
        state, origin = starting.begin(made.program, made.tokenizer, lambda _: None)
        kernel = state["params"]["layers"]["mlp"]["up"]["kernel"]
        told.append((origin["digest"], sum(shard.data.size for shard in kernel.addressable_shards)))
    return told


@pytest.mark.full
def test_two_processes_begin_with_the_same_each_with_its_shards(folder, words, run_processes) -> None:
    """And with a checkpoint as with what was exported of it."""
    base = Trainer.from_run(folder / "runs/base", devices=jax.devices()[:1])
    list(export(base, folder / "exported"))
    overrides = (words, "model.vocab_size=260", "model.max_length=40", "mesh.data=2")
    told = run_processes(digests_here, folder, *overrides, "mesh.fsdp=2", devices=2)
    alone = digests_here(folder, *overrides, "mesh.fsdp=4")
    assert told == [[(alone[0][0], 32 * 4 * 32)] * 2] * 2
    assert alone[1][0] == alone[0][0]
