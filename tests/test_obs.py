from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma as soma

from tiledbsoma_ml import ExperimentDataset
from tiledbsoma_ml._obs import ObsColumns, ObsTable


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


# Decoding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [pa.int8(), pa.uint8(), pa.int32()])
@pytest.mark.parametrize("missing", [False, True])
def test_categories_are_decoded_once_and_shared_by_all_that_is_taken(codes: Any, missing: bool) -> None:
    indices = pa.array([2, 0, None if missing else 1, 2], codes)
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["a", "b", "c"]), ordered=True)
    table = ObsTable({"label": column})
    rows = np.array([3, 2, 0])
    first, second = table.take(rows)["label"], table.take(rows[::-1])["label"]
    expected = pd.Categorical(["c", None if missing else "b", "c"], categories=["a", "b", "c"], ordered=True)
    pd.testing.assert_series_equal(first, pd.Series(expected, name="label"))
    assert first.dtype.categories is second.dtype.categories
