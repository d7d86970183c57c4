"""The recipes in configs/ are read, described and held still by golden snapshots.

After a wanted change: `pytest tests/config/test_recipes.py --refresh`, then read the difference.
"""

import json
import re
from pathlib import Path

import jsonschema
import pytest

from stack.config import dump, load, parse, schema
from stack.config.document import read_file

CONFIGS = Path(__file__).parents[2] / "configs"
SNAPSHOTS = Path(__file__).parent / "snapshots"
REFRESH = "pytest tests/config/test_recipes.py --refresh"

recipes = pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)


def check_golden(path: Path, text: str, *, refresh: bool) -> None:
    """The file holds this very text; with `--refresh` it is written."""
    if refresh:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.is_file(), f"{path.name} is missing; write it with `{REFRESH}`"
    assert path.read_text() == text, f"{path.name} differs; if that is wanted, `{REFRESH}`"


@recipes
def test_a_recipe_resolves_to_its_snapshot(recipe, request):
    golden = SNAPSHOTS / recipe.name
    check_golden(golden, dump(load(recipe)), refresh=request.config.getoption("--refresh"))
    assert parse(golden.read_text()) == load(recipe)


def test_every_snapshot_has_its_recipe():
    assert {path.name for path in SNAPSHOTS.iterdir()} == {path.name for path in CONFIGS.glob("*.yaml")}


def test_the_schema_is_that_of_the_config_tree(request):
    text = json.dumps(schema(), indent=2) + "\n"
    check_golden(CONFIGS / "schema.json", text, refresh=request.config.getoption("--refresh"))


@recipes
def test_an_editor_finds_nothing_wrong_with_a_recipe(recipe):
    jsonschema.validate(read_file(recipe).plain(), schema())


@pytest.mark.parametrize(
    "model", [{"num_layer": 4}, {"kind": "decodr"}, {"kind": "parallel_decoder", "norm": "none"}]
)
def test_an_editor_finds_what_is_wrong_in_a_section_of_several_kinds(model):
    with pytest.raises(jsonschema.ValidationError) as error:
        jsonschema.validate({"model": model}, schema())
    assert error.value.absolute_path[0] == "model"


@recipes
def test_a_recipe_says_how_to_run_it_on_what_and_what_comes_out(recipe):
    text = recipe.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    header = text[: text.index("\nname:")]
    assert f"stack train configs/{recipe.name}" in header
    for part in ("command:", "hardware:", "expect:"):
        assert re.search(rf"^#   {part} +\S", header, re.MULTILINE), f"{recipe.name}: the header lacks {part}"


@recipes
def test_a_recipe_is_named_after_its_file(recipe):
    assert load(recipe).name == recipe.stem


@recipes
def test_a_recipe_leaves_no_word_of_the_vocabulary_over(recipe):
    """Of the published models only GPT-2's vocabulary is no multiple of 128."""
    model = load(recipe).model
    added = model.padded_vocab_size - model.vocab_size
    assert added == {257: 127, 361: 23, 50257: 47}.get(model.vocab_size, 0)


@pytest.mark.parametrize(
    ("recipe", "devices"),
    [
        ("turing_nlg_17b", 128),
        ("turing_nlg_small", 8),
        ("llama3_8b", 8),
        ("llama3_70b", 64),
        ("gpt2_1_5b", 8),
    ],
)
def test_the_batch_of_a_large_recipe_divides_over_its_hardware(recipe, devices):
    config = load(CONFIGS / f"{recipe}.yaml")
    replicas = devices // config.mesh.tensor
    for rows in (config.train.batch_size // config.train.accumulation, config.eval.batch_size):
        assert rows % replicas == 0
