"""A run and its text: the tokenizer it keeps, what it writes, and what it says of its data."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tokenizers
from tokenizers import decoders, normalizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer

from stack import Config, StackError, Trainer
from stack.data.tokenizer import continuation, load_tokenizer
from stack.train.watch.listeners import Listener

TEXT = "the red fox and the red dog ran to the old red house by the sea. "
FIELDS = {
    "model": {
        "num_layers": 1, "embed_dim": 32, "num_heads": 2, "max_length": 32, "vocab_size": 300,
        "dtype": "float32", "position": "rotary",
    },
    "data": {"sequence_length": 32, "heldout_fraction": 0.1},
    "train": {"steps": 6, "batch_size": 4, "log_every": 1},
    "sample": {"prompt": "the red", "length": 12, "temperature": 0},
}  # fmt: skip


def write_tokenizer(path: Path, text: str = TEXT) -> str:
    """As Llama 2's: a space is put before a text, and taken away from what is decoded."""
    model = tokenizers.Tokenizer(BPE(unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    trainer = BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"])
    model.train_from_iterator([text], trainer)
    model.save(str(path))
    return str(path)


class Warnings(Listener):
    """Writes down what it is warned of."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_warning(self, text: str) -> None:
        self.texts.append(text)


def config(folder: Path, *overrides: str) -> Config:
    return Config.model_validate(FIELDS).replace(
        "data.sources.0.kind=text",
        f"data.sources.0.path={folder}/text.txt",
        f"data.cache_dir={folder}/cache",
        f"output_dir={folder}/runs",
        *overrides,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT * 60)
    write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def warnings() -> Warnings:
    return Warnings()


@pytest.fixture(scope="module")
def trained(folder, warnings) -> Trainer:
    tree = config(folder, f"data.tokenizer={folder}/tokenizer.json")
    trainer = Trainer(tree, devices=jax.devices()[:1], listeners=[warnings])
    trainer.fit()
    return trainer


def test_one_file_trains_and_is_evaluated_on_its_end(trained, warnings) -> None:
    assert trained.history.curve("loss", "heldout")[0] == [6]
    assert [text for text in warnings.texts if "the last 0.1 of the text is held out" in text]


def test_a_default_that_depends_on_the_length_of_the_run_is_written_out(trained) -> None:
    assert Config().optimizer.schedule.warmup_steps is None
    assert Config().settled().optimizer.schedule.warmup_steps == 100
    assert "warmup_steps: 0" in (trained.folder / "config.yaml").read_text()
    assert Config().replace("train.steps=60").settled().optimizer.schedule.warmup_steps == 6


def test_a_continuation_keeps_its_first_space(trained) -> None:
    tokenizer = trained.tokenizer
    prompt, new = (tokenizer.encode_batch([text])[0].tolist() for text in ("the red", "dog ran"))
    assert tokenizer.decode(new) == "dog ran", "alone it has lost its space"
    assert continuation(tokenizer, [tokenizer.bos, *prompt], new) == " dog ran"


def test_a_text_streams_as_it_is_generated_whole(trained) -> None:
    for prompt in ("the red", "", "the old red house by"):
        assert "".join(trained.stream(prompt)) == trained.generate(prompt)[0]


def test_a_run_is_sampled_without_its_text_and_tokenizer(folder, trained) -> None:
    told = trained.generate("the red")
    for name in ("text.txt", "tokenizer.json"):
        (folder / name).rename(folder / f"{name}.away")
    try:
        assert Trainer.from_run(trained.folder, devices=jax.devices()[:1]).generate("the red") == told
    finally:
        for name in ("text.txt", "tokenizer.json"):
            (folder / f"{name}.away").rename(folder / name)


def test_a_run_goes_on_with_its_own_tokenizer_and_refuses_another(trained) -> None:
    again = Trainer.from_run(trained.folder, ["data.tokenizer=bytes"], devices=jax.devices()[:1])
    assert again.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert (
        load_tokenizer(str(trained.folder / "tokenizer/tokenizer.json")).fingerprint
        == again.tokenizer.fingerprint
    )
    with pytest.raises(StackError, match=r"began with another tokenizer than data\.tokenizer=bytes is now"):
        again.fit()


def test_a_tokenizer_trained_anew_in_place_changes_no_evaluation_and_no_sample(folder, trained) -> None:
    """That of the config is not asked; another in the run's own place is refused."""
    told, loss = trained.generate("the red"), trained.evaluate()["loss"]
    for path in (folder / "tokenizer.json", trained.folder / "tokenizer" / "tokenizer.json"):
        before = path.read_bytes()
        try:
            write_tokenizer(path, TEXT.translate(str.maketrans("aeio", "oiea")))
            again = Trainer.from_run(trained.folder, devices=jax.devices()[:1])
            if path.parent == folder:
                assert again.evaluate()["loss"] == loss
                assert again.generate("the red") == told
            else:
                for use in (again.evaluate, lambda again=again: again.generate("the red")):
                    with pytest.raises(StackError, match=r"began otherwise: data\.tokenizer content "):
                        use()
        finally:
            path.write_bytes(before)


def test_a_text_ends_at_any_of_the_named_tokens(trained) -> None:
    words = trained.tokenizer.encode_batch([trained.generate("the red")[0].lstrip()])[0].tolist()
    name = trained.tokenizer.model.id_to_token(words[-1])
    shorter = Trainer.from_run(
        trained.folder, [f"sample.end_tokens=['{name}']"], devices=jax.devices()[:1]
    ).generate("the red")[0]
    assert len(shorter) < len(trained.generate("the red")[0])
    with pytest.raises(StackError, match=r"sample\.end_tokens: 'no such' is no token of"):
        Trainer.from_run(
            trained.folder, ["sample.end_tokens=['no such']"], devices=jax.devices()[:1]
        ).generate("the")


def test_an_evaluation_of_some_batches_is_the_same_each_time(trained) -> None:
    some = Trainer.from_run(
        trained.folder, ["eval.batches=2", "eval.batch_size=1"], devices=jax.devices()[:1]
    )
    metrics = some.evaluate()
    assert metrics == some.evaluate()
    assert metrics["tokens"] < trained.evaluate()["tokens"]
    assert metrics["nats_per_byte"] == pytest.approx(
        metrics["loss"] * some.data.heldout.num_tokens / some.data.heldout.num_bytes
    )


def sample(folder: Path, *arguments: str | bytes, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", **options.pop("environment", {})}
    command = [sys.executable, "-m", "stack", "sample", folder, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, **options)


@pytest.mark.full
def test_prompts_come_from_arguments_a_file_or_standard_input(trained, tmp_path) -> None:
    (tmp_path / "prompt.txt").write_text("the old")
    done = sample(
        trained.folder, "-", "--file", str(tmp_path / "prompt.txt"), "--", "- the", input=b"the red"
    )
    assert done.stderr == b""
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "the red" + trained.generate(["the red", "- the", "the old"])[0]
    assert (lines[1].startswith("- the"), lines[2].startswith("the old")) == (True, True)


@pytest.mark.full
def test_what_a_terminal_cannot_show_is_spelled_out(trained) -> None:
    done = sample(trained.folder, "réd", environment={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"r\\xe9d")


def test_a_prompt_is_utf8_whatever_the_terminal_is(trained) -> None:
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = sample(trained.folder, "r\u00e9d".encode(), environment=environment)
    assert done.returncode == 0
    assert done.stdout.startswith((b"r\\xe9d", "r\u00e9d".encode()))


@pytest.mark.parametrize("prompt", [b"\xff\xfe", "-"])
def test_a_prompt_that_is_not_text_is_one_line(trained, prompt) -> None:
    done = sample(trained.folder, prompt, input=b"abc\xff")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().count("\n") == 1
    assert b"UTF-8" in done.stderr


def test_a_tokenizer_without_the_words_is_told_and_flatters_nobody(folder) -> None:
    words = WordLevel({"[UNK]": 0, "[EOS]": 1, "the": 2, "red": 3}, unk_token="[UNK]")
    model = tokenizers.Tokenizer(words)
    model.add_special_tokens(["[UNK]", "[EOS]"])
    model.pre_tokenizer = Whitespace()
    model.save(str(folder / "words.json"))
    heard = Warnings()
    tree = config(folder, "name=words", f"data.tokenizer={folder}/words.json", "eval.baselines=true")
    run = Trainer(tree, devices=jax.devices()[:1], listeners=[heard])
    (last,) = (record for record in run.fit().records if record["kind"] == "heldout")
    assert "loss" in last
    assert "nats_per_byte" not in last
    assert [text for text in heard.texts if "does not know 0." in text and "no nats per byte" in text]


def test_a_damaged_checkpoint_is_one_line(trained, tmp_path) -> None:
    run = shutil.copytree(trained.folder, tmp_path / "run")
    largest = max((run / "checkpoints").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    done = sample(run, "the")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().count("\n") == 1
    assert b"is damaged: " in done.stderr
    assert b"; none is left that is sound: restore the files, or delete " in done.stderr
