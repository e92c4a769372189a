"""The benchmark harness on tiny data: what it makes, what it reports. No figure is checked for its size."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import tiledbsoma as soma

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZE = {"rows": 5000, "genes": 3000, "nnz_per_row": 40.0, "seed": 1}
SIZE_OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark_data")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def make(harness, data_dir: Path, layout: str) -> Path:
    make_data: ModuleType = harness("make_data")
    return make_data.make_data(make_data.DataSpec(layout=layout, **SIZE), data_dir)


def run_bench(data_dir: Path, *arguments: str) -> tuple[str, dict]:
    report = data_dir / "report.json"
    command = [
        sys.executable,
        BENCHMARKS / "run.py",
        *SIZE_OPTIONS,
        f"--data-dir={data_dir}",
        f"--json={report}",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(report.read_text())


def as_csr(uri: Path) -> sp.csr_matrix:
    with soma.open(f"{uri}/ms/RNA/X/raw") as X:
        table = X.read().tables().concat()
        i, j, data = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        return sp.csr_matrix((data, (i, j)), shape=X.shape)


@pytest.mark.parametrize(
    ("layout", "tile", "capacity"),
    [("census", ("2048", "2048"), 65_536), ("training", ("64", "3000"), 512)],
)
def test_data_have_the_layout_that_was_asked_for(harness, data_dir, layout, tile, capacity):
    uri = make(harness, data_dir, layout)

    with soma.open(f"{uri}/ms/RNA/X/raw") as X:
        stored = X.schema_config_options()
        dims = json.loads(stored.dims)

    assert tuple(str(dims[name]["tile"]) for name in ("soma_dim_0", "soma_dim_1")) == tile
    assert stored.capacity == capacity
    assert "ZSTD" in str(dims["soma_dim_0"]["filters"]).upper()


def test_every_layout_has_the_same_cells(harness, data_dir):
    census, training = (as_csr(make(harness, data_dir, layout)) for layout in ("census", "training"))
    h5ad = anndata.read_h5ad(make(harness, data_dir, "h5ad") / "cells.h5ad")

    assert census.shape == h5ad.shape == (SIZE["rows"], SIZE["genes"])
    assert (census != training).nnz == 0
    assert (census != h5ad.X).nnz == 0


def test_counts_look_like_molecules_of_few_popular_genes(harness, data_dir):
    X = as_csr(make(harness, data_dir, "census"))

    assert X.nnz / X.shape[0] == pytest.approx(SIZE["nnz_per_row"], rel=0.1)
    assert X.dtype == np.float32
    assert (X.data == np.round(X.data)).all()
    assert X.data.min() == 1
    cells_of_gene = np.sort(np.asarray((X > 0).sum(axis=0)).ravel())[::-1]
    assert cells_of_gene[: SIZE["genes"] // 20].sum() > X.nnz / 2


def test_obs_is_sorted_by_dataset_and_has_categories(harness, data_dir):
    with soma.Experiment.open(str(make(harness, data_dir, "census"))) as experiment:
        obs = experiment.obs.read().concat().to_pandas()

    assert obs["soma_joinid"].tolist() == list(range(SIZE["rows"]))
    assert obs["dataset_id"].cat.codes.is_monotonic_increasing
    assert obs["dataset_id"].nunique() >= 4
    assert obs.groupby("donor_id", observed=True)["dataset_id"].nunique().max() == 1
    assert {"cell_type", "donor_id", "assay"} <= {name for name in obs if obs[name].dtype == "category"}
    assert (obs["percentile"] < 10).mean() == pytest.approx(0.1, abs=0.02)


def test_data_are_used_again_and_made_anew_for_other_parameters(harness, data_dir):
    make_data = harness("make_data")
    spec = make_data.DataSpec(layout="training", **{**SIZE, "rows": 100})

    folder = make_data.make_data(spec, data_dir)
    (folder / "left_alone").touch()
    again = make_data.make_data(spec, data_dir)
    other = make_data.make_data(replace(spec, seed=2), data_dir)

    assert again == folder
    assert (folder / "left_alone").exists()
    assert other != folder
    assert not list(data_dir.glob("*.partial*"))


def test_a_run_gives_a_table_and_json_with_every_field(data_dir):
    table, report = run_bench(
        data_dir, "--quick", "--only=raw scan", "--only=default, sparse", "--batch-size=256"
    )

    raw, ours = report["cases"]
    assert [raw["name"], ours["name"]] == ["raw scan", "default, sparse"]
    assert raw["status"] == ours["status"] == "ok", (raw, ours)
    assert ours["rows"] == raw["rows"] == SIZE["rows"]
    assert ours["n_batches"] == -(-SIZE["rows"] // 256)
    assert ours["window_rows"] == SIZE["rows"]
    assert ours["of_raw"] == pytest.approx(raw["seconds"] / ours["seconds"])
    assert 0.9 < ours["mixing"] < 1.1
    for name in ("rows_per_s", "seconds", "first_s", "first_raw_s", "peak_mib", "peak_anon_mib", "cpu_s"):
        assert ours[name] > 0, name
    assert report["machine"]["cores"] >= 1
    assert report["data"]["rows"] == SIZE["rows"]
    assert {goal["verdict"] for goal in report["goals"]} <= {"met", "missed", "not measured"}
    assert all(words in table for words in ("rows/s", "default, sparse", "verdict"))


def test_an_option_that_is_not_there_is_reported(harness, data_dir):
    make_data = harness("make_data")
    cases, run = harness("cases"), harness("run")
    case = cases.Case(name="tomorrow", options={"warp_speed": True})
    options = run.parse_options([f"--data-dir={data_dir}", "--quick"])
    bench = run.Bench(make_data.DataSpec(layout="census", **SIZE), options)
    bench._folders["census"] = make(harness, data_dir, "census")

    record = bench.measure(case)
    row = run.summarise(case, {"tomorrow": [record]})

    assert row["status"] == "not available"
    assert "warp_speed" in row["note"]
    assert "not available" in harness("report").as_text(harness("report").case_table([row]))


def test_a_peer_that_cannot_be_installed_is_reported(harness, data_dir, monkeypatch):
    run, cases = harness("run"), harness("cases")
    case = next(case for case in cases.CASES if case.peer == "scdataset")

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "pip\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", fail)
    folders = [f"--data-dir={data_dir}", f"--envs-dir={data_dir / 'envs'}"]
    options = run.parse_options([*SIZE_OPTIONS, *folders, "--repetitions=1"])

    [row] = run.measure_all([case], options)["cases"]

    assert row["status"] == "not installed"
    assert row["note"] == "not installed: ERROR: No matching distribution found"


def test_windows_are_found_from_the_order_of_rows(harness):
    window_ends = harness("soma_epoch").window_ends
    rng = np.random.default_rng(0)
    chunks = rng.permutation(np.arange(1000 * 64).reshape(-1, 64))
    windows = [rng.permutation(part.ravel()) for part in np.split(chunks, [200, 400])]

    ends = window_ends(np.concatenate(windows), np.arange(1000 * 64), 64)

    assert ends.tolist() == [200 * 64, 400 * 64, 1000 * 64]


def test_mixing_is_one_for_a_random_order_and_nought_for_sorted_labels(harness):
    mixing = harness("soma_epoch").mixing
    labels = np.repeat(np.arange(10), 1000)
    ids = np.arange(len(labels))

    assert mixing(labels, np.split(ids, 10), ids) == pytest.approx(0, abs=1e-9)
    shuffled = np.random.default_rng(1).permutation(ids)
    assert mixing(labels, np.split(shuffled, 10), ids) == pytest.approx(1, abs=0.01)
