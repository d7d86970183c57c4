"""Fields that have moved are read where they were, and said to be."""

import pytest

from stack.config import Config, load, parse, reading

FILE = "model:\n  num_layers: 2\n  attention: xla\n"


@pytest.fixture(autouse=True)
def _say_again():
    reading._tell.cache_clear()


def test_an_older_file_is_read_and_one_line_says_so(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    config = load(path)
    assert (config.kernels.attention, config.model.num_layers) == ("xla", 2)
    told = f"{path}:3: model.attention is kernels.attention now, and is read as such\n"
    assert capsys.readouterr() == ("", told)
    load(path)
    assert capsys.readouterr().err == "", "once is enough"
    assert "attention: xla" in reading.dump(config).split("kernels:")[1].split("\n\n")[0]


def test_an_older_run_is_opened(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(FILE)
    assert load(tmp_path, ["kernels.attention=xla_chunked"]).kernels.attention == "xla_chunked"
    assert capsys.readouterr().err.count("\n") == 1
    saved = Config().model_dump(mode="json")
    saved["model"]["attention"] = saved.pop("kernels")["attention"]
    assert Config.model_validate(saved) == Config()


@pytest.mark.parametrize(
    ("overrides", "kernel"),
    [
        (["model.attention=xla"], "xla"),
        (["kernels.attention=xla_chunked", "model.attention=xla"], "xla"),
        (["model.attention=xla", "kernels.attention=xla_chunked"], "xla_chunked"),
    ],
)
def test_an_override_by_the_older_name_counts_as_one(overrides, kernel, capsys):
    assert parse("kernels: {attention: auto}", overrides).kernels.attention == kernel
    assert "override 'model.attention=xla': model.attention is kernels.attention" in capsys.readouterr().err


def test_the_older_name_beside_the_newer_is_told(capsys):
    config = parse(FILE + "kernels:\n  attention: xla_chunked\n")
    assert config.kernels.attention == "xla_chunked"
    assert "config:3: model.attention is not read beside kernels.attention" in capsys.readouterr().err


def test_what_is_wrong_is_told_by_its_line():
    from stack.config import ConfigError

    with pytest.raises(ConfigError, match=r"config:3: .*attention.*'flash'"):
        parse(FILE.replace("xla", "flash"))
