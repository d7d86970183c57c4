"""The list of mutations fits the code; that tests see each is for `python tests/mutations.py` to say."""

from pathlib import Path

import pytest
from mutation_list import MUTATIONS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_breaks_one_place_that_is_there(mutation):
    text = (ROOT / mutation.file).read_text("utf-8")
    assert text.count(mutation.old) == 1
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    assert (ROOT / mutation.tests).exists()


def test_there_are_24_and_more():
    assert len({mutation.name for mutation in MUTATIONS}) >= 24
