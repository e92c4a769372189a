"""Simulated cells with types to tell apart, for demos and tests."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from tiledbsoma_ml._ingest.experiment import write_cells

__all__ = ["N_CELLS", "N_GENES", "simulate_cells", "simulate_experiment"]

N_CELLS = 20_000
N_GENES = 3_000

# Cell types, the most abundant first, each with the lineage whose marker genes it shares.
_LINEAGE = {
    "CD4-positive, alpha-beta T cell": "T",
    "classical monocyte": "myeloid",
    "CD8-positive, alpha-beta T cell": "T",
    "naive B cell": "B",
    "natural killer cell": "T",
    "memory B cell": "B",
    "non-classical monocyte": "myeloid",
    "regulatory T cell": "T",
    "conventional dendritic cell": "myeloid",
    "plasma cell": "B",
    "platelet": "platelet",
    "erythrocyte": "erythroid",
}
_TYPES = tuple(_LINEAGE)
_TYPE_SHARES = 0.75 ** np.arange(len(_TYPES)) / np.sum(0.75 ** np.arange(len(_TYPES)))

# Assays, each with the number of molecules that it typically counts in a cell; a dataset has one assay.
_ASSAYS = {"10x 3' v3": 900.0, "10x 3' v2": 500.0, "10x 5' v1": 650.0}
_N_DATASETS = 6
_MAX_DONORS = 4
_DISPERSION = 0.5
_SLAB_VALUES = 2**22


def simulate_experiment(uri: str, n_cells: int = N_CELLS, n_genes: int = N_GENES, seed: int = 0) -> None:
    """Write the cells of `simulate_cells` to a new SOMA Experiment at `uri`.

    The counts are the layer "raw" of the measurement "RNA"; `feature_id` is the key of its `var`.
    """
    write_cells(uri, simulate_cells(n_cells, n_genes, seed), var_id_name="feature_id")


def simulate_cells(n_cells: int = N_CELLS, n_genes: int = N_GENES, seed: int = 0) -> anndata.AnnData:
    """Return simulated counts of 12 blood cell types over several datasets, donors and assays.

    The mean of a gene is log-normal. Some marker genes have a higher mean in a lineage, others in one cell
    type only; related types (the T cells, the monocytes) therefore differ in few genes. Each type has about
    a quarter fewer cells than the one before. The cells of a dataset are neighbours, as in the CELLxGENE
    Census. A dataset shifts every gene a little (its batch effect), and has its own mix of types, one assay
    and its own donors. The number of molecules of a cell is log-normal around the typical number of its
    assay. Counts are negative binomial, drawn as Poisson counts of a gamma-distributed rate.

    Returns:
        The cells: `X` as CSR of float32 whole numbers, `obs` with cell_type, dataset_id, donor_id and assay,
        and `var` with feature_name. Equal arguments give equal cells.
    """
    if n_cells < 1 or n_genes < 1:
        raise ValueError(f"n_cells={n_cells} and n_genes={n_genes} must be at least 1.")
    rng = np.random.default_rng(seed)
    shares = _gene_shares(n_genes, rng)
    dataset, donor = _datasets_and_donors(n_cells, rng)
    cell_type = _cell_types(dataset, rng)
    assay = rng.permutation(np.arange(_N_DATASETS) % len(_ASSAYS))[dataset]
    n_molecules = np.array(list(_ASSAYS.values()))[assay] * rng.lognormal(0.0, 0.4, n_cells)
    obs = pd.DataFrame(
        {
            "cell_type": _categorical(cell_type, _TYPES),
            "dataset_id": _categorical(dataset, [f"dataset-{d + 1}" for d in range(_N_DATASETS)]),
            "donor_id": _categorical(donor, _donor_names()),
            "assay": _categorical(assay, list(_ASSAYS)),
        },
        index=[f"cell-{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(
        {"feature_name": [f"GENE{g + 1:05d}" for g in range(n_genes)]},
        index=[f"SIMG{g + 1:011d}" for g in range(n_genes)],
    )
    X = _draw_counts(shares, dataset, cell_type, n_molecules, rng, slab_values=_SLAB_VALUES)
    return anndata.AnnData(X=X, obs=obs, var=var)


def _gene_shares(n_genes: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the share of each gene in the molecules of a cell, of shape (datasets, types, genes)."""
    log_mean = rng.normal(0.0, 1.2, n_genes) + np.zeros((len(_TYPES), 1))
    for lineage in dict.fromkeys(_LINEAGE.values()):
        members = [t for t, name in enumerate(_TYPES) if _LINEAGE[name] == lineage]
        log_mean[members] += _marker_effect(n_genes, rng)
    for t in range(len(_TYPES)):
        log_mean[t] += _marker_effect(n_genes, rng)
    batch_effect = rng.normal(0.0, 0.25, (_N_DATASETS, 1, n_genes))
    mean = np.exp(log_mean + batch_effect)
    shares: NDArray[np.float32] = (mean / mean.sum(axis=-1, keepdims=True)).astype(np.float32)
    return shares


def _marker_effect(n_genes: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return log fold changes: not zero for one gene in a hundred, and for at least ten if there are ten."""
    n_markers = min(n_genes, max(10, n_genes // 100))
    effect = np.zeros(n_genes)
    effect[rng.choice(n_genes, n_markers, replace=False)] = rng.normal(1.1, 0.4, n_markers)
    return effect


def _datasets_and_donors(
    n_cells: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the dataset and the donor of each cell: runs of unequal length, donors nested in datasets."""
    size = rng.lognormal(0.0, 0.6, _N_DATASETS)
    dataset = np.sort(rng.choice(_N_DATASETS, n_cells, p=size / size.sum()))
    n_donors = rng.integers(2, _MAX_DONORS + 1, _N_DATASETS)
    donor = dataset * _MAX_DONORS + rng.integers(0, n_donors[dataset])
    return dataset, np.sort(donor)


def _donor_names() -> list[str]:
    return [f"D{d + 1}-{k + 1}" for d in range(_N_DATASETS) for k in range(_MAX_DONORS)]


def _cell_types(dataset: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the type of each cell from the mix of types of its dataset."""
    mixes = rng.dirichlet(30.0 * _TYPE_SHARES, _N_DATASETS)
    n_cells = np.bincount(dataset, minlength=_N_DATASETS)
    draws = [rng.choice(len(_TYPES), n, p=mix) for n, mix in zip(n_cells, mixes, strict=True)]
    return np.concatenate(draws)


def _categorical(codes: NDArray[np.int64], names: list[str] | tuple[str, ...]) -> pd.Categorical[str]:
    return pd.Categorical.from_codes(codes, categories=pd.Index(names)).remove_unused_categories()


def _draw_counts(
    shares: NDArray[np.float32],
    dataset: NDArray[np.int64],
    cell_type: NDArray[np.int64],
    n_molecules: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    slab_values: int,
) -> sp.csr_matrix:
    """Draw counts around `shares` × `n_molecules`, in slabs of rows to keep memory small."""
    n_rows = max(1, slab_values // shares.shape[-1])
    slabs = []
    for start in range(0, len(dataset), n_rows):
        rows = slice(start, start + n_rows)
        rate = shares[dataset[rows], cell_type[rows]] * n_molecules[rows, np.newaxis]
        rate *= rng.standard_gamma(1 / _DISPERSION, rate.shape, dtype=np.float32) * _DISPERSION
        slabs.append(sp.csr_matrix(rng.poisson(rate), dtype=np.float32))
    return sp.vstack(slabs, format="csr", dtype=np.float32)
