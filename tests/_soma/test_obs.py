from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma as soma
import torch
from torch.utils.data import DataLoader

from tiledbsoma_ml import ExperimentDataset, QueryIDs, Snapshot, XLocator
from tiledbsoma_ml._soma.obs import ObsColumns, ObsTable


def write_frame(uri: str, index: str, **columns: Any) -> str:
    """Write a frame indexed by one of its columns; return its URI."""
    table = pa.table(columns)
    domain = [[0, len(table) - 1]] if index == "soma_joinid" else [None]
    with soma.DataFrame.create(uri, schema=table.schema, index_column_names=[index], domain=domain) as frame:
        frame.write(table)
    return uri


def write_repeating(uri: Path, *, obs: list[int], var: list[int]) -> str:
    """Write an experiment whose obs and var, indexed by other columns, have these joinids."""
    with soma.Experiment.create(str(uri)) as experiment:
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        for parent, name, joinids in ((experiment, "obs", obs), (measurement, "var", var)):
            labels = [f"label{k}" for k in range(len(joinids))]
            frame_uri = write_frame(f"{parent.uri}/{name}", "label", soma_joinid=joinids, label=labels)
            parent.set(name, soma.DataFrame.open(frame_uri), use_relative_uri=False)
        X = measurement.add_new_collection("X")
        X.add_new_sparse_ndarray("raw", type=pa.float32(), shape=(9, 9)).close()
    return str(uri)


# Joinids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeating", ["obs", "var"])
def test_an_experiment_in_which_a_joinid_repeats_is_refused_when_it_is_queried(
    tmp_path: Path, repeating: str
) -> None:
    joinids = {"obs": [0, 1, 2], "var": [0, 1], repeating: [0, 1, 2, 0, 1, 2]}
    uri = write_repeating(tmp_path / "experiment", **joinids)
    with (
        soma.Experiment.open(uri) as experiment,
        experiment.axis_query("RNA") as query,
        pytest.raises(ValueError, match=rf"/{repeating}' must have every soma_joinid once.* but 0 repeats"),
    ):
        ExperimentDataset(query)


def test_a_joinid_that_repeats_is_found_where_the_query_selects_one_of_its_rows(tmp_path: Path) -> None:
    uri = write_repeating(tmp_path / "experiment", obs=[0, 1, 2, 0, 1, 5], var=[0])
    selected = soma.AxisQuery(value_filter="label in ['label2', 'label4']")
    with soma.Experiment.open(uri) as experiment, experiment.axis_query("RNA", obs_query=selected) as query:
        dataset = ExperimentDataset(query)
    with pytest.raises(ValueError, match=r"/obs' must have every soma_joinid once.* but 1 repeats"):
        next(iter(dataset))


def test_joinids_that_repeat_among_rows_that_nobody_wants_do_no_harm(tmp_path: Path) -> None:
    uri = write_frame(str(tmp_path / "obs"), "barcode", soma_joinid=[3, 0, 3, 7], barcode=list("abcd"))
    with soma.DataFrame.open(uri) as frame:
        obs = ObsColumns.read(frame, ["barcode"], np.array([0, 7]))
    assert obs.take(np.array([7, 0]))["barcode"].tolist() == ["d", "b"]


def test_rows_indexed_by_another_column_than_the_joinid_are_read_right(tmp_path: Path) -> None:
    uri = write_frame(str(tmp_path / "obs"), "barcode", soma_joinid=range(6), barcode=list("fedcba"))
    with soma.DataFrame.open(uri) as frame:
        obs = ObsColumns.read(frame, ["barcode", "soma_joinid"], np.array([4, 0, 2]))
    assert obs.take(np.array([2, 4, 0])).to_dict("list") == {
        "barcode": ["d", "b", "f"],
        "soma_joinid": [2, 4, 0],
    }


# Types ----------------------------------------------------------------------------------------------------

# Of 60 rows one has no number, and it is last; another has no flag. Beside them, in obs, more are missing.
IDS = QueryIDs(obs_joinids=range(60), var_joinids=range(4))
COLUMNS = ["number", "flag", "whole", "text", "real", "label", "time"]
TYPES = ["Int32", "boolean", "int64", "object", "float32", "category", "datetime64[us]"]


@pytest.fixture(scope="module")
def locator(tmp_path_factory: pytest.TempPathFactory) -> XLocator:
    rows = np.arange(80)
    missing = {
        "number": rows >= 59,
        "flag": np.isin(rows, [30, 70]),
        "whole": rows >= 60,
        "text": rows >= 20,
        "real": rows % 2 == 0,
        "label": rows < 40,
        "time": rows > 50,
    }
    columns = {
        "soma_joinid": pa.array(rows),
        "number": pa.array(rows.astype(np.int32), mask=missing["number"]),
        "flag": pa.array(rows % 2 == 0, mask=missing["flag"]),
        "whole": pa.array(rows + 2**60, mask=missing["whole"]),
        "text": pa.array([f"t{k}" for k in rows], mask=missing["text"]),
        "real": pa.array(rows.astype(np.float32), mask=missing["real"]),
        "label": pa.array([f"l{k % 3}" for k in rows], mask=missing["label"]).dictionary_encode(),
        "time": pa.array(rows.astype("datetime64[us]"), mask=missing["time"]),
    }
    uri = str(tmp_path_factory.mktemp("types") / "experiment")
    with soma.Experiment.create(uri) as experiment:
        write_frame(f"{uri}/obs", "soma_joinid", **columns)
        experiment.set("obs", soma.DataFrame.open(f"{uri}/obs"), use_relative_uri=False)
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        write_frame(f"{uri}/ms/RNA/var", "soma_joinid", soma_joinid=range(4))
        measurement.set("var", soma.DataFrame.open(f"{uri}/ms/RNA/var"), use_relative_uri=False)
        X = measurement.add_new_collection("X").add_new_sparse_ndarray("raw", type=pa.int8(), shape=(80, 4))
        X.write(pa.table({"soma_dim_0": rows, "soma_dim_1": rows % 4, "soma_data": rows.astype(np.int8)}))
    with soma.Experiment.open(uri) as experiment:
        return XLocator.create(experiment, "RNA")


@pytest.fixture(scope="module")
def snapshot(locator: XLocator, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A snapshot of more rows than are queried."""
    path = tmp_path_factory.mktemp("types") / "snapshot"
    ids = attrs.evolve(IDS, obs_joinids=range(80))
    return Snapshot.create_from(path, [(locator, ids)], obs_column_names=COLUMNS, progress=False)


@pytest.fixture(params=["query", "experiment", "snapshot"])
def make_dataset(request: pytest.FixtureRequest, locator: XLocator, snapshot: Snapshot) -> Any:
    def of_query(query_ids: QueryIDs = IDS, **options: Any) -> ExperimentDataset:
        rows, columns = (
            soma.AxisQuery(coords=(ids,)) for ids in (query_ids.obs_joinids, query_ids.var_joinids)
        )
        with (
            locator.open_experiment() as experiment,
            experiment.axis_query(locator.measurement_name, obs_query=rows, var_query=columns) as query,
        ):
            return ExperimentDataset(query, **same, **options)

    same = {"obs_column_names": COLUMNS, "batch_size": 10, "shuffle": False}
    if request.param == "query":
        return of_query
    source = None if request.param == "experiment" else snapshot
    return partial(
        ExperimentDataset,
        x_locator=locator,
        query_ids=IDS,
        obs_column_names=COLUMNS,
        batch_size=10,
        shuffle=False,
        snapshot=source,
    )


def types_of(dataset: ExperimentDataset) -> list[list[str]]:
    """Return the types of the columns in each mini-batch."""
    return [obs.dtypes.astype(str).tolist() for _, obs in dataset]


def test_columns_have_the_types_of_the_query_in_every_mini_batch(make_dataset: Any) -> None:
    assert types_of(make_dataset()) == [TYPES] * 6


@pytest.mark.parametrize("worker", [0, 1, 2])
def test_columns_have_the_types_of_the_query_in_every_worker(
    make_dataset: Any, worker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = make_dataset(), pickle.loads(pickle.dumps(make_dataset()))  # forked, and spawned
    place = SimpleNamespace(id=worker, num_workers=3)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: place)
    for dataset in datasets:
        assert types_of(dataset) == [TYPES] * 2


def test_columns_have_the_types_of_the_query_in_every_part_of_a_split(make_dataset: Any) -> None:
    for part in make_dataset().random_split(0.5, 0.3, 0.2, seed=1):
        assert types_of(part) == [TYPES] * len(part)


def test_columns_have_the_types_of_the_query_after_a_resume_with_other_workers(
    make_dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, resumed = (make_dataset(shuffle_scope="global", seed=7) for _ in range(2))
    batches = iter(dataset)
    for _ in range(4):
        next(batches)
    resumed.load_state_dict(dataset.state_dict())
    place = SimpleNamespace(id=1, num_workers=2)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: place)
    assert types_of(resumed) == [TYPES]


def test_a_query_without_a_missing_value_keeps_the_types_of_numpy(make_dataset: Any) -> None:
    ids = attrs.evolve(IDS, obs_joinids=[3, 9, 4, 29, 31])  # 30, where a flag is missing, is read with them
    for part in (make_dataset(query_ids=ids), *make_dataset(query_ids=ids).random_split(0.6, 0.4, seed=1)):
        assert types_of(part) == [["int32", "bool", *TYPES[2:]]]


@pytest.fixture
def reads_of_obs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The coordinates of each read of a data frame in this process."""
    read, asked = soma.DataFrame.read, []

    def recorded(frame: soma.DataFrame, coords: Any = (), **options: Any) -> Any:
        asked.append(coords)
        return read(frame, coords, **options)

    monkeypatch.setattr(soma.DataFrame, "read", recorded)
    return asked


def test_a_pickled_dataset_knows_its_types_and_takes_no_joinids_along_but_its_own(
    make_dataset: Any, reads_of_obs: list[Any]
) -> None:
    first, second = make_dataset().random_split(0.9, 0.1, seed=1)
    assert len(pickle.dumps(first)) - len(pickle.dumps(second)) >= 48 * 8
    pickled = pickle.dumps(second)
    reads_of_obs.clear()
    assert types_of(pickle.loads(pickled)) == [TYPES]
    assert len(reads_of_obs) <= 1, "its own rows at most, not those of the query"
    assert IDS.obs_joinids.tobytes() not in pickled


def test_what_a_forked_worker_found_out_is_not_read_again(make_dataset: Any, reads_of_obs: list[Any]) -> None:
    first, second = make_dataset().random_split(0.9, 0.1, seed=1)
    list(DataLoader(first, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    reads_of_obs.clear()
    assert types_of(second) == [TYPES]
    assert len(reads_of_obs) <= 1, "its own rows at most, not those of the query"


# Decoding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [pa.int8(), pa.uint8(), pa.int32()])
@pytest.mark.parametrize("missing", [False, True])
def test_categories_are_decoded_once_and_shared_by_all_that_is_taken(codes: Any, missing: bool) -> None:
    indices = pa.array([2, 0, None if missing else 1, 2], codes)
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["a", "b", "c"]), ordered=True)
    table = ObsTable({"label": column}, nullable=[])
    rows = np.array([3, 2, 0])
    first, second = table.take(rows)["label"], table.take(rows[::-1])["label"]
    expected = pd.Categorical(["c", None if missing else "b", "c"], categories=["a", "b", "c"], ordered=True)
    pd.testing.assert_series_equal(first, pd.Series(expected, name="label"))
    assert first.dtype.categories is second.dtype.categories
