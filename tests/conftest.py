"""Fixtures: real SOMA experiments, written once for all tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import tiledbsoma as soma
from hypothesis import settings

from stores import MEASUREMENT, Store, make_experiment
from tiledbsoma_ml import XLocator

# A shell starts what runs in its background with Ctrl-C ignored. Python leaves it so, and tests of Ctrl-C
# would have nothing to test; TileDB would even call what it takes for a handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# TileDB's parallel merge can crash any process that reads `obs`, also one that opens it as a user might. The
# tests of what the package itself sets take this away.
os.environ.setdefault("TILEDB_SM_QUERY_SPARSE_GLOBAL_ORDER_PREPROCESS_TILE_MERGE", "0")

# What `stores.workers` start has this imported; see there.
multiprocessing.set_forkserver_preload(["tiledbsoma_ml"])

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
