from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stores import N_OBS, Store, joinids_of, workers
from tiledbsoma_ml import ExperimentDataset, experiment_dataloader
from tiledbsoma_ml._cli.epoch_plan import Json, PlanOptions, plan_epoch
from tiledbsoma_ml.simulate import simulate_experiment

DEFAULTS = {
    "measurement_name": None,
    "layer_name": None,
    "obs_filter": None,
    "seed": 0,
    "epoch": 0,
    "world_size": 1,
    "num_workers": 0,
    "shuffle_scope": "partition",
    "column": None,
    "limit": 100_000,
}
SMALL = {"shuffle_chunk_size": 8, "io_batch_size": 32, "batch_size": 10, "seed": 3}


def planned(uri: str, **options: Any) -> Json:
    return plan_epoch(PlanOptions(uri=uri, **{**DEFAULTS, **options}))


def rows_of(pieces: list[Any]) -> list[int]:
    """Return the joinids of chunks, IO batches or mini-batches, one after the other."""
    return list(chain.from_iterable(p if isinstance(p, list) else p["obs_joinids"] for p in pieces))


# What is planned ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"epoch": 2}, {"obs_filter": "cell_type == 'T cell'"}])
@pytest.mark.parametrize("sizes", [SMALL, {**SMALL, "shuffle_chunk_size": "auto", "io_batch_size": "auto"}])
def test_what_is_planned_is_what_a_dataset_yields(store: Store, sizes: Any, options: Any) -> None:
    plan = planned(store.uri, **sizes, **options)
    with store.query(options.get("obs_filter")) as query:
        dataset = ExperimentDataset(query, **sizes)
    dataset.set_epoch(options.get("epoch", 0))
    [part] = plan["parts"]
    assert rows_of(part["mini_batches"]) == joinids_of(dataset).tolist()
    assert part["n_mini_batches"] == len(part["mini_batches"]) == len(dataset)
    assert plan["is_whole"]


@pytest.mark.parametrize("scope", ["partition", "global"])
def test_what_is_planned_for_a_rank_is_what_its_loader_yields_from_workers_in_turn(
    store: Store, monkeypatch: pytest.MonkeyPatch, scope: Any
) -> None:
    plan = planned(store.uri, **SMALL, world_size=2, num_workers=2, shuffle_scope=scope)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with store.query() as query:
        loader = experiment_dataloader(ExperimentDataset(query, **SMALL, shuffle_scope=scope), **workers(2))
    of_workers = [part["mini_batches"] for part in plan["parts"] if part["rank"] == 1]
    in_turn = [of_workers[k % 2][k // 2] for k in range(len(loader))]
    assert rows_of(in_turn) == joinids_of(loader).tolist()


def test_chunks_are_neighbours_and_io_batches_are_made_of_them(store: Store) -> None:
    [part] = planned(store.uri, **SMALL)["parts"]
    chunks = [chunk["obs_joinids"] for chunk in part["chunks"]]
    assert len(chunks) == part["n_chunks"] == -(-N_OBS // 8)
    for chunk in chunks:
        assert chunk == list(range(chunk[0], chunk[0] + len(chunk)))
    n_read = 0
    for io_batch in part["io_batches"]:
        joinids = io_batch["obs_joinids"]
        assert sorted(joinids) == sorted(rows_of(chunks)[n_read : n_read + len(joinids)])
        assert len(joinids) == io_batch["n_rows"]
        n_read += len(joinids)
    assert rows_of(part["io_batches"]) == rows_of(part["mini_batches"])


@pytest.mark.parametrize("chunk", [8, "auto"])
def test_in_global_scope_chunks_are_those_of_the_query(store: Store, chunk: Any) -> None:
    options = {**SMALL, "shuffle_chunk_size": chunk, "world_size": 2, "num_workers": 2}
    plan = planned(store.uri, **options, shuffle_scope="global")
    assert plan["settings"]["shuffle_scope"] == "global"
    for part in plan["parts"]:
        assert sorted(rows_of(part["chunks"])) == sorted(rows_of(part["mini_batches"]))
        for piece in part["chunks"]:
            assert len({joinid // plan["sizes"]["chunk_rows"] for joinid in piece["obs_joinids"]}) == 1


def test_chunks_under_auto_are_runs_of_the_layer(store: Store) -> None:
    plan = planned(store.uri, shuffle_chunk_size="auto", io_batch_size="auto", batch_size=10)
    assert plan["row_tile"] == plan["sizes"]["chunk_rows"] == 64
    starts = sorted(chunk["obs_joinids"][0] for chunk in plan["parts"][0]["chunks"])
    assert starts == list(range(0, N_OBS, 64))
    perfect = {"mixing": 1.0, "global_mixing": 1.0, "read_amplification": 1.0}
    assert plan["predicted"] == {**perfect, "rows_held": plan["n_rows"]}


@pytest.mark.parametrize("scope", ["partition", "global"])
def test_the_mixing_of_many_ranks_and_workers_is_predicted_in_view_of_the_whole_query(
    store: Store, scope: Any
) -> None:
    options = {**SMALL, "shuffle_scope": scope, "world_size": 4}
    alone, shared = (planned(store.uri, **given)["predicted"] for given in (SMALL, options))
    assert shared["mixing"] < alone["mixing"]
    assert shared["mixing"] < shared["global_mixing"] <= 1


def test_the_mixing_is_predicted_for_the_labels_of_a_column(store: Store) -> None:
    plan = planned(store.uri, **SMALL, world_size=4, column="cell_type")
    assert plan["settings"]["column"] == "cell_type"
    assert plan["predicted"]["mixing"] == pytest.approx(1, abs=0.01), "each part has all of its types"
    with pytest.raises(ValueError, match="cell_typ"):
        planned(store.uri, **SMALL, column="cell_typ")


def test_the_labels_are_those_of_datasets_if_there_are_any(tmp_path: Path) -> None:
    simulate_experiment(str(tmp_path / "cells"), n_cells=2000, n_genes=20)
    plan = planned(str(tmp_path / "cells"), **SMALL, world_size=8)
    assert plan["settings"]["column"] == "dataset_id"
    assert plan["predicted"]["mixing"] < 0.3, "a part has one or two of the six datasets"
    assert (
        plan["predicted"]
        == planned(str(tmp_path / "cells"), **SMALL, world_size=8, column="dataset_id")["predicted"]
    )


def test_ranks_and_workers_of_the_scope_global_read_rows_of_the_same_tiles(store: Store) -> None:
    options = {**SMALL, "io_batch_size": 400, "world_size": 4, "num_workers": 2}
    times = {
        scope: planned(store.uri, **options, shuffle_scope=scope)["predicted"]["read_amplification"]
        for scope in ("partition", "global")
    }
    assert times["partition"] == 1
    assert 3 < times["global"] < 8


@pytest.mark.parametrize("limit", [40, 100, 310])
def test_the_limit_bounds_what_is_listed_and_each_listed_row_is_in_every_step(
    store: Store, limit: int
) -> None:
    options = {**SMALL, "world_size": 2, "num_workers": 2}
    whole = planned(store.uri, **options)
    plan = planned(store.uri, **options, limit=limit)
    assert not plan["is_whole"]
    assert sum(len(rows_of(part["mini_batches"])) for part in plan["parts"]) <= limit
    for part, all_of_it in zip(plan["parts"], whole["parts"], strict=True):
        n_listed = len(part["mini_batches"])
        assert n_listed >= 1
        assert part["mini_batches"] == all_of_it["mini_batches"][:n_listed]
        assert sorted(rows_of(part["chunks"])) == sorted(rows_of(part["mini_batches"]))
        assert rows_of(part["io_batches"]) == rows_of(part["mini_batches"])
        for name in ("n_rows", "n_chunks", "n_io_batches", "n_mini_batches"):
            assert part[name] == all_of_it[name]
        sizes = {chunk["n_rows"] for chunk in all_of_it["chunks"]}
        assert {chunk["n_rows"] for chunk in part["chunks"]} <= sizes


def test_rows_need_not_be_neighbours_nor_in_order(make_store: Callable[..., Store]) -> None:
    store = make_store(obs_joinids=range(5, 405, 4))
    [part] = planned(store.uri, **SMALL)["parts"]
    assert sorted(rows_of(part["chunks"])) == list(range(5, 405, 4))
    for chunk in part["chunks"]:
        assert np.unique(np.diff(chunk["obs_joinids"])).tolist() == [4]


def test_the_format_is_specified_field_by_field(store: Store) -> None:
    text = (Path(__file__).parents[2] / "docs" / "plan_format.md").read_text()
    example = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]

    def fields(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fields(item) for name, item in value.items()}
        return [fields(value[0])] if isinstance(value, list) and value else None

    options = {**SMALL, "world_size": 2}
    assert fields(example) == fields(planned(store.uri, **options))
    eight = {"shuffle_chunk_size": 2, "io_batch_size": 4, "batch_size": 2, "seed": 5, "world_size": 2}
    plan = planned(store.uri, obs_filter="n_genes < 8", **eight)
    assert example["parts"][0] == plan["parts"][0]
    for name in (*example, *example["parts"][0]):
        assert f"`{name}`" in text
