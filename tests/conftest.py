"""Fixtures: real SOMA experiments, written once for all tests."""

from __future__ import annotations

import gc
import math
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiledbsoma as soma
from hypothesis import settings

from scripts import RunScript, forking_runner
from snapshots import ALL_OBS
from snapshots import make as make_snapshot
from stores import (
    MEASUREMENT,
    Store,
    eager_threads,
    make_experiment,
)
from tiledbsoma_ml import Snapshot, XLocator
from tiledbsoma_ml._kernels.jit import waiting
from tiledbsoma_ml.snapshot.stored_layers import ShardSizes
from windows import N_ROWS, TILE

# A shell starts what runs in its background with Ctrl-C ignored. Python leaves it so, and tests of Ctrl-C
# would have nothing to test; TileDB would even call what it takes for a handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# TileDB's parallel merge can crash any process that reads `obs`, also one that opens it as a user might. The
# tests of what the package itself sets take this away.
os.environ.setdefault("TILEDB_SM_QUERY_SPARSE_GLOBAL_ORDER_PREPROCESS_TILE_MERGE", "0")

# Whichever test needs loops first compiles them: no test of the log should find the line that tells it.
waiting.seconds = math.inf

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Store]:
    """Write an experiment, with the options of `make_experiment`."""

    def make(layer_name: str | None = None, **options: Any) -> Store:
        uri = make_experiment(tmp_path_factory.mktemp("store") / "experiment", **options)
        with soma.Experiment.open(uri) as experiment:
            return Store(uri, XLocator.create(experiment, MEASUREMENT, layer_name))

    return make


@pytest.fixture(scope="session")
def store(make_store: Callable[..., Store]) -> Store:
    """The experiment that most tests read; never written to."""
    return make_store()


@pytest.fixture(scope="session")
def large(make_store: Callable[..., Store]) -> Store:
    """2,000 rows in tiles of 32."""
    return make_store(obs_joinids=range(N_ROWS), tile=(TILE, 8))


@pytest.fixture(scope="session")
def dense_store(make_store: Callable[..., Store]) -> Store:
    return make_store(dense=True)


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = eager_threads()
    yield
    gc.collect()
    assert eager_threads() <= before


@pytest.fixture(scope="session")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A snapshot of all of the store, in five shards."""
    path = tmp_path_factory.mktemp("snapshots") / "whole.snapshot"
    return make_snapshot(path, store, obs_column_names=ALL_OBS)


@pytest.fixture(scope="session")
def compressed(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The same, compressed, in three shards of one or two blocks."""
    path = tmp_path_factory.mktemp("snapshots") / "compressed.snapshot"
    sizes = ShardSizes(min_bytes=1, min_number=3)
    return make_snapshot(path, store, obs_column_names=ALL_OBS, shards=sizes, compression="zstd")


@pytest.fixture(scope="session", params=["whole", "compressed"])
def either(request: pytest.FixtureRequest) -> Snapshot:
    """A snapshot of all of the store: first not compressed, then compressed."""
    found: Snapshot = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def run_script() -> Iterator[RunScript]:
    """Run code in a process of its own, by `run(code, name=…, folder=…, environment=…)`."""
    with forking_runner() as run:
        yield run
