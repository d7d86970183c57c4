"""Configs from files and overrides, and the one line that says what is wrong with them."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stack.config import (
    Config,
    ConfigError,
    DataConfig,
    DecoderConfig,
    ParallelDecoderConfig,
    SampleConfig,
    SourceConfig,
    dump,
    load,
    parse,
)
from stack.config.paths import expand

FILE = Path("run.yaml")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """File names in errors are as given, so tests name files in the current directory."""
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def error(text: str, *overrides: str) -> str:
    """The one line for a file of this text."""
    write("run.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load("run.yaml", overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


# What is read.


def test_what_a_file_leaves_out_has_its_default():
    write("run.yaml", "train:\n  steps: 123\n")
    assert load("run.yaml") == Config().replace("train.steps=123")


def test_a_base_is_relative_to_the_file_that_names_it_and_may_have_a_base_itself():
    write("a.yaml", "base: deeper/b.yaml\nseed: 3\n")
    write("deeper/b.yaml", "base: ../c.yaml\nseed: 2\nmodel:\n  num_layers: 5\n")
    write("c.yaml", "seed: 1\nname: from_c\nmodel:\n  num_layers: 4\n  embed_dim: 96\n")
    config = load("a.yaml")
    assert (config.seed, config.name) == (3, "from_c")
    assert (config.model.num_layers, config.model.embed_dim) == (5, 96)


def test_a_list_takes_the_place_of_the_list_in_the_base():
    write("base.yaml", "data:\n  sources:\n  - {kind: synthetic}\n  - {kind: python}\n")
    write("run.yaml", "base: base.yaml\ndata:\n  sources: [{kind: synthetic, weight: 2.0}]\n")
    assert [source.weight for source in load("run.yaml").data.sources] == [2.0]


@pytest.mark.parametrize(
    ("text", "number"), [("3e-4", 3e-4), ("1E-3", 1e-3), ("3.0e-4", 3e-4), (".5", 0.5), ("2", 2.0)]
)
def test_numbers_may_be_written_in_every_usual_way(text, number):
    write("run.yaml", f"optimizer:\n  learning_rate: {text}\n")
    assert load("run.yaml").optimizer.learning_rate == number
    assert Config().replace(f"optimizer.learning_rate={text}").optimizer.learning_rate == number


@pytest.mark.parametrize("text", ["on", "no", "010", "1:30", "2024-01-01"])
def test_words_that_old_yaml_takes_for_something_else_are_text(text):
    write("run.yaml", f"name: {text}\n")
    assert load("run.yaml").name == text


def test_whole_numbers_may_have_underscores():
    assert Config().replace("train.steps=1_000_000").train.steps == 1_000_000


def test_of_two_overrides_the_later_wins_and_both_win_over_the_file():
    write("run.yaml", "seed: 1\n")
    assert load("run.yaml", ["seed=2", "seed=3"]).seed == 3


def test_an_override_changes_one_entry_of_the_default_list():
    config = Config().replace("data.sources.0.kind=synthetic", "data.sources.1.kind=python")
    assert [source.kind for source in config.data.sources] == ["synthetic", "python"]


def test_an_override_of_a_section_keeps_its_other_fields():
    write("run.yaml", "mesh: {zero: 1}\n")
    config = load("run.yaml", ["mesh={data: 2, fsdp: 4}"])
    assert (config.mesh.zero, config.mesh.data, config.mesh.fsdp) == (1, 2, 4)


@pytest.mark.parametrize("prompt", ["Once: a # [tale", "2024", "true", "a=b", ""])
def test_an_override_of_text_is_taken_as_typed(prompt):
    assert Config().replace(f"sample.prompt={prompt}").sample.prompt == prompt


def test_quotes_around_an_override_of_text_are_yaml():
    assert Config().replace(r'sample.prompt="two\nlines"').sample.prompt == "two\nlines"


def test_null_in_an_override_clears_a_field():
    config = Config().replace("data.sources.0.kind=text", "data.sources.0.path=a.txt")
    assert config.replace("data.sources.0.kind=python", "data.sources.0.path=null") == Config()


def test_the_dump_of_a_config_reads_back_equal():
    config = Config().replace(
        "optimizer.learning_rate=3e-7", "train.profile_steps=[2, 4]", "sample.prompt=é: #"
    )
    assert parse(dump(config)) == config


def test_a_run_folder_stands_for_the_config_in_it_wherever_it_was_moved():
    write("moved/here/config.yaml", dump(Config().replace("name=elsewhere", "seed=7")))
    config = load("moved/here", ["train.steps=2000"])
    assert (config.seed, config.train.steps) == (7, 2000)
    assert Path(config.output_dir, config.name) == Path("moved/here").resolve()


# What is refused.


def test_an_unknown_name_is_told_with_its_line_and_the_nearest_name():
    line = error("seed: 1\nmodel:\n  embed_dim: 64\n  num_layer: 4\n")
    assert line == "run.yaml:4: model.num_layer is not a field; did you mean model.num_layers?"


def test_a_known_name_in_the_wrong_section_is_sent_to_its_own():
    assert error("batch_size: 4\n") == "run.yaml:1: batch_size is not a field; did you mean train.batch_size?"
    assert error("train:\n  learning_rate: 1\n").endswith("did you mean optimizer.learning_rate?")


def test_an_unknown_name_inside_a_list_keeps_its_index():
    line = error("data:\n  sources:\n  - kind: python\n  - knd: python\n")
    assert line == "run.yaml:4: data.sources.1.knd is not a field; did you mean data.sources.1.kind?"


def test_a_name_like_no_other_is_told_where_the_names_are():
    assert error("zzz: 4\n") == "run.yaml:1: zzz is not a field; `stack config schema` lists every field"


def test_an_error_in_a_base_file_is_told_at_its_line_there():
    write("configs/base.yaml", "# first\nmodel:\n  num_heads: none\n")
    line = error("base: configs/base.yaml\nseed: 2\n")
    assert line == "configs/base.yaml:3: model.num_heads='none' must be a whole number"


def test_an_error_in_an_entry_of_a_list_is_told_with_its_override():
    text = "data: {sources: [{kind: jsonl, path: a.jsonl}]}"
    with pytest.raises(
        ConfigError, match=r"^override 'data\.sources\.0\.task=x': data\.sources\.0\.task=x is not"
    ):
        parse(text, ["train.steps=3", "data.sources.0.task=x"])


def test_an_error_in_an_override_is_told_with_the_override():
    line = error("seed: 1\n", "model.num_layer=4")
    assert (
        line == "override 'model.num_layer=4': model.num_layer is not a field; did you mean model.num_layers?"
    )


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("train.steps=0", "train.steps=0 must be greater than 0"),
        ("train.steps=2.5", "train.steps=2.5 must be a whole number"),
        ("train.steps=1e3", "train.steps=1000.0 must be a whole number; write 1000"),
        ("train.steps=true", "train.steps=true must be a whole number"),
        ("train.steps='3'", "train.steps='3' must be a whole number"),
        ("train.steps=[3]", "train.steps=[3] must be a whole number"),
        ("train.steps.x=3", 'train.steps={"x": 3} must be a whole number'),
        ("train.tensorboard=1", "train.tensorboard=1 must be true or false"),
        ("train.profile_steps=4", "train.profile_steps=4 must be a list"),
        ("train.profile_steps=[4]", "train.profile_steps has too few entries"),
        ("train.profile_steps=[1, 2, 3]", "train.profile_steps has more than 2 entries"),
        ("model.dtype=bf16", "model.dtype='bf16' must be 'bfloat16' or 'float32'; did you mean bfloat16?"),
        ("model.num_kv_heads=None", "model.num_kv_heads='None' must be a whole number; write null"),
        ("model=4", "model=4 must be a group of fields"),
        ("model.embed_dim.0=4", 'model.embed_dim={"0": 4} must be a whole number'),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate=Infinity must be a finite number"),
        ("name=null", "name=null must be text"),
        ("data.sources=[]", "data: sources is empty; give at least one source"),
        ("data.sources.2.kind=text", "a list is changed by index, 0 to 1 (1 appends), not '2'"),
        ("data.sources.kind=text", "a list is changed by index, 0 to 1 (1 appends), not 'kind'"),
        ("train.steps", "expected name=value, for example train.steps=100"),
        ("train.steps=[", "bad YAML: expected the node content, but found '<stream end>'"),
    ],
)
def test_a_bad_override_is_told_in_one_line(field, told):
    with pytest.raises(ConfigError) as caught:
        Config().replace(field)
    assert str(caught.value) == f"override {field!r}: {told}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "model: {kind: decodr}",
            "model.kind='decodr' must be one of decoder, parallel_decoder, encoder, encoder_decoder; did",
        ),
        ("model: {kind: 3}", "model.kind=3 must be one of decoder, parallel_decoder, encoder"),
        ("model: {num_layer: 3}", "model.num_layer is not a field; did you mean model.num_layers?"),
        (
            "model: {kind: parallel_decoder, num_layers: x}",
            "model.num_layers='x' must be a whole number",
        ),
        (
            "model: {mlp: swigl}",
            "model.mlp='swigl' must be 'relu', 'gelu', 'gelu_tanh', 'swiglu' or 'geglu'; did you",
        ),
        ("model: {embed_dim: 7}", "model: embed_dim=7 is not a multiple of num_heads=12; set head_dim"),
        ("model: [1]", "model=[1] must be a group of fields"),
        ("model:", "model=null must be a group of fields"),
        ("train: {loss_chunk: 3}", "train.loss_chunk is not a field; write objective.logits_bytes"),
        ("train: {z_loss: 3}", "train.z_loss is not a field; did you mean objective.z_loss?"),
    ],
)
def test_what_is_wrong_in_a_section_of_several_kinds_is_told_as_in_any_other(text, told):
    write("run.yaml", text)
    with pytest.raises(ConfigError) as error:
        load("run.yaml")
    assert str(error.value).startswith(f"run.yaml:1: {told}")


def test_a_kind_may_be_overridden_and_survives_a_dump():
    config = Config().replace("model.kind=parallel_decoder", "model.num_layers=4")
    assert isinstance(config.model, ParallelDecoderConfig)
    assert parse(dump(config)) == config
    assert parse(dump(config)).model.num_layers == 4
    assert isinstance(parse("seed: 1").model, DecoderConfig)


@pytest.mark.parametrize("text", ["9" * 5000, "é" * 5000, "0." * 2500, "-" + "9" * 5000])
@pytest.mark.parametrize("field", ["name", "train.steps", "sample.prompt.x", "objective.sentinel"])
def test_a_long_value_is_told_in_one_line_of_readable_length(field, text):
    line = error("objective: {kind: span_corruption}\n", f"{field}={text}")
    assert len(line) < 500
    assert "\n" not in line


def test_a_number_that_python_cannot_write_is_refused_from_python_too():
    with pytest.raises(ConfigError, match="too long to show"):
        Config(train={"steps": -(10**5000)})  # pyrefly: ignore[bad-argument-type]


def test_text_that_looks_like_a_number_is_asked_for_in_quotes():
    assert error("name: 2024\n") == "run.yaml:1: name=2024 must be text; put it in quotes"


def test_an_incompatible_pair_is_told_at_the_one_set_last():
    text = "model:\n  embed_dim: 100\n  num_layers: 2\n  num_heads: 12\n"
    problem = "model: embed_dim=100 is not a multiple of num_heads=12; set head_dim"
    assert error(text) == f"run.yaml:2: {problem}"
    assert error("model:\n  embed_dim: 100\n", "model.num_heads=12") == (
        f"override 'model.num_heads=12': {problem}"
    )


def test_an_incompatible_pair_across_sections_is_told_at_its_line():
    line = error("seed: 1\ndata:\n  sequence_length: 2048\n")
    assert line == "run.yaml:3: data.sequence_length=2048 exceeds model.max_length=1024"


def test_of_several_errors_the_first_is_told_and_the_others_counted():
    assert error("seed: -1\nname: 3\ntrain:\n  steps: 0\n") == (
        "run.yaml:2: name=3 must be text; put it in quotes (and 2 more)"
    )


def test_a_name_given_twice_is_refused():
    line = error("model:\n  num_layers: 2\n  embed_dim: 8\n  num_layers: 3\n")
    assert line == "run.yaml:4: model.num_layers is given twice, first at run.yaml:2"


def test_a_dotted_name_in_a_file_is_told_how_to_nest():
    line = error("model.num_layers: 2\n")
    assert (
        line == "run.yaml:1: model.num_layers: dotted names are for overrides; write num_layers under model:"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1\nb: 2\n", "run.yaml:2: bad YAML: expected ',' or ']', but got ':'"),
        ("train:\n\tsteps: 2\n", "run.yaml:2: bad YAML: found character '\\t' that cannot start any token"),
        (
            "seed: &a 1\ntrain: {steps: *a}\n",
            "run.yaml:2: bad YAML: aliases are not read; share fields by `base:`",
        ),
        ("seed: 1\n---\nseed: 2\n", "run.yaml:2: bad YAML: but found another document"),
        ("a: \x00\n", "run.yaml:1: bad YAML: special characters are not allowed"),
        (
            "seed: !!python/object:os.system 1\n",
            "run.yaml:1: seed: '1' cannot be a tag:yaml.org,2002:python/object:os.system",
        ),
        ('seed: !!float ""\n', "run.yaml:1: seed: '' cannot be a tag:yaml.org,2002:float"),
        ("- a\n- b\n", "run.yaml:1: expected fields as `name: value`, not a list"),
        ("words\n", "run.yaml:1: expected fields as `name: value`, not a single value"),
        ("[a, b]: 1\n", "run.yaml:1: the name of a field must be plain text"),
        ("# nothing\n", "run.yaml: the file is empty; write fields as `name: value`"),
        ("model:\n", "run.yaml:1: model=null must be a group of fields"),
        ("base: 3\n", "run.yaml:1: base must be the path of another config file"),
    ],
)
def test_what_is_no_config_file_is_told_with_its_line(text, told):
    assert error(text) == told


def test_a_file_that_is_no_config_is_not_read_to_its_end():
    FILE.write_bytes(b"#" * (1 << 20) + b"\xff")
    with pytest.raises(ConfigError, match=r"^run.yaml: it is longer than 1,048,576 bytes; is this a YAML"):
        load(FILE)


def test_a_file_that_is_not_text_is_told():
    FILE.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"^run.yaml: byte 6 is not UTF-8; is this a YAML file\?$"):
        load(FILE)


def test_a_missing_file_is_told_with_the_configs_nearby():
    write("configs/quickstart.yaml", "seed: 1\n")
    with pytest.raises(
        ConfigError, match=r"^quickstrat.yaml: no such file; did you mean configs/quickstart.yaml\?$"
    ):
        load("quickstrat.yaml")
    with pytest.raises(ConfigError, match=r"^zebra: no such file; there are configs/quickstart.yaml$"):
        load("zebra")


def test_a_missing_base_is_told_at_the_line_that_names_it():
    write("base_small.yaml", "seed: 1\n")
    assert error("seed: 1\nbase: base_smal.yaml\n") == (
        "run.yaml:2: base base_smal.yaml: no such file; did you mean base_small.yaml?"
    )


def test_bases_in_a_circle_are_told():
    write("other.yaml", "base: run.yaml\n")
    assert error("base: other.yaml\n") == (
        "other.yaml:1: base goes round in a circle: run.yaml -> other.yaml -> run.yaml"
    )


def test_a_folder_without_a_run_is_told():
    Path("empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"^empty is neither a config file nor a run: it holds no config.yaml$"
    ):
        load("empty")


def test_python_gets_the_same_line_as_a_file():
    with pytest.raises(
        ConfigError, match=r"^DecoderConfig: num_layer is not a field; did you mean num_layers\?$"
    ):
        DecoderConfig(num_layer=4)
    with pytest.raises(ConfigError, match=r"^Config: model.num_layers=0 must be greater than 0$"):
        Config(model={"num_layers": 0})


def test_a_single_text_for_the_list_of_overrides_is_told():
    write("run.yaml", "seed: 1\n")
    with pytest.raises(ConfigError, match=r"write \['seed=2'\]"):
        load("run.yaml", "seed=2")


# Any text survives.


@pytest.mark.parametrize(
    "text", ["3e-4", "1E3", "1_000", "on", "0x1f", "1:30", "2024-01-01", "~", "", "=", "<<"]
)
def test_text_that_looks_like_something_else_reads_back_as_text(text):
    config = Config(sample=SampleConfig(prompt=text))
    assert parse(dump(config)) == config


@settings(deadline=None)
@given(st.text())
@example("\U0001f600")
@example("\x85")
def test_any_text_reads_back(text):
    source = SourceConfig(kind="jsonl", path=text, field=text, encoding=text)
    config = Config(
        output_dir=text,
        sample=SampleConfig(prompt=text, end_tokens=(text,)),
        data=DataConfig(sources=(source,), tokenizer=text, cache_dir=text),
    )
    write("config.yaml", dump(config))
    assert load("config.yaml") == config
    for ascii_only in (True, False) if text.isprintable() else ():  # Others YAML wants escaped.
        quoted = json.dumps(text, ensure_ascii=ascii_only)
        assert Config().replace(f"sample.prompt={quoted}").sample.prompt == text


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ConfigError, match="prompt holds bytes or half a character that are not text"):
        Config(sample=SampleConfig(prompt="\ud800"))
    assert "cannot be" in error('sample: {prompt: "\\ud800"}')
    assert "not text" in error("seed: 1", "sample.prompt=\udcff")


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "", "..", "a\0b", "a\nb"])
def test_the_name_of_a_run_is_that_of_one_folder(name):
    with pytest.raises(ConfigError, match="must be the name of one folder"):
        Config(name=name)


def test_paths_expand_alike(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand("~/x") == Path("/home/someone/x")
    with pytest.raises(ConfigError, match="there is no user nobody_at_all"):
        expand("~nobody_at_all/x")


@pytest.mark.parametrize("base", [".", "..", "/"])
def test_a_base_that_is_a_folder_is_one_line(tmp_path, base):
    (tmp_path / "run.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match=r"run.yaml:1: base .*no such file"):
        load(tmp_path / "run.yaml")


def test_an_objective_of_another_kind_takes_the_place_of_the_bases(tmp_path):
    base = "objective: {kind: classification, label: b, too_long: cut}\n"
    source = "data: {sources: [{kind: jsonl, path: a.jsonl, field: null}]}\n"
    (tmp_path / "base.yaml").write_text(base + source)
    (tmp_path / "own.yaml").write_text("base: base.yaml\nobjective: {kind: retrieval, query: a}\n")
    made = load(tmp_path / "own.yaml").objective
    assert made == type(made)(query="a")
    (tmp_path / "more.yaml").write_text("base: base.yaml\nobjective: {text: a}\n")
    more = load(tmp_path / "more.yaml").objective
    assert (more.kind, more.text, more.label) == ("classification", "a", "b")
