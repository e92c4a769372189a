from __future__ import annotations

from typing import Any

import attrs
import pytest
import tiledbsoma as soma

from matrix_source import MatrixSource, matrix_source
from stores import N_OBS, Store
from tiledbsoma_ml import ExperimentDataset, QueryIDs
from tiledbsoma_ml._query_ids import Partition


def test_an_unknown_layer_is_named_with_the_nearest_one(store: Store) -> None:
    with (
        store.query() as query,
        pytest.raises(
            ValueError,
            match=r"layer_name='rwa' must be an X layer of measurement 'RNA'; did you mean 'raw'\?",
        ),
    ):
        ExperimentDataset(query, layer_name="rwa")


def test_obs_columns_are_checked_for_a_locator_too(store: Store) -> None:
    with pytest.raises(
        ValueError, match=r"obs_column_names='stag' must be a column of obs; did you mean 'stage'\?"
    ):
        store.dataset(obs_column_names=["stag"])


def test_a_query_on_a_closed_experiment_is_refused(store: Store) -> None:
    with store.query() as query:
        pass
    with pytest.raises(ValueError, match=r"the experiment .* must be open; build the dataset inside"):
        ExperimentDataset(query)


def test_what_is_no_query_is_refused(store: Store) -> None:
    with soma.Experiment.open(store.uri) as experiment:
        for given_query in (experiment, store.uri):
            with pytest.raises(
                TypeError, match=rf"query must be .* not of type {type(given_query).__name__}; try"
            ):
                ExperimentDataset(given_query)


def test_a_query_of_no_cells_is_told(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with store.query(obs="cell_type == 'none of them'") as query:
        dataset = ExperimentDataset(query)
    assert [record.levelname for record in caplog.records if "selects no cells" in record.message] == [
        "WARNING"
    ]
    assert not list(dataset)


def test_either_a_query_or_a_locator_with_ids_must_be_given(store: Store) -> None:
    ids = QueryIDs(obs_joinids=[0], var_joinids=[0])
    with store.query() as query:
        for given_arguments, listed in [
            ({}, "not none of them"),
            ({"query": query, "query_ids": ids}, "not query, query_ids"),
            (
                {"query": query, "x_locator": store.locator, "query_ids": ids},
                "not query, x_locator, query_ids",
            ),
            ({"x_locator": store.locator}, "not x_locator"),
            (
                {"layer_name": "raw", "x_locator": store.locator, "query_ids": ids},
                "not layer_name, x_locator, query_ids",
            ),
        ]:
            with pytest.raises(
                ValueError, match=r"either query .* or both x_locator and query_ids"
            ) as caught:
                ExperimentDataset(**given_arguments)
            assert listed in str(caught.value)


def test_a_part_of_a_query_is_refused(store: Store) -> None:
    part = QueryIDs(obs_joinids=range(8), var_joinids=range(3)).partitioned(Partition(0, 2, 0, 1))
    with pytest.raises(
        ValueError, match=r"query_ids must be the rows of all, and these are the part of Part"
    ):
        ExperimentDataset(x_locator=store.locator, query_ids=part)
    whole = attrs.evolve(part, partition=None)
    assert len(ExperimentDataset(x_locator=store.locator, query_ids=whole)) == 4


def test_what_it_does_not_have_is_told_before_anything_is_read() -> None:
    class Unread(MatrixSource):
        open = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match="obs_column_names='cell_typ' must be a column of obs; did you mean"):
        ExperimentDataset(source=matrix_source(kind=Unread), obs_column_names=["cell_typ"])
    with pytest.raises(ValueError, match=r"not source, layer_name|not layer_name, source"):
        ExperimentDataset(source=matrix_source(kind=Unread), layer_name="raw")


def test_what_is_no_source_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"source=str must have all members of a tiledbsoma_ml\.Source, but lacks query_ids"
    ):
        ExperimentDataset(source="cells.h5ad")  # type: ignore[arg-type]


def test_an_address_without_its_layer_is_refused(store: Store) -> None:
    ids = QueryIDs(obs_joinids=[0], var_joinids=[0])
    for wrong in ({"layer_name": "nope"}, {"measurement_name": "nada"}):
        [(name, value)] = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value!r} must be a"):
            ExperimentDataset(x_locator=attrs.evolve(store.locator, **wrong), query_ids=ids)


@pytest.mark.parametrize("wrong", [{"obs_joinids": [N_OBS]}, {"var_joinids": [999]}])
def test_rows_and_columns_that_the_source_lacks_are_refused(wrong: dict[str, Any]) -> None:
    ids = QueryIDs(**{"obs_joinids": [0], "var_joinids": [0], **wrong})
    with pytest.raises(
        ValueError, match=f"{next(iter(wrong))} must be those of the source, but 1 of 1 are not"
    ):
        ExperimentDataset(source=matrix_source(), query_ids=ids)
