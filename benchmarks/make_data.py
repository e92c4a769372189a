"""Simulate cells with the shape of the CELLxGENE Census, as a SOMA experiment or as h5ad.

    python benchmarks/make_data.py --layout census
    python benchmarks/make_data.py --layout census --cells light --rows 100000

Memory does not grow with the data. Equal arguments give equal cells, the same in every layout; what is
finished is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from cells import BLOCK_ROWS, KINDS, Cells

DEFAULT_DATA_DIR = Path(__file__).parent / "data"
LAYOUTS = ("census", "training", "h5ad")

_FINISHED = "finished.json"
_VERSION = 2  # data of an older generator are made again
_SLAB_NNZ = 4_000_000
_ZSTD = {"_type": "ZstdFilter", "level": 5}


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a data set is made from."""

    layout: str = "census"
    kind: str = "census"
    rows: int
    genes: int
    nnz_per_row: float
    seed: int = 0

    @classmethod
    def of(
        cls,
        kind: str,
        *,
        rows: int | None = None,
        genes: int | None = None,
        nnz_per_row: float | None = None,
        seed: int = 0,
    ) -> DataSpec:
        """Return what cells of a kind are like, where nothing else is asked for.

        With fewer genes than usual, cells have fewer non-zeros, in proportion.
        """
        usual = KINDS[kind].default
        genes = int(genes or usual["genes"])
        nnz_per_row = nnz_per_row or usual["nnz_per_row"] * genes / usual["genes"]
        rows = int(rows or usual["rows"])
        return cls(kind=kind, rows=rows, genes=genes, nnz_per_row=nnz_per_row, seed=seed)

    @property
    def name(self) -> str:
        size = f"{self.rows}x{self.genes}x{self.nnz_per_row:g}"
        return f"{self.layout}-of-{self.kind}-cells-{size}-seed{self.seed}"

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
        return Cells(
            kind=self.kind, rows=self.rows, genes=self.genes, nnz_per_row=self.nnz_per_row, seed=self.seed
        )


def make_data(spec: DataSpec, data_dir: Path = DEFAULT_DATA_DIR) -> Path:
    """Return the folder of the data, made now unless it is there and finished.

    It is the experiment itself; with the layout "h5ad" it holds the file `cells.h5ad`.
    """
    folder = data_dir / spec.name
    marker = {"version": _VERSION, **asdict(spec)}
    if (folder / _FINISHED).exists() and _finished(folder).get("made_from") == marker:
        return folder
    data_dir.mkdir(parents=True, exist_ok=True)
    partial = data_dir / f"{spec.name}.partial-{os.getpid()}"
    try:
        nnz = (_write_h5ad if spec.layout == "h5ad" else _write_experiment)(spec, partial)
        (partial / _FINISHED).write_text(json.dumps({"made_from": marker, "nnz": nnz}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def nnz_of(folder: Path) -> int:
    """Return the number of non-zeros of finished data."""
    return int(_finished(folder)["nnz"])


def _finished(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _FINISHED).read_text())


# SOMA -----------------------------------------------------------------------------------------------------


def _write_experiment(spec: DataSpec, folder: Path) -> int:
    obs, nnz = spec.cells.obs(), 0
    with soma.Experiment.create(str(folder)) as experiment:
        _write_frame(experiment, "obs", obs)
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        _write_frame(measurement, "var", spec.cells.var())
        layer = measurement.add_new_collection("X").add_new_sparse_ndarray(
            "raw", type=pa.float32(), shape=(spec.rows, spec.genes), platform_config=_platform_config(spec)
        )
        for slab in _slabs(spec, obs):
            layer.write(slab, platform_config=soma.TileDBWriteOptions(sort_coords=False))
            nnz += len(slab)
    return nnz


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


def _slabs(spec: DataSpec, obs: pd.DataFrame) -> Iterator[pa.Table]:
    """Yield X as coordinates in the order in which TileDB stores them, some blocks of rows at a time."""
    # Rows of a block lie in one tile, or in whole tiles with one tile of columns: block order is tile order.
    pending: list[pa.Table] = []
    for start, row, column, count in spec.cells.blocks(obs, spec.tile[1]):
        columns = {"soma_dim_0": start + row, "soma_dim_1": column, "soma_data": count}
        pending.append(pa.table(columns))
        if sum(map(len, pending)) >= _SLAB_NNZ or start + BLOCK_ROWS >= spec.rows:
            yield pa.concat_tables(pending).combine_chunks()
            pending = []


# h5ad -----------------------------------------------------------------------------------------------------


def _write_h5ad(spec: DataSpec, folder: Path) -> int:
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
        for _, row, column, count in spec.cells.blocks(obs, spec.genes):
            n_rows = min(BLOCK_ROWS, spec.rows - X.shape[0])
            X.append(sp.csr_matrix((count, (row, column)), shape=(n_rows, spec.genes)))
        del file["obs"]
        anndata.io.write_elem(file, "obs", obs)
        return int(file["X/data"].size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="census")
    add_size_options(parser)
    options = parser.parse_args()
    print(make_data(replace(spec_of(options), layout=options.layout), options.data_dir))


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which cells, and where they are kept."""

    def usual(name: str) -> str:
        return ", ".join(f"{kind.default[name]:,g} of {key}" for key, kind in KINDS.items())

    parser.add_argument(
        "--cells",
        choices=KINDS,
        default="census",
        help="census: non-zeros, counts and popularity of genes of real cells; "
        "light: a quarter of the non-zeros (default: %(default)s)",
    )
    parser.add_argument("--rows", type=int, help=f"cells (default: {usual('rows')})")
    parser.add_argument("--genes", type=int, help=f"columns (default: {usual('genes')})")
    parser.add_argument(
        "--nnz-per-row",
        type=float,
        help=f"non-zeros of a cell (default: {usual('nnz_per_row')} cells, in proportion to --genes)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the cells (default: %(default)s)")
    parser.add_argument(
        "--data-dir", type=Path, default=DEFAULT_DATA_DIR, help="where data are kept (default: %(default)s)"
    )


def spec_of(options: argparse.Namespace) -> DataSpec:
    """Return what these options say."""
    return DataSpec.of(
        options.cells,
        rows=options.rows,
        genes=options.genes,
        nnz_per_row=options.nnz_per_row,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
