"""Mixing that is predicted, and mixing that was drawn."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._order.mixing import Labels, Sharing, predicted_mixing
from tiledbsoma_ml._order.plan import EpochPart, PartPlan, Plan
from tiledbsoma_ml._order.quality import evenly_spaced
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import Partition

CENSUS = Path(__file__).parents[3] / "shared" / "data" / "census_obs_23945.parquet"

CLOSE = 0.03
"""Largest difference of predicted and drawn mixing."""


def datasets(n_rows: int, n_labels: int, seed: int) -> NDArray[np.int64]:
    """Return labels that lie one after the other, of log-normal size, like the datasets of the Census."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0.0, 1.5, n_labels)
    stops = np.round(np.cumsum(sizes) / sizes.sum() * n_rows).astype(int)
    return np.repeat(rng.permutation(n_labels), np.diff(stops, prepend=0))


def planned(
    world_size: int, num_workers: int, n_rows: int = 0, joinids: Any = None, **options: Any
) -> PartPlan:
    plan = Plan(**{"batch_size": 128, "permutes": True, **options})
    partition = Partition(0, world_size, 0, max(1, num_workers))
    ids = QueryIDs(obs_joinids=np.arange(n_rows) if joinids is None else joinids, var_joinids=[0])
    return plan.of(EpochPart(ids=ids, partition=partition, seed=1, epoch=0))


def entropy(labels: NDArray[np.int64]) -> float:
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log(share)).sum())


def at_random(labels: NDArray[np.int64], size: int) -> float:
    """Return the mean entropy of mini-batches that are drawn from all rows."""
    rng = np.random.default_rng(0)
    return float(np.mean([entropy(labels[rng.choice(len(labels), size, replace=False)]) for _ in range(200)]))


def drawn(part: PartPlan, labels: NDArray[np.int64], n_epochs: int) -> tuple[float, float]:
    """Return the mean entropy of the mini-batches of all ranks, and of global batches, in several epochs."""
    joinids, of_batches, of_global = part.part.ids.obs_joinids, [], []
    for epoch in range(n_epochs):
        of_epoch = part.plan.of(attrs.evolve(part.part, epoch=epoch))
        ranks = [evenly_spaced(of_epoch, rank, 12) for rank in range(part.part.partition.world_size)]
        labels_of_ranks = [[labels[np.searchsorted(joinids, rows)] for rows in rank] for rank in ranks]
        steps = list(zip(*labels_of_ranks, strict=True))
        of_batches += [entropy(batch) for step in steps for batch in step]
        of_global += [entropy(np.concatenate(step)) for step in steps]
    return float(np.mean(of_batches)), float(np.mean(of_global))


# Predictions and orders that were drawn -------------------------------------------------------------------

SIZES = [(64, 65_536), (64, 4096), (1024, 16_384), (2048, 2**20)]


@pytest.mark.parametrize("scope", ["partition", "global"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 16])
def test_the_prediction_for_known_labels_is_what_is_drawn(world_size: int, scope: Any) -> None:
    n_rows = 60_000
    labels = datasets(n_rows, 300, seed=world_size)
    known, random = Labels.of_rows(labels), (at_random(labels, 128), at_random(labels, 128 * world_size))
    for num_workers, (chunk, window) in product([0, 1, 4], SIZES):
        sizes = {"shuffle_chunk_size": chunk, "io_batch_size": window}
        part = planned(world_size, num_workers, n_rows, scope=scope, **sizes)
        predicted = part.predicted_mixing(known), part.predicted_mixing(known, "global")
        found = np.divide(drawn(part, labels, n_epochs=3 + 12 // world_size), random).tolist()
        assert predicted == pytest.approx(found, abs=CLOSE), (num_workers, chunk, window)


@pytest.mark.parametrize(("world_size", "scope"), [(1, "global"), (8, "global"), (4, "partition")])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_auto_mixes_as_it_predicts_and_as_well_as_the_defaults(
    world_size: int, scope: Any, share: float
) -> None:
    labels = datasets(100_000, 300, seed=3)
    rows = np.flatnonzero(np.random.default_rng(0).random(100_000) < share)  # scattered, or all
    labels = labels[rows]
    layout = Layout(2048, 100.0, len(rows) // 3)
    options = {"scope": scope, "joinids": rows, "batch_size": 64}
    auto, defaults = (
        planned(world_size, 0, **options, **sizes)
        for sizes in (
            {"shuffle_chunk_size": "auto", "io_batch_size": "auto", "layout": layout},
            {"shuffle_chunk_size": 64, "io_batch_size": 65_536},
        )
    )
    random = at_random(labels, 64)
    of_auto, of_defaults = (drawn(part, labels, n_epochs=6)[0] / random for part in (auto, defaults))
    assert auto.predicted_mixing(Labels.of_rows(labels)) == pytest.approx(of_auto, abs=CLOSE)
    assert of_auto > of_defaults - CLOSE


# A window holds the share of a rank here, but not the query.
def test_many_ranks_that_share_few_rows_do_not_take_whole_tiles() -> None:
    labels = datasets(200_000, 300, seed=0)
    options = {"scope": "global", "batch_size": 1024, "io_batch_size": "auto", "n_rows": 200_000}
    part = planned(8, 0, **options, shuffle_chunk_size="auto", layout=Layout(2048, 100.0, 10**6))
    known = Labels.of_rows(labels)
    tiles = predicted_mixing(part.sharing, chunk_rows=2048, window_rows=10**6, labels=known)
    found = drawn(part, labels, n_epochs=2)[0] / at_random(labels, 1024)
    assert tiles < 0.8 < 0.9 < found
    assert part.predicted_mixing(known) == pytest.approx(found, abs=CLOSE)


@pytest.mark.realdata
@pytest.mark.skipif(not CENSUS.exists(), reason=f"there is no {CENSUS}")
def test_labels_of_the_real_census_mix_as_predicted() -> None:
    obs = pd.read_parquet(CENSUS, columns=["dataset_id"])
    labels = pd.factorize(obs["dataset_id"])[0].astype(np.int64)
    random, known = at_random(labels, 128), Labels.of_rows(labels)
    for world_size, scope in product([1, 4, 8], ["partition", "global"]):
        part = planned(
            world_size, 0, n_rows=len(labels), shuffle_chunk_size=256, io_batch_size=4096, scope=scope
        )
        found = drawn(part, labels, n_epochs=3 + 12 // world_size)[0] / random
        assert part.predicted_mixing(known) == pytest.approx(found, abs=CLOSE), (world_size, scope)


# What a prediction says, whatever the labels --------------------------------------------------------------


# "How well a window mixes" in shared/design.md, for mini-batches of 1,024: rows of chunks and windows.
@pytest.mark.parametrize(
    ("chunk_rows", "window_rows", "mixing"),
    [
        (64, 65_536, 0.96),
        (2048, 65_536, 0.59),
        (2048, 340_000, 0.83),
        (1024, 340_000, 0.89),
        (512, 340_000, 0.94),
        (256, 340_000, 0.97),
    ],
)
def test_the_model_mixes_like_the_simulated_census(chunk_rows: int, window_rows: int, mixing: float) -> None:
    large = Sharing(n_rows=20_000_000, batch_size=1024)
    found = predicted_mixing(large, chunk_rows=chunk_rows, window_rows=window_rows)
    assert found == pytest.approx(mixing, abs=0.04)


sharings = st.builds(
    Sharing,
    n_rows=st.integers(10**5, 10**7),
    batch_size=st.integers(1, 5000),
    scope=st.sampled_from(["partition", "global"]),
    world_size=st.integers(1, 16),
    n_workers=st.integers(1, 4),
)


@settings(max_examples=60)
@given(sharing=sharings, chunk=st.integers(1, 3000), window=st.integers(1, 10**6), factor=st.integers(1, 20))
def test_larger_windows_and_shorter_chunks_mix_no_worse_and_never_better_than_at_random(
    sharing: Sharing, chunk: int, window: int, factor: int
) -> None:
    window = max(window, chunk)
    mixing = predicted_mixing(sharing, chunk_rows=chunk, window_rows=window)
    larger = predicted_mixing(sharing, chunk_rows=chunk, window_rows=window * factor)
    shorter = predicted_mixing(sharing, chunk_rows=max(1, chunk / factor), window_rows=window)
    assert 0 <= mixing <= min(larger, shorter) + CLOSE
    assert max(larger, shorter) <= 1


@given(sharing=sharings, chunk=st.integers(1, 3000))
def test_one_process_whose_window_holds_the_query_mixes_as_at_random(sharing: Sharing, chunk: int) -> None:
    alone = attrs.evolve(sharing, world_size=1, n_workers=1)
    assert predicted_mixing(alone, chunk_rows=chunk, window_rows=sharing.n_rows) == 1


@given(sharing=sharings, window=st.integers(1, 10**6))
def test_single_rows_of_the_whole_query_mix_as_at_random(sharing: Sharing, window: int) -> None:
    dealt = attrs.evolve(sharing, scope="global")
    assert predicted_mixing(dealt, chunk_rows=1, window_rows=window) == 1


@settings(max_examples=30)
@given(sharing=sharings, chunk=st.integers(1, 3000), window=st.integers(1, 10**6))
def test_workers_do_not_matter_in_the_scope_global(sharing: Sharing, chunk: int, window: int) -> None:
    shares = (attrs.evolve(sharing, scope="global", n_workers=n) for n in (1, 4))
    one, four = (predicted_mixing(share, chunk_rows=chunk, window_rows=window) for share in shares)
    assert one == four


def test_a_part_with_one_label_is_not_mixed_though_its_rows_are() -> None:
    labels = Labels.of_rows(np.repeat(np.arange(8), 2500))
    sharing = Sharing(n_rows=20_000, batch_size=128, world_size=8)
    assert predicted_mixing(sharing, chunk_rows=1, window_rows=10**6, labels=labels) == pytest.approx(
        0, abs=1e-3
    )
    together = predicted_mixing(sharing, chunk_rows=1, window_rows=10**6, labels=labels, batches="global")
    assert together == pytest.approx(1, abs=1e-3)


def test_the_ranks_of_the_scope_partition_differ_and_their_mean_is_what_is_said_of_all() -> None:
    labels = Labels.of_rows(np.concatenate([np.zeros(10_000, dtype=np.int64), np.arange(10_000) // 1000]))
    sharing = Sharing(n_rows=20_000, batch_size=128, world_size=2)
    of_ranks = [
        predicted_mixing(sharing, chunk_rows=1, window_rows=10**6, labels=labels, batches=rank)
        for rank in (0, 1)
    ]
    assert of_ranks[0] < 1e-3 < 1 < of_ranks[1]
    mean = predicted_mixing(sharing, chunk_rows=1, window_rows=10**6, labels=labels)
    assert mean == pytest.approx(sum(of_ranks) / 2, abs=1e-6)


def test_labels_that_are_all_the_same_are_mixed_and_so_is_nothing() -> None:
    same = Labels.of_rows(np.zeros(1000, dtype=np.int64))
    assert (
        predicted_mixing(Sharing(n_rows=1000, batch_size=8), chunk_rows=8, window_rows=16, labels=same) == 1
    )
    assert predicted_mixing(Sharing(n_rows=0, batch_size=8), chunk_rows=8, window_rows=16) == 1


def test_rows_that_are_not_shuffled_are_as_mixed_as_neighbours() -> None:
    labels = np.repeat(np.arange(30), 300)
    part = planned(1, 0, n_rows=9_000, shuffle_chunk_size=None, io_batch_size=1024, permutes=False)
    found = drawn(part, labels, n_epochs=1)[0] / at_random(labels, 128)
    assert part.predicted_mixing(Labels.of_rows(labels)) == pytest.approx(found, abs=CLOSE)


@given(codes=st.lists(st.integers(-1, 3), min_size=1, max_size=30), n_parts=st.integers(1, 6))
def test_runs_are_cut_where_parts_begin(codes: list[int], n_parts: int) -> None:
    cut, part = Labels.of_rows(np.array(codes)).cut(n_parts)
    assert cut.starts.tolist() == [0, *cut.stops[:-1]]
    assert cut.stops[-1] == len(codes)
    middles = (cut.starts + cut.stops) / 2
    assert part.tolist() == np.floor(middles / (len(codes) / n_parts)).tolist()
    names = np.unique(codes)
    assert [codes[int(middle)] for middle in middles] == names[cut.codes].tolist()
