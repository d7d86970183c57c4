"""The list of mutations fits the code; that tests see each is for `python tests/mutations.py` to say."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def mutations():
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "tests" / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MUTATIONS


@pytest.mark.parametrize("mutation", mutations(), ids=lambda mutation: mutation.name)
def test_a_mutation_breaks_one_place_that_is_there(mutation):
    text = (ROOT / mutation.file).read_text("utf-8")
    assert text.count(mutation.old) == 1
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    assert (ROOT / mutation.tests).exists()


def test_there_are_24_and_more():
    assert len({mutation.name for mutation in mutations()}) >= 24
