"""An epoch that is left goes on as if nothing had been; and everyone gets their own rows."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import tiledbsoma as soma
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from stores import MEASUREMENT, N_OBS, Store, joinids_of
from tiledbsoma_ml import ExperimentDataset, QueryIDs, Snapshot, experiment_dataloader
from tiledbsoma_ml._order.plan import EpochPart, Plan
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import Partition
from tiledbsoma_ml._soma import reader as _reader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* changes nothing here: "),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
]

SCOPES, TAILS = ("partition", "global"), ("drop", "pad")


@pytest.fixture(scope="session")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    path = tmp_path_factory.mktemp("snapshots") / "whole.snapshot"
    with soma.Experiment.open(store.uri) as experiment, experiment.axis_query(MEASUREMENT) as query:
        return Snapshot.create(path, query, progress=False)


def dataset_of(snapshot: Snapshot, n_rows: int = N_OBS, **options: Any) -> ExperimentDataset:
    ids = QueryIDs(obs_joinids=np.arange(n_rows), var_joinids=np.arange(5))
    options = {"seed": 5, "batch_size": 8, "shuffle_chunk_size": 3, "io_batch_size": 24, **options}
    return ExperimentDataset(snapshot=snapshot, query_ids=ids, **options)


class Place(NamedTuple):
    """A worker of a rank, as `Partition` has it; without workers `n_workers` is 0."""

    rank: int
    world_size: int
    worker_id: int
    n_workers: int


@contextmanager
def at(place: Place | Partition) -> Iterator[None]:
    """Be a worker of a rank."""
    ranks = {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size)}
    info = SimpleNamespace(id=place.worker_id, num_workers=place.n_workers) if place.n_workers else None
    with (
        mock.patch.dict("os.environ", ranks),
        mock.patch.object(torch.utils.data, "get_worker_info", return_value=info),
    ):
        yield


def batches_of(dataset: Any) -> list[list[int]]:
    return [obs["soma_joinid"].tolist() for _, obs in dataset]


def epoch_of_rank(dataset: ExperimentDataset, rank: int, world_size: int, n_workers: int) -> list[list[int]]:
    """Return the mini-batches of a rank, in the order in which a `DataLoader` takes them from workers."""
    of_workers = []
    for worker in range(n_workers or 1):
        with at(Place(rank, world_size, worker, n_workers)):
            of_workers.append(batches_of(copy.deepcopy(dataset)))
    taken = []
    while any(of_workers):
        taken += [mine.pop(0) for mine in of_workers if mine]
    return taken


# Who gets what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "n_workers", "scope", "tail"), list(product((1, 2, 3, 4), (0, 1, 2, 3), SCOPES, TAILS))
)
def test_every_row_comes_once_in_equal_batches_of_known_number(
    whole: Snapshot, world_size: int, n_workers: int, scope: Any, tail: Any
) -> None:
    n_rows = 203
    dataset = dataset_of(whole, n_rows, shuffle_scope=scope, tail=tail)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        of_ranks = [epoch_of_rank(dataset, rank, world_size, n_workers) for rank in range(world_size)]
        lengths = [[len(batch) for batch in batches] for batches in of_ranks]
        assert all(one == lengths[0] for one in lengths)
        loader = experiment_dataloader(dataset, num_workers=n_workers)
        with at(Place(0, world_size, 0, 0)):
            assert len(loader) == len(lengths[0])
        rows = [row for batches in of_ranks for batch in batches for row in batch]
        if tail == "drop":
            assert len(set(rows)) == len(rows) == n_rows // world_size * world_size
        else:
            assert set(rows) == set(range(n_rows))
            assert len(rows) == -(-n_rows // world_size) * world_size


@pytest.mark.parametrize("mode", ["cpu", "gpu_iobatch", "gpu_minibatch"])
@pytest.mark.parametrize("tail", TAILS)
def test_in_global_scope_the_mini_batches_of_a_rank_do_not_depend_on_its_workers(
    whole: Snapshot, mode: str, tail: Any
) -> None:
    device = None if mode == "cpu" else "cpu"
    options = {"shuffle_mode": mode, "device": device, "tail": tail, "batch_size": 7}
    dataset = dataset_of(whole, 150, shuffle_scope="global", **options)
    dataset.ranks = (1, 2)
    if mode == "cpu":
        expected = sorted(epoch_of_rank(dataset, 1, 2, 0))
        for n_workers in (1, 2, 3):
            found = epoch_of_rank(dataset, 1, 2, n_workers)
            assert sorted(found) == expected
            assert sum(len(batch) < 7 for batch in found) <= 1
    else:
        dataset.ranks = None
        with mock.patch.dict("os.environ", {"RANK": "1", "WORLD_SIZE": "2"}):
            expected = sorted(batches_of(copy.deepcopy(dataset)))
            context = {"num_workers": 2, "multiprocessing_context": "fork"}
            assert sorted(batches_of(experiment_dataloader(dataset, **context))) == expected


def test_in_global_scope_every_rank_sees_all_of_the_query_and_other_rows_in_every_epoch(
    whole: Snapshot,
) -> None:
    dataset = dataset_of(whole, 300, shuffle_scope="global")
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        rows = np.concatenate(epoch_of_rank(dataset, 0, 2, 0))
        assert min((rows < 100).sum(), (rows >= 200).sum()) > 20
        epochs.append(set(rows.tolist()))
    assert len(epochs[0] & epochs[1]) < 100


def test_in_global_scope_other_rows_are_dropped_in_every_epoch(whole: Snapshot) -> None:
    dataset = dataset_of(whole, 203, shuffle_scope="global")
    dropped = set()
    for epoch in range(5):
        dataset.set_epoch(epoch)
        rows = [row for rank in range(4) for batch in epoch_of_rank(dataset, rank, 4, 0) for row in batch]
        dropped |= set(range(203)) - set(rows)
    assert len(dropped) > 3


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("source", ["experiment", "snapshot", "device"])
def test_without_the_rows_marked_as_padding_every_row_comes_once(
    store: Store, whole: Snapshot, scope: Any, source: str
) -> None:
    options = {
        "tail": "pad",
        "padding_column_name": "is_padding",
        "shuffle_scope": scope,
        "batch_size": 8,
        "seed": 1,
    }
    options |= {"io_batch_size": 64, "shuffle_chunk_size": 4}
    if source == "experiment":
        dataset = store.dataset(range(101), **options)
    else:
        device = {"shuffle_mode": "gpu", "device": "cpu"} if source == "device" else {}
        dataset = dataset_of(whole, 101, **options, **device)
    rows, n_padding = [], 0
    for rank in range(4):
        with at(Place(rank, 4, 0, 0)):
            for _, obs in copy.deepcopy(dataset):
                assert obs["is_padding"].dtype == bool
                rows += obs["soma_joinid"][~obs["is_padding"]].tolist()
                n_padding += obs["is_padding"].sum()
    assert sorted(rows) == list(range(101))
    assert n_padding == 3


def test_a_column_that_marks_padding_needs_padding_and_a_name_of_its_own(whole: Snapshot) -> None:
    with pytest.raises(ValueError, match=r"padding_column_name='p' needs rows .* add tail='pad'"):
        dataset_of(whole, padding_column_name="p")
    with pytest.raises(ValueError, match="must not be one of obs_column_names"):
        dataset_of(whole, tail="pad", padding_column_name="soma_joinid")


@pytest.mark.parametrize("name", ["shuffle_scope", "tail"])
def test_an_unknown_word_is_refused_with_those_that_are_known(whole: Snapshot, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='all' must be '.*' or '.*'; try"):
        dataset_of(whole, **{name: "all"})


def test_more_ranks_than_rows_are_refused_unless_rows_are_repeated(whole: Snapshot) -> None:
    with at(Place(0, 4, 0, 0)):
        with pytest.raises(ValueError, match="4 ranks must each get a row, but the query has 3"):
            next(iter(dataset_of(whole, 3)))
        assert len(batches_of(dataset_of(whole, 3, tail="pad"))) == 1


@pytest.mark.parametrize("scope", SCOPES)
def test_more_workers_than_rows_are_left_without(whole: Snapshot, scope: Any) -> None:
    dataset = dataset_of(whole, 2, shuffle_scope=scope, batch_size=1)
    assert sorted(epoch_of_rank(dataset, 0, 1, 4)) == [[0], [1]]


# Resuming -------------------------------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "partition": {},
    "global": {"shuffle_scope": "global"},
    "single rows": {"shuffle_chunk_size": 1, "io_batch_size": 30},
    "auto": {"shuffle_chunk_size": "auto", "io_batch_size": "auto"},
    "unshuffled": {"shuffle": False},
    "lazy": {"use_eager_fetch": False},
    "device": {"shuffle_mode": "gpu_iobatch", "device": "cpu"},
    "device, global": {"shuffle_mode": "gpu_iobatch", "device": "cpu", "shuffle_scope": "global"},
    "device, mini-batches": {"shuffle_mode": "gpu_minibatch", "device": "cpu"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resuming_at_every_mini_batch_gives_the_very_sequence(
    whole: Snapshot, options: dict[str, Any]
) -> None:
    def fresh() -> ExperimentDataset:
        return dataset_of(whole, 100, **options)

    dataset = fresh()
    expected = [batches_of(dataset) for _ in range(3)]
    uninterrupted = [batch for epoch in expected for batch in epoch]
    dataset, n_yielded = fresh(), 0
    for _ in range(2):
        for _ in dataset:
            n_yielded += 1
            state = json.loads(json.dumps(dataset.state_dict()))
            resumed = fresh()
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            rest = batches_of(resumed)
            if n_yielded % len(expected[0]):
                rest += batches_of(resumed)
            assert rest == uninterrupted[n_yielded : n_yielded + len(rest)]


def test_resuming_from_soma_reads_nothing_of_what_came_before(store: Store) -> None:
    options = {"seed": 2, "batch_size": 10, "io_batch_size": 40, "shuffle_chunk_size": 4}
    expected = batches_of(store.dataset(**options))
    read, asked = _reader.SOMAReader.read, []

    def watched(self: Any, obs_joinids: Any) -> Any:
        asked.extend(obs_joinids.tolist())
        return read(self, obs_joinids)

    for n_yielded in (1, 4, 7, 20, len(expected) - 1):
        dataset = store.dataset(**options)
        iterator = iter(dataset)
        for _ in range(n_yielded):
            next(iterator)
        state = dataset.state_dict()
        iterator.close()
        asked.clear()
        resumed = store.dataset(**options)
        resumed.load_state_dict(state)
        with mock.patch.object(_reader.SOMAReader, "read", watched):
            assert batches_of(resumed) == expected[n_yielded:]
        assert sorted(asked) == sorted(np.concatenate(expected[n_yielded:]).tolist())


def test_a_state_is_taken_up_twice_in_a_row(whole: Snapshot) -> None:
    expected = batches_of(dataset_of(whole))
    rest, state = [], None
    for n_batches in (3, 5, 1):
        dataset = dataset_of(whole)
        if state is not None:
            dataset.load_state_dict(state)
        iterator = iter(dataset)
        rest += [next(iterator)[1]["soma_joinid"].tolist() for _ in range(n_batches)]
        state = dataset.state_dict()
    assert rest == expected[:9]


def test_a_state_is_a_new_small_dictionary_of_the_mini_batch_that_was_yielded(whole: Snapshot) -> None:
    dataset = dataset_of(whole)
    iterator = iter(dataset)
    next(iterator)
    first = dataset.state_dict()
    kept = copy.deepcopy(first)
    next(iterator)
    second = dataset.state_dict()
    assert first == kept
    assert (first["n_yielded"], second["n_yielded"]) == (1, 2)
    assert len(pickle.dumps(first)) < 1000


def test_loading_after_iter_and_before_the_first_mini_batch_counts(whole: Snapshot) -> None:
    expected = batches_of(dataset_of(whole))
    dataset = dataset_of(whole)
    iterator = iter(dataset)
    next(iterator)
    state = dataset.state_dict()
    resumed = dataset_of(whole)
    iter(resumed)
    iterator = iter(resumed)
    resumed.load_state_dict(state)
    assert [obs["soma_joinid"].tolist() for _, obs in iterator] == expected[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed is 5 there, not 6"),
        ({"batch_size": 4}, "batch_size is 8 there, not 4"),
        ({"n_rows": 90}, "query is '.*' there, not '.*'; n_obs is 311 there, not 90"),
        ({"io_batch_size": 48}, "io_batch_size is 24 there, not 48"),
        ({"shuffle_scope": "global"}, "shuffle_scope is 'partition' there, not 'global'"),
        ({"shuffle": False}, "shuffle is True there, not False"),
    ],
)
def test_a_state_of_another_dataset_is_refused_with_the_difference(
    whole: Snapshot, change: dict[str, Any], message: str
) -> None:
    state = dataset_of(whole).state_dict()
    with pytest.raises(ValueError, match=f"state must be of this dataset, but .*{message}"):
        dataset_of(whole, **change).load_state_dict(state)


def test_what_is_no_state_is_refused(whole: Snapshot) -> None:
    with pytest.raises(TypeError, match="must be what state_dict"):
        dataset_of(whole).load_state_dict({"epoch": 3})
    with pytest.raises(ValueError, match="state must have version 1, not 2"):
        dataset_of(whole).load_state_dict({**dataset_of(whole).state_dict(), "version": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_yielded": 40}, "n_yielded=40 in state must lie in 0 … 39;"),
        ({"n_yielded": 10**12}, "n_yielded=1000000000000 in state must lie in 0 … 39;"),
        ({"n_yielded": -1}, "n_yielded=-1 in state must lie in 0 … 39;"),
        ({"epoch": -1}, "epoch=-1 in state must lie in 0 …"),
        ({"epoch": 2**63}, "epoch=9223372036854775808 in state must lie in 0 …"),
        ({"world_size": 0}, "world_size=0 in state must lie in 1 …"),
        ({"world_size": 10**9}, "world_size=1000000000 in state must lie in 1 …"),
        ({"num_workers": 10**9}, "num_workers=1000000000 in state must lie in 0 …"),
        ({"num_workers": 2, "worker_id": 2}, "worker_id=2 in state must lie in 0 … 1;"),
        ({"num_workers": 2, "worker_id": 1, "n_yielded": 21}, "n_yielded=21 in state must lie in 0 … 20;"),
        ({"earlier": [[10**9, 1, 1]]}, "earlier=1000000000 in state must lie in 1 …"),
        ({"earlier": [[1, 1, 41]]}, "earlier=41 in state must lie in 0 … 39;"),
        ({"earlier": [[1, 1, 30]], "n_yielded": 10}, "n_yielded=10 in state must lie in 0 … 9;"),
    ],
)
def test_a_state_out_of_range_is_refused(whole: Snapshot, change: dict[str, Any], message: str) -> None:
    dataset = dataset_of(whole, shuffle_scope="global" if "earlier" in change else "partition")
    with pytest.raises(ValueError, match=f"^{message}.* load a state as it was saved, or start anew"):
        dataset.load_state_dict({**dataset.state_dict(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_yielded": 1.5}, "n_yielded=1.5 in state must be an integer, not a float"),
        ({"world_size": None}, "world_size=None in state must be an integer"),
        ({"epoch": True}, "epoch=True in state must be an integer, not a bool"),
        ({"earlier": [[1, 1]]}, r"earlier=\[\[1, 1\]\] in state must be a list of three numbers each"),
        ({"seed": "five"}, "seed='five' must be an integer"),
    ],
)
def test_a_state_of_other_types_is_refused(whole: Snapshot, change: dict[str, Any], message: str) -> None:
    dataset = dataset_of(whole, seed=None if "seed" in change else 5)
    with pytest.raises(TypeError, match=f"^{message}"):
        dataset.load_state_dict({**dataset.state_dict(), **change})
    state = dataset.state_dict()
    del state["worker_id"]
    with pytest.raises(TypeError, match="but has no 'worker_id'; load that of this dataset"):
        dataset.load_state_dict(state)


def test_a_state_holds_plain_values_whatever_types_the_options_had(store: Store, tmp_path: Path) -> None:
    sizes = {"batch_size": np.int32(8), "io_batch_size": "auto", "shuffle_chunk_size": np.int64(4)}
    dataset = store.dataset(seed=np.uint16(5), **sizes)
    torch.save(dataset.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state == json.loads(json.dumps(dataset.state_dict()))
    dataset.load_state_dict(state)


def test_a_drawn_seed_comes_back_with_the_state(whole: Snapshot) -> None:
    dataset = dataset_of(whole, seed=None)
    expected = batches_of(dataset)
    dataset.set_epoch(0)
    iterator = iter(dataset)
    next(iterator)
    resumed = dataset_of(whole, seed=None)
    resumed.load_state_dict(dataset.state_dict())
    assert batches_of(resumed) == expected[1:]


def test_in_partition_scope_another_world_size_is_refused(whole: Snapshot) -> None:
    with at(Place(0, 2, 0, 0)):
        dataset = dataset_of(whole)
        next(iter(dataset))
        state = dataset.state_dict()
    resumed = dataset_of(whole)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="state must be of 1 ranks with 1 workers, but is of 2 with 1"):
        next(iter(resumed))


layouts = st.tuples(st.integers(1, 4), st.integers(1, 3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layouts=st.lists(layouts, min_size=2, max_size=3),
    n_yielded=st.lists(st.integers(0, 4), min_size=2, max_size=2),
    n_rows=st.integers(4, 120),
    batch_size=st.integers(1, 9),
    tail=st.sampled_from(TAILS),
    chunk=st.sampled_from([1, 3, "auto", None]),
    io_batch_size=st.integers(1, 50),
    epoch=st.integers(0, 3),
)
def test_with_other_ranks_and_workers_no_row_of_the_epoch_is_lost_or_repeated(
    layouts: list[tuple[int, int]],
    n_yielded: list[int],
    n_rows: int,
    batch_size: int,
    tail: Any,
    chunk: Any,
    io_batch_size: int,
    epoch: int,
) -> None:
    from tiledbsoma_ml._epoch.position import Position

    ids = QueryIDs(obs_joinids=np.arange(n_rows) * 3, var_joinids=[0])
    plan = Plan(
        shuffle_chunk_size=chunk,
        io_batch_size=io_batch_size,
        batch_size=batch_size,
        permutes=chunk is not None,
        layout=Layout(16, 10.0) if chunk == "auto" else None,
        scope="global",
        tail=tail,
    )
    position, rows = Position(epoch=epoch), []
    for k, (world_size, n_workers) in enumerate(layouts):
        is_last = k == len(layouts) - 1
        n_now = 10**6 if is_last else n_yielded[k]
        lengths = []
        for rank in range(world_size):
            of_workers = []
            for worker in range(n_workers):
                place = Partition(rank, world_size, worker, n_workers)
                part = EpochPart(ids=ids, place=place, seed=3, epoch=epoch, earlier=position._over)
                found = np.concatenate([np.empty(0, np.int64), *plan.batches_of(part)])
                batches = [found[b : b + batch_size].tolist() for b in range(0, len(found), batch_size)]
                assert len(batches) == plan.n_mini_batches(part)
                padding = set() if is_last is False else set(plan.padding_of(part).tolist())
                of_workers.append([[row for row in batch if row not in padding] for batch in batches])
            taken: list[list[int]] = []
            while any(of_workers):
                taken += [mine.pop(0) for mine in of_workers if mine]
            rows += [row for batch in taken[:n_now] for row in batch]
            lengths.append(len(taken))
        assert len(set(lengths)) == 1
        done = min(n_now, lengths[0])
        position = Position(
            epoch=epoch,
            world_size=world_size,
            num_workers=n_workers,
            n_yielded=done,
            earlier=position._over,
        )
    if tail == "drop":
        assert len(set(rows)) == len(rows)
        assert n_rows - len(rows) < layouts[-1][0]
    assert set(rows) <= set(ids.obs_joinids.tolist())
    if tail == "pad":
        assert set(rows) == set(ids.obs_joinids.tolist())


@settings(max_examples=1000)
@given(
    n_rows=st.integers(1, 20_000),
    batch_size=st.integers(1, 200),
    chunk=st.sampled_from([1, 7, 64, "auto", None]),
    n_chunks=st.integers(1, 50),
    scope=st.sampled_from(SCOPES),
    place=st.sampled_from([Partition(0, 1, 0, 1), Partition(1, 2, 2, 3), Partition(2, 3, 0, 2)]),
    share=st.floats(0, 1),
    epoch=st.integers(0, 2),
)
def test_skipping_leaves_the_rest_of_a_part_as_it_was(
    n_rows: int,
    batch_size: int,
    chunk: Any,
    n_chunks: int,
    scope: Any,
    place: Partition,
    share: float,
    epoch: int,
) -> None:
    size = chunk if isinstance(chunk, int) else 16
    plan = Plan(
        shuffle_chunk_size=chunk,
        io_batch_size=n_chunks * size,
        batch_size=batch_size,
        permutes=chunk is not None,
        layout=Layout(64, 10.0) if chunk == "auto" else None,
        scope=scope,
    )
    ids = QueryIDs(obs_joinids=np.arange(n_rows) * 2, var_joinids=[0])

    def rows(skip: int) -> list[int]:
        part = EpochPart(ids=ids, place=place, seed=1, epoch=epoch, skip=skip)
        return np.concatenate([np.empty(0, np.int64), *plan.batches_of(part)]).tolist()

    whole = rows(0)
    skip = round(share * -(-len(whole) // batch_size))
    assert rows(skip) == whole[skip * batch_size :]


# With a DataLoader ----------------------------------------------------------------------------------------


def loader_of(snapshot: Snapshot, n_workers: int, **options: Any) -> Any:
    kept = {"multiprocessing_context": "fork", "persistent_workers": True} if n_workers else {}
    return experiment_dataloader(dataset_of(snapshot, 130, **options), num_workers=n_workers, **kept)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("n_workers", [0, 1, 2, 3])
def test_a_loader_resumes_in_the_middle_and_at_the_end_of_an_epoch(
    whole: Snapshot, scope: Any, n_workers: int
) -> None:
    loader = loader_of(whole, n_workers, shuffle_scope=scope)
    expected = [batches_of(loader) for _ in range(3)]
    n_batches = len(expected[0])
    assert len(loader) == n_batches
    loader = loader_of(whole, n_workers, shuffle_scope=scope)
    states = [loader.state_dict(), *(loader.state_dict() for _ in loader)]
    for n_yielded in (0, 1, 2, 5, n_batches - 1, n_batches):
        resumed = loader_of(whole, n_workers, shuffle_scope=scope)
        resumed.load_state_dict(states[n_yielded])
        rest = expected[0][n_yielded:] if n_yielded < n_batches else []
        found = [] if n_yielded == n_batches else batches_of(resumed)
        assert found == rest
        assert batches_of(resumed) == expected[1]
        assert batches_of(resumed) == expected[2]
        del resumed


def test_a_state_that_is_loaded_into_a_loader_with_living_workers_counts(whole: Snapshot) -> None:
    loader = loader_of(whole, 2)
    expected = [batches_of(loader) for _ in range(2)]
    iterator = iter(loader_of(whole, 2))
    other = loader_of(whole, 2)
    iterator = iter(other)
    for _ in range(3):
        next(iterator)
    state = other.state_dict()
    loader.load_state_dict(state)
    assert batches_of(loader) == expected[0][3:]
    assert batches_of(loader) == expected[1]


def test_in_global_scope_a_loader_resumes_with_another_number_of_workers(whole: Snapshot) -> None:
    loader = loader_of(whole, 3, shuffle_scope="global")
    iterator = iter(loader)
    before = [next(iterator)[1]["soma_joinid"].tolist() for _ in range(4)]
    for n_workers in (0, 2):
        resumed = loader_of(whole, n_workers, shuffle_scope="global")
        resumed.load_state_dict(loader.state_dict())
        rest = batches_of(resumed)
        assert sorted(np.concatenate(before + rest).tolist()) == list(range(130))
        assert sorted(np.concatenate(batches_of(resumed)).tolist()) == list(range(130))


# Whose position it is -------------------------------------------------------------------------------------


def place_of(stateful: Any) -> tuple[int, int]:
    state = stateful.state_dict()
    return state["epoch"], state["n_yielded"]


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_look_by_another_loader_moves_neither_the_position_nor_the_order(
    whole: Snapshot, n_workers: int
) -> None:
    expected = batches_of(loader_of(whole, n_workers))
    loader = loader_of(whole, n_workers)
    look = experiment_dataloader(loader.dataset)
    next(iter(look))
    iterator = iter(loader)
    found = [next(iterator)[1]["soma_joinid"].tolist() for _ in range(5)]
    next(iter(look))
    assert (place_of(loader), place_of(look)) == ((0, 5), (1, 1))
    assert found == expected[:5]
    later = experiment_dataloader(loader.dataset)
    assert place_of(later) == (2, 0)  # a loader that is made now goes on from what there was


@pytest.mark.parametrize("copied_by", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_dataset_moves_by_itself(whole: Snapshot, copied_by: Callable[[Any], Any]) -> None:
    dataset = dataset_of(whole)
    batches_of(dataset)
    copied = copied_by(dataset)
    assert place_of(copied) == place_of(dataset) == (1, 0)
    iterator = iter(dataset)
    ahead = [next(iterator)[1]["soma_joinid"].tolist() for _ in range(3)]
    assert place_of(copied) == (1, 0)
    assert batches_of(copied)[:3] == ahead
    copied.load_state_dict(dict(copied.state_dict(), epoch=7))
    assert (place_of(copied), place_of(dataset)) == ((7, 0), (1, 3))
    copied.set_epoch(9)
    assert (copied.epoch, dataset.epoch) == (9, 1)


def test_an_iterator_that_is_not_the_newest_does_not_move_the_position(whole: Snapshot) -> None:
    for stateful in (dataset_of(whole), loader_of(whole, 0)):
        old = iter(stateful)
        next(old)
        new = iter(stateful)
        for _ in range(4):
            next(new)
        next(old)
        assert place_of(stateful) == (1, 4)
        del old
        assert place_of(stateful) == (1, 4)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_look_at_one_mini_batch_does_not_use_a_loaded_state_up(whole: Snapshot, n_workers: int) -> None:
    loader = loader_of(whole, n_workers)
    expected = batches_of(loader)
    loader = loader_of(whole, n_workers)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    resumed = loader_of(whole, n_workers)
    resumed.load_state_dict(state)
    for _ in range(2):
        assert next(iter(resumed))[1]["soma_joinid"].tolist() == expected[5]
        assert resumed.state_dict() == state
    assert batches_of(resumed) == expected[5:]
    assert place_of(resumed) == (1, 0)


def test_a_loop_that_takes_one_mini_batch_of_a_new_iterator_at_a_time_goes_on_after_a_resume(
    whole: Snapshot,
) -> None:
    loader = loader_of(whole, 0)
    loader.load_state_dict({**loader.state_dict(), "n_yielded": 3})
    found = [tuple(next(iter(loader))[1]["soma_joinid"]) for _ in range(8)]
    assert len(set(found)) > 3


def test_the_last_mini_batch_of_an_epoch_uses_a_loaded_state_up(whole: Snapshot) -> None:
    loader = loader_of(whole, 0)
    loader.load_state_dict({**loader.state_dict(), "n_yielded": len(loader) - 1})
    next(iter(loader))
    assert place_of(loader) == (1, 0)
    next(iter(loader))
    assert place_of(loader) == (1, 1)


def test_a_state_is_of_no_use_once_another_epoch_was_set(whole: Snapshot) -> None:
    dataset = dataset_of(whole)
    expected = batches_of(dataset)
    loader = experiment_dataloader(dataset)
    for resumed in dataset, loader:
        resumed.load_state_dict({**dataset.state_dict(), "epoch": 0, "n_yielded": 4})
        dataset.set_epoch(2)
        dataset.set_epoch(0)
        assert batches_of(resumed) == expected


def test_a_state_that_a_dataset_has_used_counts_for_its_loader_again(whole: Snapshot) -> None:
    dataset = dataset_of(whole)
    iterator = iter(dataset)
    next(iterator)
    state = dataset.state_dict()
    rest = [obs["soma_joinid"].tolist() for _, obs in iterator]
    dataset.load_state_dict(state)
    assert batches_of(dataset) == rest
    loader = experiment_dataloader(dataset)
    loader.load_state_dict(state)
    assert batches_of(loader) == rest
    dataset.load_state_dict(state)
    dataset.set_epoch(5)
    loader.load_state_dict(state)
    assert batches_of(loader) == rest


@pytest.mark.parametrize("persistent", [False, True])
def test_the_state_of_a_dataset_is_that_of_its_loader_with_workers(whole: Snapshot, persistent: bool) -> None:
    options = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": persistent}
    loader = experiment_dataloader(dataset_of(whole, 130), **options)
    expected = batches_of(loader)
    loader.dataset.set_epoch(0)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.dataset.state_dict()
    assert state == loader.state_dict()
    resumed = experiment_dataloader(dataset_of(whole, 130), **options)
    resumed.dataset.load_state_dict(state)
    assert batches_of(resumed) == expected[5:]
    assert place_of(resumed.dataset) == (1, 0)


def test_iterators_share_no_workers_unless_they_are_kept_and_the_newest_has_those(whole: Snapshot) -> None:
    options = {"num_workers": 1, "multiprocessing_context": "fork"}
    expected = loader_of(whole, 1)
    first, second = batches_of(expected), batches_of(expected)
    loader = experiment_dataloader(dataset_of(whole, 130), persistent_workers=False, **options)
    both = list(zip(loader, loader, strict=True))
    assert [batches_of(found) for found in zip(*both, strict=True)] == [first, second]
    loader = experiment_dataloader(dataset_of(whole, 130), **options)
    old = iter(loader)
    next(old)
    assert batches_of(loader) == second
    with pytest.raises(RuntimeError, match="must be the newest one, but another began since"):
        next(old)
    with pytest.raises(RuntimeError, match="must be the newest one"):
        list(zip(loader, loader, strict=True))


def test_only_workers_know_the_position_where_a_plain_loader_has_some(whole: Snapshot) -> None:
    dataset = dataset_of(whole, 60)
    options = {"num_workers": 1, "multiprocessing_context": "fork", "collate_fn": lambda batch: batch}
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, **options)
    first, second = batches_of(loader), batches_of(loader)
    assert first != second
    assert dataset.epoch == 1
    with pytest.raises(RuntimeError, match=r"must be that of the loader .* take experiment_dataloader or"):
        dataset.state_dict()
    dataset.set_epoch(1)
    assert place_of(dataset) == (1, 0)
    dataset.load_state_dict({**dataset.state_dict(), "n_yielded": 3})
    assert batches_of(loader) == second[3:]
    assert batches_of(loader) not in (second[3:], second)  # a state is taken once, not by each copy


def test_mini_batches_out_of_order_are_refused(whole: Snapshot) -> None:
    with pytest.raises(ValueError, match="in_order=False does not apply to experiment_dataloader, whose"):
        experiment_dataloader(dataset_of(whole), num_workers=1, in_order=False)


# With torchdata -------------------------------------------------------------------------------------------


def stateful_loader_of(snapshot: Snapshot, n_workers: int, persistent: bool) -> Any:
    kept = {"multiprocessing_context": "fork", "persistent_workers": persistent} if n_workers else {}
    dataset = dataset_of(snapshot, 100)
    return StatefulDataLoader(
        dataset, batch_size=None, num_workers=n_workers, collate_fn=lambda batch: batch, **kept
    )


@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (1, False), (2, False), (2, True)])
def test_a_dataset_alone_resumes_in_a_stateful_data_loader(
    whole: Snapshot, n_workers: int, persistent: bool
) -> None:
    loader = stateful_loader_of(whole, n_workers, persistent)
    expected = [batches_of(loader) for _ in range(3)]
    assert expected[0] != expected[1] != expected[2]
    n_batches = len(expected[0])
    for n_yielded in (1, 4, n_batches - 1):
        loader = stateful_loader_of(whole, n_workers, persistent)
        iterator = iter(loader)
        for _ in range(n_yielded):
            next(iterator)
        resumed = stateful_loader_of(whole, n_workers, persistent)
        resumed.load_state_dict(loader.state_dict())
        assert batches_of(resumed) == expected[0][n_yielded:]
        assert [batches_of(resumed) for _ in range(2)] == expected[1:]
    loader = stateful_loader_of(whole, n_workers, persistent)
    batches_of(loader)
    resumed = stateful_loader_of(whole, n_workers, persistent)
    resumed.load_state_dict(loader.state_dict())
    assert batches_of(resumed) == expected[1]


def test_joinids_and_X_stay_together_after_a_resume(store: Store) -> None:
    dataset = store.dataset(batch_size=9, seed=1, shuffle_scope="global", io_batch_size=50)
    iterator = iter(dataset)
    before = [next(iterator) for _ in range(5)]
    resumed = store.dataset(batch_size=9, seed=1, shuffle_scope="global", io_batch_size=50)
    resumed.load_state_dict(dataset.state_dict())
    assert sorted([*joinids_of(before), *joinids_of(resumed)]) == list(range(N_OBS))


def test_a_worker_that_dies_is_named_with_its_cause(whole: Snapshot, tmp_path: Path) -> None:
    import os
    import signal

    loader = loader_of(whole, 2, use_eager_fetch=False, batch_size=1)
    iterator = iter(loader)
    next(iterator)
    os.kill(loader._iterator._workers[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker 1 of 2 \(process \d+\) died by signal 9"):
        for _ in iterator:
            pass
