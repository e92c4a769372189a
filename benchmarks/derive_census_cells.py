"""Derive `census_cells.json`, from which `cells.py` draws cells, from obs and var of the CELLxGENE Census.

    python benchmarks/derive_census_cells.py --obs obs.parquet --var var.parquet

`obs` has `dataset_id`, `nnz` and `raw_sum` of each cell, `var` has `nnz` and `n_measured_obs` of each gene,
as the Census publishes them. A run of the benchmarks needs neither.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

TABLES = Path(__file__).with_name("census_cells.json")

_N_CELL_QUANTILES = 33
_N_COUNT_QUANTILES = 9
_N_GENE_RANKS = 49
_ABOUT = (
    "Made by derive_census_cells.py. Source: obs of 23,945 cells of the CELLxGENE Census (two types of B "
    "cells in five datasets, assays 10x 3' v1 to v3 and 5' v2), and var of all 60,664 genes over the "
    "whole Census (63 million cells). The tables tell how many genes are seen in a cell of one dataset, "
    "how far these datasets differ, how many molecules a seen gene has, and how often each gene is seen. "
    "They cannot tell the spread over all tissues and assays: five datasets are few, and B cells are "
    "small cells. `mean_nnz` is the mean of these cells. `census_mean_nnz` is that of the whole Census, "
    "from var: it counts assays that see more genes, and cells that several datasets have as often as "
    "they have them."
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--obs", type=Path, required=True, help="Parquet: dataset_id, nnz, raw_sum")
    parser.add_argument("--var", type=Path, required=True, help="Parquet: nnz, n_measured_obs")
    parser.add_argument("--out", type=Path, default=TABLES, help="default: %(default)s")
    options = parser.parse_args()
    tables = derive(pd.read_parquet(options.obs), pd.read_parquet(options.var))
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(table)}" for name, table in tables.items())
    options.out.write_text(f"{{\n{lines}\n}}\n")


def derive(obs: pd.DataFrame, var: pd.DataFrame) -> dict[str, Any]:
    """Return the tables, as lists of numbers. Datasets count the same, however many cells they have."""
    datasets = [cells for _, cells in obs.groupby("dataset_id", observed=True)]
    of_dataset = np.linspace(0, 1, _N_CELL_QUANTILES)
    spread = [np.quantile(cells["nnz"] / cells["nnz"].median(), of_dataset) for cells in datasets]
    share = (var["nnz"] / var["n_measured_obs"]).fillna(0.0).sort_values(ascending=False).to_numpy()
    share = share[share > 0]
    rank = np.unique(np.geomspace(1, len(share), _N_GENE_RANKS).round().astype(int))
    return {
        "about": _ABOUT,
        "mean_nnz": _rounded(obs["nnz"].mean()),
        "census_mean_nnz": _rounded(var["nnz"].sum() / var["n_measured_obs"].max()),
        "dataset_median_nnz": sorted(_rounded(cells["nnz"].median()) for cells in datasets),
        "nnz_of_median": [_rounded(x) for x in np.exp(np.log(spread).mean(axis=0))],
        "mean_count": _mean_counts(datasets),
        "n_genes": len(share),
        "gene_rank": rank.tolist(),
        "gene_share": [_rounded(x) for x in share[rank - 1]],
    }


def _mean_counts(datasets: list[pd.DataFrame]) -> list[list[float]]:
    """Return (nnz, mean of the values) of typical cells, by quantile of nnz within each dataset, in steps."""
    points = []
    for cells in datasets:
        part = pd.qcut(cells["nnz"].rank(method="first"), 3, labels=False)
        of_part = cells.assign(mean=cells["raw_sum"] / cells["nnz"]).groupby(part)
        points += of_part[["nnz", "mean"]].median().to_numpy().tolist()
    nnz, mean = np.log(sorted(points)).T
    slope, level = np.polyfit(nnz, mean, 1)
    at = np.quantile(nnz, np.linspace(0, 1, _N_COUNT_QUANTILES))
    return [[_rounded(np.exp(x)), _rounded(np.exp(level + slope * x))] for x in at]


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


if __name__ == "__main__":
    main()
