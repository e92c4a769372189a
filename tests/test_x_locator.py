from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma

from stores import MEASUREMENT, N_OBS, N_VARS, Store, expected_X, make_experiment, make_obs
from tiledbsoma_ml import ExperimentDataset, QueryIDs, Snapshot, XLocator
from tiledbsoma_ml._budget import Budget

CONFIG = {
    "vfs.s3.region": "eu-north-1",
    "vfs.s3.endpoint_override": "storage.example:9000",
    "vfs.s3.aws_secret_access_key": "hush-hush",
    "soma.init_buffer_bytes": "1048576",
}


def create(uri: str, *names: str | None, config: dict[str, Any] | None = None) -> XLocator:
    context = soma.SOMATileDBContext(tiledb_config=config)
    with soma.Experiment.open(uri, context=context) as experiment:
        return XLocator.create(experiment, *names)  # type: ignore[arg-type]


def test_groups_which_take_many_requests_are_opened_once_in_a_process(
    make_uri: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    locator = create(make_uri(layers=("counts", "raw")), MEASUREMENT, "counts")
    with locator.open() as (X, _):
        expected = dense_of(X, 12, 3)
    for group in (soma.Experiment, soma.Collection, soma.Measurement):
        monkeypatch.setattr(group, "open", None)
    with locator.open() as (X, obs):
        np.testing.assert_array_equal(dense_of(X, 12, 3), expected)
        assert len(obs.read().concat()) == 12
    with pytest.raises(ValueError, match="can be opened"), attrs.evolve(locator, layer_name="raw").open():
        pass


def dense_of(X: soma.SparseNDArray | soma.DenseNDArray, n_rows: int, n_vars: int) -> np.ndarray:
    if isinstance(X, soma.DenseNDArray):
        return X.read().to_numpy()
    table = X.read().tables().concat()
    dense = np.zeros((n_rows, n_vars), dtype=np.float32)
    dense[table["soma_dim_0"], table["soma_dim_1"]] = table["soma_data"]
    return dense


@pytest.fixture(scope="session")
def make_uri(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    def make(**options: Any) -> str:
        small = {"obs_joinids": range(12), "n_vars": 3}
        return make_experiment(tmp_path_factory.mktemp("locate") / "experiment", **(small | options))

    return make


@pytest.fixture(scope="session")
def with_raw(make_uri: Callable[..., str]) -> str:
    return make_uri(layers=("counts", "normalized", "raw"))


@pytest.fixture(scope="session")
def without_raw(make_uri: Callable[..., str]) -> str:
    return make_uri(layers=("counts", "normalized"))


# Which layer ----------------------------------------------------------------------------------------------


def test_a_layer_that_is_named_is_the_one(with_raw: str) -> None:
    locator = create(with_raw, "RNA", "normalized")
    assert (locator.uri, locator.measurement_name, locator.layer_name) == (with_raw, "RNA", "normalized")


@pytest.mark.parametrize("names", [("RNA",), ("RNA", None)])
def test_without_a_name_the_layer_raw_is_chosen(with_raw: str, names: tuple[str | None, ...]) -> None:
    assert create(with_raw, *names).layer_name == "raw"


def test_without_a_name_the_only_layer_is_chosen(make_uri: Callable[..., str]) -> None:
    assert create(make_uri(layers=("counts",)), "RNA").layer_name == "counts"


def test_without_a_name_several_layers_of_which_none_is_raw_are_an_error_that_lists_them(
    without_raw: str,
) -> None:
    with pytest.raises(ValueError, match="layer_name must be given where no layer is called 'raw'") as caught:
        create(without_raw, "RNA")
    assert str(caught.value).endswith("measurement 'RNA' has 'counts', 'normalized'.")


@pytest.mark.parametrize(
    ("layer", "way_out"), [("normalised", "did you mean 'normalized'?"), ("zz", "there are 'counts', 'norma")]
)
def test_an_unknown_layer_is_an_error_that_names_the_nearest(
    without_raw: str, layer: str, way_out: str
) -> None:
    with pytest.raises(
        ValueError, match=f"layer_name='{layer}' must be an X layer of measurement 'RNA'; "
    ) as caught:
        create(without_raw, "RNA", layer)
    assert way_out in str(caught.value)


def test_an_unknown_measurement_is_an_error_that_names_the_nearest(with_raw: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"measurement_name='RNAs' must be a measurement of the experiment; did you mean 'RNA'\?",
    ):
        create(with_raw, "RNAs", "raw")


@pytest.mark.parametrize("has_collection", [False, True])
@pytest.mark.parametrize("layer", [None, "raw"])
def test_a_measurement_without_x_is_refused(
    make_uri: Callable[..., str], has_collection: bool, layer: str | None
) -> None:
    uri = make_uri()
    with soma.Experiment.open(uri, "w") as experiment:
        measurement = experiment.ms.add_new_collection("protein", soma.Measurement)
        if has_collection:
            measurement.add_new_collection("X")
    with pytest.raises(ValueError, match=r"measurement_name='protein' must have an X layer; choose another"):
        create(uri, "protein", layer)


def test_a_closed_experiment_is_refused(store: Store) -> None:
    with soma.Experiment.open(store.uri) as experiment:
        pass
    with pytest.raises(ValueError, match="must be open; build the dataset inside") as caught:
        XLocator.create(experiment, MEASUREMENT)
    assert repr(store.uri) in str(caught.value)


# Opening --------------------------------------------------------------------------------------------------


def test_open_gives_the_layer_and_obs_and_closes_both(store: Store) -> None:
    with store.locator.open() as (X, obs):
        assert isinstance(X, soma.SparseNDArray)
        assert X.uri.endswith("/ms/RNA/X/raw")
        np.testing.assert_array_equal(dense_of(X, N_OBS, N_VARS), expected_X(range(N_OBS), range(N_VARS)))
        joinids = obs.read(column_names=["soma_joinid"]).concat()["soma_joinid"]
        assert joinids.to_pylist() == list(range(N_OBS))
    assert X.closed
    assert obs.closed


def test_open_gives_the_layer_that_was_named(without_raw: str) -> None:
    with create(without_raw, "RNA", "normalized").open() as (X, _):
        assert X.uri.endswith("/X/normalized")


def test_a_dense_layer_is_opened_as_it_is(make_uri: Callable[..., str]) -> None:
    with create(make_uri(dense=True), "RNA").open() as (X, _):
        assert isinstance(X, soma.DenseNDArray)
        np.testing.assert_array_equal(dense_of(X, 12, 3), expected_X(range(12), range(3)))


def test_what_is_written_after_the_locator_was_created_is_not_seen(make_uri: Callable[..., str]) -> None:
    written, added = [0, 1, 2, 5], 4
    uri = make_uri(obs_joinids=written)
    locator = create(uri, "RNA")
    later = locator.tiledb_timestamp_ms + 1000
    with soma.Experiment.open(uri, "w", tiledb_timestamp=later) as experiment:
        experiment.obs.write(pa.Table.from_pandas(make_obs(np.array([added])), preserve_index=False))
        entry = {"soma_dim_0": [added], "soma_dim_1": [0], "soma_data": pa.array([7.0], pa.float32())}
        experiment.ms["RNA"].X["raw"].write(pa.table(entry))

    def joinids_and_value(locator: XLocator) -> tuple[list[int], float]:
        with locator.open() as (X, obs):
            joinids = obs.read(column_names=["soma_joinid"]).concat()["soma_joinid"]
            return sorted(joinids.to_pylist()), dense_of(X, 6, 3)[added, 0].item()

    assert joinids_and_value(locator) == (written, 0.0)
    assert joinids_and_value(pickle.loads(pickle.dumps(locator))) == (written, 0.0)
    assert joinids_and_value(attrs.evolve(locator, tiledb_timestamp_ms=later)) == ([0, 1, 2, 4, 5], 7.0)


def test_a_locator_has_the_timestamp_at_which_its_experiment_was_opened(store: Store) -> None:
    timestamp = store.locator.tiledb_timestamp_ms + 5
    with soma.Experiment.open(store.uri, tiledb_timestamp=timestamp) as experiment:
        locator = XLocator.create(experiment, MEASUREMENT)
    assert locator.tiledb_timestamp_ms == timestamp
    with locator.open() as (X, obs):
        assert X.tiledb_timestamp_ms == obs.tiledb_timestamp_ms == timestamp


# The configuration ----------------------------------------------------------------------------------------


def of_config(config: Any) -> dict[str, str]:
    return {key: str(config[key]) for key in CONFIG}


def test_the_whole_configuration_travels_credentials_included(with_raw: str) -> None:
    locator = create(with_raw, "RNA", config=CONFIG)
    copy = pickle.loads(pickle.dumps(locator))
    assert of_config(locator.tiledb_config) == CONFIG
    with copy.open() as (X, obs):
        assert of_config(X.context.tiledb_config) == CONFIG
        assert of_config(obs.context.tiledb_config) == CONFIG


def test_the_configuration_of_an_experiment_that_was_read_from_travels_too(with_raw: str) -> None:
    context = soma.SOMATileDBContext(tiledb_config=CONFIG)
    assert context.native_context is not None
    with soma.Experiment.open(with_raw, context=context) as experiment:
        experiment.obs.read().concat()
        locator = XLocator.create(experiment, "RNA")
    assert of_config(locator.tiledb_config) == CONFIG
    with locator.open() as (X, _):
        assert of_config(X.context.tiledb_config) == CONFIG


def test_the_configuration_is_not_shown(with_raw: str) -> None:
    locator = create(with_raw, "RNA", config=CONFIG)
    for text in (repr(locator), str(locator)):
        assert "hush-hush" not in text
        assert "config" not in text
        assert repr(with_raw) in text


def test_a_locator_survives_pickling(store: Store) -> None:
    assert pickle.loads(pickle.dumps(store.locator)) == store.locator


def test_a_locator_cannot_be_assigned_to(store: Store) -> None:
    with pytest.raises(AttributeError):
        store.locator.layer_name = "counts"  # type: ignore[misc]


# What cannot be opened ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"uri": "/nowhere/at/all"}, r"uri='/nowhere/at/all' must be an experiment .*; check the path"),
        ({"layer_name": "rwa"}, r"layer_name='rwa' must be an X layer .*did you mean 'raw'"),
        ({"measurement_name": "RMA"}, r"measurement_name='RMA' must be a measurement; did you mean 'RNA'"),
        (
            {"tiledb_config": {"sm.mem.total_budget": "plenty"}},
            r"tiledb_config\['sm.mem.total_budget'\]='plenty' must be a number of bytes; leave it out",
        ),
        (
            {"tiledb_config": {"sm.io_concurrency_level": "-3"}},
            r"must be an experiment that can be opened with its tiledb_config, but: .*'-3'.*configuration",
        ),
    ],
)
def test_a_locator_that_leads_nowhere_says_so_before_any_data_is_read(
    store: Store, changes: dict[str, Any], sentence: str
) -> None:
    locator = attrs.evolve(store.locator, **changes)
    with pytest.raises(ValueError, match=sentence):
        ExperimentDataset(x_locator=locator, query_ids=QueryIDs(obs_joinids=[1], var_joinids=[0]))


def test_buffers_are_small_unless_the_configuration_sizes_them(store: Store) -> None:
    def sizes(config: dict[str, str | float]) -> tuple[int, int]:
        with attrs.evolve(store.locator, tiledb_config=config).open(Budget(2**28)) as (X, _):
            in_use = X.context.tiledb_config
        return int(in_use["soma.init_buffer_bytes"]), int(in_use["sm.mem.total_budget"])

    ours = (Budget(2**28).buffer, Budget(2**28).tiledb)
    assert max(ours) <= 2**24
    assert sizes({}) == ours
    assert sizes({"sm.mem.total_budget": "10737418240"}) == ours, "TileDB's own default counts as not set"
    assert sizes({"soma.init_buffer_bytes": 12345, "sm.mem.total_budget": 77_000_000}) == (12345, 77_000_000)


@pytest.mark.parametrize(
    ("uri", "is_remote"),
    [("/data/x", False), ("file:///data/x", False), ("s3://bucket/x", True), ("tiledb://namespace/x", True)],
)
def test_an_experiment_in_an_object_store_is_known_as_remote(store: Store, uri: str, is_remote: bool) -> None:
    assert attrs.evolve(store.locator, uri=uri).is_remote == is_remote
    assert Budget(2**31, is_remote=True).tiledb > Budget(2**31).tiledb


# Addresses ------------------------------------------------------------------------------------------------


def test_a_path_is_absolute_from_the_start_and_a_uri_stays(
    with_raw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    locator = create(with_raw, "RNA")
    paths = {"cells": "cells", "./cells/": "cells", "~/cells": "home/cells", "~x/cells": "~x/cells"}
    for path, whole in paths.items():
        assert attrs.evolve(locator, uri=path).uri == str(tmp_path / whole)
    for uri in (with_raw, "s3://bucket/cells", f"file://{with_raw}", "tiledb://name/cells", "memfs://cells"):
        assert attrs.evolve(locator, uri=uri).uri == uri


IN_ANOTHER_FOLDER = """
import os, pickle, sys
import tiledbsoma as soma
from tiledbsoma_ml import ExperimentDataset, Snapshot, XLocator, experiment_dataloader

if __name__ == "__main__":
    name = sys.argv[1]
    with soma.Experiment.open(name) as experiment, experiment.axis_query("RNA") as query:
        streamed = ExperimentDataset(query, window_dir=".", window_budget="64MiB")
        from_snapshot = ExperimentDataset(query, snapshot="relative.snapshot")
        made = Snapshot.create("made.snapshot", query, progress=False)
        opened = Snapshot.open("made.snapshot")
    forked = {"multiprocessing_context": "fork"}  # which starts faster
    os.makedirs("elsewhere")
    os.chdir("elsewhere")
    for dataset in (streamed, from_snapshot, pickle.loads(pickle.dumps(streamed))):
        assert sum(len(obs) for _, obs in dataset) == 12
    assert sum(len(obs) for _, obs in experiment_dataloader(streamed, num_workers=1, **forked)) == 12
    with soma.Experiment.open(name) as experiment:  # TileDB remembers the first folder
        again = XLocator.create(experiment, "RNA").uri
    print(streamed.x_locator.uri, again, made.path, opened.path, *os.listdir("."))
"""


def test_what_was_named_by_a_relative_path_is_found_from_another_folder(
    make_uri: Callable[..., str], tmp_path: Path
) -> None:
    whole = Path(make_uri())
    script = tmp_path / "script.py"
    script.write_text(IN_ANOTHER_FOLDER)
    command = [sys.executable, str(script), whole.name]
    done = subprocess.run(command, cwd=whole.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [*map(str, [whole] * 2 + [whole.parent / "made.snapshot"] * 2)]
    assert (whole.parent / "relative.snapshot").is_dir()


def test_the_home_directory_is_understood_wherever_a_folder_is_named(
    make_uri: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(make_uri())
    monkeypatch.setenv("HOME", str(whole.parent))
    monkeypatch.chdir(tmp_path)
    with soma.Experiment.open(str(whole)) as experiment, experiment.axis_query("RNA") as query:
        dataset = ExperimentDataset(query, snapshot="~/home.snapshot")
        assert Snapshot.create("~/s", query, progress=False).path == whole.parent / "s"
        ExperimentDataset(query, window_dir="~", window_budget="64MiB")
    assert sum(len(obs) for _, obs in dataset) == 12
    assert (whole.parent / "home.snapshot").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_layer_of_many_fragments_is_read_within_a_small_budget(tmp_path: Path) -> None:
    n_fragments, n_rows, n_cols = 16, 60, 700
    uri = make_experiment(tmp_path / "experiment", obs_joinids=range(n_fragments * n_rows), layers=())
    config = {"tiledb": {"create": {"capacity": 65_536}}}
    with soma.Experiment.open(uri, "w") as experiment:
        layers = experiment.ms[MEASUREMENT].X
        shape = (n_fragments * n_rows, n_cols)
        X = layers.add_new_sparse_ndarray("raw", type=pa.float32(), shape=shape, platform_config=config)
        i, j = (index.ravel() for index in np.indices((n_rows, n_cols)))
        for fragment in range(n_fragments):
            values = np.full(len(i), fragment + 1, dtype=np.float32)
            X.write(pa.table({"soma_dim_0": i + fragment * n_rows, "soma_dim_1": j, "soma_data": values}))
    with soma.Experiment.open(uri) as experiment:
        locator = XLocator.create(experiment, MEASUREMENT)
    ids = QueryIDs(obs_joinids=range(n_fragments * n_rows), var_joinids=range(5))
    dataset = ExperimentDataset(x_locator=locator, query_ids=ids, memory_budget="64MiB", batch_size=100)
    for X, obs in dataset:
        np.testing.assert_array_equal(X[:, 4], obs["soma_joinid"] // n_rows + 1)
