"""Every field is explained, and the page of them is the one that the config makes."""

from pathlib import Path

import pytest

from stack.cli import main
from stack.config import Config, fields
from stack.config.explain import dotted, field_names

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_is_of_this_config():
    assert PAGE.read_text() == fields.page(), "stack config fields --markdown > docs/config.md"


def test_every_field_is_explained_with_its_type():
    every = fields.fields()
    assert {field.name for field in every} == {dotted(name) for name in field_names(Config)}
    for field in every:
        assert "typing" not in field.type, field.name
        assert field.description or not field.default or field.name.endswith("kind"), field.name


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("warmup", "optimizer.schedule.warmup_steps = null  (whole number or null)"),
        ("DATA.sources", "data.sources.0.path = null  (text or null)"),
        ("nucleus", None),
        ("2104.09864", None),
    ],
)
def test_fields_are_searched_by_name_then_by_meaning(capsys, pattern, told):
    status = main(["config", "fields", pattern])
    out = capsys.readouterr().out
    assert (status, bool(out)) in ((0, True), (2, False))
    assert told is None or told in out.splitlines()


def test_what_no_field_has_is_one_line_with_the_nearest(capsys):
    assert main(["config", "fields", "wramup"]) == 2
    told = "error: no field has 'wramup' in it; did you mean optimizer.schedule.warmup_steps?\n"
    assert capsys.readouterr().err == told
