from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma

from tiledbsoma_ml import simulate
from tiledbsoma_ml.simulate import simulate_cells, simulate_experiment


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return simulate_cells(n_cells=3_000, n_genes=200, seed=1)


def test_counts_are_whole_numbers_in_a_sparse_matrix(cells: anndata.AnnData) -> None:
    assert cells.X.format == "csr"
    assert cells.X.dtype == np.float32
    assert cells.X.shape == (3_000, 200)
    assert cells.X.data.min() >= 1
    np.testing.assert_array_equal(cells.X.data, np.round(cells.X.data))


def test_every_cell_has_molecules_and_a_complete_obs(cells: anndata.AnnData) -> None:
    assert np.asarray(cells.X.sum(axis=1)).min() > 0
    assert list(cells.obs) == ["cell_type", "dataset_id", "donor_id", "assay"]
    assert not cells.obs.isna().any(axis=None)
    assert cells.obs_names.is_unique
    assert cells.var_names.is_unique


def test_cell_types_are_twelve_of_unequal_size(cells: anndata.AnnData) -> None:
    shares = cells.obs["cell_type"].value_counts(normalize=True)
    assert len(shares) == 12
    assert 0.15 < shares.max() < 0.4
    assert shares.min() < 0.05


def test_datasets_follow_each_other_with_one_assay_and_donors_of_their_own(cells: anndata.AnnData) -> None:
    obs = cells.obs
    for column in ("dataset_id", "donor_id"):
        runs = 1 + (obs[column].cat.codes.diff().iloc[1:] != 0).sum()
        assert runs == obs[column].nunique() > 1
    assert (obs.groupby("dataset_id", observed=True)["assay"].nunique() == 1).all()
    assert (obs.groupby("donor_id", observed=True)["dataset_id"].nunique() == 1).all()
    assert obs["assay"].nunique() > 1
    assert (obs.groupby("dataset_id", observed=True)["donor_id"].nunique() >= 2).all()


def test_counts_vary_more_than_poisson_counts_do() -> None:
    rng = np.random.default_rng(0)
    shares = np.full((1, 1, 1), 1.0, dtype=np.float32)
    one = np.zeros(50_000, dtype=np.int64)
    counts = simulate._draw_counts(shares, one, one, np.full(50_000, 20.0), rng, slab_values=2**22).toarray()
    # Negative binomial: variance = mean + dispersion * mean².
    assert counts.mean() == pytest.approx(20, rel=0.02)
    assert counts.var() == pytest.approx(20 + 0.5 * 20**2, rel=0.05)


def test_slabs_of_rows_cover_all_cells() -> None:
    n_molecules, cell_type = np.linspace(100.0, 3_000.0, 30), np.zeros(30, dtype=np.int64)
    shares, rng = np.full((1, 1, 50), 1.0, dtype=np.float32), np.random.default_rng(0)
    counts = simulate._draw_counts(shares, cell_type, cell_type, n_molecules, rng, slab_values=7 * 50)
    assert counts.shape == (30, 50)
    np.testing.assert_allclose(counts.toarray().mean(axis=1), n_molecules, rtol=0.5)


def test_equal_seeds_give_equal_cells_and_others_do_not() -> None:
    first, again, other = (simulate_cells(100, 50, seed) for seed in (3, 3, 4))
    assert (first.X != again.X).nnz == 0
    pd.testing.assert_frame_equal(first.obs, again.obs)
    assert (first.X != other.X).nnz > 0


@pytest.mark.parametrize(("n_cells", "n_genes"), [(1, 1), (1, 20), (40, 1), (3, 7)])
def test_any_size_can_be_simulated(n_cells: int, n_genes: int) -> None:
    assert simulate_cells(n_cells, n_genes).shape == (n_cells, n_genes)


@pytest.mark.parametrize(("n_cells", "n_genes"), [(0, 5), (5, 0), (-1, 5)])
def test_a_size_below_one_is_refused(n_cells: int, n_genes: int) -> None:
    with pytest.raises(ValueError, match=f"n_cells={n_cells} and n_genes={n_genes} must be at least 1"):
        simulate_cells(n_cells, n_genes)


def test_the_experiment_holds_the_simulated_cells(tmp_path: Path) -> None:
    simulate_experiment(str(tmp_path / "experiment"), n_cells=60, n_genes=40, seed=2)
    cells = simulate_cells(n_cells=60, n_genes=40, seed=2)
    with soma.Experiment.open(str(tmp_path / "experiment")) as experiment:
        X = experiment.ms["RNA"].X["raw"].read().coos().concat().to_scipy().tocsr()
        obs = experiment.obs.read().concat().to_pandas()
        var = experiment.ms["RNA"].var.read().concat().to_pandas()
    assert (X != cells.X).nnz == 0
    assert list(obs["cell_type"]) == list(cells.obs["cell_type"])
    assert list(var["feature_id"]) == list(cells.var_names)
    assert list(var["feature_name"]) == list(cells.var["feature_name"])
