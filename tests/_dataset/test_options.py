from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import pytest
import tiledbsoma as soma

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
