"""Simulated cells with the shape of the CELLxGENE Census, drawn block by block: any size in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

BLOCK_ROWS = 2048  # cells that share a generator: the same ones whatever is written from them

_CELLS_PER_DATASET = 22_000
_CELLS_PER_DONOR = 5_000
_N_CELL_TYPES = 120
_ASSAYS = ("10x 3' v1", "10x 3' v2", "10x 3' v3", "10x 5' v2")
_TABLE_BITS = 20


@dataclass(frozen=True, kw_only=True)
class Cells:
    """What cells are drawn from: equal ones are equal cells.

    A cell is a number of molecules, log-normal around what is typical of its dataset. Each is of a gene drawn
    by popularity, the k-th most popular one having the weight 1 / k; genes lie in random order. Counts are
    thus whole numbers, mostly 1.
    """

    rows: int
    genes: int
    nnz_per_row: float
    seed: int

    def obs(self) -> pd.DataFrame:
        """Return the labels of the cells, and `n_molecules`.

        Datasets of log-normal size follow each other, named in that order; in each its donors do likewise.
        A dataset has one assay and a mix of cell types of its own. `percentile`, 0 to 99, is independent of
        everything: a filter on it picks scattered rows.
        """
        rng = np.random.default_rng([self.seed, 0])
        dataset = _runs(np.zeros(self.rows, dtype=np.int64), _CELLS_PER_DATASET, rng)
        donor = _runs(dataset, _CELLS_PER_DONOR, rng)
        n_datasets = dataset[-1] + 1
        mixes = rng.dirichlet(0.1 + 3 / np.arange(1, _N_CELL_TYPES + 1), n_datasets).cumsum(axis=1)
        cell_type = (rng.random((self.rows, 1)) > mixes[dataset, :-1]).sum(axis=1)
        typical = rng.lognormal(0.0, 0.3, n_datasets)[dataset]
        return pd.DataFrame(
            {
                "cell_type": _categorical(cell_type, [f"cell type {k}" for k in range(_N_CELL_TYPES)]),
                "dataset_id": _categorical(dataset, [f"dataset-{d:05d}" for d in range(n_datasets)]),
                "donor_id": _categorical(donor, [f"donor-{d:06d}" for d in range(donor[-1] + 1)]),
                "assay": _categorical(rng.integers(len(_ASSAYS), size=n_datasets)[dataset], list(_ASSAYS)),
                "percentile": rng.integers(100, size=self.rows, dtype=np.int32),
                "n_molecules": self._n_molecules(typical * rng.lognormal(0.0, 0.5, self.rows)),
            }
        )

    def var(self) -> pd.DataFrame:
        """Return the names of the genes."""
        return pd.DataFrame({"feature_id": [f"ENSG{k:011d}" for k in range(self.genes)]})

    def blocks(
        self, n_molecules: NDArray[np.int64], tile_columns: int
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
        """Yield (first row, row in the block, column, count) of `BLOCK_ROWS` cells at a time.

        Values are ordered by tile of columns, then row, then column. With one tile that is CSR order.
        """
        gene_of = self._gene_table()
        for start in range(0, self.rows, BLOCK_ROWS):
            rng = np.random.default_rng([self.seed, 1, start])
            row = np.repeat(
                np.arange(min(BLOCK_ROWS, self.rows - start)), n_molecules[start : start + BLOCK_ROWS]
            )
            column = gene_of[rng.integers(len(gene_of), size=len(row))]
            tile, within = np.divmod(column, tile_columns)
            keys, counts = np.unique((tile * BLOCK_ROWS + row) * tile_columns + within, return_counts=True)
            tile, place = np.divmod(keys, BLOCK_ROWS * tile_columns)
            row, within = np.divmod(place, tile_columns)
            yield start, row, tile * tile_columns + within, counts.astype(np.float32)

    def _weights(self) -> NDArray[np.float64]:
        weights = 1 / np.arange(1, self.genes + 1)
        return np.random.default_rng([self.seed, 2]).permutation(weights / weights.sum())

    def _gene_table(self) -> NDArray[np.int64]:
        """Return genes, each as often as its weight says: a uniform draw from it is a weighted draw."""
        middles = (np.arange(2**_TABLE_BITS) + 0.5) / 2**_TABLE_BITS
        return np.minimum(np.searchsorted(self._weights().cumsum(), middles), self.genes - 1)

    def _n_molecules(self, relative: NDArray[np.float64]) -> NDArray[np.int64]:
        """Scale the sizes of cells so that they have `nnz_per_row` different genes in the mean."""
        weights, sample = self._weights(), np.quantile(relative, (np.arange(24) + 0.5) / 24)[:, None]
        low, high = 0.0, 1e6
        for _ in range(40):
            middle = (low + high) / 2
            n_different = -np.expm1(-middle * sample * weights).sum(axis=1).mean()
            low, high = (middle, high) if n_different < self.nnz_per_row else (low, middle)
        return np.maximum(1, np.round(relative * high)).astype(np.int64)


def _runs(outer: NDArray[np.int64], mean: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Number runs of log-normal length, cut where `outer` changes as well; at least five of them."""
    n_runs = max(len(outer) // mean, min(5, len(outer)))
    size = rng.lognormal(0.0, 1.0, n_runs)
    stops = np.round(np.cumsum(size / size.sum()) * len(outer)).astype(np.int64)
    begins = np.diff(outer, prepend=outer[0]) != 0
    begins[stops[(stops > 0) & (stops < len(outer))]] = True
    return np.cumsum(begins)


def _categorical(codes: NDArray[np.int64], names: list[str]) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, categories=names).remove_unused_categories()
