from __future__ import annotations

import errno
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from matrix_source import matrix_source
from ranks import run_ranks
from snapshots import (
    N_SHARDS,
    add_array,
    assert_is_right,
    building,
    create_with_others,
    files_of,
    make,
    raising,
    watched_disk,
    written_by,
)
from stores import N_OBS, N_VARS, Store, expected_X
from tiledbsoma_ml import Rows
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.format import MANIFEST
from tiledbsoma_ml.x_locator import XLocator

ENOUGH_S = 120.0


def nothing(_: int) -> None:
    pass


def meet(barrier: Any, n_before: int) -> None:
    """Wait at the first shard until the other processes write their first one, too."""
    if not n_before:
        barrier.wait(ENOUGH_S)


def stop(n: int, n_before: int) -> None:
    """Wait for ever, in the midst of the shard after `n` shards."""
    if n_before == n:
        time.sleep(1000)


def fail(number: int, barrier: Any, n_before: int) -> None:
    meet(barrier, n_before)
    if n_before:
        raising(number)()


def started(
    processes: Any, locator: XLocator, path: Path, steps: list[Callable[[int], object]], **options: Any
) -> Any:
    """Return started processes that make a snapshot together, with a step for each."""
    args = [(locator, path.parent, step) for step in steps]
    found = [processes.Process(target=create_with_others, args=a, kwargs=options) for a in args]
    for process in found:
        process.start()
    return found


def wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + ENOUGH_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def told_by(process: Any, path: Path) -> str:
    file = path.parent / f"{process.pid}.err"
    return file.read_text() if file.exists() else ""


def joined(makers: list[Any]) -> list[int]:
    for process in makers:
        process.join()
    return [process.exitcode for process in makers]


# Together -------------------------------------------------------------------------------------------------


def test_processes_make_a_snapshot_together_which_is_byte_for_byte_what_one_makes(
    make_store: Any, tmp_path: Path, processes: Any
) -> None:
    store = make_store(obs_joinids=range(N_OBS))
    add_array(store, "X", "norm", expected_X(range(N_OBS), range(N_VARS)) / 3)
    add_array(store, "obsm", "pca", np.random.default_rng(0).random((N_OBS, 3)))
    options: dict[str, Any] = {
        "layers": ["norm"],
        "obsm": ["pca"],
        "obs_column_names": ["soma_joinid", "cell_type"],
    }
    locator = attrs.evolve(store.locator, tiledb_timestamp_ms=time.time_ns() // 10**6)
    alone, together = tmp_path / "alone", tmp_path / "x.snapshot"
    make(alone, store, **options)
    barrier = processes.Barrier(3)
    makers = started(processes, locator, together, 3 * [partial(meet, barrier)], **options)
    assert joined(makers) == [0, 0, 0]

    written = written_by(tmp_path)
    names = [f"{layer}shard-{number:05}" for layer in ("", "layer1-") for number in range(N_SHARDS)]
    assert sorted(name for _, name in written) == sorted(names)
    assert {pid for pid, _ in written} == {process.pid for process in makers}
    for process in makers:
        assert f"{2 * N_OBS} of {2 * N_OBS} rows" in told_by(process, together)

    assert_is_right(together)
    assert files_of(together) == files_of(alone)
    for name in files_of(alone):
        if name != MANIFEST:
            assert (together / name).read_bytes() == (alone / name).read_bytes(), name
    assert manifest_of(together) == manifest_of(alone)


def manifest_of(path: Path) -> dict[str, Any]:
    """Return a manifest without what tells the time."""
    fields: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    del fields["created_at"], fields["sha256"]
    for source in fields["content"]["sources"]:
        del source["tiledb_timestamp_ms"]
    return fields


def test_ranks_make_a_snapshot_together(store: Store, path: Path) -> None:
    script = f"""
from pathlib import Path
from snapshots import OF_ONE_TILE
from tiledbsoma_ml.snapshot import Snapshot

path, claims = Path({str(path)!r}), dict()

def note(*_):
    if not claims:
        locks = path.with_name(f".{{path.name}}.building").glob("tasks/shard-*.lock")
        claims.update((file.stem, file.read_text()) for file in locks)
        torch.distributed.barrier()  # after the first shard of each

ids = QueryIDs(obs_joinids=np.arange({N_OBS}), var_joinids=np.arange({N_VARS}))
names = ["soma_joinid"]
Snapshot.create_from(path, [(locator, ids)], obs_column_names=names, progress=note, shards=OF_ONE_TILE)
tell([str(os.getpid()), list(claims.values())])
"""
    for pid, claimed_by in run_ranks(script, store):
        assert pid in claimed_by
    assert_is_right(path)


def test_a_process_ends_well_if_another_one_completes_the_snapshot_before_its_own_files_are_on_the_disk(
    path: Path,
) -> None:
    may_go_on = threading.Event()

    def step(what: str, file: Path) -> None:
        if what == "fsync" and threading.current_thread().name.startswith("fsync"):
            assert may_go_on.wait(ENOUGH_S)

    def has_made_all() -> bool:
        return len(list(building(path).glob("tasks/*.json"))) == N_SHARDS + 1

    with watched_disk(path.parent, step), ThreadPoolExecutor(1) as pool:
        first = pool.submit(make, path, matrix_source())
        wait_for(has_made_all)
        make(path, matrix_source())
        may_go_on.set()
        first.result().verify()
    assert_is_right(path)


# Some end -------------------------------------------------------------------------------------------------


def test_what_a_killed_process_did_not_finish_is_made_by_the_others_in_the_same_call(
    store: Store, path: Path, processes: Any
) -> None:
    [killed] = started(processes, store.locator, path, [partial(stop, 1)])
    wait_for(lambda: (path.parent / "written.txt").exists() and len(written_by(path.parent)) == 2)
    [other] = started(processes, store.locator, path, [nothing])
    line = f"process {killed.pid} makes what is left; waiting until it is there"
    wait_for(lambda: line in told_by(other, path))
    os.kill(killed.pid, signal.SIGKILL)
    assert joined([killed, other]) == [-signal.SIGKILL, 0]
    assert told_by(other, path).count("waiting") == 1
    written = written_by(path.parent)
    finished, unfinished = (name for pid, name in written if pid == killed.pid)
    by_other = [name for pid, name in written if pid == other.pid]
    assert finished not in by_other
    assert by_other.count(unfinished) == 1
    assert_is_right(path)


def test_if_all_are_killed_the_next_call_goes_on_and_keeps_what_is_finished(
    store: Store, path: Path, processes: Any
) -> None:
    makers = started(processes, store.locator, path, 2 * [partial(stop, 1)])
    wait_for(lambda: (path.parent / "written.txt").exists() and len(written_by(path.parent)) == 4)
    for process in makers:
        os.kill(process.pid, signal.SIGKILL)
    assert joined(makers) == 2 * [-signal.SIGKILL]
    finished = [file.stem for file in building(path).glob("tasks/shard-*.json")]
    assert len(finished) == 2
    made = [(building(path) / f"{name}.data").stat().st_mtime_ns for name in finished]
    make(path, store)
    assert [(path / f"{name}.data").stat().st_mtime_ns for name in finished] == made
    assert_is_right(path)


def test_an_error_ends_its_process_and_the_others_finish(store: Store, path: Path, processes: Any) -> None:
    barrier = processes.Barrier(2)
    steps = [partial(fail, errno.EIO, barrier), partial(meet, barrier)]
    makers = started(processes, store.locator, path, steps)
    assert joined(makers) == [1, 0]
    assert "must be on a disk that works, but: Input/output error" in told_by(makers[0], path)
    assert_is_right(path)


# Not together ---------------------------------------------------------------------------------------------


class WaitingSource:
    """A source that waits, when its second shard is read, until it may go on."""

    def __init__(self, **options: Any) -> None:
        self.source = matrix_source(given=self._given, **options)
        self.waits, self.may_go_on = threading.Event(), threading.Event()

    def _given(self, rows: Rows[Any]) -> Rows[Any]:
        if 64 in rows.obs_joinids:
            self.waits.set()
            assert self.may_go_on.wait(ENOUGH_S)
        return rows


def test_what_has_other_content_is_refused_while_others_make_the_snapshot(path: Path) -> None:
    waiting = WaitingSource()
    maker = threading.Thread(target=make, args=(path, waiting.source))
    maker.start()
    assert waiting.waits.wait(ENOUGH_S)
    try:
        message = (
            rf"process {os.getpid()} makes a snapshot of another one there \(the number of rows is {N_OBS}"
        )
        with pytest.raises(ValueError, match=message):
            make(path, matrix_source(100))
        with pytest.raises(ValueError, match=r"content\['version'\] is '1' there, not '2'"):
            make(path, matrix_source(content={"version": "2"}))
    finally:
        waiting.may_go_on.set()
        maker.join()
    snapshot = Snapshot.open(path)
    np.testing.assert_array_equal(snapshot[:][0].toarray(), expected_X(range(N_OBS), range(N_VARS)))


def test_where_changes_cannot_be_told_rows_are_not_mixed_but_others_are_waited_for(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class GoesOn(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if f"process {os.getpid()} makes it; waiting until it is there" in record.getMessage():
                waiting.may_go_on.set()

    waiting, handler = WaitingSource(content={}), GoesOn()
    other = matrix_source(content={})
    other.X = other.X * 2
    logging.getLogger("tiledbsoma_ml").addHandler(handler)
    maker = threading.Thread(target=make, args=(path, waiting.source))
    maker.start()
    assert waiting.waits.wait(ENOUGH_S)
    try:
        with (
            caplog.at_level(logging.INFO, "tiledbsoma_ml"),
            pytest.warns(UserWarning, match="cannot be told"),
        ):
            snapshot = make(path, other)
    finally:
        logging.getLogger("tiledbsoma_ml").removeHandler(handler)
        waiting.may_go_on.set()
        maker.join()
    np.testing.assert_array_equal(snapshot[:][0].toarray(), expected_X(range(N_OBS), range(N_VARS)))
