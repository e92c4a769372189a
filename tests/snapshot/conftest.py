"""Snapshots that the tests of this folder read."""

from __future__ import annotations

import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from stores import Store, fork_server
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


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Processes that start fast, each forked from the server of the tests."""
    return fork_server()
