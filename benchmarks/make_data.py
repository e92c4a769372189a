"""Simulate cells with the shape of the CELLxGENE Census, as a SOMA experiment or as h5ad.

    python benchmarks/make_data.py --layout census --rows 500000 --genes 20000

Memory does not grow with the data. Equal arguments give equal cells, the same in every layout; what is
finished is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from cells import BLOCK_ROWS, Cells

DEFAULT_DATA_DIR = Path(__file__).parent / "data"
LAYOUTS = ("census", "training", "h5ad")

_FINISHED = "finished.json"
_VERSION = 1  # data of an older generator are made again
_SLAB_NNZ = 4_000_000
_ZSTD = {"_type": "ZstdFilter", "level": 5}


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a data set is made from."""

    layout: str = "census"
    rows: int = 500_000
    genes: int = 20_000
    nnz_per_row: float = 490.0
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.layout}-{self.rows}x{self.genes}x{self.nnz_per_row:g}-seed{self.seed}"

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile of X."""
        return (2048, min(2048, self.genes)) if self.layout == "census" else (64, self.genes)

    @property
    def capacity(self) -> int:
        """Values that are decoded together; in the training layout about a quarter of those of 64 rows."""
        return 65_536 if self.layout == "census" else 2 ** max(8, round(np.log2(self.nnz_per_row * 16)))

    @property
    def cells(self) -> Cells:
        return Cells(rows=self.rows, genes=self.genes, nnz_per_row=self.nnz_per_row, seed=self.seed)


def make_data(spec: DataSpec, data_dir: Path = DEFAULT_DATA_DIR) -> Path:
    """Return the folder of the data, made now unless it is there and finished.

    It is the experiment itself; with the layout "h5ad" it holds the file `cells.h5ad`.
    """
    folder = data_dir / spec.name
    marker = {"version": _VERSION, **asdict(spec)}
    if (folder / _FINISHED).exists() and json.loads((folder / _FINISHED).read_text()) == marker:
        return folder
    data_dir.mkdir(parents=True, exist_ok=True)
    partial = data_dir / f"{spec.name}.partial-{os.getpid()}"
    try:
        (_write_h5ad if spec.layout == "h5ad" else _write_experiment)(spec, partial)
        (partial / _FINISHED).write_text(json.dumps(marker))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


# SOMA -----------------------------------------------------------------------------------------------------


def _write_experiment(spec: DataSpec, folder: Path) -> None:
    obs = spec.cells.obs()
    with soma.Experiment.create(str(folder)) as experiment:
        _write_frame(experiment, "obs", obs)
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        _write_frame(measurement, "var", spec.cells.var())
        layer = measurement.add_new_collection("X").add_new_sparse_ndarray(
            "raw", type=pa.float32(), shape=(spec.rows, spec.genes), platform_config=_platform_config(spec)
        )
        for slab in _slabs(spec, obs["n_molecules"].to_numpy()):
            layer.write(slab, platform_config=soma.TileDBWriteOptions(sort_coords=False))


def _platform_config(spec: DataSpec) -> dict[str, Any]:
    """Return how X is stored: "census" like the CELLxGENE Census, "training" for reads of 64 rows."""
    rows, columns = spec.tile
    dims = {
        "soma_dim_0": {"tile": rows, "filters": [_ZSTD]},
        "soma_dim_1": {"tile": columns, "filters": ["ByteShuffleFilter", _ZSTD]},
    }
    create = {
        "capacity": spec.capacity,
        "dims": dims,
        "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", _ZSTD]}},
        "tile_order": "row-major",
        "cell_order": "row-major",
    }
    return {"tiledb": {"create": create}}


def _write_frame(parent: soma.Collection, name: str, frame: pd.DataFrame) -> None:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.add_column(0, "soma_joinid", pa.array(np.arange(len(frame))))
    soma_frame = parent.add_new_dataframe(
        name, schema=table.schema, index_column_names=["soma_joinid"], domain=[[0, len(frame) - 1]]
    )
    soma_frame.close()
    with soma.DataFrame.open(soma_frame.uri, "w") as soma_frame:  # categories are lost without opening anew
        soma_frame.write(table)


def _slabs(spec: DataSpec, n_molecules: np.ndarray) -> Iterator[pa.Table]:
    """Yield X as coordinates in the order in which TileDB stores them, some blocks of rows at a time."""
    # Rows of a block lie in one tile, or in whole tiles with one tile of columns: block order is tile order.
    pending: list[pa.Table] = []
    for start, row, column, count in spec.cells.blocks(n_molecules, spec.tile[1]):
        columns = {"soma_dim_0": start + row, "soma_dim_1": column, "soma_data": count}
        pending.append(pa.table(columns))
        if sum(map(len, pending)) >= _SLAB_NNZ or start + BLOCK_ROWS >= spec.rows:
            yield pa.concat_tables(pending).combine_chunks()
            pending = []


# h5ad -----------------------------------------------------------------------------------------------------


def _write_h5ad(spec: DataSpec, folder: Path) -> None:
    import anndata
    import h5py
    import scipy.sparse as sp

    folder.mkdir()
    obs, var = spec.cells.obs(), spec.cells.var().set_index("feature_id")
    obs.index = obs.index.astype(str)
    path = folder / "cells.h5ad"
    anndata.AnnData(X=sp.csr_matrix((0, len(var)), dtype=np.float32), var=var).write_h5ad(path)
    with h5py.File(path, "a") as file:
        X = anndata.io.sparse_dataset(file["X"])
        for _, row, column, count in spec.cells.blocks(obs["n_molecules"].to_numpy(), spec.genes):
            n_rows = min(BLOCK_ROWS, spec.rows - X.shape[0])
            X.append(sp.csr_matrix((count, (row, column)), shape=(n_rows, spec.genes)))
        del file["obs"]
        anndata.io.write_elem(file, "obs", obs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="census")
    add_size_options(parser)
    options = vars(parser.parse_args())
    data_dir = options.pop("data_dir")
    print(make_data(DataSpec(**options), data_dir))


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which cells, and where they are kept."""
    spec = DataSpec()
    parser.add_argument("--rows", type=int, default=spec.rows, help="cells (default: %(default)s)")
    parser.add_argument("--genes", type=int, default=spec.genes, help="columns (default: %(default)s)")
    parser.add_argument(
        "--nnz-per-row", type=float, default=spec.nnz_per_row, help="genes of a cell (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=spec.seed, help="of the cells (default: %(default)s)")
    parser.add_argument(
        "--data-dir", type=Path, default=DEFAULT_DATA_DIR, help="where data are kept (default: %(default)s)"
    )


if __name__ == "__main__":
    main()
