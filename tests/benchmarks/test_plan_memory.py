"""The grid of compiled memory: what its cells ask for, and the fit of the formula's constants to it."""

import importlib.util
from pathlib import Path

import pytest

from stack.planner.formula import memory as formula
from stack.planner.formula.memory import memory

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("plan_memory", ROOT / "benchmarks" / "plan_memory.py")
    assert spec is not None
    assert spec.loader is not None
    plan_memory = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
        spec.loader.exec_module(plan_memory)
    return plan_memory


def test_the_file_has_every_cell_of_the_grid(module):
    assert set(module.read_results(module.RESULTS)) == set(module.cells(list(module.RECIPES)))


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("recipe", ["llama3_8b", "gpt2_124m"])
def test_every_cell_takes_the_loss_in_chunks_of_1024_tokens(module, recipe, tensor):
    config = module.config_of(module.Cell(recipe, 1, "full", tensor, False))
    assert module.workload_of(config).loss_chunk == 1024


def test_the_fit_gives_back_the_constants_that_made_the_sizes(module, monkeypatch, capsys):
    cells = [module.Cell("nanogpt_cpu", zero, "none", 2, True) for zero in range(4)]
    cells += [module.Cell("gpt2_124m", zero, "dots", 1, False) for zero in (1, 2, 3)]
    constants = {"STREAMS": 12.0, "AHEAD": 0.4}
    works = {cell: module.workload_of(module.config_of(cell)) for cell in cells}
    with monkeypatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(formula, name, value)
        sizes = {cell: memory(work).program for cell, work in works.items()}
    fitted = module.fit(sizes)
    for name, value in fitted.items():
        monkeypatch.setattr(formula, name, value)
    assert {cell: memory(work).program for cell, work in works.items()} == pytest.approx(sizes, rel=1e-3)
    assert "AHEAD" in capsys.readouterr().out


@pytest.mark.full
def test_the_formula_is_as_close_to_the_grid_as_it_is_said_to_be(module):
    sizes = module.read_results(module.RESULTS)
    errors = {
        cell: abs(memory(module.workload_of(module.config_of(cell))).program / size - 1)
        for cell, size in sizes.items()
    }
    ordered = sorted(errors.values())
    assert ordered[len(ordered) // 2] < 0.011
    assert ordered[len(ordered) * 9 // 10] < 0.045
    assert sum(error <= 0.05 for error in ordered) > 0.92 * len(ordered)
    assert max(error for cell, error in errors.items() if sizes[cell] > 1e8) < 0.111
