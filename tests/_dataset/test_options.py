from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pytest
import tiledbsoma as soma
from scipy import sparse

from stores import N_OBS, Store, joinids_of
from tiledbsoma_ml import ExperimentDataset, QueryIDs
from tiledbsoma_ml._dataset.options import OF_SHUFFLING, Options


def make(store: Store, **options: Any) -> ExperimentDataset:
    ids = QueryIDs(obs_joinids=range(N_OBS), var_joinids=range(4))
    return ExperimentDataset(x_locator=store.locator, query_ids=ids, **options)


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0 must be a positive integer; try 128."),
        ({"batch_size": -5}, ValueError, "batch_size=-5 must be a positive integer; try 128."),
        ({"batch_size": 1.0}, TypeError, "batch_size=1.0 must be a positive integer, not a float; try 128."),
        ({"batch_size": True}, TypeError, "batch_size=True must be a positive integer, not a bool; try 128."),
        ({"io_batch_size": 0}, ValueError, "io_batch_size=0 must be a positive integer; try 65536."),
        (
            {"io_batch_size": 2.5},
            TypeError,
            "io_batch_size=2.5 must be a positive integer, not a float; try 65536.",
        ),
        ({"shuffle_chunk_size": -1}, ValueError, "shuffle_chunk_size=-1 must be a positive integer; try 64."),
        (
            {"shuffle_chunk_size": False},
            TypeError,
            "shuffle_chunk_size=False must be a positive integer, not a bool",
        ),
        (
            {"io_batch_size": 100, "shuffle_chunk_size": 64},
            ValueError,
            "io_batch_size=100 must be a multiple of shuffle_chunk_size=64; try 128.",
        ),
        ({"seed": -1}, ValueError, "seed=-1 must be an integer of at least 0; try 42."),
        ({"seed": "42"}, TypeError, "seed='42' must be an integer of at least 0, not a str; try 42."),
        (
            {"shuffle_mode": "tpu"},
            ValueError,
            "shuffle_mode='tpu' must be one of 'cpu', 'gpu_iobatch', 'gpu_minibatch' or 'gpu'.",
        ),
        (
            {"obs_column_names": ["celltype"]},
            ValueError,
            "obs_column_names='celltype' must be a column of obs; did you mean 'cell_type'?",
        ),
        (
            {"obs_column_names": []},
            ValueError,
            "obs_column_names=[] must hold at least one name; try ['soma_joinid']",
        ),
        (
            {"obs_column_names": "stage"},
            TypeError,
            "obs_column_names='stage' must be a list of names; try ['stage'].",
        ),
        (
            {"obs_column_names": ["stage", "stage"]},
            ValueError,
            "obs_column_names=['stage', 'stage'] must differ from each other; name each column once.",
        ),
        ({"memory_budget": 0}, ValueError, "memory_budget=0 must be at least 64 MiB; try '2GiB'."),
        ({"memory_budget": -1}, ValueError, "memory_budget=-1 must be at least 64 MiB; try '2GiB'."),
        (
            {"memory_budget": "63MiB"},
            ValueError,
            "memory_budget='63MiB' must be at least 64 MiB; try '2GiB'.",
        ),
        (
            {"memory_budget": True},
            TypeError,
            "memory_budget=True must be a number of bytes or a string; try memory_budget='2GiB'.",
        ),
        (
            {"memory_budget": 2.5e9},
            TypeError,
            "memory_budget=2500000000.0 must be a number of bytes or a string; try memory_budget='2GiB'.",
        ),
        (
            {"memory_budget": None},
            TypeError,
            "memory_budget=None must be a number of bytes or a string; try memory_budget='2GiB'.",
        ),
        (
            {"memory_budget": "2 apples"},
            ValueError,
            "memory_budget='2 apples' must be a number of bytes, with a unit or without; try '2GiB'.",
        ),
        (
            {"io_batch_size": "big"},
            ValueError,
            "io_batch_size='big' must be a positive integer or 'auto'; try 'auto'.",
        ),
        (
            {"shuffle_chunk_size": "tile"},
            ValueError,
            "shuffle_chunk_size='tile' must be a positive integer or 'auto'; try 'auto'.",
        ),
        (
            {"shuffle_chunk_size": 2**63, "io_batch_size": 2**63},
            ValueError,
            "io_batch_size=9223372036854775808 must be at most 9223372036854775807, the largest joinid; try "
            "'auto'.",
        ),
        (
            {"shuffle_chunk_size": "auto", "io_batch_size": 0},
            ValueError,
            "io_batch_size=0 must be a positive integer; try 65536.",
        ),
        (
            {"window_dir": "/no/such/folder", "window_budget": "1GiB"},
            ValueError,
            "window_dir='/no/such/folder' must be an existing folder; make it, or choose another.",
        ),
        (
            {"window_dir": __file__, "window_budget": "1GiB"},
            ValueError,
            f"window_dir={__file__!r} must be an existing folder; make it, or choose another.",
        ),
        (
            {"window_dir": "", "window_budget": "1GiB"},
            ValueError,
            "window_dir='' must not be empty; try '.' for the working directory.",
        ),
        (
            {"window_dir": "/"},
            ValueError,
            "window_dir='/' needs a limit; add window_budget='64GiB'.",
        ),
        (
            {"window_budget": "64GiB"},
            ValueError,
            "window_budget needs a folder on a local disk; add window_dir='/path'.",
        ),
        (
            {"window_dir": "/", "window_budget": "63MiB"},
            ValueError,
            "window_budget='63MiB' must be at least 64 MiB; try '2GiB'.",
        ),
        (
            {"window_dir": "/", "window_budget": 1.5},
            TypeError,
            "window_budget=1.5 must be a number of bytes or a string; try window_budget='2GiB'.",
        ),
        (
            {"window_dir": "/", "window_budget": "1048576TiB"},
            ValueError,
            "window_budget=1073741824.0 GiB must fit into window_dir='/', where ",
        ),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence_before_any_data_is_read(
    store: Store, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with (
        store.query() as query,
        mock.patch.object(soma.SparseNDArray, "read", side_effect=AssertionError("X was read")),
        mock.patch.object(soma.DataFrame, "read", side_effect=AssertionError("obs was read")),
        pytest.raises(error) as caught,
    ):
        ExperimentDataset(query, **options)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith((".", "?"))


def test_a_window_budget_above_the_free_space_says_how_much_there_is(store: Store, tmp_path: Path) -> None:
    with (
        mock.patch("shutil.disk_usage", return_value=mock.Mock(free=3 * 2**29)),
        pytest.raises(ValueError, match="window_budget") as caught,
    ):
        store.dataset(window_dir=tmp_path, window_budget="2GiB")
    assert str(caught.value) == (
        f"window_budget=2.0 GiB must fit into window_dir={str(tmp_path)!r}, where 1.5 GiB are free; "
        "lower it, or choose another folder."
    )


def test_numpy_integers_are_integers(store: Store) -> None:
    dataset = store.dataset(batch_size=np.int64(7), seed=np.uint32(3))
    assert (dataset.batch_size, dataset.seed) == (7, 3)


def test_the_io_batch_size_need_not_be_a_multiple_when_not_shuffling(store: Store) -> None:
    assert joinids_of(store.dataset(shuffle=False, io_batch_size=100)).tolist() == list(range(N_OBS))
