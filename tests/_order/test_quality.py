from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiledbsoma_ml._order.quality import ShuffleQuality, evenly_spaced, measure_quality

IDS = np.arange(0, 4000, 2)
LABELS = np.repeat(np.arange(8), 250)


def test_a_true_shuffle_has_a_mixing_of_one_and_rows_of_every_tile() -> None:
    shuffled = np.random.default_rng(0).permutation(IDS)
    quality = measure_quality(np.split(shuffled, 20), IDS, LABELS, row_tile=400)
    assert quality.mixing == pytest.approx(1, abs=0.02)
    assert quality.random_entropy_bits == pytest.approx(3, abs=0.1)
    assert quality.tiles_per_batch == 10
    assert quality.n_batches == 20


def test_mini_batches_of_one_label_are_not_mixed_at_all() -> None:
    quality = measure_quality(np.split(IDS, 16), IDS, LABELS, row_tile=250)
    assert (quality.mixing, quality.entropy_bits, quality.tiles_per_batch) == (0, 0, 1)


def test_two_labels_in_equal_parts_are_one_bit() -> None:
    batches = [np.concatenate([IDS[:50], IDS[-50:]])]
    assert measure_quality(batches, IDS, LABELS, row_tile=1).entropy_bits == 1
    assert measure_quality(batches, IDS, LABELS, row_tile=1).tiles_per_batch == 100


def test_labels_that_are_all_the_same_are_mixed_and_so_is_nothing() -> None:
    assert measure_quality(np.split(IDS, 4), IDS, np.zeros(2000, dtype=np.int64), 1).mixing == 1
    nothing = ShuffleQuality(
        mixing=1.0, entropy_bits=0.0, random_entropy_bits=0.0, tiles_per_batch=0.0, n_batches=0
    )
    assert measure_quality([], IDS, LABELS, 1) == nothing


@given(
    lengths=st.lists(st.integers(0, 30), max_size=12),
    batch_size=st.integers(1, 12),
    n_batches=st.integers(1, 40),
)
def test_mini_batches_are_taken_evenly_from_the_first_to_the_last(
    lengths: list[int], batch_size: int, n_batches: int
) -> None:
    n_rows = sum(lengths)
    batches = np.split(np.arange(n_rows), np.cumsum(lengths)[:-1]) if lengths else []
    found = [rows.tolist() for rows in evenly_spaced(batches, batch_size, n_rows, n_batches)]
    total = -(-n_rows // batch_size)
    numbers = [rows[0] // batch_size for rows in found]
    assert len(found) == min(n_batches, total)
    for number, rows in zip(numbers, found, strict=True):
        assert rows == list(range(number * batch_size, min((number + 1) * batch_size, n_rows)))
    if len(found) > 1:
        gaps = np.diff(numbers)
        assert (numbers[0], numbers[-1]) == (0, total - 1)
        assert max(gaps) - min(gaps) <= 1
