"""Simulated cells with the shape of the CELLxGENE Census, drawn block by block: any size in little memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

BLOCK_ROWS = 2048  # cells that share a generator: the same ones whatever is written from them

_N_CELL_TYPES = 120
_ASSAYS = ("10x 3' v1", "10x 3' v2", "10x 3' v3", "10x 5' v2")
_TABLES = Path(__file__).with_name("census_cells.json")
_MOST_MOLECULES = 4000  # of one gene in a cell; the largest values of real data are of this size


@dataclass(frozen=True, kw_only=True)
class Cells:
    """What cells are drawn from: equal ones are equal cells.

    A cell is a number of molecules, each of a gene that is drawn by popularity; genes lie in random order.
    `kind`, a key of `KINDS`, says how many molecules cells have, and how popular genes are.
    """

    kind: str
    rows: int
    genes: int
    nnz_per_row: float
    seed: int

    def obs(self) -> pd.DataFrame:
        """Return the labels of the cells, `n_molecules`, and what else their kind asks for.

        Datasets of log-normal size follow each other, named in that order; in each its donors do likewise.
        A dataset has one assay and a mix of cell types of its own. `percentile`, 0 to 99, is independent of
        everything: a filter on it picks scattered rows.
        """
        rng = np.random.default_rng([self.seed, 0])
        dataset = _runs(np.zeros(self.rows, dtype=np.int64), self._kind.cells_per_dataset, rng)
        donor = _runs(dataset, self._kind.cells_per_donor, rng)
        n_datasets = dataset[-1] + 1
        mixes = rng.dirichlet(0.1 + 3 / np.arange(1, _N_CELL_TYPES + 1), n_datasets).cumsum(axis=1)
        cell_type = (rng.random((self.rows, 1)) > mixes[dataset, :-1]).sum(axis=1)
        typical = self._kind.typical_sizes(n_datasets, rng)[dataset]
        return pd.DataFrame(
            {
                "cell_type": _categorical(cell_type, [f"cell type {k}" for k in range(_N_CELL_TYPES)]),
                "dataset_id": _categorical(dataset, [f"dataset-{d:05d}" for d in range(n_datasets)]),
                "donor_id": _categorical(donor, [f"donor-{d:06d}" for d in range(donor[-1] + 1)]),
                "assay": _categorical(rng.integers(len(_ASSAYS), size=n_datasets)[dataset], list(_ASSAYS)),
                "percentile": rng.integers(100, size=self.rows, dtype=np.int32),
                **self._kind.molecules(
                    typical * self._kind.spread(self.rows, rng), self._rates(), self.nnz_per_row
                ),
            }
        )

    def var(self) -> pd.DataFrame:
        """Return the names of the genes."""
        return pd.DataFrame({"feature_id": [f"ENSG{k:011d}" for k in range(self.genes)]})

    def blocks(
        self, obs: pd.DataFrame, tile_columns: int
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
        """Yield (first row, row in the block, column, count) of `BLOCK_ROWS` cells at a time.

        Values are ordered by tile of columns, then row, then column. With one tile that is CSR order.

        Args:
            obs: What `obs` returns.
            tile_columns: Columns of a tile.
        """
        gene_of = self._gene_table()
        for start in range(0, self.rows, BLOCK_ROWS):
            rng = np.random.default_rng([self.seed, 1, start])
            cells = obs.iloc[start : start + BLOCK_ROWS]
            row = np.repeat(np.arange(len(cells)), cells["n_molecules"])
            column = gene_of[rng.integers(len(gene_of), size=len(row))]
            tile, within = np.divmod(column, tile_columns)
            keys, counts = np.unique((tile * BLOCK_ROWS + row) * tile_columns + within, return_counts=True)
            tile, place = np.divmod(keys, BLOCK_ROWS * tile_columns)
            row, within = np.divmod(place, tile_columns)
            column = tile * tile_columns + within
            yield start, row, column, self._values(cells, row, counts, rng).astype(np.float32)

    def _values(
        self,
        cells: pd.DataFrame,
        row: NDArray[np.int64],
        counts: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        """Return the values; they are drawn by row and column, so that they are the same in any tiles."""
        order = np.argsort(row.astype(np.uint16), kind="stable")  # within a row, columns are sorted already
        values = np.empty(len(counts))
        values[order] = self._kind.values(cells, row[order], counts[order], rng)
        return values

    @property
    def _kind(self) -> Kind:
        return KINDS[self.kind]

    def _rates(self) -> NDArray[np.float64]:
        """Return how many molecules of each gene a cell has, relative to those of other genes."""
        return np.random.default_rng([self.seed, 2]).permutation(self._kind.rates(self.genes))

    def _gene_table(self) -> NDArray[np.int64]:
        """Return genes, each as often as its rate says: a uniform draw from it is a weighted draw."""
        size, rates = 2**self._kind.table_bits, self._rates()
        middles = (np.arange(size) + 0.5) / size
        return np.minimum(np.searchsorted(rates.cumsum() / rates.sum(), middles), self.genes - 1)


class Kind(Protocol):
    """What is typical of cells: a population from which `Cells` are drawn.

    Attributes:
        default: `rows`, `genes` and `nnz_per_row` of a data set that is not told otherwise.
        cells_per_dataset: Mean cells of a dataset, and `cells_per_donor` of a donor in it.
        table_bits: How exact the table of genes is.
    """

    default: Mapping[str, float]
    cells_per_dataset: int
    cells_per_donor: int
    table_bits: int

    def rates(self, genes: int) -> NDArray[np.float64]:
        """Return how many molecules of each gene there are, the most popular gene first."""

    def typical_sizes(self, n_datasets: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return the size of a typical cell of each dataset."""

    def spread(self, rows: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return the size of each cell, as a multiple of the typical one's."""

    def molecules(
        self, sizes: NDArray[np.float64], rates: NDArray[np.float64], nnz_per_row: float
    ) -> dict[str, NDArray[Any]]:
        """Return columns of obs, `n_molecules` among them: cells have `nnz_per_row` genes in the mean."""

    def values(
        self,
        cells: pd.DataFrame,
        row: NDArray[np.int64],
        counts: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        """Return what is stored for each non-zero, from the number of its molecules that were drawn."""


class CensusCells:
    """Cells whose numbers of genes, counts, and popularity of genes are those of real ones.

    They are drawn from the tables that `derive_census_cells.py` made; `about` in their file says what these
    can tell.
    """

    default: Mapping[str, float] = {"rows": 131_072, "genes": 60_664, "nnz_per_row": 1_900.0}
    cells_per_dataset = 6_000
    cells_per_donor = 1_500
    table_bits = 23  # the rarest genes of the Census are seen in one of a million cells

    @cached_property
    def _tables(self) -> dict[str, Any]:
        return json.loads(_TABLES.read_text())

    def rates(self, genes: int) -> NDArray[np.float64]:
        """Return the rates with which genes are seen in as many cells as in the Census.

        With fewer genes than there, evenly spaced ones of the ranking are taken.
        """
        rank = (np.arange(genes) + 0.5) / genes * self._tables["n_genes"]
        share = np.interp(np.log(rank), np.log(self._tables["gene_rank"]), np.log(self._tables["gene_share"]))
        return -np.log1p(-np.exp(share))

    def typical_sizes(self, n_datasets: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return non-zeros, between those of the lightest and the heaviest dataset."""
        return _quantiles(self._tables["dataset_median_nnz"], rng.random(n_datasets))

    def spread(self, rows: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return non-zeros as a multiple of those of the median cell of a dataset."""
        return _quantiles(self._tables["nnz_of_median"], rng.random(rows))

    def molecules(
        self, sizes: NDArray[np.float64], rates: NDArray[np.float64], nnz_per_row: float
    ) -> dict[str, NDArray[Any]]:
        """Return the molecules that give each cell its number of different genes, and its mean value."""
        if nnz_per_row > len(rates) / 4:
            raise ValueError(f"nnz_per_row={nnz_per_row:g} must be at most a quarter of genes={len(rates)}.")
        nnz = np.minimum(sizes * (nnz_per_row / sizes.mean()), 0.9 * len(rates))
        n_molecules = np.geomspace(1, 1e3 * len(rates), 200)
        n_different = [-np.expm1(-n * rates / rates.sum()).sum() for n in n_molecules]
        at, mean_count = np.log(self._tables["mean_count"]).T
        return {
            "n_molecules": np.maximum(1, np.interp(nnz, n_different, n_molecules).round()).astype(np.int64),
            "mean_count": np.exp(np.interp(np.log(sizes), at, mean_count)).astype(np.float32),
        }

    def values(
        self,
        cells: pd.DataFrame,
        row: NDArray[np.int64],
        counts: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        """Return counts that reach `mean_count`: each molecule that was drawn stands for a burst of them.

        The size of a burst follows a power law, as counts of real cells nearly do: most are 1, few are large.
        """
        drawn = np.bincount(row, counts, len(cells)) / np.maximum(1, np.bincount(row, minlength=len(cells)))
        exponent = _burst_exponent(cells["mean_count"].to_numpy() / np.maximum(1, drawn))
        burst = np.floor((1 - rng.random(len(row))) ** (-1 / exponent[row]))
        return counts * np.minimum(burst, _MOST_MOLECULES / np.maximum(1, counts)).clip(1).round()


class LightCells:
    """Cells that are lighter and simpler than real ones: 490 genes each, the k-th one with the weight 1 / k.

    Molecules are log-normal around what is typical of a dataset. A count is the number of molecules drawn,
    thus mostly 1.
    """

    default: Mapping[str, float] = {"rows": 500_000, "genes": 20_000, "nnz_per_row": 490.0}
    cells_per_dataset = 22_000
    cells_per_donor = 5_000
    table_bits = 20

    def rates(self, genes: int) -> NDArray[np.float64]:
        """Return 1 / k, of sum 1."""
        weights = 1 / np.arange(1, genes + 1)
        return weights / weights.sum()

    def typical_sizes(self, n_datasets: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return molecules, relative to those of other datasets."""
        return rng.lognormal(0.0, 0.3, n_datasets)

    def spread(self, rows: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return molecules as a multiple of the typical number."""
        return rng.lognormal(0.0, 0.5, rows)

    def molecules(
        self, sizes: NDArray[np.float64], rates: NDArray[np.float64], nnz_per_row: float
    ) -> dict[str, NDArray[Any]]:
        """Scale the molecules of cells so that they have `nnz_per_row` different genes in the mean."""
        sample = np.quantile(sizes, (np.arange(24) + 0.5) / 24)[:, None]
        low, high = 0.0, 1e6
        for _ in range(40):
            middle = (low + high) / 2
            n_different = -np.expm1(-middle * sample * rates).sum(axis=1).mean()
            low, high = (middle, high) if n_different < nnz_per_row else (low, middle)
        return {"n_molecules": np.maximum(1, np.round(sizes * high)).astype(np.int64)}

    def values(
        self,
        cells: pd.DataFrame,
        row: NDArray[np.int64],
        counts: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        """Return the molecules that were drawn."""
        return counts


KINDS: Mapping[str, Kind] = {"census": CensusCells(), "light": LightCells()}


def _quantiles(table: list[float], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values of a table of evenly spaced quantiles, between which logarithms are interpolated."""
    return np.exp(np.interp(at, np.linspace(0, 1, len(table)), np.log(table)))


def _burst_exponent(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the exponent of bursts of this mean: one has size k or more with probability k ** -exponent."""
    exponents = np.geomspace(60, 1.05, 100)
    k = np.arange(1, _MOST_MOLECULES + 1)
    return np.interp(mean, [(k**-exponent).sum() for exponent in exponents], exponents)


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
