"""Snapshots that the tests of this folder read."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from stores import Store
from tiledbsoma_ml.snapshot import Snapshot


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture
def copied(whole: Snapshot, tmp_path: Path) -> Path:
    """A copy of the whole one, to be damaged."""
    return Path(shutil.copytree(whole.path, tmp_path / "copied.snapshot"))


@pytest.fixture
def copied_either(either: Snapshot, tmp_path: Path) -> Path:
    """A copy of one that is compressed or not, to be damaged."""
    return Path(shutil.copytree(either.path, tmp_path / "either.snapshot"))


@pytest.fixture(scope="session")
def both(make_store: Any, store: Store, folder: Path) -> Snapshot:
    """Rows of two experiments, of which some have the same joinids."""
    other = make_store(obs_joinids=range(100))
    with store.query([5, 90, 300]) as first, other.query(slice(80, 99)) as second:
        return Snapshot.create(
            folder / "both.snapshot", [first, second], obs_column_names=["cell_type"], progress=False
        )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.snapshot"


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start fast: they are forked from one that has imported everything and runs no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["snapshots"])
    yield context
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
