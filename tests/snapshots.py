"""Snapshots of the test experiments in several shards, and ways to damage or to interrupt them."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma

from matrix_source import MatrixSource
from stores import MEASUREMENT, N_OBS, N_VARS, Store, expected_X, make_obs
from tiledbsoma_ml import QueryIDs, Rows
from tiledbsoma_ml._soma.reader import SOMAReader
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.files import sealed
from tiledbsoma_ml.snapshot.format import MANIFEST
from tiledbsoma_ml.snapshot.segments import located
from tiledbsoma_ml.snapshot.stored_layers import ShardSizes
from tiledbsoma_ml.snapshot.takeover import PARTIAL
from tiledbsoma_ml.x_locator import XLocator

ALL_OBS = [name for name in make_obs(np.arange(4)) if name != "soma_joinid"]
OF_ONE_TILE = ShardSizes(min_bytes=1, min_number=1000)
N_SHARDS = 5  # of all rows, in tiles of 64


def make(
    path: Path, of: Any, obs: Any = None, var: Any = None, *, layer_name: str | None = None, **options: Any
) -> Snapshot:
    """Make a snapshot of rows and columns of a store, or of sources, in shards of one row tile."""
    asked = of.query(obs, var) if isinstance(of, Store) else nullcontext(of)
    defaults = {"obs_column_names": ["soma_joinid"], "progress": False, "shards": OF_ONE_TILE}
    with asked as query:
        return Snapshot.create_from(path, located(query, layer_name), **{**defaults, **options})


def read_soma(store: Store, rows: Sequence[int], columns: Sequence[int], names: Sequence[str]) -> Any:
    """Return rows as the experiment gives them."""
    with store.locator.open() as (X, obs):
        ids, columns = (np.asarray(joinids, dtype=np.int64) for joinids in (rows, columns))
        reader = SOMAReader(X, obs, columns, obs_column_names=names, obs_joinids=ids)
        [found] = reader.read(ids)
    return found.X, found.obs


def add_array(store: Store, group: str, name: str, values: np.ndarray, dense: bool = False) -> None:
    """Add an array of this content to `X` or `obsm` of a store."""
    kind, pa_type = (soma.DenseNDArray if dense else soma.SparseNDArray), pa.from_numpy_dtype(values.dtype)
    with soma.Experiment.open(store.uri, "w") as experiment:
        measurement = experiment.ms[MEASUREMENT]
        collection = measurement[group] if group in measurement else measurement.add_new_collection(group)
        add = collection.add_new_dense_ndarray if kind is soma.DenseNDArray else None
        array = (add or collection.add_new_sparse_ndarray)(name, type=pa_type, shape=values.shape)
        if dense:
            array.write((), pa.Tensor.from_numpy(values))
        else:
            write_entries(array, *values.nonzero(), values[values.nonzero()])


def write_entries(array: soma.SparseNDArray, i: np.ndarray, j: np.ndarray, values: np.ndarray) -> None:
    array.write(
        pa.table({"soma_dim_0": i.astype(np.int64), "soma_dim_1": j.astype(np.int64), "soma_data": values})
    )


def dense_of(reader: Any, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), reader.n_vars), reader.dtype)
    reader.fill_dense(rows, out)
    return out


def files_of(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def with_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a snapshot; its checksum and those of all files are made to fit."""
    fields = json.loads((path / MANIFEST).read_text())
    del fields["sha256"]
    change(fields)
    for file in all_files(fields):
        if (path / file["name"]).is_file():
            file["sha256"] = hashlib.sha256((path / file["name"]).read_bytes()).hexdigest()
    (path / MANIFEST).write_text(sealed(fields))


def all_files(fields: Any) -> Iterator[dict[str, Any]]:
    if isinstance(fields, dict) and "nbytes" in fields and isinstance(fields["name"], str):
        yield fields
    elif isinstance(fields, dict | list):
        for value in fields.values() if isinstance(fields, dict) else fields:
            yield from all_files(value)


def set_value(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets the last of some keys to a value."""
    *where, last, value = keys

    def change(fields: Any) -> None:
        for key in where:
            fields = fields[key]
        fields[last] = value

    return change


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


class Killed(BaseException):
    """Ends a creation at once, like a kill."""


def ending_at(n_rows: int) -> Callable[..., None]:
    """Return a callback for progress that ends a creation once so many rows are done."""

    def end(done: int, *_: Any) -> None:
        if done >= n_rows:
            raise Killed

    return end


def partial(path: Path, of: Any, n_rows: int = 3 * 64, **options: Any) -> None:
    """Leave a creation with three finished shards."""
    with pytest.raises(Killed):
        make(path, of, progress=ending_at(n_rows), **options)
    assert (building(path) / PARTIAL).is_file()


@contextmanager
def watched_disk(folder: Path, step: Callable[[str, Path], object]) -> Iterator[None]:
    """Call `step` before each change of this process to files in a folder, and each wait for the disk.

    It gets "open" for a new file, "write", "fsync", "replace" or "rename", and the path.
    """
    usual, paths = {name: getattr(os, name) for name in ("open", "fdopen", "fsync")}, dict[int, Path]()

    def tell(what: str, path: Path) -> None:
        if folder in path.parents:
            step(what, path)

    class Writer(io.BufferedWriter):
        def write(self, data: Any) -> int:
            tell("write", paths[self.fileno()])
            return super().write(data)

    def opened(file: Any, flags: int, *args: Any, **options: Any) -> int:
        path = Path(os.fsdecode(file))
        if flags & os.O_CREAT:
            tell("open", path)
        descriptor: int = usual["open"](file, flags, *args, **options)
        paths[descriptor] = path
        return descriptor

    def fdopen(descriptor: int, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "wb":
            return Writer(io.FileIO(descriptor, mode))
        return usual["fdopen"](descriptor, mode, *args, **options)

    def fsync(descriptor: int) -> None:
        tell("fsync", paths[descriptor])
        usual["fsync"](descriptor)

    def moving(what: str) -> Callable[[Any, Any], None]:
        move = getattr(os, what)

        def moved(old: Any, new: Any) -> None:
            tell(what, Path(new))
            move(old, new)

        return moved

    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("open", opened), ("fdopen", fdopen), ("fsync", fsync)):
            patch.setattr(os, name, function)
        for name in ("replace", "rename"):
            patch.setattr(os, name, moving(name))
        yield


def create_with_others(
    locator: XLocator, folder: Path, at_shard: Callable[[int], object], **options: Any
) -> None:
    """Make x.snapshot in a folder; `at_shard` is called before a shard is written, with how many were before.

    What is told is in a file of this process, and each shard that it begins is a line of written.txt.
    """
    sys.stderr = (folder / f"{os.getpid()}.err").open("w", buffering=1)
    ids = QueryIDs(obs_joinids=np.arange(N_OBS), var_joinids=np.arange(N_VARS))
    n_before = itertools.count()

    def step(what: str, path: Path) -> None:
        if what == "open" and path.suffix == ".indices":
            with (folder / "written.txt").open("a") as file:
                file.write(f"{os.getpid()} {path.stem}\n")
            at_shard(next(n_before))

    defaults = {"obs_column_names": ["soma_joinid"], "shards": OF_ONE_TILE}
    with watched_disk(folder, step):
        Snapshot.create_from(folder / "x.snapshot", [(locator, ids)], **{**defaults, **options}).verify()


def written_by(folder: Path) -> list[tuple[int, str]]:
    """Return the process and the name of each shard that `create_with_others` began to write."""
    lines = [line.split() for line in (folder / "written.txt").read_text().splitlines()]
    return [(int(pid), name) for pid, name in lines]


def raising(number: int) -> Any:
    def raise_error(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return raise_error


# Once, and killed -----------------------------------------------------------------------------------------


def recording(source: MatrixSource) -> list[int]:
    """Return the rows that a source will have been asked for, but for the one that tells the type."""
    asked: list[int] = []

    def record(rows: Rows[Any]) -> Rows[Any]:
        asked.extend(rows.obs_joinids.tolist() if len(rows) > 1 else [])
        return rows

    source.given = record
    return asked
