from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiledbsoma as soma
from test_snapshot import make, write_entries

from stores import MEASUREMENT, N_OBS, N_VARS, Store, expected_X
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot import build as _snapshot_build
from tiledbsoma_ml.snapshot import files as _snapshot_files
from tiledbsoma_ml.snapshot import format as _snapshot_format
from tiledbsoma_ml.snapshot import frames as _snapshot_frames
from tiledbsoma_ml.snapshot import progress as _snapshot_progress
from tiledbsoma_ml.snapshot import resume as _snapshot_resume
from tiledbsoma_ml.snapshot.build import _Builder
from tiledbsoma_ml.snapshot.files import HashedFile
from tiledbsoma_ml.snapshot.format import MANIFEST
from tiledbsoma_ml.snapshot.resume import PARTIAL
from tiledbsoma_ml.snapshot.shards import ShardWriter
from tiledbsoma_ml.x_locator import XLocator

N_SHARDS = 5


def building(path: Path) -> Path:
    return path.with_name(f".{path.name}.building")


def assert_is_right(path: Path, obs_joinids: Any = range(N_OBS)) -> None:
    """Check a snapshot, and that nothing is left beside it."""
    snapshot = Snapshot.open(path)
    snapshot.verify()
    X, obs = snapshot[:]
    np.testing.assert_array_equal(X.toarray(), expected_X(obs_joinids, range(N_VARS)))
    assert obs["soma_joinid"].tolist() == list(obs_joinids)
    assert [other.name for other in path.parent.iterdir() if path.name in other.name] == [path.name]
    assert PARTIAL not in [file.name for file in path.iterdir()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.snapshot"


# Once -----------------------------------------------------------------------------------------------------


def test_a_snapshot_is_made_once_and_then_used(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(path, store)
    assert_is_right(path)
    inode, modified = path.stat().st_ino, (path / MANIFEST).stat().st_mtime_ns
    monkeypatch.setattr(_snapshot_build, "_Builder", None)
    again = make(path, store)  # at another timestamp: the experiment was opened anew
    assert again.fingerprint == made.fingerprint
    assert (path.stat().st_ino, (path / MANIFEST).stat().st_mtime_ns) == (inode, modified)


def test_rows_that_are_asked_for_twice_or_in_another_order_are_kept_once_and_ascending(
    store: Store, path: Path
) -> None:
    ids = QueryIDs(obs_joinids=[9, 3, 9, 200], var_joinids=range(N_VARS))
    Snapshot.create_from(path, [(store.locator, ids)], obs_column_names=["soma_joinid"], progress=False)
    assert_is_right(path, [3, 9, 200])


def test_columns_of_a_query_stay_in_its_order(store: Store, path: Path) -> None:
    ids = QueryIDs(obs_joinids=range(100), var_joinids=[20, 3, 11])
    snapshot = Snapshot.create_from(
        path, [(store.locator, ids)], obs_column_names=["soma_joinid"], progress=False
    )
    X, _ = snapshot[:]
    np.testing.assert_array_equal(X.toarray(), expected_X(range(100), [20, 3, 11]))
    assert snapshot.var["soma_joinid"].tolist() == [20, 3, 11]
    X.has_canonical_format = False
    X.sum_duplicates()
    np.testing.assert_array_equal(X.indices, snapshot[:][0].indices)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"obs": slice(0, 9)}, "the number of rows is 20 there, not 10"),
        ({"obs": slice(1, 20)}, "obs_joinids are others"),
        ({"var": [1]}, "the number of columns is 2 there, not 1"),
        ({"var": [1, 5]}, "var_joinids are others"),
        ({"obs_column_names": ["score"]}, r"obs_column_names is \['soma_joinid'\] there, not \['score'\]"),
    ],
)
def test_a_snapshot_of_another_query_is_not_used_and_not_overwritten(
    store: Store, path: Path, other: dict[str, Any], difference: str
) -> None:
    make(path, store, slice(0, 19), [1, 2])
    with pytest.raises(ValueError, match=f"holds another one .*{difference}.*; choose another path"):
        make(path, store, **{"obs": slice(0, 19), "var": [1, 2], **other})
    assert Snapshot.open(path).shape == (20, 2)


def test_a_snapshot_is_not_used_for_an_experiment_that_was_written_to_since(
    make_store: Any, store: Store, path: Path
) -> None:
    changing = make_store(obs_joinids=range(20))
    make(path, changing)
    with soma.SparseNDArray.open(f"{changing.uri}/ms/{MEASUREMENT}/X/raw", "w") as X:
        write_entries(X, np.array([1]), np.array([1]), np.ones(1, np.float32))
    with pytest.raises(ValueError, match="X/raw was written to since the snapshot was made"):
        make(path, changing)
    with soma.Experiment.open(changing.uri, "w") as experiment:
        experiment.metadata["note"] = "no data"
    with pytest.raises(ValueError, match=r"the experiment is .* there, not"):
        make(path, store, slice(0, 19))


def test_what_is_no_snapshot_is_never_overwritten(store: Store, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(ValueError, match="something else is there, which is never overwritten"):
            make(tmp_path / name, store)
    assert sorted(other.name for other in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert not list((tmp_path / "folder").iterdir())


def test_a_damaged_snapshot_is_named_and_not_made_anew(store: Store, path: Path) -> None:
    make(path, store)
    (path / "shard-00001.data").unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.data' must be there"):
        make(path, store)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"obs_column_names": ["cell_typ"]}, "did you mean 'cell_type'"),
        ({"obs_column_names": "score"}, "must be a list of names"),
        ({"layer_name": "rw"}, "layer_name='rw' must be an X layer"),
        ({"layers": ["norm"]}, "layers='norm' must be an X layer"),
        ({"obsm": ["pca"]}, "obsm='pca' must be an array of obsm"),
        ({"memory_budget": "1MiB"}, "memory_budget='1MiB' must be at least 64 MiB"),
        ({"progress": "yes"}, "progress='yes' must be True, False or a function"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    store: Store, path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(path, store, **options)
    assert not list(path.parent.iterdir())


def test_what_is_no_query_is_refused(store: Store, path: Path) -> None:
    with pytest.raises(TypeError, match="query must be an ExperimentAxisQuery, not of type str; try"):
        Snapshot.create(path, store.uri)


def test_a_closed_experiment_is_refused(store: Store, path: Path) -> None:
    with store.query() as query:
        pass
    with pytest.raises(ValueError, match="must be open"):
        Snapshot.create(path, query, progress=False)


# Shards ---------------------------------------------------------------------------------------------------


def test_shards_are_whole_tiles_unless_one_is_larger() -> None:
    tiles = np.repeat([0, 1, 2, 5, 6], [10, 10, 4, 10, 30])
    assert _snapshot_build._shard_borders(tiles, 20) == [20, 34, 54, 64]
    assert _snapshot_build._shard_borders(tiles, 1000) == [64]
    assert _snapshot_build._shard_borders(tiles[:0], 20) == []


def test_a_small_budget_makes_small_shards(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path, store)
    assert len(Snapshot.open(path)._manifest.layers[0].shards) == N_SHARDS
    shutil.rmtree(path)
    monkeypatch.setattr(_snapshot_build.Budget, "windows", 4 * 1000)
    make(path, store, memory_budget="64MiB")
    assert len(Snapshot.open(path)._manifest.layers[0].shards) > 2 * N_SHARDS
    assert_is_right(path)


# Killed ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a creation at once, like a kill."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let the n-th step of a creation that changes something on the disk, or waits for it, fail."""
    n_left = [0]

    def counted(function: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            n_left[0] -= 1
            if n_left[0] == 0:
                raise Killed
            return function(*args, **kwargs)

        return step

    def arm(n: int) -> None:
        n_left[0] = n

    monkeypatch.setattr(HashedFile, "write", counted(HashedFile.write))
    fsync = counted(_snapshot_files.fsync)
    for module in (_snapshot_build, _snapshot_files):
        monkeypatch.setattr(module, "fsync", fsync)
    monkeypatch.setattr(_snapshot_frames, "write_table", counted(_snapshot_frames.write_table))
    for module in (_snapshot_resume, _snapshot_format):
        monkeypatch.setattr(module, "write_atomically", counted(_snapshot_files.write_atomically))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    return arm


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
                n += rng.randrange(1, 4)
                continue
            kill_at(0)
            make(path, store)
            assert_is_right(path)
            path = tmp_path / f"{n_kills}.snapshot"
            n += rng.randrange(1, 4)
        else:
            break
    assert n_kills > 10


def test_finished_shards_are_not_read_again(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = ShardWriter.write

    def recorded(self: Any, name: str, window: Any) -> Any:
        written.append(name)
        if len(written) == 4:
            raise Killed
        return write(self, name, window)

    monkeypatch.setattr(ShardWriter, "write", recorded)
    with pytest.raises(Killed):
        make(path, store)
    assert not path.exists()
    names = ["shard-00000.data", "shard-00002.data"]
    made = [(building(path) / name).stat().st_mtime_ns for name in names]
    make(path, store)
    assert written[4:] == ["shard-00003", "shard-00004"]
    assert [(path / name).stat().st_mtime_ns for name in names] == made
    assert_is_right(path)


def partial(path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Leave a creation with three finished shards."""
    with monkeypatch.context() as patch:
        keep = _Builder._keep_partial

        def keep_and_end(self: Any) -> None:
            keep(self)
            if len(self._finished["raw"]) == 3:
                raise Killed

        patch.setattr(_Builder, "_keep_partial", keep_and_end)
        with pytest.raises(Killed):
            make(path, store, **options)
    assert (building(path) / PARTIAL).is_file()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "partial", "no partial"])
def test_a_damaged_part_of_a_creation_is_made_anew(
    store: Store, path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial(path, store, monkeypatch)
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
    fields["shards"]["raw"] = fields["shards"]["raw"][1:]


def swap_shards(fields: dict[str, Any]) -> None:
    shards = fields["shards"]["raw"]
    for what in ("indptr", "indices", "data"):
        shards[0][what], shards[1][what] = shards[1][what], shards[0][what]


def name_another_file(fields: dict[str, Any]) -> None:
    fields["shards"]["raw"][0]["data"]["name"] = "../outside"


def tell_other_types(fields: dict[str, Any]) -> None:
    fields["shards"]["raw"][0]["data_dtype"] = "|i1"
    fields["shards"]["raw"][1]["nnz"] = 10**6


def tell_nonsense(fields: dict[str, Any]) -> None:
    fields["borders"], fields["shards"] = {"0": 1}, [7]


@pytest.mark.parametrize(
    "change",
    [drop_rows, drop_first_border, swap_shards, name_another_file, tell_other_types, tell_nonsense],
)
def test_a_continued_creation_believes_nothing_that_is_not_so(
    store: Store, path: Path, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial(path, store, monkeypatch)
    fields = json.loads((building(path) / PARTIAL).read_text())
    del fields["sha256"]
    change(fields)
    (building(path) / PARTIAL).write_text(_snapshot_files.sealed(fields))
    make(path, store)
    assert_is_right(path)


@pytest.mark.parametrize(("kind", "value"), [("indices", 2**15), ("indices", 0), ("indptr", 2**40)])
def test_a_creation_checks_what_it_wrote(
    store: Store, path: Path, kind: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardWriter.write

    def wrong(self: Any, name: str, window: Any) -> Any:
        written = write(self, name, window)
        file = self._folder / f"{name}.{kind}"
        values = np.fromfile(file, "<u2" if kind == "indices" else "<i8")
        values[1] = value
        values.tofile(file)
        return written | {kind: _snapshot_files.describe_file(file)}

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", wrong)
        with pytest.raises(ValueError, match=rf"shard-0000\d\.{kind}.* it is damaged"):
            make(path, store)
    assert not path.exists()
    make(path, store)
    assert_is_right(path)


def test_a_part_of_another_creation_is_discarded(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial(path, store, monkeypatch)
    make(path, store, [5, 70, 300])
    assert_is_right(path, [5, 70, 300])


def slowly(seconds: float) -> None:
    """Let creations in this process take time for every shard, and make several."""
    write = ShardWriter.write

    def slow(self: Any, name: str, window: Any) -> Any:
        with Path("written.txt").open("a") as file:
            file.write(f"{os.getpid()} {name}\n")
        time.sleep(seconds)
        return write(self, name, window)

    ShardWriter.write = slow  # type: ignore[method-assign]


def create_in_folder(locator: XLocator, folder: Path, seconds: float, progress: bool) -> None:
    """Make x.snapshot in a folder, telling into a file of this process."""
    os.chdir(folder)
    sys.stderr = Path(f"{os.getpid()}.err").open("w", buffering=1)  # noqa: SIM115
    slowly(seconds)
    _snapshot_build.MIN_SHARD_BYTES, _snapshot_build.MIN_SHARDS = 1, 1000
    ids = QueryIDs(obs_joinids=np.arange(N_OBS), var_joinids=np.arange(N_VARS))
    Snapshot.create_from(
        "x.snapshot", [(locator, ids)], obs_column_names=["soma_joinid"], progress=progress
    ).verify()


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start fast: they are forked from one that has imported everything and runs no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_snapshot_build"])
    yield context
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


def test_creations_that_are_killed_at_random_moments_end_in_a_right_snapshot(
    store: Store, path: Path, processes: Any
) -> None:
    rng = random.Random()
    n_killed = 0
    for _ in range(8):
        process = processes.Process(target=create_in_folder, args=(store.locator, path.parent, 0.15, False))
        process.start()
        process.join(rng.uniform(0.5, 1.6))
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


def test_of_several_processes_one_makes_the_snapshot_and_the_others_wait_and_use_it(
    store: Store, path: Path, processes: Any
) -> None:
    args = (store.locator, path.parent, 0.3, True)
    makers = [processes.Process(target=create_in_folder, args=args) for _ in range(3)]
    for process in makers:
        process.start()
    for process in makers:
        process.join()
    assert [process.exitcode for process in makers] == [0, 0, 0]
    writers = [line.split()[0] for line in (path.parent / "written.txt").read_text().splitlines()]
    assert writers == N_SHARDS * [writers[0]]
    told = [(path.parent / f"{process.pid}.err").read_text() for process in makers]
    message = f"process {writers[0]} is making it; waiting until it is there"
    waited = [text for text in told if message in text]
    assert len(waited) == 2
    assert_is_right(path)


# The disk -------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_space_is_checked_before_anything_is_read(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**19, 2**19))
    with pytest.raises(OSError, match=r"with 1 MiB free, not 0 MiB; .* choose another disk") as raised:
        make(path, store)
    assert raised.value.errno == errno.ENOSPC
    assert not list(path.parent.iterdir())


def test_a_disk_that_becomes_full_is_told_and_what_is_finished_is_kept(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, n_left, n_free = HashedFile.write, [9], [2**30]

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - n_free[0], n_free[0]))

    def full(self: HashedFile, array: np.ndarray) -> None:
        n_left[0] -= 1
        if n_left[0] < 0:
            n_free[0] = 2**19
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, array)

    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", full)
        with pytest.raises(OSError, match=r"MiB free, .* call again: what is finished is kept") as raised:
            make(path, store)
    assert raised.value.errno == errno.ENOSPC
    assert (building(path) / PARTIAL).is_file()
    n_free[0] = 2**30
    make(path, store)
    assert_is_right(path)


def test_what_a_disk_takes_only_the_beginning_of_is_not_there_at_all(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # a write beyond is cut there, as at the end
    try:
        with pytest.raises(OSError, match="File too large"):
            _snapshot_files.write_atomically(tmp_path / MANIFEST, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / MANIFEST).exists()


def test_a_folder_that_cannot_be_written_to_is_told(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path.parent / "file").write_text("mine")
    with pytest.raises(OSError, match="must be in a folder that can be written to"):
        make(path.parent / "file" / "x.snapshot", store)

    def read_only(*_: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(_snapshot_progress.os, "open", read_only)
    with pytest.raises(OSError, match=r"must be in a folder .* but: Read-only file system; choose"):
        make(path, store)


def raising(number: int) -> Any:
    def raise_error(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return raise_error


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_told(
    store: Store, path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", raising(number))
    with pytest.raises(
        OSError, match=r"must be on a disk with locks \(flock\), but: .*; choose .* local"
    ) as raised:
        make(path, store)
    assert raised.value.errno == number


def test_a_lock_that_is_taken_away_whenever_it_is_looked_at_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(file: Any, *args: Any, **options: Any) -> int:
        descriptor = usual(file, *args, **options)
        if n_taken_away and str(file).endswith(".x.snapshot.lock"):
            n_taken_away.pop()
            Path(file).unlink()
        return descriptor

    usual, n_taken_away = os.open, [0]
    monkeypatch.setattr(os, "open", opened)
    with _snapshot_progress.locked(path, pytest.fail):
        assert not n_taken_away
        assert list(path.parent.iterdir()) == [path.with_name(".x.snapshot.lock")]


def test_a_lock_of_another_user_and_a_link_are_told(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, mine = path.with_name(f".{path.name}.lock"), path.with_name("mine")
    mine.write_text("mine")
    lock.symlink_to(mine)
    with pytest.raises(
        OSError, match=r"lock '.*\.x\.snapshot\.lock' is a link, which is not followed; remove"
    ):
        make(path, store)
    lock.unlink()
    lock.touch()
    user = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(_snapshot_progress.os, "open", raising(errno.EACCES))
        patch.setattr(_snapshot_progress.os, "geteuid", lambda: user + 1)
        with pytest.raises(
            OSError, match=r"lock '.*lock' belongs to the user .*; wait until it is there, or"
        ):
            make(path, store)
    assert mine.read_text() == "mine"
    make(path, store)


def test_a_snapshot_is_made_where_nobody_else_looks_and_then_is_open_to_whom_the_umask_lets(
    store: Store, path: Path
) -> None:
    modes = []
    path.with_name("usual").mkdir()
    make(path, store, progress=lambda *_: modes.append(building(path).stat().st_mode & 0o777))
    assert set(modes) == {0o700}
    assert path.stat().st_mode == path.with_name("usual").stat().st_mode


def test_what_another_user_put_in_the_way_is_not_used_and_no_link_is_followed(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = path.with_name("other")
    other.mkdir()
    building(path).symlink_to(other)
    with pytest.raises(
        ValueError, match=r"is made in the folder .*, but a link or a file is there; remove it"
    ):
        make(path, store)
    building(path).unlink()
    partial(path, store, monkeypatch)
    user = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(_snapshot_progress.os, "geteuid", lambda: user + 1)
        with pytest.raises(OSError, match=r"but that belongs to the user .*, who began to make it; choose"):
            make(path, store)
    (other / "mine").write_text("mine")
    for name in ("shard-00001.indices", "obs.arrow", "manifest.json.new", f"{PARTIAL}.new"):
        (building(path) / name).unlink(missing_ok=True)
        (building(path) / name).symlink_to(other / "mine")
    make(path, store)
    assert (other / "mine").read_text() == "mine"
    assert_is_right(path)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            "No space left on device, though the disk has .* free: a quota or the number of files",
        ),
        (errno.EDQUOT, "Disk quota exceeded, though the disk has"),
        (errno.EROFS, "must be in a folder that can be written to, but: Read-only file system"),
        (errno.EIO, "must be on a disk that works, but: Input/output error; look after the disk"),
        (errno.ECONNREFUSED, "^.Errno 111. Connection refused$"),
    ],
)
def test_an_error_of_the_disk_is_told_as_what_it_is(
    store: Store, path: Path, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HashedFile, "write", raising(number))
    with pytest.raises(OSError, match=message) as raised:
        make(path, store)
    assert raised.value.errno == number


def test_a_snapshot_on_a_disk_that_cannot_be_written_to_is_used(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(path, store)
    monkeypatch.setattr(_snapshot_build, "locked", None)
    make(path, store)


# Progress -------------------------------------------------------------------------------------------------


def test_a_callback_is_told_rows_done_and_in_all_speed_and_time_left(store: Store, path: Path) -> None:
    told: list[tuple[int, int, float, float]] = []
    make(path, store, progress=lambda *args: told.append(args))
    assert [done for done, *_ in told] == [64, 128, 192, 256, N_OBS]
    assert {total for _, total, *_ in told} == {N_OBS}
    assert all(speed > 0 and left >= 0 for *_, speed, left in told)
    assert told[-1][3] == 0


def test_a_continued_creation_starts_where_the_last_one_ended(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial(path, store, monkeypatch)
    told: list[int] = []
    make(path, store, progress=lambda done, *_: told.append(done))
    assert told == [256, N_OBS]


def test_lines_on_stderr_tell_how_far_it_is_unless_they_are_unwanted(
    store: Store, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(path, store)
    assert capsys.readouterr().err == ""
    shutil.rmtree(path)
    make(path, store, progress=True)
    assert "x.snapshot: 311 of 311 rows, " in capsys.readouterr().err


def test_a_terminal_shows_a_bar(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    make(path, store, progress=True)
    shown = sys.stderr.getvalue()
    assert "x.snapshot" in shown
    assert "311/311" in shown
    assert "rows/s" in shown
