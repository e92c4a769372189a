"""Experiments are opened with the settings that we recommend, wherever the package opens one."""

from __future__ import annotations

import ast
import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiledbsoma as soma
from typer.testing import CliRunner

import tiledbsoma_ml
from stores import MEASUREMENT, N_OBS, Store, make_cells, workers
from stress_obs import read_until
from tiledbsoma_ml import (
    ExperimentDataset,
    QueryIDs,
    Snapshot,
    XLocator,
    _context,
    cli,
    experiment_dataloader,
)
from tiledbsoma_ml._context import PARALLEL_MERGE
from tiledbsoma_ml.data_module import ExperimentDataModule
from tiledbsoma_ml.simulate import simulate_experiment

PACKAGE = Path(tiledbsoma_ml.__file__).parent
VARIABLE = "TILEDB_SM_QUERY_SPARSE_GLOBAL_ORDER_PREPROCESS_TILE_MERGE"


def merge_in(context: soma.SOMATileDBContext) -> str:
    """Return the setting as TileDB has it."""
    return str(context.native_context.config()[PARALLEL_MERGE])


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own environment would decide otherwise."""
    monkeypatch.delenv(VARIABLE, raising=False)


# The context that we offer --------------------------------------------------------------------------------


def test_the_context_has_the_setting_and_opens_what_it_is_given(store: Store) -> None:
    context = tiledbsoma_ml.context()
    with soma.Experiment.open(store.uri, context=context) as experiment:
        assert len(experiment.obs.read().concat()) == N_OBS
        assert merge_in(experiment.obs.context) == "0"


def test_tiledb_alone_does_not_have_it() -> None:
    assert merge_in(soma.SOMATileDBContext(tiledb_config={"vfs.s3.region": "us-west-2"})) != "0"


def test_the_context_takes_settings_of_the_user() -> None:
    settings: dict[str, Any] = {"vfs.s3.region": "us-west-2"}
    for context in (
        tiledbsoma_ml.context(settings),
        tiledbsoma_ml.context(tiledb_config=settings),
        tiledbsoma_ml.context(**settings),
    ):
        assert context.native_context.config()["vfs.s3.region"] == "us-west-2"
        assert merge_in(context) == "0"


def test_a_name_that_is_no_setting_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^region='us-west-2' must be a setting of TileDB, whose names have"):
        tiledbsoma_ml.context(region="us-west-2")


@pytest.mark.parametrize("settings", ["vfs.s3.region", [("vfs.s3.region", "us-west-2")], {1: 2}])
def test_what_is_no_dictionary_of_settings_is_refused(settings: Any) -> None:
    with pytest.raises(TypeError, match=r"try context\({'vfs.s3.region': 'us-west-2'}\)"):
        tiledbsoma_ml.context(settings)


def test_the_context_takes_a_timestamp(store: Store) -> None:
    context = tiledbsoma_ml.context(timestamp=1_700_000_000_000)
    assert context.timestamp_ms == 1_700_000_000_000


# What the user decided wins -------------------------------------------------------------------------------


def located(uri: str, context: soma.SOMATileDBContext | None) -> XLocator:
    with soma.Experiment.open(uri, context=context) as experiment:
        return XLocator.create(experiment, MEASUREMENT)


def merge_of(locator: XLocator) -> str:
    with locator.open() as (_, obs):
        return merge_in(obs.context)


@pytest.mark.parametrize(
    ("config", "expected"), [(None, "0"), ({"vfs.s3.region": "x"}, "0"), ({PARALLEL_MERGE: 7}, "7")]
)
def test_the_users_own_value_wins(store: Store, config: dict[str, Any] | None, expected: str) -> None:
    assert merge_of(located(store.uri, soma.SOMATileDBContext(tiledb_config=config))) == expected
    assert merge_in(tiledbsoma_ml.context(config)) == expected


@pytest.mark.parametrize("value", ["9", "32768"])
def test_the_users_environment_wins(store: Store, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    fresh = soma.SOMATileDBContext(tiledb_config={"vfs.s3.region": "x"})
    assert merge_of(located(store.uri, fresh)) == value
    assert merge_in(tiledbsoma_ml.context()) == value
    assert merge_in(tiledbsoma_ml.context({PARALLEL_MERGE: "0"})) == "0"


# What is told ---------------------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.INFO and "crash" in r.getMessage()]


def test_a_query_from_another_context_is_told_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    _context._tell_unprotected.cache_clear()
    caplog.set_level(logging.INFO, "tiledbsoma_ml")
    located(store.uri, tiledbsoma_ml.context())
    located(store.uri, soma.SOMATileDBContext(tiledb_config={PARALLEL_MERGE: 0}))
    assert told(caplog) == []
    for _ in range(2):
        located(store.uri, soma.SOMATileDBContext(tiledb_config={"vfs.s3.region": "x"}))
    (sentence,) = told(caplog)
    assert sentence.endswith("open the experiment with context=tiledbsoma_ml.context().")


def test_versions_of_tiledb_that_do_not_know_the_setting_are_not_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _context._tell_unprotected.cache_clear()
    caplog.set_level(logging.INFO, "tiledbsoma_ml")
    _context.tell_if_unprotected({"vfs.s3.region": "x"})
    assert told(caplog) == []


# Every context that the package opens ---------------------------------------------------------------------


@pytest.fixture
def query(store: Store) -> Iterator[soma.ExperimentAxisQuery]:
    """A query of a user whose own context lacks the setting."""
    context = soma.SOMATileDBContext(tiledb_config={"vfs.s3.region": "x"})
    with (
        soma.Experiment.open(store.uri, context=context) as experiment,
        experiment.axis_query(MEASUREMENT) as query,
    ):
        yield query


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[soma.SOMATileDBContext]]:
    """All contexts that are made during a test, which must be some; each must have the setting."""
    contexts: list[soma.SOMATileDBContext] = []
    make = soma.SOMATileDBContext.__init__

    def recorded(context: soma.SOMATileDBContext, *args: Any, **kwargs: Any) -> None:
        make(context, *args, **kwargs)
        contexts.append(context)

    monkeypatch.setattr(soma.SOMATileDBContext, "__init__", recorded)
    yield contexts
    assert contexts
    assert {merge_in(context) for context in contexts} == {"0"}


def run(*arguments: object) -> None:
    result = CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("context") / "experiment")
    simulate_experiment(uri, n_cells=60, n_genes=10)
    return uri


def test_the_simulation_does(tmp_path: Path, opened: list[Any]) -> None:
    simulate_experiment(str(tmp_path / "experiment"), n_cells=30, n_genes=5)


def test_a_dataset_does(query: soma.ExperimentAxisQuery, opened: list[Any]) -> None:
    for sizes in ({}, {"shuffle_chunk_size": "auto", "io_batch_size": "auto"}):
        assert sum(len(obs) for _, obs in ExperimentDataset(query, batch_size=100, **sizes)) == N_OBS


def test_a_snapshot_and_its_creation_do(
    query: soma.ExperimentAxisQuery, tmp_path: Path, opened: list[Any]
) -> None:
    for _ in range(2):  # the second checks what the first was made of
        Snapshot.create(tmp_path / "s", query, obs_column_names=["barcode"], progress=False)


def test_a_data_module_does(query: soma.ExperimentAxisQuery, opened: list[Any]) -> None:
    data = ExperimentDataModule(query, batch_size=64)
    assert len(data.read_obs(["barcode"])) == N_OBS
    assert len(data.read_var(["feature_id"])) == data.n_vars


def test_the_demo_does_on_an_h5ad_file(tmp_path: Path, opened: list[Any]) -> None:
    cells = make_cells(np.ones((60, 4), np.float32), obs={"label": pd.Categorical(["odd", "even"] * 30)})
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for _ in range(2):  # the second uses what the first made
        run("demo", "--h5ad", tmp_path / "cells.h5ad", "--epochs", 2, "--output-dir", tmp_path / "out")


def test_the_demo_and_the_plan_do_on_an_experiment(simulated: str, tmp_path: Path, opened: list[Any]) -> None:
    run("demo", "--uri", simulated, "--label", "assay", "--epochs", 1, "--output-dir", tmp_path)
    run("plan", simulated)


def test_several_h5ad_files_as_one_experiment_do(tmp_path: Path, opened: list[Any]) -> None:
    from tiledbsoma_ml._ingest.h5ad import ingest_h5ads

    path = tmp_path / "cells.h5ad"
    make_cells(np.ones((6, 4), np.float32)).write_h5ad(path)
    ingest_h5ads([path], None, tmp_path / "made", print)


def test_an_embedding_that_is_written_does(simulated: str, opened: list[Any]) -> None:
    scvi = pytest.importorskip("tiledbsoma_ml.scvi")
    rows = pd.Index(range(60), name="soma_joinid")
    scvi.write_obsm(simulated, "RNA", "X_new", pd.DataFrame(np.ones((60, 2)), index=rows))


def merges_here(batch: Any) -> Any:
    """Return the setting in every context of this process."""
    return [merge_in(c) for c in gc.get_objects() if isinstance(c, soma.SOMATileDBContext)]


def test_a_worker_process_does(store: Store) -> None:
    locator = located(store.uri, soma.SOMATileDBContext(tiledb_config={"vfs.s3.region": "x"}))
    ids = QueryIDs(obs_joinids=range(20), var_joinids=range(3))
    dataset = ExperimentDataset(x_locator=locator, query_ids=ids, batch_size=5)
    found = list(experiment_dataloader(dataset, collate_fn=merges_here, **workers(1)))
    assert found[0]
    assert {merge for merges in found for merge in merges} == {"0"}


def test_what_make_stress_repeats_does(store: Store, opened: list[Any]) -> None:
    assert read_until(store.uri, seconds=0.01, protected=True) == 1


def calls_in(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield the calls in a file, each with the text of what is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def lacks_context(called: str, call: ast.Call) -> bool:
    """Whether a call opens something of SOMA in a context that nobody chose."""
    if called.endswith("SOMATileDBContext"):
        return True
    opens = called.startswith(("soma.", "tiledbsoma.")) and called.endswith(
        (".open", ".create", ".exists", ".from_anndata", ".from_h5ad")
    )
    is_chosen = any("context(" in ast.unparse(argument) for argument in call.args)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    is_chosen |= "context" in keywords or any("context(" in value for value in keywords.values())
    return opens and not is_chosen


EXAMPLES = (Path(__file__).parents[1] / "notebooks").glob("*.py")


@pytest.mark.parametrize("path", sorted([*PACKAGE.rglob("*.py"), *EXAMPLES]), ids=lambda path: path.stem)
def test_no_module_opens_anything_of_soma_in_a_context_of_its_own(path: Path) -> None:
    allowed = {"soma.SOMATileDBContext"} if path.stem == "_context" else set()
    assert {called for called, call in calls_in(path) if lacks_context(called, call)} <= allowed
