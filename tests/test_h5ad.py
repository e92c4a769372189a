from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma
from scipy import sparse

from stores import expected_X
from tiledbsoma_ml import ExperimentDataset
from tiledbsoma_ml._h5ad import ingest_h5ads

GENES = ["g0", "g1", "g2", "g3", "g4"]


def write(path: Path, rows: range, genes: range, *, kind: Any = sparse.csr_matrix, **obs: Any) -> Path:
    """Write a file of cells with these rows and columns of `expected_X`."""
    X = expected_X(rows, genes)
    cells = anndata.AnnData(
        kind(X),
        obs=pd.DataFrame(obs, index=[f"cell-{i}" for i in range(len(rows))]),
        var=pd.DataFrame(index=[GENES[gene] for gene in genes]),
        layers={"doubled": sparse.csr_matrix(2 * X)},
    )
    cells.write_h5ad(path)
    return path


def read(uri: str, columns: list[str]) -> tuple[np.ndarray, pd.DataFrame, list[str]]:
    with soma.Experiment.open(uri) as experiment, experiment.axis_query("RNA") as query:
        names = query.var(column_names=["var_id"]).concat()["var_id"].to_pylist()
        dataset = ExperimentDataset(query, obs_column_names=columns, shuffle=False, batch_size=1000)
        [(X, obs)] = list(dataset)
    return X, obs, names


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_files_follow_each_other_and_have_the_genes_of_all(tmp_path: Path, kind: Any) -> None:
    paths = [
        write(tmp_path / "a.h5ad", range(40), range(3), kind=kind, label=pd.Categorical(["x", "y"] * 20)),
        write(
            tmp_path / "b.h5ad",
            range(40, 70),
            range(1, 5),
            kind=kind,
            label=pd.Categorical(["y", "z"] * 15),
            score=np.arange(30) / 2,
        ),
    ]
    X, obs, names = read(ingest_h5ads(paths, None, tmp_path / "made", print), ["label", "score", "obs_id"])
    assert names == GENES
    expected = expected_X(range(70), range(5))
    expected[:40, 3:] = 0
    expected[40:, 0] = 0
    np.testing.assert_array_equal(X, expected)
    assert obs["label"].tolist() == ["x", "y"] * 20 + ["y", "z"] * 15
    np.testing.assert_array_equal(obs["score"], [np.nan] * 40 + (np.arange(30) / 2).tolist())
    assert obs["obs_id"].is_unique


def test_a_layer_is_taken_in_place_of_x(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", range(10), range(5))
    X, _, _ = read(ingest_h5ads([path], "doubled", tmp_path / "made", print), ["obs_id"])
    np.testing.assert_array_equal(X, 2 * expected_X(range(10), range(5)))


def test_the_same_files_are_ingested_once_and_changed_ones_again(tmp_path: Path) -> None:
    path, said = write(tmp_path / "a.h5ad", range(10), range(5)), list[str]()
    first = ingest_h5ads([path], None, tmp_path / "made", said.append)
    assert ingest_h5ads([path], None, tmp_path / "made", said.append) == first
    assert [line.split()[0] for line in said] == ["building", "using"]
    write(path, range(12), range(5))
    changed = ingest_h5ads([path], None, tmp_path / "made", said.append)
    assert changed != first
    assert len(read(changed, ["obs_id"])[0]) == 12


def test_what_cannot_be_ingested_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    path, made = write(tmp_path / "a.h5ad", range(10), range(5)), tmp_path / "made"
    with pytest.raises(ValueError, match=r"h5ad='.*missing.h5ad' must be an existing file; check the path"):
        ingest_h5ads([path, tmp_path / "missing.h5ad"], None, made, print)
    with pytest.raises(ValueError, match=r"layer_name='double' must be one of the layers of '.*a.h5ad'; did"):
        ingest_h5ads([path], "double", made, print)
    (tmp_path / "other.h5ad").write_text("not HDF5")
    with pytest.raises(ValueError, match=r"h5ad='.*other.h5ad' must be an AnnData file"):
        ingest_h5ads([tmp_path / "other.h5ad"], None, made, print)
    assert list(made.glob("*")) == []
