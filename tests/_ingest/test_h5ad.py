from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma
from scipy import sparse

from stores import expected_X, make_cells
from tiledbsoma_ml import ExperimentDataset
from tiledbsoma_ml._ingest.choose import Choose, choose_matrix, find_counts
from tiledbsoma_ml._ingest.experiment import build_once
from tiledbsoma_ml._ingest.h5ad import ingest_h5ads
from tiledbsoma_ml._ingest.h5ad_file import open_h5ad

GENES = ["g0", "g1", "g2", "g3", "g4"]


def write(path: Path, rows: range, genes: range, *, kind: Any = sparse.csr_matrix, **obs: Any) -> Path:
    """Write a file of cells with these rows and columns of `expected_X`."""
    X = expected_X(rows, genes)
    names, layers = [GENES[gene] for gene in genes], {"doubled": sparse.csr_matrix(2 * X)}
    make_cells(kind(X), obs=obs, genes=names, layers=layers).write_h5ad(path)
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


# Files as they are found -----------------------------------------------------------------------------------

COUNTS = np.random.default_rng(0).poisson(1.5, (8, len(GENES))).astype(np.float32)


def cells(X: Any, **more: Any) -> anndata.AnnData:
    return make_cells(X, obs={"kind": pd.Categorical(["a", "b"] * 4)}, genes=GENES, **more)


def few_genes(X: np.ndarray, *, raw: np.ndarray) -> anndata.AnnData:
    """Return cells with two genes, and with all of them in `raw`."""
    adata = cells(raw)
    adata.raw = adata.copy()
    adata = adata[:, :2].copy()
    adata.X = X[:, :2]
    return adata


def split_entries(X: np.ndarray) -> sparse.csr_matrix:
    """Return a matrix that stores every value in two parts: one, and the rest."""
    row, column = X.nonzero()
    values = np.stack([np.ones(len(row), X.dtype), X[row, column] - 1], axis=1).ravel()
    return sparse.csr_matrix(
        (values, np.repeat(column, 2), np.concatenate([[0], np.cumsum(2 * (X != 0).sum(axis=1))])), X.shape
    )


def long_indices(X: np.ndarray) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix(X)
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    return matrix


def write_as_before_0_7(path: Path) -> None:
    """Write cells as anndata did before 0.7: frames are compound datasets, and there are no encodings."""
    with h5py.File(path, "w") as file:
        cell = np.dtype([("index", "S10"), ("kind", "i4")])
        file["obs"] = np.array([(f"c{i}".encode(), i % 2) for i in range(8)], dtype=cell)
        file["uns/kind_categories"] = np.array([b"a", b"b"])
        genes = np.array([(name.encode(),) for name in GENES], dtype=[("index", "S10")])
        file["var"] = file["raw.var"] = genes
        for name, X in {"X": COUNTS, "raw.X": 2 * COUNTS}.items():
            matrix, group = sparse.csr_matrix(X), file.create_group(name)
            group.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": X.shape})
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(matrix, part)


def test_matrices_of_every_kind_are_read(tmp_path: Path) -> None:
    kinds: list[Any] = [COUNTS.astype(dtype) for dtype in ("f2", "f8", "u2", "i8")]
    kinds += [sparse.csr_array(COUNTS), long_indices(COUNTS), sparse.csc_matrix(COUNTS)]
    kinds += [split_entries(COUNTS), split_entries(COUNTS.T).T]
    paths = [tmp_path / f"{number}.h5ad" for number in range(len(kinds))]
    for path, X in zip(paths, kinds, strict=True):
        cells(X).write_h5ad(path)
    cells(COUNTS > 1).write_h5ad(tmp_path / "bool.h5ad")
    write_as_before_0_7(tmp_path / "old.h5ad")
    paths += [tmp_path / "bool.h5ad", tmp_path / "old.h5ad"]
    X, obs, names = read(ingest_h5ads(paths, None, tmp_path / "made", print), ["kind"])
    np.testing.assert_array_equal(X, np.concatenate([*[COUNTS] * len(kinds), COUNTS > 1, COUNTS]))
    assert obs["kind"].tolist() == ["a", "b"] * 4 * len(paths)
    assert names == GENES


@pytest.mark.parametrize("X", [COUNTS, sparse.csr_matrix(COUNTS), split_entries(COUNTS.T).T])
def test_rows_are_read_piece_by_piece(tmp_path: Path, X: Any) -> None:
    cells(X).write_h5ad(tmp_path / "x.h5ad")
    with open_h5ad(tmp_path / "x.h5ad") as file:
        whole, matrix = file.matrices["X"].survey(), file.matrices["X"]
        pieces = list(matrix.pieces(12))  # two rows of a dense matrix
        assert matrix.survey(12) == whole
        assert whole.bad_position is None
    assert len(pieces) > 3
    np.testing.assert_array_equal(sparse.vstack(pieces).toarray(), COUNTS)


@pytest.mark.parametrize(
    ("adata", "taken", "said"),
    [
        (cells(None, layers={"counts": COUNTS, "other": -COUNTS}), "layers['counts']", "cells.h5ad has no X"),
        (cells(None, layers={"spliced": COUNTS}), "layers['spliced']", "cells.h5ad has no X"),
        (few_genes(COUNTS - 2, raw=COUNTS), "raw.X", "no counts found in X"),
        (few_genes(np.log1p(COUNTS), raw=COUNTS), "raw.X", "no counts found in X"),
        (few_genes(COUNTS, raw=COUNTS)[:, :0].copy(), "raw.X", "no counts found in X"),
        (cells(0 * COUNTS, layers={"counts": COUNTS}), "layers['counts']", "no counts found in X"),
    ],
    ids=["no X", "one layer", "scaled", "logarithms", "no genes", "zeros"],
)
def test_counts_are_found_and_that_is_said(
    adata: anndata.AnnData, taken: str, said: str, tmp_path: Path
) -> None:
    adata.write_h5ad(tmp_path / "cells.h5ad")
    lines = list[str]()
    uri = ingest_h5ads([tmp_path / "cells.h5ad"], None, tmp_path, lines.append, find_counts)
    X, _, names = read(uri, ["obs_id"])
    np.testing.assert_array_equal(X, COUNTS)
    assert names == GENES
    assert lines[-1] == f"{said}: {taken} is taken"


def with_value(value: float, dtype: str = "f8") -> np.ndarray:
    X = COUNTS.astype(dtype)
    X[3, 2] = value
    return X


PLACE = "for cell 'c3' and gene 'g2' .row 3, column 2.; mend the value and write the file anew"
BEFORE = "must hold counts, or other numbers of 0 or more, and holds"


@pytest.mark.parametrize(
    ("adata", "choose", "sentence"),
    [
        (cells(with_value(np.nan)), choose_matrix, f"X of '.*cells.h5ad' must .* holds nan {PLACE}"),
        (cells(sparse.csr_matrix(with_value(np.inf))), find_counts, f"holds inf {PLACE}"),
        (cells(sparse.csc_matrix(with_value(1e39))), choose_matrix, f"fit float32, and holds 1e.39 {PLACE}"),
        (
            few_genes(COUNTS - 2, raw=COUNTS),
            choose_matrix,
            r"scaled \(it holds -2\).* 'raw.X', or 'X' to take",
        ),
        (
            few_genes(COUNTS - 2, raw=-COUNTS),
            find_counts,
            f"X of '.*' {BEFORE} -2; .* another layer: 'raw.X'",
        ),
        (cells(0 * COUNTS), find_counts, f"{BEFORE} nothing but 0; write the file with its values"),
        (
            cells(COUNTS)[:, :0].copy(),
            find_counts,
            "X of '.*cells.h5ad' must have genes, and has none; write",
        ),
        (few_genes(COUNTS, raw=COUNTS)[:, :0].copy(), choose_matrix, "has none; .* another layer: 'raw.X'"),
        (
            cells(COUNTS)[:0].copy(),
            choose_matrix,
            "h5ad='.*cells.h5ad' must have cells, and has none; choose",
        ),
        (cells(None), find_counts, "h5ad='.*cells.h5ad' must have X, and has none, and no layers"),
        (cells(None, layers={"a": COUNTS, "b": COUNTS}), choose_matrix, "has none; name a layer: 'a' or 'b'"),
    ],
)
def test_what_cannot_be_learned_from_is_named(
    adata: anndata.AnnData, choose: Choose, sentence: str, tmp_path: Path
) -> None:
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=sentence):
        ingest_h5ads([tmp_path / "cells.h5ad"], None, tmp_path / "made", print, choose)
    assert list((tmp_path / "made").iterdir()) == []


def test_a_matrix_is_taken_by_its_name(tmp_path: Path) -> None:
    few_genes(COUNTS - 2, raw=COUNTS).write_h5ad(tmp_path / "a.h5ad")
    X, _, _ = read(ingest_h5ads([tmp_path / "a.h5ad"], "X", tmp_path, print), ["obs_id"])
    np.testing.assert_array_equal(X, COUNTS[:, :2] - 2)
    X, _, _ = read(ingest_h5ads([tmp_path / "a.h5ad"], "raw.X", tmp_path, print), ["obs_id"])
    np.testing.assert_array_equal(X, COUNTS)


def replaced(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        if value is not None:
            file[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (replaced("X/data", None), "X of '.*a.h5ad' cannot be read .*; copy the file again or write it anew"),
        (replaced("X/data", np.ones(3)), "cannot be read .indices and data should have the same size"),
        (lambda file: file["X/indices"].__setitem__(0, 99), "cannot be read .indices must be < [58]"),
        (
            replaced("X/indptr", np.array([0, 9, 3, 4, 5, 6, 7, 8, 33])),
            "cannot be read .ind(ptr must be a non-d|ex pointer)",
        ),
        (
            replaced("X", np.zeros(4)),
            r"must hold numbers of 8 cells and 5 genes, and holds float64 of shape \(4,",
        ),
        (replaced("X", np.full((8, 5), b"x")), r"must hold numbers of .* and holds .S1 of shape \(8, 5\)"),
        (
            lambda file: file["obs/kind"].attrs.update({"encoding-type": "of the future"}),
            "obs of '.*a.h5ad' cannot be read .No read method",
        ),
    ],
)
@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix])
def test_damaged_files_are_told(
    change: Callable[[h5py.File], None], sentence: str, kind: Any, tmp_path: Path
) -> None:
    cells(kind(COUNTS)).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=sentence):
        ingest_h5ads([tmp_path / "a.h5ad"], None, tmp_path / "made", print)
    assert list((tmp_path / "made").iterdir()) == []


def whole_file() -> bytes:
    with io.BytesIO() as content:
        with h5py.File(content, "w") as file:
            file["obs/a"] = file["var/a"] = np.zeros(1000)
        return content.getvalue()


def hdf5(path: Path, *names: str) -> None:
    with h5py.File(path, "w") as file:
        for name in names:
            file[name] = np.zeros(3)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (
            lambda path: path.write_bytes(b""),
            "must be an AnnData file, and is empty; copy or download it again",
        ),
        (
            lambda path: path.write_bytes(whole_file()[:5000]),
            r"cannot be read as one .*truncated file.*; copy or down",
        ),
        (
            lambda path: path.write_bytes(gzip.compress(whole_file())),
            "is packed; unpack it first with gunzip",
        ),
        (lambda path: path.mkdir(), "must be a file, and is a folder; .*read_zarr.*an experiment by its URI"),
        (lambda path: hdf5(path, "matrix/barcodes"), "is one of Cell Ranger; .*read_10x_h5"),
        (
            lambda path: hdf5(path, "matrix", "row_attrs/Gene", "col_attrs/CellID"),
            "is a loom file; .*read_loom",
        ),
        (lambda path: hdf5(path, "obs/a", "var/a", "mod/rna/X"), r"is one of MuData; .*mdata\['rna'\]"),
        (lambda path: hdf5(path, "numbers"), "is another HDF5 file, without obs and var; write one"),
    ],
)
def test_what_is_no_h5ad_file_is_told_with_the_way_to_one(
    write: Callable[[Path], None], sentence: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=f"h5ad='.*a.h5ad' .*{sentence}"):
        ingest_h5ads([tmp_path / "a.h5ad"], None, tmp_path / "made", print)


def test_columns_that_soma_cannot_hold_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    adata, lines = cells(COUNTS), list[str]()
    adata.obs["stage"] = pd.Categorical(["old", "young"] * 4, categories=["young", "old"], ordered=True)
    adata.obs["maybe"] = pd.array([True, None] * 4, dtype="boolean")
    adata.obs["complex"] = np.arange(8) * 1j
    adata.obs["dose"] = pd.Categorical([0.5, 1.5] * 4)
    for name in ("index", "obs_id", "soma_id", "__x"):
        adata.obs[name] = range(8)
    adata.write_h5ad(tmp_path / "a.h5ad")
    uri = ingest_h5ads([tmp_path / "a.h5ad"], None, tmp_path, lines.append)
    with soma.Experiment.open(uri) as experiment:
        obs = experiment.obs.read().concat().to_pandas()
    assert list(obs) == ["soma_joinid", "obs_id", "kind", "stage", "maybe"]
    assert obs["obs_id"].tolist() == [f"c{i}" for i in range(8)]
    assert obs["stage"].cat.ordered
    assert obs["stage"].cat.categories.tolist() == ["young", "old"]
    assert lines[1].startswith("left out of obs: complex, dose, index, obs_id, soma_id, __x (neither")


# Once for the same files -----------------------------------------------------------------------------------


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


def test_what_another_user_put_in_the_way_is_not_written_to_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "x.soma", tmp_path / ".x.soma.building"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    for target in ("other", "nothing"):
        made.symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=r"x\.soma.* is made in .* but a link or a file is there"):
            build_once(path, pytest.fail, print)
        made.unlink()
    made.mkdir()
    user = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: user + 1)
        with pytest.raises(OSError, match=r"belongs to the user .*, who began to make it; wait until"):
            build_once(path, pytest.fail, print)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == [made.name, "mine", "other"]


ANOTHER_PROCESS = """
import sys, time
from pathlib import Path
import tiledbsoma as soma
from tiledbsoma_ml._ingest.h5ad import ingest_h5ads

folder, first, second = (Path(argument) for argument in sys.argv[1:])
write = soma.SparseNDArray.write

def slowly(array, entries, **options):
    if len(entries):  # not when the layer is made
        (folder / "writing").touch()
        while not (folder / "go on").exists():
            time.sleep(0.01)
    return write(array, entries, **options)

soma.SparseNDArray.write = slowly
print(ingest_h5ads([first], None, folder, lambda line: None), flush=True)
(folder / "go on").unlink()
ingest_h5ads([second], None, folder, lambda line: None)
"""


def test_of_two_processes_one_ingests_and_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, range(10), range(5)) for name in ("a.h5ad", "b.h5ad"))
    made, lines = tmp_path / "made", list[str]()
    made.mkdir()

    def say(line: str) -> None:
        lines.append(line.split()[0])
        if "waiting until it is there" in line:
            (made / "writing").unlink()
            (made / "go on").touch()

    def wait_until_the_other_writes() -> None:
        while not (made / "writing").exists():
            assert other.poll() is None
            time.sleep(0.01)

    command = [sys.executable, "-c", ANOTHER_PROCESS, *map(str, (made, first, second))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            wait_until_the_other_writes()
            uri = ingest_h5ads([first], None, made, say)
            assert other.stdout is not None
            assert other.stdout.readline().strip() == uri
            assert lines == ["process", "using"]
            wait_until_the_other_writes()
        finally:
            other.kill()
    assert list(made.glob(".b-*.building/*.soma/obs")) != []
    again = ingest_h5ads([second], None, made, say)
    assert lines[2:] == ["building"]
    assert sorted(entry.name for entry in made.iterdir()) == [Path(uri).name, Path(again).name, "writing"]
    for made_of in (uri, again):
        np.testing.assert_array_equal(read(made_of, ["obs_id"])[0], expected_X(range(10), range(5)))
