from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from matrix_source import MatrixSource, matrix_source
from snapshots import dense_of, make
from stores import DTYPES, N_VARS, expected_X
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.compressed import CompressedLayer
from tiledbsoma_ml.snapshot.stored_layers import ShardSizes

SIZES = {"one shard": ShardSizes(), "a shard a tile": ShardSizes(min_bytes=1, min_number=1000)}


def random_matrix(seed: int, n_rows: int, n_cols: int, dtype: str, density: float) -> sparse.csr_matrix:
    """Return a matrix with values of all sizes, and rows and whole tiles without any."""
    rng = np.random.default_rng(seed)
    n = rng.binomial(min(n_cols, 400), density, n_rows)
    n[rng.random(n_rows) < 0.2] = 0
    n[64:128] *= rng.integers(2)
    rows = np.repeat(np.arange(n_rows), n)
    columns = np.concatenate([np.sort(rng.choice(n_cols, k, replace=False)) for k in n] or [[]])
    width = 8 * np.dtype(dtype).itemsize
    sizes = 2.0 ** rng.integers(0, {"f": 24, "u": width, "i": width - 1}[np.dtype(dtype).kind], len(rows))
    values = (sizes - 1).astype(dtype)
    if np.dtype(dtype).kind != "u" and rng.integers(2):
        values[::5] *= -1
    if np.dtype(dtype).kind == "f" and rng.integers(2):
        values[::7] /= 3
    return sparse.csr_matrix((values, (rows, columns.astype(int))), shape=(n_rows, n_cols))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    n_rows=st.sampled_from([0, 1, 63, 64, 65, 130, 200]),
    n_cols=st.sampled_from([1, 7, 300, 70_000]),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.1, 0.9]),
    sizes=st.sampled_from(list(SIZES)),
    data=st.data(),
)
def test_rows_are_those_of_a_snapshot_that_is_not_compressed(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    n_rows: int,
    n_cols: int,
    dtype: str,
    density: float,
    sizes: str,
    data: st.DataObject,
) -> None:
    source = MatrixSource(
        random_matrix(seed, n_rows, n_cols, dtype, density), pd.DataFrame(index=range(n_rows))
    )
    folder = tmp_path_factory.mktemp("compressed")
    plain, compressed = (
        make(folder / str(name), source, shards=SIZES[sizes], compression=name) for name in (None, "zstd")
    )
    compressed.verify()
    if n_rows:
        assert (plain.compression, compressed.compression) == (None, "zstd")
    assert compressed.nnz == plain.nnz
    columns = data.draw(st.lists(st.integers(0, n_cols - 1), unique=True, max_size=5) | st.none())
    of_columns = None if columns is None else np.array(columns, np.int64)
    readers = [snapshot.reader(None, of_columns) for snapshot in (plain, compressed)]
    for _ in range(2):
        asked = data.draw(st.lists(st.integers(0, n_rows - 1), max_size=90)) if n_rows else []
        assert_same_rows(*readers, np.array(asked, np.int64))


def assert_same_rows(plain: Any, compressed: Any, rows: np.ndarray) -> None:
    X, other = plain.csr(rows), compressed.csr(rows)
    for name in ("indptr", "indices", "data"):
        found, expected = getattr(other, name), getattr(X, name)
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()
    assert dense_of(compressed, rows).tobytes() == dense_of(plain, rows).tobytes()
    for read, expected_read in zip(compressed.read(rows), plain.read(rows), strict=True):
        assert read.obs_joinids.tolist() == expected_read.obs_joinids.tolist()
        assert read.X.indices.dtype == expected_read.X.indices.dtype
        np.testing.assert_array_equal(read.X.indices, expected_read.X.indices)
        assert read.X.data.tobytes() == expected_read.X.data.tobytes()
        pd.testing.assert_frame_equal(read.obs, expected_read.obs)


@pytest.mark.parametrize("cache_bytes", [0, 4000, 2**25])
def test_rows_are_the_same_whatever_is_kept_of_earlier_ones(
    compressed: Snapshot, whole: Snapshot, cache_bytes: int
) -> None:
    [layer] = compressed._manifest.layers
    few = CompressedLayer(compressed.path, layer, compressed.shape[1], cache_bytes=cache_bytes)
    rng = np.random.default_rng(0)
    from tiledbsoma_ml._batch.gather import ShardColumns

    X = ShardColumns(few, None)
    for n in (1, 2, 5, 400, 1, 30):
        rows = rng.integers(0, len(whole), n)
        np.testing.assert_array_equal(X.csr(rows).toarray(), whole[rows][0].toarray())


def test_a_read_decodes_each_block_once_and_gives_its_rows_out_in_pieces(compressed: Snapshot) -> None:
    rows = np.random.default_rng(0).permutation(len(compressed))
    pieces = list(compressed.reader().read_at_once(rows, 100))
    assert [len(piece) for piece in pieces] == [*3 * [*8 * [12], 4], 11]
    assert np.concatenate([piece.obs_joinids for piece in pieces]).tolist() == rows.tolist()


def test_several_sources_and_layers_are_compressed_alike(make_store: Any, tmp_path: Path) -> None:
    sources = [matrix_source(), matrix_source(n_obs=100)]
    both = make(tmp_path / "both", sources, compression="zstd")
    both.verify()
    rows = np.array([410, 0, 311, 310])
    np.testing.assert_array_equal(both[rows][0].toarray(), expected_X([99, 0, 0, 310], range(N_VARS)))
    assert both[rows][1]["soma_source"].tolist() == [1, 0, 1, 0]

    two = make(tmp_path / "two", make_store(layers=["raw", "other"]), layers=["other"], compression="zstd")
    assert [layer.compression for layer in two._manifest.layers] == ["zstd", "zstd"]
    other = two.reader(layer_name="other").csr(two.obs_joinids)
    np.testing.assert_array_equal(other.toarray(), two.to_anndata().layers["other"].toarray())
    assert other.nnz == two.nnz
