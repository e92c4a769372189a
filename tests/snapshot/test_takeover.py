from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matrix_source import matrix_source
from snapshots import (
    Killed,
    assert_is_right,
    building,
    create_with_others,
    make,
    partial,
    recording,
    watched_disk,
)
from stores import N_OBS, N_VARS, Store, expected_X
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.files import sealed
from tiledbsoma_ml.snapshot.takeover import PARTIAL


@pytest.fixture
def kill_at(tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """Let the n-th step of a creation that changes something on the disk, or waits for it, fail."""
    n_left = 0

    def step(*_: Any) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            raise Killed

    def arm(n: int) -> None:
        nonlocal n_left
        n_left = n

    with watched_disk(tmp_path, step):
        yield arm


def test_a_creation_that_ends_at_any_step_is_continued_and_ends_right(
    store: Store, tmp_path: Path, kill_at: Any
) -> None:
    rng = random.Random(0)
    n, n_kills = 1, 0
    path = tmp_path / "0.snapshot"
    while True:
        kill_at(n)
        try:
            make(path, store)
        except Killed:
            n_kills += 1
            if path.exists():
                Snapshot.open(path).verify()
            if rng.random() < 0.5:  # the next one ends again, later
                n += rng.randrange(1, 7)
                continue
            kill_at(0)
            make(path, store)
            assert_is_right(path)
            path = tmp_path / f"{n_kills}.snapshot"
            n += rng.randrange(1, 7)
        else:
            break
    assert n_kills > 10


def test_finished_shards_are_left_as_they_are(store: Store, path: Path) -> None:
    partial(path, store)
    assert not path.exists()
    names = ["shard-00000.data", "shard-00002.data"]
    made = [(building(path) / name).stat().st_mtime_ns for name in names]
    make(path, store)
    assert [(path / name).stat().st_mtime_ns for name in names] == made
    assert_is_right(path)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "partial", "no partial"])
def test_a_damaged_part_of_a_creation_is_made_anew(store: Store, path: Path, damage: str) -> None:
    partial(path, store)
    file = building(path) / (PARTIAL if "partial" in damage else "shard-00001.indices")
    content = file.read_bytes()
    if damage in ("missing", "no partial"):
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(content[:7] + bytes([content[7] ^ 1]) + content[8:])
    make(path, store)
    assert_is_right(path)


def drop_rows(fields: dict[str, Any]) -> None:
    fields["borders"] = fields["borders"][:-1]


def drop_first_border(fields: dict[str, Any]) -> None:
    fields["borders"] = fields["borders"][1:]


def move_a_border(fields: dict[str, Any]) -> None:
    fields["borders"][1] -= 1


def tell_no_numbers(fields: dict[str, Any]) -> None:
    fields["borders"], fields["bytes_per_row"] = {"0": 1}, 7


def swap_with_another_shard(fields: dict[str, Any]) -> None:
    for what in ("indptr", "indices", "data"):
        fields["made"][what]["name"] = fields["made"][what]["name"].replace("00001", "00002")


def name_another_file(fields: dict[str, Any]) -> None:
    fields["made"]["data"]["name"] = "../outside"


def tell_another_type(fields: dict[str, Any]) -> None:
    fields["made"]["data_dtype"] = "|i1"


def tell_another_number(fields: dict[str, Any]) -> None:
    fields["made"]["nnz"] = 10**6


def tell_nonsense(fields: dict[str, Any]) -> None:
    fields["made"] = [7]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (PARTIAL, drop_rows),
        (PARTIAL, drop_first_border),
        (PARTIAL, move_a_border),
        (PARTIAL, tell_no_numbers),
        ("tasks/shard-00001.json", swap_with_another_shard),
        ("tasks/shard-00001.json", name_another_file),
        ("tasks/shard-00001.json", tell_another_type),
        ("tasks/shard-00001.json", tell_another_number),
        ("tasks/shard-00001.json", tell_nonsense),
    ],
)
def test_a_continued_creation_believes_nothing_that_is_not_so(
    store: Store, path: Path, file: str, change: Any
) -> None:
    partial(path, store)
    fields = json.loads((building(path) / file).read_text())
    del fields["sha256"]
    change(fields)
    (building(path) / file).write_text(sealed(fields))
    make(path, store)
    assert_is_right(path)


@pytest.mark.parametrize(("kind", "value"), [("indices", 2**15), ("indices", 0), ("indptr", 2**40)])
def test_a_creation_checks_what_the_disk_has_of_what_it_wrote(
    store: Store, path: Path, kind: str, value: int
) -> None:
    def alter(what: str, file: Path) -> None:
        if (what, file.name) == ("fsync", f"shard-00001.{kind}"):
            values = np.fromfile(file, "<u2" if kind == "indices" else "<i8")
            values[1] = value
            values.tofile(file)

    with (
        watched_disk(path.parent, alter),
        pytest.raises(ValueError, match=rf"shard-00001\.{kind}.* it is damaged"),
    ):
        make(path, store)
    assert not path.exists()
    make(path, store)
    assert_is_right(path)


def test_a_part_of_another_creation_is_discarded(store: Store, path: Path) -> None:
    partial(path, store)
    make(path, store, [5, 70, 300])
    assert_is_right(path, [5, 70, 300])


def pause(_: int) -> None:
    time.sleep(0.15)


def test_creations_that_are_killed_at_random_moments_end_in_a_right_snapshot(
    store: Store, path: Path, processes: Any
) -> None:
    rng = random.Random()
    n_killed = 0
    for _ in range(8):
        process = processes.Process(target=create_with_others, args=(store.locator, path.parent, pause))
        process.start()
        process.join(rng.uniform(0.1, 0.8))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            n_killed += 1
        process.join()
        if path.exists():
            Snapshot.open(path).verify()
            break
    make(path, store)
    assert_is_right(path)
    assert n_killed or process.exitcode == 0


# Once, and killed -----------------------------------------------------------------------------------------


def test_a_creation_that_was_killed_is_continued_and_finished_shards_are_not_read_again(path: Path) -> None:
    partial(path, matrix_source())
    source = matrix_source()
    asked = recording(source)
    snapshot = make(path, source)
    assert asked == list(range(192, N_OBS))
    snapshot.verify()
    np.testing.assert_array_equal(snapshot[:][0].toarray(), expected_X(range(N_OBS), range(N_VARS)))
    assert not building(path).exists()


@pytest.mark.parametrize("content", [{"version": "2"}, {}])
def test_what_was_finished_of_other_content_or_of_unknown_content_is_made_anew(
    path: Path, content: dict[str, str]
) -> None:
    other = matrix_source(content=content if content == {} else None)
    other.X = other.X * 2
    partial(path, other)
    snapshot = make(path, matrix_source(content=content))
    np.testing.assert_array_equal(snapshot[:][0].toarray(), expected_X(range(N_OBS), range(N_VARS)))


@pytest.mark.parametrize("compression", ["zstd", None])
def test_a_compressed_creation_goes_on_and_only_with_its_compression(
    path: Path, compression: str | None
) -> None:
    partial(path, matrix_source(), compression="zstd")
    source = matrix_source()
    asked = recording(source)
    snapshot = make(path, source, compression=compression)
    assert asked == list(range(192 if compression == "zstd" else 0, N_OBS))
    assert snapshot.compression == compression
    snapshot.verify()
    np.testing.assert_array_equal(snapshot[:][0].toarray(), expected_X(range(N_OBS), range(N_VARS)))
    assert not building(path).exists()
