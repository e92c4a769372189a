from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from stores import N_VARS, expected_X
from tiledbsoma_ml._batch.assemble import Assembly, DeviceShuffle
from tiledbsoma_ml._batch.read_ahead import Piece
from tiledbsoma_ml._rows import Padding, Rows


def pieces_of(*sizes: int) -> Iterator[Piece]:
    """Yield rows 0, 1, … of the test experiments, in pieces of these sizes, each read by itself."""
    borders = np.cumsum([0, *sizes])
    for start, stop in pairwise(borders):
        ids = np.arange(start, stop)
        X = sparse.csr_matrix(expected_X(ids, range(N_VARS)))
        yield Rows.from_scipy(ids, X, pd.DataFrame({"soma_joinid": ids})), True


def joinids(mini_batches: Any) -> list[list[int]]:
    return [obs["soma_joinid"].tolist() for _, obs in mini_batches]


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 9), max_size=5),
    batch_size=st.integers(1, 12),
    is_sparse=st.booleans(),
    eager=st.booleans(),
    device=st.sampled_from([None, torch.device("cpu")]),
)
def test_mini_batches_run_on_across_pieces_and_hold_their_own_rows(
    sizes: list[int], batch_size: int, is_sparse: bool, eager: bool, device: torch.device | None
) -> None:
    assembly = Assembly(batch_size=batch_size, is_sparse=is_sparse, use_eager_fetch=eager, device=device)
    found = list(assembly.mini_batches(pieces_of(*sizes)))
    rows = np.arange(sum(sizes))
    assert joinids(found) == [rows[k : k + batch_size].tolist() for k in range(0, len(rows), batch_size)]
    for X, obs in found:
        dense = X.to_dense().numpy() if isinstance(X, torch.Tensor) else X.toarray() if is_sparse else X
        expected = expected_X(obs["soma_joinid"], range(N_VARS))
        np.testing.assert_array_equal(dense.reshape(expected.shape), expected)
        assert dense.shape == ((N_VARS,) if batch_size == 1 and not is_sparse else expected.shape)


def test_draws_of_mini_batches_that_came_before_are_passed_over() -> None:
    def shuffled(n_earlier: int, *sizes: int) -> list[list[int]]:
        shuffle = DeviceShuffle(unit="mini_batch", seed=3, epoch=1, n_earlier=n_earlier)
        assembly = Assembly(batch_size=5, is_sparse=False, device=torch.device("cpu"), shuffle=shuffle)
        return joinids(assembly.mini_batches(pieces_of(*sizes)))

    whole, rest = shuffled(0, 20), shuffled(2, 10)
    assert [[row - 10 for row in batch] for batch in whole[2:]] == rest
    assert shuffled(0, 10) != rest


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_rows_that_fill_up_are_marked_in_their_mini_batches(device: torch.device | None) -> None:
    padding = Padding(column_name="is_padding", obs_joinids=np.array([5, 6]))
    assembly = Assembly(batch_size=4, is_sparse=True, padding=padding, device=device)
    marked = [obs["is_padding"].tolist() for _, obs in assembly.mini_batches(pieces_of(3, 4))]
    assert marked == [[False] * 4, [False, True, True]]


def test_leaving_midway_ends_the_pieces() -> None:
    ended = []

    def pieces() -> Iterator[Piece]:
        try:
            yield from pieces_of(5, 5, 5)
        finally:
            ended.append(True)

    mini_batches = Assembly(batch_size=2, is_sparse=False).mini_batches(pieces())
    next(mini_batches)
    mini_batches.close()
    assert ended == [True]
