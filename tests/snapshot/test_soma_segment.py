from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshots import add_array, make
from stores import N_OBS, N_VARS, expected_X


def test_further_layers_and_obsm_sparse_or_dense_are_kept(make_store: Any, tmp_path: Path) -> None:
    rich = make_store()
    scaled = expected_X(range(N_OBS), range(N_VARS), np.float64) / 3 - 0.25
    pca = np.random.default_rng(0).normal(size=(N_OBS, 5)).astype(np.float32)
    add_array(rich, "X", "scaled", scaled, dense=True)
    add_array(rich, "obsm", "pca", pca, dense=True)
    add_array(rich, "obsm", "umap", pca[:, :2].astype(np.float64))
    options = {"layer_name": "raw", "layers": ["scaled"], "obsm": ["pca", "umap"]}
    snapshot = make(tmp_path / "rich.snapshot", rich, slice(50, 250), [2, 3, 8], **options)
    assert snapshot.layer_names == ("raw", "scaled")
    X = snapshot.reader(layer_name="scaled").csr(np.array([249, 50]))
    assert X.toarray().tobytes() == scaled[[249, 50]][:, [2, 3, 8]].tobytes()
    np.testing.assert_array_equal(snapshot.obsm["pca"], pca[50:251])
    np.testing.assert_array_equal(snapshot.obsm["umap"], pca[50:251, :2].astype(np.float64))
    adata = snapshot.to_anndata([200, 0])
    np.testing.assert_array_equal(adata.layers["scaled"].toarray(), scaled[[250, 50]][:, [2, 3, 8]])
    np.testing.assert_array_equal(adata.obsm["pca"], pca[[250, 50]])
    snapshot.verify()
    with pytest.raises(ValueError, match=r"layer_name='norm' must be a layer in the snapshot"):
        snapshot.reader(layer_name="norm")


def test_a_dense_layer_is_read_like_a_sparse_one(make_store: Any, tmp_path: Path) -> None:
    dense = make_store(dense=True, dtype=np.int32)
    X, _ = make(tmp_path / "dense.snapshot", dense, slice(3, 200))[:]
    np.testing.assert_array_equal(X.toarray(), expected_X(range(3, 201), range(N_VARS)))
