from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiledbsoma as soma
from hypothesis import given
from hypothesis import strategies as st

from snapshots import dense_of, make, write_entries
from stores import DTYPES, MEASUREMENT, expected_X
from tiledbsoma_ml.snapshot import shards as _snapshot_shards


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_keeps_its_dtype_and_every_value(make_store: Any, folder: Path, dtype: str) -> None:
    n_obs = 12 if np.dtype(dtype).itemsize == 1 else 30
    typed = make_store(dtype=dtype, obs_joinids=range(n_obs), n_vars=9)
    X, _ = make(folder / f"{dtype}.snapshot", typed)[:]
    assert X.dtype == dtype
    np.testing.assert_array_equal(X.toarray(), expected_X(range(n_obs), range(9), dtype))


EDGES = {
    "u1": [0, 255],
    "u2": [256, 65_535],
    "u4": [65_536, 2**24, 2**24 + 1, 2**32 - 1],
    "i1": [-1, -128, 127],
    "i2": [-129, 200, -32_768],
    "i4": [-32_769, 60_000, -(2**31)],
    "f4": [0.5, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38, -1.0, 2.0**33],
}


@pytest.mark.parametrize(
    ("dtype", "kinds", "stored"),
    [
        ("float32", ["u1"], "|u1"),
        ("float32", ["u1", "u2"], "<u2"),
        ("float32", ["u4"], "<f4"),
        ("float32", ["u2", "f4"], "<f4"),
        ("float64", ["u1", "u2"], "<u2"),
        ("float64", ["u2", "f4"], "<f4"),
        ("float64", ["u4"], "<u4"),
        ("float64", ["u4", "f4"], "<f8"),
        ("int64", ["u1", "u2"], "<u2"),
        ("int64", ["i1"], "|i1"),
        ("int64", ["u1", "i1"], "<i2"),
        ("int32", ["i1", "i2"], "<i2"),
        ("int64", ["i4", "u2"], "<i4"),
        ("int64", ["u4"], "<u4"),
        ("int64", ["i1", "u4"], "<i8"),
        ("uint64", ["u1", "u4"], "<u4"),
        ("int16", ["u1", "i1"], "<i2"),
    ],
)
def test_values_are_stored_in_the_smallest_type_that_holds_all_of_a_shard_bit_for_bit(
    make_store: Any, tmp_path: Path, dtype: str, kinds: list[str], stored: str
) -> None:
    values = np.concatenate([np.array(EDGES[kind]).astype(kind).astype(dtype) for kind in kinds])
    typed = make_store(dtype=dtype, obs_joinids=range(70), n_vars=2)
    everywhere = np.zeros((70, 2), dtype)
    everywhere[: len(values), 0] = values
    with soma.SparseNDArray.open(f"{typed.uri}/ms/{MEASUREMENT}/X/raw", "w") as X:
        write_entries(X, *np.divmod(np.arange(2 * 70), 2), everywhere.ravel())
    snapshot = make(tmp_path / "edges.snapshot", typed)
    [layer] = snapshot._manifest.layers
    assert [shard.data_dtype for shard in layer.shards] == [stored, "|u1"]
    reader = snapshot.reader()
    rows = snapshot.obs_joinids[: len(values)]
    for found in (reader.csr(rows)[:, 0].data, reader.rows(rows).X.data[::2], dense_of(reader, rows)[:, 0]):
        assert found.dtype == dtype
        assert found.tobytes() == values.tobytes()


@given(
    parts=st.lists(st.lists(st.integers(-40_000, 2**33) | st.integers(-200, 300), min_size=1), max_size=3),
    dtype=st.sampled_from(DTYPES),
    factor=st.sampled_from([1.0, 0.5, 0.1]),
)
def test_the_type_of_a_shard_holds_every_value_and_no_smaller_one_does(
    parts: list[list[int]], dtype: str, factor: float
) -> None:
    scale = factor if np.dtype(dtype).kind == "f" else 1
    arrays = [(np.array(part) * scale).astype(dtype) for part in parts]
    kept = [array.astype(_snapshot_shards.narrowest_dtype(array)) for array in arrays]
    chosen = _snapshot_shards.common_dtype(kept, np.dtype(dtype))

    def holds(name: str) -> bool:
        with np.errstate(all="ignore"):
            return all(array.astype(name).astype(dtype).tobytes() == array.tobytes() for array in arrays)

    assert holds(chosen.name)
    names = {
        "f": ["u1", "u2", "u4", "f4"],
        "u": ["u1", "u2", "u4"],
        "i": ["u1", "i1", "u2", "i2", "u4", "i4"],
    }
    for name in names[np.dtype(dtype).kind]:
        if np.dtype(name).itemsize < chosen.itemsize:
            # A cast that wraps and wraps back is no sign that a type holds a value.
            limits = np.iinfo(name) if name != "f4" else None
            inside = limits is None or all(limits.min <= a.min() and a.max() <= limits.max for a in arrays)
            assert not (inside and holds(name))


def test_more_columns_than_16_bits_number_are_kept(make_store: Any, tmp_path: Path) -> None:
    wide = make_store(obs_joinids=range(3), n_vars=70_000, tile=(64, 70_000))
    snapshot = make(tmp_path / "wide.snapshot", wide)
    assert snapshot._manifest.layers[0].indices_dtype == "<u4"
    np.testing.assert_array_equal(snapshot[:][0].toarray(), expected_X(range(3), range(70_000)))
    few = np.array([69_999, 4, 65_536])
    X = snapshot.reader(None, few).rows(np.array([2, 0])).X
    assert X.indices.dtype == np.uint16
    np.testing.assert_array_equal(X.slice_tonumpy(slice(None)), expected_X([2, 0], few))
