from __future__ import annotations

import json
import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from stores import make_cells
from test_cli import run, run_process
from tiledbsoma_ml._ingest.experiment import write_cells
from tiledbsoma_ml.simulate import simulate_cells, simulate_experiment

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
SMALL = ["--cells", "600", "--genes", "100", "--epochs", "3", "--batch-size", "16"]


def read_table(output: str) -> dict[str, float]:
    """Return the numbers of the table at the end, percentages as shares."""
    names = "cells|genes|mini-batches|rows/s|held-out accuracy|majority class"
    rows = re.findall(rf"^  ({names}) +([\d,.]+)(%?)", output, flags=re.MULTILINE)
    return {name: float(number.replace(",", "")) / (100 if percent else 1) for name, number, percent in rows}


def size_of_png(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    return width, height


def write_h5ad(path: Path, **obs: Any) -> Path:
    counts = np.random.default_rng(0).poisson(3.0, (60, 8)).astype(np.float32)
    counts[::2, :4] *= 4
    columns = {name: pd.Categorical(list(values)) for name, values in obs.items()}
    make_cells(sparse.csr_matrix(counts), obs=columns).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("cli") / "experiment")
    simulate_experiment(path, n_cells=200, n_genes=50)
    return path


@pytest.fixture
def h5ad(tmp_path: Path) -> Path:
    return write_h5ad(tmp_path / "cells.h5ad", label=["odd", "even"] * 30)


# What it does ---------------------------------------------------------------------------------------------


def test_the_demo_simulates_streams_learns_and_reports(tmp_path: Path) -> None:
    code, output = run("demo", *SMALL, "--output-dir", tmp_path)
    table = read_table(output)
    assert code == 0
    assert list(table) == ["cells", "genes", "mini-batches", "rows/s", "held-out accuracy", "majority class"]
    assert (table["cells"], table["genes"], table["mini-batches"]) == (600, 100, 3 * 30)
    assert table["rows/s"] > 0
    assert table["held-out accuracy"] > table["majority class"]
    assert "training on 480 cells, testing on 120" in output
    assert f"loss curve: {tmp_path / 'loss.png'}" in output.splitlines()
    assert size_of_png(tmp_path / "loss.png") == (1200, 825)


def test_output_that_is_no_terminal_has_a_line_per_epoch_and_no_control_codes(tmp_path: Path) -> None:
    _, output = run("demo", *SMALL, "--output-dir", tmp_path)
    assert re.findall(r"^epoch (\d)/3 ", output, flags=re.MULTILINE) == ["1", "2", "3"]
    assert output.isprintable() or set(filter(lambda c: not c.isprintable(), output)) == {"\n"}
    assert "━" not in output


def test_a_second_run_uses_the_same_experiment_and_repeats_the_first(tmp_path: Path) -> None:
    outputs = [run("demo", *SMALL, "--output-dir", tmp_path)[1] for _ in range(2)]
    assert "building the experiment" in outputs[0]
    assert "using the experiment built before" in outputs[1]
    accuracies = [re.findall(r"held-out accuracy ([\d.]+%)", output) for output in outputs]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize(
    ("arguments", "n_snapshots"),
    [((), 1), (("--stream",), 0), (("--epochs", 1), 0), (("--epochs", 1, "--snapshot"), 1)],
)
def test_what_is_read_more_than_once_is_read_from_a_snapshot(
    uri: str, tmp_path: Path, arguments: tuple[str, ...], n_snapshots: int
) -> None:
    code, output = run("demo", "--uri", uri, "--label", "cell_type", *arguments, "--output-dir", tmp_path)
    assert code == 0
    assert len(list(tmp_path.glob("experiment-*.snapshot"))) == n_snapshots
    assert output.count("snapshot of the cells: ") == n_snapshots


def test_an_h5ad_file_is_trained_on(h5ad: Path, tmp_path: Path) -> None:
    code, output = run("demo", "--h5ad", h5ad, "--batch-size", 8, "--output-dir", tmp_path / "out")
    table = read_table(output)
    assert code == 0
    assert "no --label was given: learning 'label'" in output
    assert (table["cells"], table["genes"]) == (60, 8)
    assert table["held-out accuracy"] > table["majority class"]
    assert (tmp_path / "out" / "loss.png").exists()


def test_missing_labels_and_filtered_cells_are_left_out(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "x.h5ad", kind=["odd", "even", None] * 20, batch=["p"] * 30 + ["q"] * 30)
    options = ["--label", "kind", "--obs-filter", "batch == 'p'", "--epochs", 1, "--output-dir", tmp_path]
    code, output = run("demo", "--h5ad", path, "--layer-name", "X", *options)
    assert code == 0
    assert "10 of 30 cells have no kind and are left out" in output
    assert read_table(output)["cells"] == 20


def test_an_experiment_is_trained_on_and_left_as_it_is(uri: str, tmp_path: Path) -> None:
    before = sorted(Path(uri).rglob("*"))
    options = ["--label", "donor_id", "--layer-name", "raw", "--measurement-name", "RNA", "--epochs", 1]
    code, output = run("demo", "--uri", uri, *options, "--output-dir", tmp_path)
    assert code == 0
    assert read_table(output)["cells"] == 200
    assert sorted(Path(uri).rglob("*")) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]


def test_workers_read_the_same_cells(uri: str, tmp_path: Path) -> None:
    options = ["--label", "cell_type", "--epochs", 1, "--num-workers", 1, "--output-dir", tmp_path]
    code, output = run("demo", "--uri", uri, *options)
    assert code == 0
    assert read_table(output)["mini-batches"] == 2


def test_one_core_is_left_to_readers_while_training_and_given_back(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    step, before = torch.optim.Adam.step, torch.get_num_threads()

    def watched(*args: Any) -> Any:
        seen.append(torch.get_num_threads())
        return step(*args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    run("demo", "--uri", uri, "--label", "cell_type", "--epochs", 1, "--output-dir", tmp_path)
    assert set(seen) == {max(1, before - 1)}
    assert torch.get_num_threads() == before


def test_names_with_brackets_and_dollars_are_shown_as_they_are(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a [b] $c$.h5ad", **{"type [x] $y$ ${": ["odd", "even"] * 30})
    code, output = run("demo", "--h5ad", path, "--epochs", 1, "--output-dir", tmp_path / "out [1]")
    assert code == 0
    assert "2 classes of type [x] $y$ ${" in output
    assert f"loss curve: {tmp_path / 'out [1]' / 'loss.png'}" in output


def test_the_console_script_runs_as_a_process(tmp_path: Path) -> None:
    done = run_process(
        "from tiledbsoma_ml.cli import main; main()", "demo", *SMALL, "--output-dir", str(tmp_path)
    )
    assert done.returncode == 0
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    assert read_table(done.stdout)["cells"] == 600


def test_paths_may_be_relative_or_begin_with_the_home_directory(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(uri).parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, output = run("plan", Path(uri).name, "--json")
    assert (code, json.loads(output)["settings"]["uri"]) == (0, uri)
    arguments = ("--epochs", 1, "--snapshot", "--output-dir", "~/out")
    code, output = run("demo", "--uri", Path(uri).name, "--label", "cell_type", *arguments)
    assert code == 0
    assert f"loss curve: {tmp_path / 'out' / 'loss.png'}" in output.splitlines()
    assert len(list((tmp_path / "out").glob("*.snapshot"))) == 1
    write_h5ad(tmp_path / "cells.h5ad", label=["odd", "even"] * 30)
    assert run("demo", "--h5ad", "~/cells.h5ad", "--epochs", 1, "--output-dir", "~/out")[0] == 0


def test_help_names_every_option_and_gives_examples() -> None:
    code, output = run("demo", "--help")
    assert code == 0
    of_cells = "h5ad uri label obs-filter layer-name measurement-name cells genes"
    for option in f"{of_cells} epochs batch-size seed num-workers snapshot output-dir".split():
        assert f"--{option} " in output
    assert "tiledbsoma-ml demo --h5ad pbmc.h5ad --label cell_type" in output


# What it refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", 0], "epochs=0 must be a positive integer; try 5."),
        (["--batch-size", -1], "batch_size=-1 must be a positive integer; try 128."),
        (["--seed", -1], "seed=-1 must be an integer of at least 0; try 42."),
        (["--num-workers", -1], "num_workers=-1 must be an integer of at least 0; try 0."),
        (["--cells", 0], "cells=0 must be a positive integer; try 2000."),
        (["--genes", 0], "genes=0 must be a positive integer; try 2000."),
        (["--cells", 5], "5 labelled cells are too few, 10 needed; select more of them."),
        (["--h5ad", "a", "--uri", "b"], "--h5ad=a and --uri=b exclude each other; give one of them."),
        (["--uri", "b"], "--uri=b needs the column of obs to learn; add --label COLUMN."),
        (
            ["--layer-name", "raw"],
            "--layer-name=raw chooses within an experiment or a file; add --uri or --h5ad, or",
        ),
        (
            ["--measurement-name", "RNA"],
            "--measurement-name=RNA chooses within an experiment; add --uri, or leave it out.",
        ),
        (
            ["--h5ad", "a", "--cells", 9],
            "--cells=9 is for simulated cells; leave out --uri and --h5ad, or this.",
        ),
        (["--h5ad", "none.h5ad"], "/none.h5ad' must be an existing file; check the path."),
        (["--uri", "", "--label", "x"], "uri='' must not be empty; try '.' for the working directory."),
        (
            ["--uri", "none", "--label", "x"],
            "/none' must be a SOMA experiment, and cannot be opened as one",
        ),
        (
            ["--uri", "{uri}", "--label", "cell"],
            "label='cell' must be a column of obs; did you mean 'cell_type'?",
        ),
        (
            ["--uri", "{uri}", "--label", "assay", "--layer-name", "rwa"],
            "layer_name='rwa' must be an X layer of",
        ),
        (
            ["--uri", "{uri}", "--label", "assay", "--measurement-name", "x"],
            "measurement_name='x' must be a measurement",
        ),
        (["--uri", "{uri}", "--label", "assay", "--obs-filter", "assay = 1"], "must be a filter that SOMA"),
        (["--uri", "{uri}", "--label", "assay", "--obs-filter", "assay == 'x'"], "selects none of 200"),
        (
            ["--uri", "{uri}", "--label", "dataset_id", "--obs-filter", "dataset_id == 'dataset-1'"],
            "label='dataset_id' must have 2 or more classes, and has only 'dataset-1'",
        ),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    arguments: list[object], message: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = run("demo", *(str(argument).format(uri=uri) for argument in arguments))
    last = output.splitlines()[-1]
    assert code == 2
    assert last.startswith("Error: ")
    assert message in last
    assert output.count("Error") == 1
    assert "Traceback" not in output
    assert not (tmp_path / "demo_output" / "loss.png").exists()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("not an h5ad file")
    code, output = run("demo", "--h5ad", tmp_path / "text.h5ad", "--output-dir", tmp_path / "out")
    assert code == 2
    assert "must be an AnnData file, and cannot be read as one" in output
    assert output.count("\n") == 1


def test_a_file_without_a_telling_column_is_refused(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "x.h5ad", sex=["f", "m"] * 30, batch=["p", "q"] * 30)
    code, output = run("demo", "--h5ad", path, "--output-dir", tmp_path)
    assert code == 2
    assert "must be named with --label; categorical are: 'sex', 'batch'." in output


def test_a_misspelt_label_of_a_file_is_refused_before_anything_is_written(h5ad: Path, tmp_path: Path) -> None:
    code, output = run("demo", "--h5ad", h5ad, "--label", "labl", "--output-dir", tmp_path / "out")
    assert code == 2
    assert "label='labl' must be a column of obs; did you mean 'label'?" in output
    assert list((tmp_path / "out").iterdir()) == []


def test_a_misspelt_layer_of_a_file_is_refused(h5ad: Path, tmp_path: Path) -> None:
    code, output = run("demo", "--h5ad", h5ad, "--layer-name", "x", "--output-dir", tmp_path / "out")
    assert code == 2
    assert f"layer_name='x' must be one of the layers of {str(h5ad)!r}; there are 'X'." in output
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_dir_that_is_a_file_is_refused(h5ad: Path) -> None:
    code, output = run("demo", "--h5ad", h5ad, "--output-dir", h5ad)
    assert code == 2
    assert "must be a folder; choose another." in output


def test_numbers_below_zero_are_refused_instead_of_learned_from(tmp_path: Path) -> None:
    uri = str(tmp_path / "scaled")
    cells = simulate_cells(n_cells=60, n_genes=20)
    cells.X = cells.X * -1.0
    write_cells(uri, cells, layer_name="scaled")
    code, output = run("demo", "--uri", uri, "--label", "assay", "--output-dir", tmp_path)
    assert code == 2
    assert output.splitlines()[-1].startswith("Error: X must hold counts, or other numbers of 0 or more")


# Real data ------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "n_cells", "n_genes", "least"),
    [("pbmc3k_counts", 2_638, 13_714, 0.8), ("mouse_bladder_counts", 2_100, 20_670, 0.7)],
)
def test_real_cells_are_told_apart(
    name: str, n_cells: int, n_genes: int, least: float, tmp_path: Path
) -> None:
    path = REAL_DATA / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    code, output = run("demo", "--h5ad", path, "--epochs", 2, "--output-dir", tmp_path)
    table = read_table(output)
    assert code == 0
    assert (table["cells"], table["genes"]) == (n_cells, n_genes)
    assert table["held-out accuracy"] > least > table["majority class"]


@pytest.mark.realdata
def test_an_experiment_written_by_others_is_trained_on(tmp_path: Path) -> None:
    archive = REAL_DATA / "soma_pbmc_small_by_others.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
        uri = tmp_path / files.getnames()[0].partition("/")[0]
    options = [
        "--label",
        "RNA_snn_res.1",
        "--layer-name",
        "counts",
        "--batch-size",
        8,
        "--output-dir",
        tmp_path,
    ]
    code, output = run("demo", "--uri", uri, *options)
    table = read_table(output)
    assert code == 0
    assert (table["cells"], table["genes"]) == (80, 230)
