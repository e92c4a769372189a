"""The benchmark harness on tiny data: what it makes, what it reports. No figure is checked for its size."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tiledbsoma as soma

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZE = {"rows": 5000, "genes": 3000, "nnz_per_row": 40.0, "seed": 1}
KINDS = ("census", "light")
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


def drawn(harness, **changes) -> tuple[sp.csr_matrix, pd.DataFrame]:
    """Return X and obs of cells, without writing them."""
    cells = harness("cells").Cells(**{"kind": "census", **SIZE, **changes})
    obs = cells.obs()
    blocks = list(cells.blocks(obs, cells.genes))
    row = np.concatenate([start + row for start, row, _, _ in blocks])
    column, count = (np.concatenate([block[k] for block in blocks]) for k in (2, 3))
    return sp.csr_matrix((count, (row, column)), shape=(cells.rows, cells.genes)), obs


@pytest.mark.parametrize("kind", KINDS)
def test_counts_look_like_molecules_of_few_popular_genes(harness, kind):
    X, _ = drawn(harness, kind=kind)

    assert X.nnz / X.shape[0] == pytest.approx(SIZE["nnz_per_row"], rel=0.1)
    assert X.dtype == np.float32
    assert (X.data == np.round(X.data)).all()
    assert X.data.min() == 1
    cells_of_gene = np.sort(np.asarray((X > 0).sum(axis=0)).ravel())[::-1]
    assert cells_of_gene[: SIZE["genes"] // 20].sum() > X.nnz / 4


def test_cells_of_the_census_have_its_spread_of_genes_and_counts(harness):
    tables = json.loads((BENCHMARKS / "census_cells.json").read_text())
    X, obs = drawn(harness, rows=2048, genes=12_000, nnz_per_row=600.0)

    nnz = np.diff(X.indptr)
    of_median = nnz / pd.Series(nnz).groupby(obs["dataset_id"].cat.codes).transform("median").to_numpy()
    at = (2, 8, 16, 24, 30)
    for share, expected in zip(np.quantile(of_median, np.array(at) / 32), at, strict=True):
        assert share == pytest.approx(tables["nnz_of_median"][expected], rel=0.15)
    # Most values of real cells are 1, and a few are in the hundreds.
    assert 0.5 < (X.data == 1).mean() < 0.8
    assert X.data.max() > 100
    means = np.asarray(X.sum(axis=1)).ravel() / nnz
    assert means.mean() == pytest.approx(obs["mean_count"].mean(), rel=0.2)
    seen = np.sort(np.asarray((X > 0).mean(axis=0)).ravel())[::-1]
    assert seen[0] > 0.5
    assert np.count_nonzero(seen < 0.01) > 12_000 / 4


def test_tables_of_cells_are_derived_from_obs_and_var_of_the_census(harness):
    rng = np.random.default_rng(0)
    nnz = np.concatenate([rng.integers(500, 1500, 301), rng.integers(2000, 4000, 101)])
    obs = pd.DataFrame({"dataset_id": ["a"] * 301 + ["b"] * 101, "nnz": nnz, "raw_sum": nnz * nnz / 1000})
    var = pd.DataFrame({"nnz": [900, 10, 0, 500], "n_measured_obs": [1000, 1000, 0, 1000]})

    tables = harness("derive_census_cells").derive(obs, var)

    assert tables.keys() == json.loads((BENCHMARKS / "census_cells.json").read_text()).keys()
    assert tables["dataset_median_nnz"] == sorted(obs.groupby("dataset_id")["nnz"].median())
    assert np.median(tables["nnz_of_median"]) == 1
    assert tables["gene_share"] == [0.9, 0.5, 0.01]
    assert all(mean == pytest.approx(nnz / 1000, rel=0.05) for nnz, mean in tables["mean_count"])


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
    n_values = as_csr(make_data.make_data(spec, data_dir)).nnz

    folder = make_data.make_data(spec, data_dir)
    (folder / "left_alone").touch()
    again = make_data.make_data(spec, data_dir)
    other = make_data.make_data(replace(spec, seed=2), data_dir)

    assert again == folder
    assert make_data.nnz_of(folder) == n_values
    assert (folder / "left_alone").exists()
    assert other != folder
    assert not list(data_dir.glob("*.partial*"))


def test_a_run_gives_a_table_and_json_with_every_field(data_dir):
    table, report = run_bench(
        data_dir, "--quick", "--only=tuned scan", "--only=default, sparse", "--batch-size=256"
    )

    raw, ours = report["cases"]
    assert [raw["name"], ours["name"]] == ["tuned scan", "default, sparse"]
    assert raw["status"] == ours["status"] == "ok", (raw, ours)
    assert ours["rows"] == raw["rows"] == SIZE["rows"]
    assert ours["n_batches"] == -(-SIZE["rows"] // 256)
    assert ours["window_rows"] == SIZE["rows"]
    assert ours["of_scan"] == pytest.approx(raw["seconds"] / ours["seconds"])
    assert ours["nnz"] == raw["nnz"]
    assert ours["cpu_ns_per_nnz"] == pytest.approx(ours["cpu_s"] / ours["nnz"] * 1e9)
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
    bench = run.Bench(make_data.DataSpec(**SIZE), options)

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


def test_a_peer_whose_python_is_not_found_is_not_installed(harness, tmp_path, monkeypatch):
    envs = harness("envs")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))

    with pytest.raises(envs.NotInstalledError, match=r"needs Python 3\.12, which was not found"):
        envs.peer_python("annbatch", tmp_path)


def test_every_case_that_others_are_compared_with_and_every_peer_is_there(harness):
    cases, envs = harness("cases").CASES, harness("envs")
    names = [case.name for case in cases]

    assert len(set(names)) == len(names)
    assert {case.against for case in cases} <= {None, *names}
    assert {case.peer for case in cases} - {None} == set(envs.PEERS)


def test_goals_are_figures_of_cases(harness):
    goals, names = harness("goals"), {case.name for case in harness("cases").CASES}

    class Asked(dict):
        def __missing__(self, name):
            assert name in names, name
            raise KeyError(name)

    goals.assess_goals(Asked())


class Answering(BaseHTTPRequestHandler):
    """Answers like a server of S3: with a content, or with a length alone."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"cells")

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()

    def log_message(self, *args):
        pass


def test_a_late_server_delays_counts_and_passes_on_each_request(harness):
    latency = harness("latency")

    def ask(port: int) -> list[tuple[str | None, bytes, float]]:
        connection, answers = HTTPConnection("127.0.0.1", port), []  # one for all requests
        for method, path in (("GET", "/x"), ("HEAD", "/x"), ("GET", latency.COUNTS_PATH)):
            start = time.perf_counter()
            connection.request(method, path)
            answer = connection.getresponse()
            content = answer.read()
            answers.append((answer.getheader("Content-Length"), content, time.perf_counter() - start))
        connection.close()
        return answers

    async def serve_and_ask(upstream: int) -> list[tuple[str | None, bytes, float]]:
        proxy = latency.Proxy("127.0.0.1", upstream, delay_s=0.05)
        async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
            return await asyncio.to_thread(ask, server.sockets[0].getsockname()[1])

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as upstream:
        threading.Thread(target=upstream.serve_forever).start()
        get, head, counts = asyncio.run(serve_and_ask(upstream.server_port))
        upstream.shutdown()

    assert get[:2] == ("5", b"cells")
    assert head[:2] == ("7", b"")
    assert min(get[2], head[2]) >= 0.05
    assert json.loads(counts[1]) == {"requests": 2, "request_bytes": 5}


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


def test_the_script_for_a_gpu_runs_on_a_cpu(harness, tmp_path, monkeypatch, capsys):
    gpu = harness("gpu")
    monkeypatch.setitem(sys.modules, "scvi.model", None)  # the test of training with scVI runs that part
    size = ["--rows=500", "--genes=300", "--batch-size=64", "--limit-s=0.1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device=cpu", *size, f"--data-dir={tmp_path}"])

    gpu.main()

    result = json.loads(capsys.readouterr().out)
    assert result["data"]["rows"] == 500
    assert len(result["cases"]) == 3
    assert all(case["rows_per_s"] > 0 for case in result["cases"].values())
    assert result["scvi"]["status"] == "not installed"
    assert result["bytes_per_row_at_least"]["dense"] == 1200


def test_bytes_sent_to_a_device_are_those_of_copies_to_it(harness):
    copies = {"Memcpy HtoD (Pinned -> Device)": 100, "Memcpy HtoD (Pageable -> Device)": 20, "Memcpy DtoH": 3}
    events = [{"name": name, "args": {"bytes": size}} for name, size in copies.items()]

    assert harness("gpu").sent_bytes({"traceEvents": [{"ph": "M"}, *events]}) == 120
