"""A run answers the lm-evaluation-harness as the harness's own Hugging Face model does."""

import dataclasses
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from stack import StackError, Trainer
from stack.cli import main
from stack.config import Config
from stack.data.tokenizer import ByteTokenizer
from stack.interop.safetensors_folder import SINGLE
from stack.step import program as programs
from stack.transfer.importing import load_weights

pytest.importorskip("lm_eval", reason="the lm-evaluation-harness: pip install 'stack[lm-eval]'")

os.environ["HF_HUB_OFFLINE"] = "1"  # Read when its library is imported: nothing is asked of a network.

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from stack.evaluation import harness
from stack.evaluation.harness import StackLM
from stack.evaluation.harness_tasks import evaluate_tasks
from stack.inference.generate import stream

GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class Golden:
    """What tests/goldens/make_harness.py wrote, and a run of its model."""

    def __init__(self, name: str, folder: Path) -> None:
        with np.load(GOLDENS / f"harness_{name}.npz") as file:
            weights = {key: file[key] for key in file.files if key != "content"}
            content = json.loads(str(file["content"]))
        self.asked, self.told = content["asked"], content["told"]
        saved = folder / "saved"
        saved.mkdir()
        for part in ("config", "tokenizer", "tokenizer_config"):
            (saved / f"{part}.json").write_text(json.dumps(content[part]))
        safetensors.numpy.save_file(weights, saved / SINGLE)
        self.run = folder / "run"
        for _ in load_weights(saved, self.run, ["model.dtype=float32"], devices=jax.devices()[:1]):
            pass

    def check(self, kind: str, answers: list[Any]) -> None:
        told = self.told[kind]
        if kind == "generate_until":
            assert answers == told
            return
        if kind == "loglikelihood":
            assert [is_greedy for _, is_greedy in answers] == [is_greedy for _, is_greedy in told]
            answers, told = [each for each, _ in answers], [each for each, _ in told]
        np.testing.assert_allclose(answers, told, rtol=0, atol=1e-4)


def load(folder: Path, *overrides: str, devices: int = 1, **options: Any) -> StackLM:
    made = Trainer.from_run(folder, overrides, devices=jax.devices()[:devices])
    return StackLM(made.program, made.trained, made.words, **options)


def ask(model: Any, kind: str, requests: list[Any]) -> list[Any]:
    instances = [Instance(kind, {}, tuple(each), number) for number, each in enumerate(requests)]
    return getattr(model, kind)(instances)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def golden(request, tmp_path_factory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(golden) -> StackLM:
    return load(golden.run, "eval.batch_size=4")


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_those_of_the_harness_own_model(golden, model, kind):
    golden.check(kind, ask(model, kind, golden.asked[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_they_are_on_a_mesh_too(golden, kind):
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "mesh.zero=3")
    golden.check(kind, ask(load(golden.run, *mesh, devices=8), kind, golden.asked[kind]))


def answers_of_a_process(folder: str, asked: dict[str, list[Any]]) -> dict[str, list[Any]]:
    model = load(Path(folder), "mesh.fsdp=2", "eval.batch_size=4", devices=jax.device_count())
    return {kind: ask(model, kind, requests) for kind, requests in asked.items()}


@pytest.mark.parametrize("golden", ["gpt2"], indirect=True)
def test_every_process_gets_all(golden, run_processes):
    for answers in run_processes(answers_of_a_process, str(golden.run), golden.asked, devices=1):
        for kind, told in answers.items():
            golden.check(kind, told)


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_harness_keeps_is_not_asked_again(golden, model, kind, tmp_path, monkeypatch):
    try:
        kept = CachingLM(model, str(tmp_path / "kept.db"))
        first = ask(kept, kind, golden.asked[kind][:6])
        again = CachingLM(model, str(tmp_path / "kept.db"))
        for name in KINDS:
            monkeypatch.setattr(model, name, None)
        assert ask(again, kind, golden.asked[kind][:6]) == first
    finally:
        model.cache_hook = type(model.cache_hook)(None)


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_an_answer_is_kept_as_soon_as_it_is_there(golden, model, tmp_path, monkeypatch):
    likelihoods = harness.likelihoods

    def interrupted(program, params, parts, *, told):
        def stop_after_the_first(number, each):
            told(number, each)
            raise KeyboardInterrupt

        return likelihoods(program, params, parts, told=stop_after_the_first)

    monkeypatch.setattr(harness, "likelihoods", interrupted)
    try:
        kept = CachingLM(model, str(tmp_path / "kept.db"))
        with pytest.raises(KeyboardInterrupt):
            ask(kept, "loglikelihood", golden.asked["loglikelihood"])
        assert len(kept.dbdict) == 1
    finally:
        model.cache_hook = type(model.cache_hook)(None)


@pytest.mark.parametrize("golden", ["gpt2"], indirect=True)
def test_texts_are_sampled_where_that_is_asked_for(golden, model):
    contexts = golden.asked["generate_until"][:4]
    hot = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12, "until": []}
    same = [(contexts[0][0], hot)] * 6  # More than a batch.
    texts = ask(model, "generate_until", same)
    assert len(set(texts)) == len(texts)
    assert ask(model, "generate_until", same) == texts
    other = load(golden.run, "eval.batch_size=4", seed=1)
    assert ask(other, "generate_until", same) != texts
    likeliest = [(context, hot | {"top_k": 1}) for context, _ in contexts]
    golden.told["likeliest"] = golden.told["generate_until"][:4]
    assert ask(model, "generate_until", likeliest) == golden.told["likeliest"]
    cold = [(context, hot | {"do_sample": False}) for context, _ in contexts]
    assert ask(model, "generate_until", cold) == golden.told["likeliest"]


@pytest.mark.parametrize("golden", ["gpt2"], indirect=True)
def test_no_more_is_written_once_every_text_has_stopped(golden, model, monkeypatch):
    turns = []

    def counted(*given, **options):
        for more in stream(*given, **options):
            turns.append(len(more))
            yield more

    monkeypatch.setattr(harness, "stream", counted)
    contexts = [context for context, _ in golden.asked["generate_until"][:3]]
    options = {"max_gen_toks": 36, "do_sample": False}
    whole = ask(model, "generate_until", [(context, options | {"until": []}) for context in contexts])
    assert len(turns) == 1
    turns.clear()
    stops = {"until": [text[3:5] for text in whole]}
    stopped = ask(model, "generate_until", [(context, options | stops) for context in contexts])
    assert len(turns) == 1, "of the three that there would be"
    assert all(text.startswith(start) for text, start in zip(whole, stopped, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 4}, "num_beams=4 is not known here"),
        ({"max_gen_toks": 48}, "max_gen_toks=48 leaves no room for a context in model.max_length=48"),
        ({}, "max_gen_toks=256 leaves no room"),
    ],
)
@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_options_that_are_not_honoured_are_refused(model, options, words):
    with pytest.raises(StackError, match=words):
        ask(model, "generate_until", [("the", options)])


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("pair", "words"),
    [(("the", ""), "request 0 has an empty"), (("the", "the " * 60), "takes 1 to 48")],
)
def test_a_continuation_that_cannot_be_scored_is_named(model, pair, words):
    with pytest.raises(StackError, match=words):
        ask(model, "loglikelihood", [pair])


@pytest.mark.parametrize("golden", ["gpt2"], indirect=True)
def test_a_text_begins_as_its_tokenizer_says_or_as_is_asked(golden, model):
    bos = model.words.bos
    told = load(golden.run, add_bos_token=True)
    plain = model.tok_encode("the model")
    assert plain[0] != bos
    assert told.tok_encode("the model") == [bos, *plain]
    assert told.tok_encode("<|endoftext|>the model") == [bos, *plain]
    assert told.tok_encode("the model", add_special_tokens=False) == plain


def test_bytes_begin_as_the_rows_of_training_do():
    program = programs.build(Config.model_validate({"model": {"vocab_size": 384}}), jax.devices()[:1])
    assert StackLM(program, {}, ByteTokenizer()).tok_encode("é") == [256, *"é".encode()]
    never = StackLM(program, {}, ByteTokenizer(), add_bos_token=False)
    assert never.tok_encode("é") == [*"é".encode()]


@pytest.mark.parametrize("golden", ["gpt2"], indirect=True)
def test_a_chat_template_lays_questions_out(model, monkeypatch):
    history = [{"role": "user", "content": "Hi "}]
    with pytest.raises(StackError, match="no chat template"):
        model.apply_chat_template(history)
    template = (
        "{{ bos_token }}{% for each in messages %}[{{ each.role }}]{{ each.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(model, "words", dataclasses.replace(model.words, chat_template=template))
    assert model.chat_template(True) == template
    assert model.apply_chat_template(history) == "<|endoftext|>[user]Hi\n[assistant]"
    answer = {"role": "assistant", "content": "Hello, "}
    whole = model.apply_chat_template([*history, answer], add_generation_prompt=False)
    assert whole == "<|endoftext|>[user]Hi\n[assistant]Hello,"


TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
"""
CHOICE = (
    "task: choose\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
    "doc_to_target: answer\n"
)
WRITE = (
    "task: write\noutput_type: generate_until\ndoc_to_text: question\ndoc_to_target: question\n"
    'generation_kwargs: {until: ["."], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n'
)


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder of two tasks."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"the {word}", "choices": ["reads", "and the sea", "a"], "answer": number % 3}
        for number, word in enumerate(("model", "old man", "night", "harbour", "Haus"))
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, text in (("choose", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(text + TASK.format(data=data))
    return folder


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_a_task_is_asked_on_the_command_line(golden, model, tasks, capsys):
    file = tasks / "results" / "all.json"
    options = ["--limit", "4", "--json", str(file), "mesh.data=8"]
    assert main(["eval", str(golden.run), "--tasks", str(tasks / "choose.yaml"), *options]) == 0
    assert "|choose|" in capsys.readouterr().out
    told = json.loads(file.read_text())["results"]["choose"]
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()][:4]
    pairs = [(row["question"], f" {choice}") for row in rows for choice in row["choices"]]
    scores = np.array([score for score, _ in ask(model, "loglikelihood", pairs)]).reshape(4, 3)
    right = scores.argmax(1) == [row["answer"] for row in rows]
    assert (told["sample_len"], told["acc,none"]) == (4, right.mean())


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_tasks_of_a_folder_are_all_asked_after_examples(model, tasks, monkeypatch):
    asked = []
    for kind in ("loglikelihood", "generate_until"):
        own = getattr(model, kind)
        monkeypatch.setattr(model, kind, lambda requests, own=own: asked.extend(requests) or own(requests))
    told = evaluate_tasks(model, [f"{tasks}/"], num_fewshot=2, limit=1, gen_kwargs="max_gen_toks=5")
    assert told["results"].keys() == {"choose", "write"}
    assert [request.args[0].count("\n\n") for request in asked] == [2, 2, 2, 2]
    assert asked[-1].args[1] == {"until": ["."], "max_gen_toks": 5}


@pytest.mark.parametrize("golden", ["llama"], indirect=True)
def test_a_task_that_cannot_be_is_told_in_one_line(golden, tasks, capsys):
    rows = TASK.format(data=tasks / "rows.jsonl")
    far = rows.replace("dataset_path: json", "dataset_path: no/such")
    late = CHOICE.replace("text: question", 'text: "{{question if answer == 0 else none.such}}"')
    for name, text in {
        "far": CHOICE + far,
        "broken": CHOICE + TASK.format(data="nowhere.jsonl"),
        "field": CHOICE.replace("text: question", 'text: "{{none.such}}"') + rows,
        "late": late + rows,
        "code": f"{CHOICE}unsafe_code: true\n{rows}",
    }.items():
        (tasks / f"{name}.yaml").write_text(text)
    (tasks / "empty").mkdir()
    for argv, words in (
        (["--tasks", "lambada_openia"], "no task of the lm-evaluation-harness; did you mean lambada_openai?"),
        (["--tasks", f"{tasks}/far.yaml"], "cannot be loaded: "),
        (["--tasks", f"{tasks}/broken.yaml"], "cannot be loaded: "),
        (["--tasks", f"{tasks}/field.yaml"], "cannot be loaded: 'None' has no attribute 'such'"),
        (["--tasks", f"{tasks}/late.yaml"], "a template of a task fails: 'None' has no attribute 'such'"),
        (["--tasks", f"{tasks}/code.yaml"], "runs code that the model writes"),
        (["--tasks", f"{tasks}/empty/"], "holds no .yaml of a task"),
        (["--tasks", f"{tasks}/gone.yaml"], "there is no such file or folder"),
        (["--tasks", f"{tasks}/choose.yaml,{tasks}/choose.yaml"], "task choose is in"),
        (["--tasks", f"{tasks}/choose.yaml", "--limit", "0"], "limit=0 asks for no document"),
        (["--tasks", f"{tasks}/choose.yaml", "--num-fewshot", "-1"], "num_fewshot=-1 is below 0"),
        (["--tasks", f"{tasks}/choose.yaml", "--apply-chat-template"], "has no chat template"),
        (["--limit", "3"], "--limit is of tasks; name them with --tasks"),
    ):
        assert main(["eval", str(golden.run), *argv, "mesh.data=8"]) in (1, 2)
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: "), argv
        assert words in error, argv


@pytest.mark.parametrize("golden", ["gpt2"], indirect=True)
def test_the_task_of_the_page_runs_as_it_stands_there(golden, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    part = page[page.index("## Tasks of the lm-evaluation-harness") :]
    found = dict(re.findall(r"```(\w+)\n(.*?)```", part, re.DOTALL))
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "capitals.jsonl").write_text(found["json"])
    (tmp_path / "my_tasks" / "capitals.yaml").write_text(found["yaml"])
    monkeypatch.chdir(tmp_path)
    said = []
    monkeypatch.setattr(Trainer, "from_run", partial(Trainer.from_run, devices=jax.devices()[:1]))
    exec(found["python"].replace("runs/quickstart", str(golden.run)), {"print": said.append})
    assert 0 <= said[0]["capitals"]["acc,none"] <= 1


def test_an_encoder_is_refused():
    tree = {"model": {"kind": "encoder", "vocab_size": 384}, "objective": {"kind": "masked_words"}}
    program = programs.build(Config.model_validate(tree), jax.devices()[:1])
    with pytest.raises(StackError, match=r"model\.kind=encoder does not predict the next token"):
        StackLM(program, {}, ByteTokenizer())
