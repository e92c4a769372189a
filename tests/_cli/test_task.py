from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import attrs
import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma
import tiledbsoma.io
from scipy import sparse

from stores import make_cells
from tiledbsoma_ml import ExperimentDataset, Snapshot
from tiledbsoma_ml._cli import task as _task
from tiledbsoma_ml._cli.task import LabelledCells, Task, build_simulated, ingest_h5ad, load_task
from tiledbsoma_ml._ingest.experiment import Say
from tiledbsoma_ml.simulate import simulate_cells

N_CELLS, N_GENES = 300, 60


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_simulated(tmp_path_factory.mktemp("demo"), N_CELLS, N_GENES, seed=0, say=print)


@pytest.fixture
def lines() -> list[str]:
    """What was said."""
    return []


@pytest.fixture
def write_h5ad(tmp_path: Path) -> Callable[..., Path]:
    """Write an h5ad file of 40 cells and 6 genes, changed by a function."""

    def write(change: Callable[[anndata.AnnData], object] = lambda adata: None) -> Path:
        counts = np.random.default_rng(0).poisson(2.0, (40, 6)).astype(np.float32)
        obs = {"cell_type": pd.Categorical(["B", "T"] * 20), "batch": pd.Categorical(["x"] * 20 + ["y"] * 20)}
        adata = make_cells(sparse.csr_matrix(counts), obs=obs, var={"feature_name": list("abcdef")})
        change(adata)
        adata.write_h5ad(tmp_path / "cells.h5ad")
        return tmp_path / "cells.h5ad"

    return write


def make_task(uri: str, *, say: Say = print, **options: Any) -> Task:
    of_cells = {name: options.pop(name) for name in [*options] if name in attrs.fields_dict(LabelledCells)}
    unnamed: dict[str, Any] = {"measurement_name": None, "layer_name": None, "obs_filter": None}
    cells = LabelledCells(uri=uri, name="cells", **{**unnamed, "label": "cell_type", **of_cells})
    return load_task(cells, **{"batch_size": 16, "seed": 0, "snapshot_dir": None, **options}, say=say)


def rows_of(part: ExperimentDataset) -> list[tuple[float, str]]:
    """Return the counts of each cell, summed, and its type, sorted."""
    return sorted(pair for X, obs in part for pair in zip(X.sum(axis=1), obs["cell_type"], strict=True))


def read_back(uri: str) -> anndata.AnnData:
    with soma.Experiment.open(uri) as experiment, experiment.axis_query("RNA") as query:
        return query.to_anndata("raw")


# Building experiments -------------------------------------------------------------------------------------


def test_an_experiment_is_built_once(tmp_path: Path, lines: list[str]) -> None:
    first = build_simulated(tmp_path, 20, 10, seed=0, say=lines.append)
    made_at = Path(first).stat().st_mtime_ns
    assert build_simulated(tmp_path, 20, 10, seed=0, say=lines.append) == first
    assert Path(first).stat().st_mtime_ns == made_at
    assert [line.partition(" ")[0] for line in lines] == ["building", "using"]


def test_other_cells_get_another_experiment(tmp_path: Path) -> None:
    sizes = [(20, 10, 0), (20, 10, 1), (20, 11, 0), (21, 10, 0)]
    uris = {build_simulated(tmp_path, n, g, seed=seed, say=print) for n, g, seed in sizes}
    assert len(uris) == len(sizes)


def test_what_was_broken_off_leaves_nothing_and_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(uri: str, *_: Any, **__: Any) -> None:
        Path(uri).mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tiledbsoma.io, "from_anndata", break_off)
        with pytest.raises(KeyboardInterrupt):
            build_simulated(tmp_path, 20, 10, seed=0, say=print)
    assert list(tmp_path.iterdir()) == []
    assert soma.Experiment.exists(build_simulated(tmp_path, 20, 10, seed=0, say=print))


def test_a_folder_that_is_no_experiment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = Path(build_simulated(tmp_path / "elsewhere", 20, 10, seed=0, say=print)).name
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists and is not an experiment; choose another folder"):
        build_simulated(tmp_path, 20, 10, seed=0, say=print)
    assert (tmp_path / folder / "thesis.txt").read_text() == "precious"


# h5ad files -----------------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_obs_and_var(write_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    path = write_h5ad()
    source = anndata.read_h5ad(path)
    uri, label = ingest_h5ad(path, None, tmp_path, print)
    written = read_back(uri)
    assert label == "cell_type"
    assert (written.X != source.X).nnz == 0
    assert list(written.obs["cell_type"]) == list(source.obs["cell_type"])
    assert list(written.obs["batch"]) == list(source.obs["batch"])
    assert list(written.var["feature_name"]) == list(source.var["feature_name"])


def test_a_changed_file_gets_a_new_experiment(write_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    before, _ = ingest_h5ad(write_h5ad(), None, tmp_path, print)
    changed = write_h5ad(lambda adata: adata.obs.insert(0, "more", range(40)))
    after, _ = ingest_h5ad(changed, None, tmp_path, print)
    assert before != after
    assert "more" in read_back(after).obs
    assert "more" not in read_back(before).obs


def as_dense(adata: anndata.AnnData) -> None:
    adata.X = adata.X.toarray()


def in_raw(adata: anndata.AnnData) -> None:
    adata.raw = adata.copy()
    adata.X = adata.X.log1p()


def in_layer(adata: anndata.AnnData) -> None:
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()


@pytest.mark.parametrize("change", [as_dense, in_raw, in_layer])
def test_counts_are_found_where_files_keep_them(
    change: Callable[[anndata.AnnData], None], write_h5ad: Callable[..., Path], tmp_path: Path
) -> None:
    counts = anndata.read_h5ad(write_h5ad()).X.toarray()
    uri, _ = ingest_h5ad(write_h5ad(change), None, tmp_path, print)
    np.testing.assert_array_equal(read_back(uri).X.toarray(), counts)


def test_raw_counts_come_with_their_own_genes(write_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    def keep_few_genes(adata: anndata.AnnData) -> None:
        adata.raw = adata.copy()
        adata._inplace_subset_var(adata.var_names[:2])
        adata.X = adata.X.log1p()

    uri, _ = ingest_h5ad(write_h5ad(keep_few_genes), None, tmp_path, print)
    assert list(read_back(uri).var["feature_name"]) == list("abcdef")


def test_values_that_are_no_counts_are_taken_as_they_are_and_that_is_said(
    write_h5ad: Callable[..., Path], tmp_path: Path, lines: list[str]
) -> None:
    path = write_h5ad(lambda adata: setattr(adata, "X", adata.X.log1p()))
    uri, _ = ingest_h5ad(path, None, tmp_path, lines.append)
    np.testing.assert_array_equal(read_back(uri).X.toarray(), anndata.read_h5ad(path).X.toarray())
    assert any("no counts found" in line for line in lines)


def test_scaled_values_are_refused(write_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    path = write_h5ad(lambda adata: setattr(adata, "X", adata.X.toarray() - 2))
    with pytest.raises(ValueError, match=r"X of '.*cells.h5ad' must hold counts, or .* and holds -2;"):
        ingest_h5ad(path, None, tmp_path, print)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cells.h5ad"]


@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning:anndata")
def test_awkward_obs_and_names_do_not_stop_the_demo(write_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    def make_awkward(adata: anndata.AnnData) -> None:
        adata.obs["soma_joinid"] = range(40)
        adata.obs["dose"] = pd.Categorical([0.5, 1.5] * 20)
        adata.obs["donor"] = pd.array([1, None] * 20, dtype="Int64")
        adata.obs["plain"] = ["a", "b", "c", "d"] * 10
        adata.obs_names = ["same"] * 40
        adata.var_names = ["gene"] * 6

    uri, _ = ingest_h5ad(write_h5ad(make_awkward), "plain", tmp_path, print)
    assert {"cell_type", "batch", "donor", "plain"} <= set(read_back(uri).obs)
    assert len(make_task(uri, label="plain").classes) == 4


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"cell_type": "BT", "label": "xy"}, "cell_type"),
        ({"louvain": "01", "label": "xy", "batch": "pq"}, "label"),
        ({"type": "BT"}, "type"),
        ({"type": "BT", "organism": "hh"}, "type"),
        ({"cell_type": "BB", "type": "BT"}, "type"),
    ],
)
def test_the_label_is_the_most_telling_column(columns: dict[str, str], label: str) -> None:
    obs = pd.DataFrame({name: pd.Categorical(list(values)) for name, values in columns.items()})
    obs["n_counts"] = [1.5, 2.5]
    assert _task._guess_label(obs, Path()) == label
    assert _task._guess_label(obs.astype(dict.fromkeys(columns, str)), Path()) == label


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"sex": "mf", "batch": "pq"}, "must be named with --label; categorical are: 'sex', 'batch'"),
        ({}, "obs of 'a.h5ad' must have a column of classes to learn, and has none; add one"),
    ],
)
def test_without_one_telling_column_the_label_must_be_named(columns: dict[str, str], sentence: str) -> None:
    obs = pd.DataFrame({name: pd.Categorical(list(values)) for name, values in columns.items()}, index=[0, 1])
    with pytest.raises(ValueError, match=sentence):
        _task._guess_label(obs, Path("a.h5ad"))


@pytest.mark.parametrize("name", ["dose", "score", "soma_kind"])
def test_a_label_that_holds_no_classes_is_refused(
    name: str, write_h5ad: Callable[..., Path], tmp_path: Path
) -> None:
    def add(adata: anndata.AnnData) -> None:
        adata.obs["dose"] = pd.Categorical([0.5, 1.5] * 20)
        adata.obs["score"] = np.arange(40) / 2
        adata.obs["soma_kind"] = pd.Categorical(["a", "b"] * 20)

    with pytest.raises(
        ValueError, match=f"label='{name}' must hold classes: strings, whole numbers, or true"
    ):
        ingest_h5ad(write_h5ad(add), name, tmp_path, print)


# The task -------------------------------------------------------------------------------------------------


def test_every_labelled_cell_is_for_training_or_held_out(uri: str) -> None:
    task = make_task(uri)
    train, held_out = (set(part.query_ids.obs_joinids.tolist()) for part in (task.train, task.held_out))
    assert train.isdisjoint(held_out)
    assert train | held_out == set(range(N_CELLS))
    assert (len(train), task.n_cells, task.n_genes) == (N_CELLS * 4 // 5, N_CELLS, N_GENES)


def test_cells_in_a_snapshot_are_read_without_the_experiment(uri: str, tmp_path: Path) -> None:
    copy = shutil.copytree(uri, tmp_path / "cells.soma")
    expected = make_task(uri)
    task = make_task(str(copy), snapshot_dir=tmp_path)
    shutil.rmtree(copy)
    [snapshot] = tmp_path.glob("cells-*.snapshot")
    assert Snapshot.open(snapshot).shape == (expected.n_cells, expected.n_genes)
    for part, same in ((task.train, expected.train), (task.held_out, expected.held_out)):
        assert rows_of(part) == rows_of(same)


def test_the_majority_accuracy_is_that_of_the_most_frequent_training_class(uri: str) -> None:
    task = make_task(uri)
    cell_type = simulate_cells(N_CELLS, N_GENES).obs["cell_type"].to_numpy()
    majority = pd.Series(cell_type[task.train.query_ids.obs_joinids]).mode()[0]
    expected = np.mean(cell_type[task.held_out.query_ids.obs_joinids] == majority)
    assert task.majority_accuracy == pytest.approx(expected)


def test_codes_are_places_in_the_sorted_classes(uri: str) -> None:
    task = make_task(uri, obs_filter="cell_type in ['platelet', 'naive B cell', 'plasma cell']")
    assert list(task.classes) == ["naive B cell", "plasma cell", "platelet"]
    for _, obs in task.train:
        assert [task.classes[code] for code in task.codes(obs).tolist()] == list(obs["cell_type"])


def test_cells_without_a_label_are_left_out(
    write_h5ad: Callable[..., Path], tmp_path: Path, lines: list[str]
) -> None:
    def forget_some(adata: anndata.AnnData) -> None:
        adata.obs["my label"] = pd.Categorical([None, "B", "T", "B"] * 10)

    uri, label = ingest_h5ad(write_h5ad(forget_some), "my label", tmp_path, print)
    task = make_task(uri, label=label, obs_filter="batch == 'x' or batch == 'y'", say=lines.append)
    assert task.n_cells == 30
    assert list(task.classes) == ["B", "T"]
    assert lines == ["10 of 40 cells have no my label and are left out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "cel_type"}, "label='cel_type' must be a column of obs; did you mean 'cell_type'?"),
        (
            {"measurement_name": "ADT"},
            "measurement_name='ADT' must be a measurement of the experiment; there are 'RNA'",
        ),
        (
            {"layer_name": "rwa"},
            "layer_name='rwa' must be an X layer of measurement 'RNA'; did you mean 'raw'?",
        ),
        ({"obs_filter": "cell_type = 'B'"}, "obs_filter=\"cell_type = 'B'\" must be a filter that SOMA"),
        ({"obs_filter": "cel == 'B'"}, "Column cel does not exist"),
        ({"obs_filter": "cell_type == 'x'"}, f"must select cells, and selects none of {N_CELLS}"),
        ({"obs_filter": "soma_joinid < 9"}, "9 labelled cells are too few, 10 needed"),
        ({"obs_filter": "cell_type == 'naive B cell'"}, "must have 2 or more classes, and has only 'naive B"),
        ({"label": "obs_id"}, "must have classes of several cells, and has 300 values in 300 cells"),
    ],
)
def test_a_task_with_nothing_to_learn_says_why(uri: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make_task(uri, **options)
    assert "\n" not in str(caught.value)


def test_a_label_of_decimal_numbers_is_refused(write_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    path = write_h5ad(lambda adata: adata.obs.insert(0, "score", np.linspace(0, 1, 40)))
    uri, _ = ingest_h5ad(path, "cell_type", tmp_path, print)
    with pytest.raises(ValueError, match="label='score' must hold classes, not decimal numbers"):
        make_task(uri, label="score")


def test_a_place_without_an_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a SOMA experiment, and cannot be opened as one"):
        make_task(str(tmp_path / "nothing"))
