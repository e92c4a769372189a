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
from test_cli import run
from tiledbsoma_ml import ExperimentDataset, experiment_dataloader
from tiledbsoma_ml._cli.epoch_plan import PlanOptions, plan_epoch

SMALL = {"shuffle_chunk_size": 8, "io_batch_size": 32, "batch_size": 10, "seed": 3}


def rows_of(pieces: list[Any]) -> list[int]:
    """Return the joinids of chunks, IO batches or mini-batches, one after the other."""
    return list(chain.from_iterable(p if isinstance(p, list) else p["obs_joinids"] for p in pieces))


# What is planned ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"epoch": 2}, {"obs_filter": "cell_type == 'T cell'"}])
@pytest.mark.parametrize("sizes", [SMALL, {**SMALL, "shuffle_chunk_size": "auto", "io_batch_size": "auto"}])
def test_what_is_planned_is_what_a_dataset_yields(store: Store, sizes: Any, options: Any) -> None:
    plan = plan_epoch(PlanOptions(uri=store.uri, **sizes, **options))
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
    plan = plan_epoch(PlanOptions(uri=store.uri, **SMALL, world_size=2, num_workers=2, shuffle_scope=scope))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with store.query() as query:
        loader = experiment_dataloader(ExperimentDataset(query, **SMALL, shuffle_scope=scope), **workers(2))
    of_workers = [part["mini_batches"] for part in plan["parts"] if part["rank"] == 1]
    in_turn = [of_workers[k % 2][k // 2] for k in range(len(loader))]
    assert rows_of(in_turn) == joinids_of(loader).tolist()


def test_chunks_are_neighbours_and_io_batches_are_made_of_them(store: Store) -> None:
    [part] = plan_epoch(PlanOptions(uri=store.uri, **SMALL))["parts"]
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
    plan = plan_epoch(PlanOptions(uri=store.uri, **options, shuffle_scope="global"))
    assert plan["settings"]["shuffle_scope"] == "global"
    for part in plan["parts"]:
        assert sorted(rows_of(part["chunks"])) == sorted(rows_of(part["mini_batches"]))
        for piece in part["chunks"]:
            assert len({joinid // plan["sizes"]["chunk_rows"] for joinid in piece["obs_joinids"]}) == 1


def test_chunks_under_auto_are_runs_of_the_layer(store: Store) -> None:
    plan = plan_epoch(
        PlanOptions(uri=store.uri, shuffle_chunk_size="auto", io_batch_size="auto", batch_size=10)
    )
    assert plan["row_tile"] == plan["sizes"]["chunk_rows"] == 64
    starts = sorted(chunk["obs_joinids"][0] for chunk in plan["parts"][0]["chunks"])
    assert starts == list(range(0, N_OBS, 64))
    assert plan["predicted"] == {"mixing": 1.0, "read_amplification": 1.0}


@pytest.mark.parametrize("limit", [40, 100, 310])
def test_the_limit_bounds_what_is_listed_and_each_listed_row_is_in_every_step(
    store: Store, limit: int
) -> None:
    options = {**SMALL, "world_size": 2, "num_workers": 2}
    whole = plan_epoch(PlanOptions(uri=store.uri, **options))
    plan = plan_epoch(PlanOptions(uri=store.uri, **options, limit=limit))
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
    [part] = plan_epoch(PlanOptions(uri=store.uri, **SMALL))["parts"]
    assert sorted(rows_of(part["chunks"])) == list(range(5, 405, 4))
    for chunk in part["chunks"]:
        assert np.unique(np.diff(chunk["obs_joinids"])).tolist() == [4]


# The command ----------------------------------------------------------------------------------------------

COMMAND = ["--shuffle-chunk-size", 8, "--io-batch-size", 32, "--batch-size", 10, "--seed", 3]


def test_the_command_prints_json_that_says_what_was_asked_for(store: Store) -> None:
    code, output = run(
        "plan", store.uri, "--json", *COMMAND, "--epoch", 1, "--world-size", 2, "--num-workers", 3
    )
    plan = json.loads(output)
    assert code == 0
    assert plan == plan_epoch(PlanOptions(uri=store.uri, **SMALL, epoch=1, world_size=2, num_workers=3))
    assert plan["settings"] == {
        "uri": store.uri,
        "measurement_name": "RNA",
        "layer_name": "raw",
        "obs_filter": None,
        **SMALL,
        "epoch": 1,
        "world_size": 2,
        "num_workers": 3,
        "shuffle_scope": "partition",
    }


def test_the_command_shows_a_table_of_who_reads_how_much(store: Store) -> None:
    code, output = run("plan", store.uri, *COMMAND, "--world-size", 2, "--num-workers", 2)
    numbers = [line.split() for line in output.splitlines() if re.fullmatch(r"[\d, ]+", line.strip())]
    assert code == 0
    assert re.search(r"rows +311 +in tiles of 64", output)
    assert numbers == [
        [str(k // 2), str(k % 2), *row]
        for k, row in enumerate([["78", "10", "3", "8"], ["77", "10", "3", "8"]] * 2)
    ]
    assert "and" not in output


def test_the_table_names_32_workers_and_counts_the_others(store: Store) -> None:
    code, output = run("plan", store.uri, *COMMAND, "--world-size", 20, "--num-workers", 2)
    assert code == 0
    assert output.rstrip().endswith("and 8 more; --json lists all of them")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none' must be a SOMA experiment, and cannot be opened as one"),
        (["{uri}", "--obs-filter", "n_genes = 1"], "must be a filter that SOMA understands"),
        (["{uri}", "--obs-filter", "n_genes < 0"], "must select cells, and selects none; loosen it."),
        (["{uri}", "--layer-name", "rwa"], "layer_name='rwa' must be an X layer of"),
        (["{uri}", "--measurement-name", "DNA"], "measurement_name='DNA' must be a measurement"),
        (
            ["{uri}", "--shuffle-chunk-size", "most"],
            "shuffle_chunk_size='most' must be a positive integer or",
        ),
        (
            ["{uri}", "--io-batch-size", "100"],
            "io_batch_size=100 must be a multiple of shuffle_chunk_size=64",
        ),
        (["{uri}", "--batch-size", "0"], "batch_size=0 must be a positive integer"),
        (["{uri}", "--seed", "-1"], "seed=-1 must be an integer of at least 0"),
        (["{uri}", "--epoch", "-1"], "epoch=-1 must be an integer of at least 0"),
        (["{uri}", "--world-size", "0"], "world_size=0 must be a positive integer"),
        (["{uri}", "--num-workers", "-1"], "num_workers=-1 must be an integer of at least 0"),
        (
            ["{uri}", "--limit", "9", "--world-size", "2"],
            "limit=9 must hold a mini-batch of every worker, 2048 rows; try 2048.",
        ),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = run("plan", *(argument.format(uri=store.uri) for argument in arguments))
    assert code == 2
    assert output.startswith("Error: ")
    assert message in output
    assert output.count("\n") == 1


def test_the_format_is_specified_field_by_field(store: Store) -> None:
    text = (Path(__file__).parents[2] / "docs" / "plan_format.md").read_text()
    example = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]

    def fields(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fields(item) for name, item in value.items()}
        return [fields(value[0])] if isinstance(value, list) and value else None

    options = {**SMALL, "world_size": 2}
    assert fields(example) == fields(plan_epoch(PlanOptions(uri=store.uri, **options)))
    eight = {"shuffle_chunk_size": 2, "io_batch_size": 4, "batch_size": 2, "seed": 5, "world_size": 2}
    planned = plan_epoch(PlanOptions(uri=store.uri, obs_filter="n_genes < 8", **eight))
    assert example["parts"][0] == planned["parts"][0]
    for name in (*example, *example["parts"][0]):
        assert f"`{name}`" in text
