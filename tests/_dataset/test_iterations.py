from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pytest

from matrix_source import MatrixSource, matrix_source
from stores import N_OBS, N_VARS, Store, joinids_of
from tiledbsoma_ml import ExperimentDataset, Layout, QueryIDs, experiment_dataloader
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._soma.source import SOMASource


def test_other_rows_of_a_dataset_have_its_columns() -> None:
    dataset = ExperimentDataset(source=matrix_source(), batch_size=4)
    ids = dataset.query_ids
    part = dataset.over(attrs.evolve(ids, obs_joinids=[8, 3]))
    assert sorted(joinids_of(part)) == [3, 8]
    with pytest.raises(ValueError, match="query_ids must have the columns of the dataset, in their order"):
        dataset.over(QueryIDs(obs_joinids=[8, 3], var_joinids=ids.var_joinids[::-1]))


class FoundOutHere(SOMASource):
    """A source whose layout only this process may ask for."""

    pid = os.getpid()

    def layout(self, ids: QueryIDs, budget: Budget) -> Layout:
        assert os.getpid() == self.pid, "found out again"
        return super().layout(ids, budget)


def test_forked_workers_find_out_nothing_that_is_known(store: Store) -> None:
    ids = QueryIDs(obs_joinids=range(N_OBS), var_joinids=range(N_VARS))
    options = {"shuffle_chunk_size": "auto", "io_batch_size": "auto", "batch_size": 16}
    columns = ["soma_joinid", "maybe_int"]
    dataset = ExperimentDataset(source=FoundOutHere(store.locator, ids), obs_column_names=columns, **options)
    loader = experiment_dataloader(dataset, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        batches = list(loader)
        assert sorted(joinids_of(batches)) == list(range(N_OBS))
        assert {str(obs["maybe_int"].dtype) for _, obs in batches} == {"Int64"}


def test_a_pickled_dataset_of_a_part_has_a_source_of_its_rows(store: Store) -> None:
    part, _ = store.dataset().random_split(0.2, 0.8, seed=1)
    copied = pickle.loads(pickle.dumps(part))
    np.testing.assert_array_equal(copied.source.query_ids.obs_joinids, part.query_ids.obs_joinids)
    assert len(ExperimentDataset(source=copied.source)) == len(part.query_ids.obs_joinids)


class ByPlace(MatrixSource):
    """A source that finds rows by their place among all: its `query_ids` are not to be touched."""

    def obs(self, obs_joinids: np.ndarray, column_names: Any) -> pd.DataFrame:
        return super().obs(np.searchsorted(self.query_ids.obs_joinids, obs_joinids), column_names)


class Fixed(MatrixSource):
    @property
    def query_ids(self) -> QueryIDs:  # type: ignore[override]
        return QueryIDs(obs_joinids=np.arange(self.X.shape[0]), var_joinids=np.arange(self.X.shape[1]))

    @query_ids.setter
    def query_ids(self, ids: QueryIDs) -> None:
        if "frame" in self.__dict__ and hasattr(self, "_content"):
            raise AttributeError("cannot be set")


@pytest.mark.parametrize("kind", [ByPlace, Fixed])
def test_the_rows_of_a_source_stay_its_own_in_a_pickled_dataset_of_a_part(kind: type[MatrixSource]) -> None:
    whole = matrix_source()
    source = kind(whole.X, whole.frame)
    options = {"batch_size": 8, "seed": 1, "obs_column_names": ["soma_joinid", "barcode"]}
    _, part = ExperimentDataset(source=source, **options).random_split(0.6, 0.4, seed=2)
    copied = pickle.loads(pickle.dumps(part))
    assert len(copied.source.query_ids.obs_joinids) == N_OBS
    for (X, obs), (other_X, other_obs) in zip(part, copied, strict=True):
        np.testing.assert_array_equal(X, other_X)
        pd.testing.assert_frame_equal(obs, other_obs)


def test_a_layout_that_failed_can_be_asked_for_again_and_its_error_is_its_own() -> None:
    class Failing(MatrixSource):
        is_failing = True

        def layout(self, *args: Any) -> Any:
            return {}.nothing if self.is_failing else super().layout(*args)  # type: ignore[attr-defined]

    auto = {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}
    dataset = ExperimentDataset(source=matrix_source(kind=Failing), batch_size=8, **auto)
    for _ in range(2):
        with pytest.raises(AttributeError, match="'dict' object has no attribute 'nothing'"):
            dataset.plan  # noqa: B018
    Failing.is_failing = False
    assert sorted(joinids_of(dataset)) == list(range(N_OBS))


def test_parts_on_several_threads_ask_for_the_plan_once() -> None:
    asked = []

    class Slow(MatrixSource):
        def layout(self, *args: Any) -> Any:
            asked.append(args)
            time.sleep(0.05)
            return super().layout(*args)

    auto = {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}
    whole = ExperimentDataset(source=matrix_source(kind=Slow), batch_size=8, **auto)
    parts = whole.random_split(0.5, 0.5, seed=1)
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda part: part.plan, [*parts, *parts]))
    assert len(asked) == 1
    assert all(plan is plans[0] for plan in plans)
