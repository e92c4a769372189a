from __future__ import annotations

from itertools import product
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._order.plan import EpochPart, PartPlan, Plan
from tiledbsoma_ml._order.quality import ShuffleQuality, evenly_spaced, quality_of
from tiledbsoma_ml._query_ids import Partition

IDS = np.arange(0, 4000, 2)
LABELS = np.repeat(np.arange(8), 250)


def planned(
    joinids: NDArray[np.int64] = IDS, rank: int = 0, world_size: int = 1, n_workers: int = 1, **options: Any
) -> PartPlan:
    sizes = {"shuffle_chunk_size": 1, "io_batch_size": 10**6, "batch_size": 100, "permutes": True}
    plan = Plan(**{**sizes, **options})
    ids = QueryIDs(obs_joinids=joinids, var_joinids=[0])
    return plan.of(EpochPart(ids=ids, partition=Partition(rank, world_size, 0, n_workers), seed=1, epoch=0))


UNSHUFFLED = {"shuffle_chunk_size": None, "permutes": False}


def measured(part: PartPlan, labels: Any = LABELS, row_tile: int = 400) -> ShuffleQuality:
    return quality_of(part, pd.Series(labels), row_tile=row_tile, n_batches=1000)


# What is measured -----------------------------------------------------------------------------------------


def test_a_true_shuffle_has_a_mixing_of_one_and_rows_of_every_tile() -> None:
    quality = measured(planned())
    assert quality.mixing == pytest.approx(1, abs=0.02)
    assert quality.global_mixing == pytest.approx(1, abs=0.02)
    assert quality.random_entropy_bits == pytest.approx(3, abs=0.1)
    assert (quality.predicted_mixing, quality.tiles_per_batch, quality.n_batches) == (1, 10, 20)


def test_mini_batches_of_one_label_are_not_mixed_at_all() -> None:
    quality = measured(planned(batch_size=125, **UNSHUFFLED), row_tile=250)
    assert (quality.mixing, quality.entropy_bits, quality.tiles_per_batch) == (0, 0, 1)


def test_two_labels_in_equal_parts_are_one_bit() -> None:
    quality = measured(planned(IDS[:100], **UNSHUFFLED), np.repeat([0, 1], 50), row_tile=1)
    assert (quality.entropy_bits, quality.tiles_per_batch) == (1, 100)


def test_labels_that_are_all_the_same_are_mixed_and_so_is_nothing() -> None:
    assert measured(planned(), np.zeros(2000)).mixing == 1
    assert measured(planned(IDS[:0]), []) == ShuffleQuality(
        mixing=1.0,
        predicted_mixing=1.0,
        global_mixing=1.0,
        entropy_bits=0.0,
        random_entropy_bits=0.0,
        tiles_per_batch=0.0,
        n_batches=0,
    )


def test_a_rank_that_has_one_label_is_compared_with_the_whole_query() -> None:
    of_ranks = [measured(planned(rank=rank, world_size=8)) for rank in range(8)]
    for quality in of_ranks:
        assert quality.mixing == 0
        assert quality.predicted_mixing == pytest.approx(0, abs=1e-3)
        assert quality.global_mixing == pytest.approx(1, abs=0.02)
    dealt = measured(planned(rank=3, world_size=8, scope="global"))
    assert dealt.mixing == pytest.approx(1, abs=0.03)


def test_workers_that_have_one_label_each_mix_it_with_nothing() -> None:
    assert measured(planned(n_workers=8)).mixing == 0
    assert measured(planned(n_workers=8, scope="global")).mixing == pytest.approx(1, abs=0.02)


def test_labels_belong_to_the_rows_of_the_query_whatever_their_order() -> None:
    order = np.random.default_rng(0).permutation(len(IDS))
    for options in ({}, {"world_size": 4}):
        found, expected = (
            attrs.asdict(measured(planned(joinids, scope="global", **options), labels))
            for joinids, labels in ((IDS[order], LABELS[order]), (IDS, LABELS))
        )
        assert found == pytest.approx(expected, abs=0.03)


def test_a_missing_label_is_a_label() -> None:
    labels = pd.Series(["a", None, "b", "b"] * 500)
    for column in (labels, labels.astype("category")):
        assert quality_of(planned(), column, row_tile=1, n_batches=5).entropy_bits > 1.3


# Which mini-batches are measured --------------------------------------------------------------------------


@given(
    n_rows=st.integers(1, 300),
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 3),
    n_workers=st.integers(1, 3),
    scope=st.sampled_from(["partition", "global"]),
    n_batches=st.integers(1, 40),
)
def test_mini_batches_are_taken_evenly_from_the_first_to_the_last_of_workers_in_turn(
    n_rows: int, batch_size: int, world_size: int, n_workers: int, scope: Any, n_batches: int
) -> None:
    options = {"world_size": world_size, "n_workers": n_workers, "scope": scope, "batch_size": batch_size}
    part = planned(np.arange(n_rows), **options)
    for rank in range(world_size):
        whole = [rows.tolist() for rows in evenly_spaced(part, rank, 10**6)]
        of_workers = [
            [rows.tolist() for rows in mini_batches_of_worker(part, rank, worker)]
            for worker in range(n_workers)
        ]
        turns = product(range(max(map(len, of_workers), default=0)), range(n_workers))
        assert whole == [of_workers[k][number] for number, k in turns if number < len(of_workers[k])]
        found = [rows.tolist() for rows in evenly_spaced(part, rank, n_batches)]
        steps = np.linspace(0, len(whole) - 1, min(n_batches, len(whole))).round().astype(int)
        assert found == [whole[step] for step in steps.tolist()]


def mini_batches_of_worker(part: PartPlan, rank: int, worker: int) -> list[NDArray[np.int64]]:
    """Return the mini-batches of a worker."""
    partition = attrs.evolve(part.part.partition, rank=rank, worker_id=worker)
    io_batches = list(part.plan.of(attrs.evolve(part.part, partition=partition)).io_batches())
    rows = np.concatenate([np.empty(0, dtype=np.int64), *io_batches])
    return [rows[k : k + part.plan.batch_size] for k in range(0, len(rows), part.plan.batch_size)]
