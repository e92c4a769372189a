"""The page `shuffle_viz`: what it computes is what Python computes, and it works in a browser.

The tests of the page are its own; they are run from here where Node.js is installed, and those in a browser
where Chromium is as well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import page_vectors
from stores import Store, joinids_of, workers
from test_cli import run
from tiledbsoma_ml import experiment_dataloader

PAGE = Path(__file__).parents[1] / "shuffle_viz"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def npm(*arguments: str, **environment: str) -> None:
    """Run a script of the page; fail with what it printed."""
    done = subprocess.run(
        ["npm", "run", *arguments],
        cwd=PAGE,
        env={**os.environ, "CI": "1", "NO_COLOR": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def _built() -> None:
    if shutil.which("npm") is None:
        pytest.skip("Node.js 20.19 or later is not installed: install it, and run `make viz`")
    if not (PAGE / "node_modules" / ".package-lock.json").exists():
        pytest.skip("the packages of the page are not installed: run `make viz`")


# What the page must compute -------------------------------------------------------------------------------


def test_the_vectors_that_the_page_is_compared_with_are_those_of_python() -> None:
    recorded = json.loads(page_vectors.PATH.read_text())
    found = json.loads(page_vectors.as_text(page_vectors.vectors()))
    stale = "shuffle_viz/src/golden/vectors.json is stale; write it anew: python tests/page_vectors.py"
    assert without_floats(found) == without_floats(recorded), stale
    # NumPy's logarithm has other last digits on other processors.
    assert floats_in(found) == pytest.approx(floats_in(recorded), rel=1e-12), stale


def floats_in(value: Any) -> list[float]:
    """Return the floating-point numbers of a JSON value, in order."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [number for item in items for number in floats_in(item)]
    return [value] if isinstance(value, float) else []


def without_floats(value: Any) -> Any:
    """Return a JSON value with 0.0 in place of each floating-point number."""
    if isinstance(value, dict):
        return {name: without_floats(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_floats(item) for item in value]
    return 0.0 if isinstance(value, float) else value


def test_the_vectors_are_what_a_loader_yields(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = page_vectors.BY_HAND
    [recorded] = [
        order["rows"]
        for order in json.loads(page_vectors.PATH.read_text())["orders"]
        if order["setup"] == page_vectors.printable(setup)
    ]
    monkeypatch.setenv("WORLD_SIZE", str(setup["ranks"]))
    yielded = []
    for rank in range(setup["ranks"]):
        monkeypatch.setenv("RANK", str(rank))
        dataset = store.dataset(
            range(setup["rows"]),
            shuffle_chunk_size=setup["chunk"],
            io_batch_size=setup["ioBatch"],
            batch_size=setup["miniBatch"],
            seed=setup["seed"],
        )
        yielded.append(joinids_of(experiment_dataloader(dataset, **workers(setup["workers"]))))
    assert np.concatenate(yielded).tolist() == [row for rows in recorded for row in rows]


# The page -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_built")
def test_the_page_computes_what_python_computes() -> None:
    npm("test")


@pytest.mark.browser
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("_built")
def test_the_page_works_in_a_browser(store: Store, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    sizes = ["--shuffle-chunk-size", 8, "--io-batch-size", 32, "--batch-size", 10]
    code, plan = run("plan", store.uri, "--json", *sizes, "--world-size", 2, "--num-workers", 2)
    assert code == 0
    (tmp_path / "plan.json").write_text(plan)
    npm("build")
    npm("test:browser", CHROMIUM=CHROMIUM, PLAN=str(tmp_path / "plan.json"))
