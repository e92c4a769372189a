"""The notebooks, run from first cell to last on little data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMALL = {"scvi.ipynb": {"N_EPOCHS": 2, "N_GENES": 100}}


def code_of(notebook: dict[str, Any], parameters: dict[str, Any]) -> str:
    """Return the code of all cells, with other values in the cell of parameters."""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cells.append("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", []):
                cells += [f"{name} = {value!r}" for name, value in parameters.items()]
    return "\n".join(cells)


def test_every_notebook_is_run() -> None:
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("beside_data", [True, False])
def test_a_notebook_runs_with_and_without_the_real_data(name: str, beside_data: bool, tmp_path: Path) -> None:
    folder = NOTEBOOKS if beside_data else tmp_path / "checkout" / "notebooks"
    if not beside_data:
        folder.mkdir(parents=True)
        shutil.copy(NOTEBOOKS / name, folder)
    code = code_of(json.loads((NOTEBOOKS / name).read_text()), SMALL[name])
    environment = {**os.environ, "MPLBACKEND": "agg", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_is_kept_with_what_it_draws(name: str) -> None:
    cells = json.loads((NOTEBOOKS / name).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
