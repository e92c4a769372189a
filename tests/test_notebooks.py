"""The notebooks, run from first cell to last on little data."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from test_docs import Block, check_calls, run_imports

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMALL: dict[str, dict[str, Any]] = {
    "scvi.ipynb": {"N_EPOCHS": 2, "N_GENES": 100},
    "tutorial_lightning.ipynb": {"N_CELLS": 3200, "N_EPOCHS": 1},
    "tutorial_multiworker.ipynb": {"N_CELLS": 1200},
    "tutorial_pytorch.ipynb": {"N_CELLS": 2000, "N_EPOCHS": 1},
}
EXTRAS = {"scvi.ipynb": ["scvi", "umap"], "tutorial_lightning.ipynb": ["lightning"]}
NOT_RUN = "skip-execution"  # the tag of cells that need a network, or GPUs


def cells_of(name: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((NOTEBOOKS / name).read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def code_of(name: str, parameters: dict[str, Any]) -> str:
    """Return the code of all cells that run, with other values in the cell of parameters."""
    cells = []
    for cell in cells_of(name):
        tags = cell["metadata"].get("tags", [])
        if NOT_RUN not in tags:
            cells.append("".join(cell["source"]))
        if "parameters" in tags:
            cells += [f"{name} = {value!r}" for name, value in parameters.items()]
    return "\n".join(cells)


def skip_without_extras(name: str) -> None:
    for extra in EXTRAS.get(name, []):
        if importlib.util.find_spec(extra) is None:
            pytest.skip(f"{name} needs {extra}, which is not installed")


def test_every_notebook_is_run() -> None:
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_with_and_without_the_real_data(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, run_script: Any
) -> None:
    skip_without_extras(name)
    code = code_of(name, SMALL[name])
    if "shared/data" in code:
        elsewhere = tmp_path / "checkout" / "notebooks"
        elsewhere.mkdir(parents=True)
        until_training, _, _ = code.partition("\nmodel = ")
        code += f"\nimport os\nos.chdir({str(elsewhere)!r})\n{until_training}"
    code = f"import torch; torch.set_num_threads(1); del torch\n{code}"
    environment = {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # umap keeps what it compiles where processes that compile at once mix it up: see `_kernels/jit.py`.
    with FileLock(tmp_path_factory.getbasetemp().parent / f"{name}.lock"):
        exit_code, output = run_script(code, name=name, folder=NOTEBOOKS, environment=environment)
    assert exit_code == 0, output[-4000:]


@pytest.mark.parametrize("name", SMALL)
def test_cells_that_do_not_run_call_what_there_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they call takes what it is called with, as far as imports tell what that is."""
    skip_without_extras(name)
    stand_in = module_from_spec(ModuleSpec("umap", None))  # umap itself compiles when it is imported
    monkeypatch.setitem(sys.modules, "umap", stand_in)
    imported: dict[str, Any] = {}
    for number, cell in enumerate(cells_of(name)):
        block = Block("".join(cell["source"]), number, "python", "needs a network or GPUs")
        if NOT_RUN in cell["metadata"].get("tags", []):
            check_calls(block, imported, name)
        else:
            run_imports(block, imported)


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_shows_the_same_on_the_census(name: str) -> None:
    not_run = [cell for cell in cells_of(name) if NOT_RUN in cell["metadata"].get("tags", [])]
    assert "s3://cellxgene-census-public-us-west-2/" in "".join(not_run[-1]["source"])


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_is_kept_with_what_it_draws(name: str) -> None:
    cells = json.loads((NOTEBOOKS / name).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
