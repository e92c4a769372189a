from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pytest
import tiledbsoma as soma
from scipy import sparse

from stores import N_OBS, Store
from tiledbsoma_ml import ExperimentDataset, QueryIDs
from tiledbsoma_ml._dataset.options import OF_SHUFFLING, Options


def make(store: Store, **options: Any) -> ExperimentDataset:
    ids = QueryIDs(obs_joinids=range(N_OBS), var_joinids=range(4))
    return ExperimentDataset(x_locator=store.locator, query_ids=ids, **options)


def test_every_option_is_an_attribute_of_the_dataset_and_of_copies_of_it(store: Store) -> None:
    made = make(store, batch_size=8, mixing=0.9, shuffle_chunk_size="auto", memory_budget="1GiB", seed=3)
    assert (made.memory_budget, made.mixing, made.window_dir, made.window_budget) == (2**30, 0.9, None, 0)
    for dataset in (made, copy.copy(made), pickle.loads(pickle.dumps(made)), made.random_split(0.5, 0.5)[0]):
        for name, value in attrs.asdict(made.options, recurse=False).items():
            found = getattr(dataset, name)
            assert (tuple(found) if name == "obs_column_names" else found) == value
            assert name in dir(dataset)
    with pytest.raises(AttributeError, match="'ExperimentDataset' object has no attribute 'batchsize'"):
        made.batchsize  # noqa: B018


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({"shuffle": False, "shuffle_chunk_size": 8}, "shuffle_chunk_size=8", "shuffle=False leaves rows"),
        ({"shuffle": False, "mixing": 0.9}, "mixing=0.9", "shuffle=False leaves rows in the order"),
        ({"mixing": 0.9}, "mixing=0.9", "shuffle_chunk_size=64 says how far rows are mixed"),
        (
            {"shuffle_mode": "gpu_minibatch", "device": "cpu", "shuffle_chunk_size": 8},
            "shuffle_chunk_size=8",
            "shuffle_mode='gpu_minibatch' permutes rows within mini-batches alone",
        ),
        (
            {"shuffle": False, "shuffle_mode": "gpu_iobatch"},
            "shuffle_mode=<ShuffleMode.GPU_IOBATCH: 'gpu_iobatch'>",
            "shuffle=False leaves rows in the order of the query",
        ),
    ],
)
def test_a_setting_that_is_not_in_use_is_told_in_one_sentence(
    store: Store, options: dict[str, Any], name: str, reason: str
) -> None:
    with pytest.warns(UserWarning, match=" changes nothing here: ") as told:
        dataset = make(store, **options)
    [message] = [str(warning.message) for warning in told]
    assert message.startswith(f"{name} changes nothing here: {reason}")
    assert message.endswith("; leave it out.")
    [(parameter, why)] = dataset.not_in_use.items()
    assert name.startswith(f"{parameter}=")
    assert f"<th style='text-align:left'>{parameter} (not in use)</th>" in dataset._repr_html_()
    assert reason in why


def test_a_setting_that_is_not_in_use_is_told_at_the_line_of_the_user(store: Store) -> None:
    ids = QueryIDs(obs_joinids=range(N_OBS), var_joinids=range(4))
    with pytest.warns(UserWarning, match=" changes nothing here: ") as told:
        ExperimentDataset(x_locator=store.locator, query_ids=ids, mixing=0.9)
    assert [warning.filename for warning in told] == [__file__]


NO_BOOLS = ("no", 0, 1.0, np.int64(1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("shuffle", "return_sparse_X", "use_eager_fetch") for value in NO_BOOLS),
        *(("snapshot", value) for value in NO_BOOLS[1:]),  # a string is a path
    ],
)
def test_an_option_that_is_true_or_false_refuses_what_is_neither(store: Store, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}={re.escape(repr(value))} must be .*True or False"):
        make(store, **{name: value})


@pytest.mark.parametrize("name", ["return_sparse_X", "use_eager_fetch", "ranks"])
def test_an_option_that_can_be_changed_is_checked_when_it_is(store: Store, name: str) -> None:
    dataset = make(store)
    with pytest.raises(TypeError, match=f"^{name}=0 must be "):
        setattr(dataset, name, 0)
    assert getattr(dataset, name) == getattr(make(store), name)


def test_bools_of_numpy_are_as_good_as_those_of_python(store: Store) -> None:
    dataset = make(store, shuffle=np.False_, return_sparse_X=np.True_, snapshot=np.False_, batch_size=8)
    assert (dataset.shuffle, dataset.return_sparse_X) == (False, True)
    X, obs = next(iter(dataset))
    assert sparse.issparse(X)
    assert obs["soma_joinid"].tolist() == list(range(8))


def test_another_batch_size_leaves_rows_and_all_other_options_as_they_are(
    store: Store, tmp_path: Path
) -> None:
    unused = {"window_dir": tmp_path, "window_budget": 2**26}
    with pytest.warns(UserWarning, match="a snapshot is read without windows"):
        made = make(store, batch_size=8, seed=3, snapshot=tmp_path / "s", **unused)
    other = made.with_batch_size(50)  # says nothing again: a warning is an error
    assert other.options == attrs.evolve(made.options, batch_size=50)
    assert (other.query_ids, other.not_in_use) == (made.query_ids, made.not_in_use)
    assert [len(obs) for _, obs in other] == [50] * 6 + [11]
    assert (made.batch_size, made.iterations.upcoming_epoch) == (8, 0)
    with pytest.raises(ValueError, match="batch_size=0 must be a positive integer"):
        made.with_batch_size(0)


def test_a_folder_for_windows_is_not_in_use_beside_a_snapshot(store: Store, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="^window_dir=.* changes nothing here: a snapshot is read without"):
        make(store, snapshot=tmp_path / "s", window_dir=tmp_path, window_budget="64MiB")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": False},
        {"shuffle": False, "shuffle_chunk_size": "auto", "io_batch_size": "auto"},
        {"shuffle_chunk_size": "auto", "mixing": 0.9},
        {"shuffle_mode": "gpu_minibatch", "device": "cpu"},
        {"shuffle_mode": "gpu_iobatch", "device": "cpu", "shuffle_chunk_size": 8, "io_batch_size": 64},
    ],
)
def test_settings_that_are_in_use_are_not_told(store: Store, options: dict[str, Any]) -> None:
    assert make(store, **options).not_in_use == {}  # a warning is an error


def test_options_of_shuffling_are_those_that_are_not_in_use_without(store: Store, tmp_path: Path) -> None:
    other = {"mixing": 0.9, "shuffle_chunk_size": 8, "shuffle_mode": "gpu_minibatch"}
    with pytest.warns(UserWarning, match="changes nothing here"):
        assert set(make(store, shuffle=False, **other).not_in_use) == OF_SHUFFLING


def test_building_and_looking_at_a_dataset_reads_no_x_and_writes_nothing(
    store: Store, tmp_path: Path
) -> None:
    auto = {"shuffle_chunk_size": "auto", "io_batch_size": "auto", "batch_size": 16}
    with mock.patch.object(soma.SparseNDArray, "read", side_effect=AssertionError("X was read")):
        for options in (auto, {**auto, "snapshot": tmp_path / "s"}, {"shuffle_chunk_size": 1}):
            dataset = make(store, **options)
            assert len(dataset) > 0
            assert repr(dataset)
            assert dataset._repr_html_()
    assert not list(tmp_path.iterdir())


def test_options_are_printable_and_frozen(store: Store) -> None:
    options = make(store, batch_size=8).options
    assert "batch_size=8" in repr(options)
    assert isinstance(options, Options)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        options.batch_size = 9  # type: ignore[misc]


def test_what_auto_stands_for_is_that_of_the_whole_query_whichever_part_asks_first(store: Store) -> None:
    auto = {"shuffle_chunk_size": "auto", "io_batch_size": "auto", "batch_size": 16}
    whole = make(store, **auto).plan
    assert whole.layout is not None
    for part in make(store, **auto).random_split(0.02, 0.98, seed=1):
        assert part.plan == whole


def test_printing_tells_the_sizes_of_this_rank_and_does_without_ranks_that_cannot_be(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = {"shuffle_chunk_size": "auto", "io_batch_size": "auto", "batch_size": 16}
    dataset = make(store, ranks=(1, 4), **auto)
    assert dataset.plan.is_auto
    assert "io_batch_size=auto: windows of 77 rows" in repr(dataset)
    alone = make(store, **auto)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "rank=unknown" in repr(alone)
    assert alone.plan.is_auto
    assert "rank=unknown" in repr(alone)


@pytest.mark.parametrize("eager", [False, True])
def test_reading_ahead_can_be_changed(store: Store, eager: bool) -> None:
    dataset = make(store, use_eager_fetch=not eager)
    dataset.use_eager_fetch = eager
    assert dataset.iterations.budget.use_eager_fetch == eager
