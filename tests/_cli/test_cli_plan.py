from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_epoch_plan import SMALL, planned

from stores import Store
from test_cli import run

COMMAND = ["--shuffle-chunk-size", 8, "--io-batch-size", 32, "--batch-size", 10, "--seed", 3]


def test_the_command_prints_json_that_says_what_was_asked_for(store: Store) -> None:
    code, output = run(
        "plan", store.uri, "--json", *COMMAND, "--epoch", 1, "--world-size", 2, "--num-workers", 3
    )
    plan = json.loads(output)
    assert code == 0
    assert plan == planned(store.uri, **SMALL, epoch=1, world_size=2, num_workers=3)
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
        "column": None,
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
    assert re.search(r"mixing +0\.\d\d +of a true shuffle, in a mini-batch; predicted", output)
    assert re.search(r" 0\.\d\d +in those of all ranks in a step; predicted", output)


def test_the_table_names_32_workers_and_counts_the_others(store: Store) -> None:
    code, output = run("plan", store.uri, *COMMAND, "--world-size", 20, "--num-workers", 2)
    assert code == 0
    assert output.rstrip().endswith("and 8 more; --json lists all of them")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "uri='' must not be empty"),
        (["none"], "none' must be a SOMA experiment, and cannot be opened as one"),
        (["{uri}", "--obs-filter", "n_genes = 1"], "must be a filter that SOMA understands"),
        (["{uri}", "--obs-filter", "n_genes < 0"], "must select cells, and selects none of 311; loosen it"),
        (["{uri}", "--layer-name", "rwa"], "layer_name='rwa' must be an X layer of"),
        (["{uri}", "--measurement-name", "DNA"], "measurement_name='DNA' must be a measurement"),
        (
            ["{uri}", "--shuffle-chunk-size", "most"],
            "shuffle_chunk_size='most' must be a positive integer or",
        ),
        (["{uri}", "--io-batch-size=--5"], "io_batch_size='--5' must be a positive integer or"),
        (["{uri}", "--shuffle-chunk-size", "9" * 23], "must be at most 9223372036854775807"),
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
            "limit=9 must hold a mini-batch of every worker, 256 rows; try 256.",
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
