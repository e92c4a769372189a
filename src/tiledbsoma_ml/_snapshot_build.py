"""A query becomes a snapshot: one scan in the order of storage, shard by shard, in a folder beside it."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import stat
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayJoinId, check_name
from tiledbsoma_ml._eager_iter import EagerIterator, EagerMap
from tiledbsoma_ml._obs import ObsColumns, ascending
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._reader import SOMAReader, check_obs_column_names, measure_row_bytes, row_tile
from tiledbsoma_ml._snapshot_check import check_content, check_shard, verify
from tiledbsoma_ml._snapshot_format import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    Content,
    Embedding,
    File,
    HashedFile,
    Layer,
    Manifest,
    Shard,
    Source,
    describe_file,
    digest,
    fsync,
    indices_dtype,
    open_new,
    read_sealed,
    sealed,
    shard_from,
    stored_dtypes,
    write_array,
    write_atomically,
)
from tiledbsoma_ml._snapshot_progress import Progress, check_own_folder, locked
from tiledbsoma_ml._threads import at_work
from tiledbsoma_ml._vfs import open_vfs
from tiledbsoma_ml._window import Window, _narrowed, preload_kernels
from tiledbsoma_ml.x_locator import XLocator

PARTIAL = "partial.json"

MIN_SHARD_BYTES, MAX_SHARD_BYTES, MIN_SHARDS = 2**25, 2**29, 8
"""A snapshot has at least so many shards of such a size."""

PART_BYTES = 2**21
"""Rows of a shard are put together and written so much at a time, in memory that is used again."""

MAX_OBSM_COLUMNS = 2**20
"""An array of `obsm` that is declared wider has the columns that are written.

tiledbsoma up to 1.14 declares arrays as wide as it can.
"""

_DISK_FAILS = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EFBIG)

SAMPLE_RUNS, SAMPLE_SHARE = 6, 2**17
"""At most so many runs of 128 rows are read to see how much space a layer needs: one of so many rows."""


@attrs.frozen
class SourceRows:
    """Rows of a layer of an experiment, for a snapshot: ascending, none twice.

    Attributes:
        locator: Address of the layer.
        ids: Rows and columns.
    """

    locator: XLocator
    ids: QueryIDs

    @classmethod
    def of(cls, locator: XLocator, ids: QueryIDs) -> SourceRows:
        """Return the rows of a query."""
        return cls(locator, attrs.evolve(ids, obs_joinids=ascending(ids.obs_joinids)))


def create(
    path: Path,
    parts: Sequence[SourceRows],
    *,
    obs_column_names: Sequence[str],
    layers: Sequence[str],
    obsm: Sequence[str],
    budget: Budget,
    progress: Progress,
) -> None:
    """Make a snapshot at a path, unless it is there already.

    Args:
        path: The folder to make.
        parts: Rows of one query or of several, one after the other.
        obs_column_names: Columns of `obs`.
        layers: Further layers of `X`.
        obsm: Arrays of `obsm`.
        budget: The memory that this may take.
        progress: Callback for progress.

    Raises:
        ValueError: If a name does not exist, queries do not fit together, or there is something else.
        OSError: If the disk cannot be written to, or is too small.
    """
    content = describe(parts, obs_column_names=obs_column_names, layers=layers, obsm=obsm)
    if is_there(path, content):
        return
    with locked(path, progress.say):
        if not is_there(path, content):
            _Builder(path, parts, content, budget, progress).build()


def is_there(path: Path, content: Content) -> bool:
    """Return whether a snapshot of this content is at the path.

    Raises:
        ValueError: If something else is.
    """
    if not os.path.lexists(path):
        return False
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"path={str(path)!r} must be a snapshot or free, but something else is there, which is never "
            "overwritten; choose another path."
        )
    manifest = Manifest.read(path)
    if differences := manifest.content.differences(content):
        raise ValueError(
            f"path={str(path)!r} must be free or hold this query, but holds another one "
            f"({'; '.join(differences)}); choose another path, or remove it."
        )
    manifest.check_files(path)
    for made, asked in zip(manifest.content.sources, content.sources, strict=True):
        warn_of_unknown(path, made, asked, content.arrays)
    return True


def warn_of_unknown(path: Path, made: Source, asked: Source, arrays: Sequence[str]) -> None:
    """Warn that of some arrays it cannot be told whether they were written to since a snapshot was made."""
    if unknown := [name for name in arrays if name not in made.versions.keys() & asked.versions.keys()]:
        date = datetime.fromtimestamp(made.tiledb_timestamp_ms / 1000, UTC).isoformat(timespec="seconds")
        warnings.warn(
            f"snapshot={str(path)!r} holds {made.uri!r} as of {date}; whether {', '.join(unknown)} changed "
            "since cannot be told, because TileDB cannot list what was written there; if so, make it again "
            "at another path.",
            stacklevel=2,
        )


# What is asked for ----------------------------------------------------------------------------------------


def describe(
    parts: Sequence[SourceRows],
    *,
    obs_column_names: Sequence[str],
    layers: Sequence[str],
    obsm: Sequence[str],
) -> Content:
    """Return what a snapshot of rows holds, having checked that it exists."""
    first = parts[0]
    layer_names = tuple(dict.fromkeys([first.locator.layer_name, *layers]))
    for part in parts[1:]:
        if not np.array_equal(part.ids.var_joinids, first.ids.var_joinids):
            raise ValueError(
                f"query must be several ones on the same columns, but that on {part.locator.uri!r} has "
                f"{len(part.ids.var_joinids):,} other var_joinids than the {len(first.ids.var_joinids):,} of "
                "the first; select the same columns, in the same order."
            )
    for part in parts:
        _check_names(part.locator, layer_names, obsm, obs_column_names)
    return Content(
        sources=tuple(source_of(part.locator, layer_names, obsm, part.ids.obs_joinids) for part in parts),
        n_vars=len(first.ids.var_joinids),
        var_digest=digest(first.ids.var_joinids),
        layer_names=layer_names,
        obs_column_names=tuple(obs_column_names),
        obsm_names=tuple(obsm),
    )


def source_of(
    locator: XLocator,
    layer_names: Sequence[str],
    obsm: Sequence[str] = (),
    joinids: NDArrayJoinId | None = None,
) -> Source:
    """Return where rows come from; without `joinids`, no rows."""
    joinids = np.empty(0, dtype=np.int64) if joinids is None else joinids
    with _opened(locator) as (measurement, obs):
        arrays = {"obs": obs, "var": measurement.var}
        arrays |= {f"X/{name}": measurement.X[name] for name in layer_names}
        arrays |= {f"obsm/{name}": measurement.obsm[name] for name in obsm}
        uris = {name: _absolute(array.uri) for name, array in arrays.items()}
    return Source(
        uri=_absolute(locator.uri),
        measurement_name=locator.measurement_name,
        tiledb_timestamp_ms=locator.tiledb_timestamp_ms,
        versions=_versions(uris, locator),
        n_obs=len(joinids),
        obs_digest=digest(joinids),
    )


@contextmanager
def _opened(locator: XLocator) -> Iterator[tuple[soma.Measurement, soma.DataFrame]]:
    """Open the measurement, and `obs`, of an address."""
    with locator.open_experiment() as experiment:
        yield experiment.ms[locator.measurement_name], experiment.obs


def _check_names(
    locator: XLocator, layer_names: Sequence[str], obsm: Sequence[str], obs_column_names: Sequence[str]
) -> None:
    with _opened(locator) as (measurement, obs):
        check_obs_column_names(obs_column_names, obs)
        for name in layer_names:
            check_name("layers", name, measurement.X.keys(), of="an X layer of the measurement")
        known = measurement.obsm.keys() if "obsm" in measurement else []
        for name in obsm:
            check_name("obsm", name, known, of="an array of obsm")


def _absolute(uri: str) -> str:
    """Return a URI that does not depend on the working directory."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "file":
        return uri.rstrip("/")
    return str(Path(rest if separator else uri).resolve())


def _versions(uris: dict[str, str], locator: XLocator) -> dict[str, str]:
    """Return, for each array, a digest of the names of what was written to it until a timestamp.

    Whenever an experiment is opened it gets a new timestamp, which says nothing. Arrays that cannot be listed
    are left out.
    """
    found = {}
    with suppress(OSError), open_vfs(locator.tiledb_config) as vfs:
        for name, uri in uris.items():
            with suppress(OSError):
                fragments = vfs.names(f"{uri}/__fragments")
                commits = vfs.names(f"{uri}/__commits")
                found[name] = _version(fragments, commits, locator.tiledb_timestamp_ms)
    return {name: version for name, version in found.items() if version is not None}


def _version(fragments: list[str], commits: list[str], timestamp_ms: int) -> str | None:
    """Return a digest of the fragments, deletions and updates until a timestamp; None if it is not known."""
    names = [*fragments, *(name for name in commits if name.endswith((".del", ".upd")))]
    try:
        times = [int(name.lstrip("_").split("_")[0]) for name in names]
    except ValueError:  # names of another version of TileDB
        return None
    written = sorted(name for name, t in zip(names, times, strict=True) if t <= timestamp_ms)
    return hashlib.blake2b("\n".join(written).encode(), digest_size=8).hexdigest()


# Building -------------------------------------------------------------------------------------------------


class _Builder:
    """Makes one snapshot, in a folder beside its path that is renamed at the end.

    The folder of a creation that was killed is taken up again: `partial.json` tells what is finished.
    """

    def __init__(
        self, path: Path, parts: Sequence[SourceRows], content: Content, budget: Budget, progress: Progress
    ) -> None:
        self._path = path
        self._folder = path.with_name(f".{path.name}.building")
        self._parts = parts
        self._content = content
        self._budget = budget
        self._progress = progress
        self._bytes_per_row: dict[str, float] = {}
        self._borders: list[int] = []
        self._frames: Future[dict[str, File]] = Future()
        self._finished: dict[str, list[Shard]] = {name: [] for name in content.layer_names}

    def build(self) -> None:
        preload_kernels()
        check_own_folder(self._folder, self._path)
        if not self._is_only_to_be_renamed():
            self._resume()
            self._bytes_per_row = self._measure()
            if not self._borders:
                self._borders = self._cut()
            needed = self._check_space()
            try:
                if not check_own_folder(self._folder, self._path):
                    self._folder.mkdir(mode=0o700)
                self._write()
            except OSError as err:
                raise self._disk_error(err, needed) from err
        (self._folder / PARTIAL).unlink(missing_ok=True)
        self._open_to_others()
        fsync(self._folder)
        self._folder.rename(self._path)
        fsync(self._path.parent)

    def _open_to_others(self) -> None:
        """Let those look into the folder who can read its files: what the umask lets."""
        special = stat.S_IMODE(self._folder.stat().st_mode) & 0o7000
        mode = stat.S_IMODE((self._folder / MANIFEST).stat().st_mode)
        with suppress(OSError):  # a file system without modes
            self._folder.chmod(special | mode | (mode & 0o444) >> 2)

    # What a killed creation left --------------------------------------------------------------------------

    def _is_only_to_be_renamed(self) -> bool:
        try:
            manifest = Manifest.read(self._folder)
            if manifest.content.fingerprint != self._content.fingerprint:
                return False
            verify(self._folder, manifest)
        except ValueError:
            return False
        return True

    def _resume(self) -> None:
        """Take over the shards that are whole; what is of another query or format is removed."""
        try:
            fields = read_sealed(self._folder / PARTIAL, "a snapshot in the making")
        except ValueError:
            fields = {}
        if fields.get("fingerprint") != self._content.fingerprint:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        try:
            self._borders = _borders_from(fields["borders"], self._content.n_obs)
            for name in self._content.layer_names:
                self._finished[name] += self._finished_shards(name, fields["shards"][name])
        except (KeyError, TypeError, ValueError):
            self._borders, self._finished = [], {name: [] for name in self._content.layer_names}

    def _finished_shards(self, name: str, told: Sequence[dict[str, Any]]) -> Iterator[Shard]:
        """Yield the first shards of a layer, of those that a killed creation tells of, that are right."""
        dtype, n_vars = self._dtype_of(name), self._content.n_vars
        columns = indices_dtype(n_vars).str
        for number, (shard, rows) in enumerate(zip(map(shard_from, told), pairwise(self._borders))):  # noqa: B905
            names = [self._shard_name(name, number) + ending for ending in (".indptr", ".indices", ".data")]
            if (shard.row_start, shard.row_stop) != rows or [file.name for file in shard.files] != names:
                return
            if any(shard.contradictions(dtype, columns, n_vars)):
                return
            try:
                for file in shard.files:
                    file.check_content(self._folder)
                check_shard(self._folder, columns, shard, n_vars)
            except ValueError:
                return
            yield shard

    def _shard_name(self, layer_name: str, number: int) -> str:
        layer = self._content.layer_names.index(layer_name)
        return f"layer{layer}-shard-{number:05}" if layer else f"shard-{number:05}"

    def _keep_partial(self) -> None:
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": self._content.fingerprint,
            "borders": self._borders,
            "shards": {name: [attrs.asdict(s) for s in shards] for name, shards in self._finished.items()},
        }
        write_atomically(self._folder / PARTIAL, sealed(fields))

    # How much there is ------------------------------------------------------------------------------------

    def _measure(self) -> dict[str, float]:
        """Return about how many bytes a row of each layer and of each array of `obsm` takes up."""
        part = max(self._parts, key=lambda part: len(part.ids.obs_joinids))
        ids = part.ids.obs_joinids
        n_runs = min(1 + len(ids) // SAMPLE_SHARE, SAMPLE_RUNS)
        starts = np.linspace(0, max(0, len(ids) - 128), n_runs + 2)[1:-1].astype(int).tolist()
        sample = np.unique(np.concatenate([ids[start : start + 128] for start in starts]))
        found = {}
        for name in self._content.layer_names:
            with self._reader(part, name) as (reader, _):
                found[name] = measure_row_bytes(reader, sample)
        with _opened(part.locator) as (measurement, _):
            for name in self._content.obsm_names:
                array = measurement.obsm[name]
                found[f"obsm {name}"] = float(_width(name, array) * _dtype(array).itemsize)
        return found

    def _cut(self) -> list[int]:
        """Return the borders of shards: whole tiles of rows, unless one is too large for the budget."""
        first_layer = self._content.layer_names[0]
        bytes_per_row = self._bytes_per_row[first_layer]
        size = max(bytes_per_row * self._content.n_obs / MIN_SHARDS, MIN_SHARD_BYTES)
        borders = [0]
        for part in self._parts:
            with self._reader(part, first_layer) as (_, X):
                tile = row_tile(X)
            n_bytes = min(max(min(size, MAX_SHARD_BYTES), tile * bytes_per_row), self._budget.windows / 4)
            found = _shard_borders(part.ids.obs_joinids // tile, max(1, int(n_bytes / bytes_per_row)))
            first = borders[-1]
            borders += [first + border for border in found]
        return borders

    def _check_space(self) -> int:
        """Return how many bytes are still to be written, about, having checked that they are free."""
        per_row = 8 + 16 * len(self._content.obs_column_names) + sum(self._bytes_per_row.values())
        done = sum(file.lstat().st_size for file in self._folder.glob("*"))
        needed = max(0, int(1.05 * per_row * self._content.n_obs) + 2**20 - done)
        if shutil.disk_usage(self._path.parent).free < needed:
            raise self._disk_error(OSError(errno.ENOSPC, ""), needed)
        return needed

    def _disk_error(self, err: OSError, needed: int) -> OSError:
        """Return an error that says what is wrong with the disk; others are returned as they are."""
        free, where = (
            shutil.disk_usage(self._path.parent).free,
            f" ({err.filename!r})" if err.filename else "",
        )
        if err.errno == errno.ENOSPC and free < needed:
            rule = f"on a disk with {_mib(needed)} free, not {_mib(free)}; free some or choose another disk"
        elif err.errno in (errno.ENOSPC, errno.EDQUOT):
            rule = (
                f"where {_mib(needed)} may be written, but: {err.strerror}, though the disk has {_mib(free)} "
            )
            rule += "free: a quota or the number of files is at its end; choose another disk"
        elif err.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            rule = (
                f"in a folder that can be written to, but: {err.strerror}{where}; allow it, or choose another"
            )
        elif err.errno in _DISK_FAILS:
            rule = f"on a disk that works, but: {err.strerror}{where}; look after the disk, or choose another"
        else:
            return err
        message = f"path={str(self._path)!r} must be {rule}, and call again: what is finished is kept."
        return OSError(err.errno, message)

    # Writing ----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        (self._folder / MANIFEST).unlink(missing_ok=True)
        n_done = sum(shards[-1].row_stop for shards in self._finished.values() if shards)
        n_rows = self._content.n_obs * len(self._content.layer_names)
        with self._progress.of(n_rows, n_done), _Fsyncs() as fsyncs, ThreadPoolExecutor(1) as pool:
            self._frames = pool.submit(at_work()(self._write_frames))
            self._keep_partial()
            layers = tuple(self._write_layer(name, fsyncs) for name in self._content.layer_names)
            obsm = tuple(
                self._write_obsm(number, name) for number, name in enumerate(self._content.obsm_names)
            )
            files = self._frames.result()
            manifest = Manifest(
                created_by=f"tiledbsoma-ml {version('tiledbsoma-ml')}",
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                content=self._content,
                layers=layers,
                obsm=obsm,
                **files,
            )
            for file in [*files.values(), *(embedding.values for embedding in obsm)]:
                fsyncs.add(self._folder / file.name)
        check_content(self._folder, manifest)
        manifest.write(self._folder)

    def _write_layer(self, name: str, fsyncs: _Fsyncs) -> Layer:
        shards, dtype = self._finished[name], self._dtype_of(name)
        borders = list(pairwise(self._borders))[len(shards) :]
        writer = _ShardWriter(self._folder, np.dtype(dtype))
        with closing(self._windows(name, borders)) as windows, EagerIterator(windows) as ahead:
            for (start, stop), window in zip(borders, ahead, strict=True):
                written = writer.write(self._shard_name(name, len(shards)), window)
                shard = Shard(row_start=start, row_stop=stop, **written)
                for file in shard.files:
                    fsyncs.add(self._folder / file.name)
                shards.append(shard)
                self._keep_partial()
                self._progress.advance(stop - start)
                if self._frames.done():
                    self._frames.result()  # rather now than at the end, if it failed
        columns = indices_dtype(self._content.n_vars).str
        return Layer(name=name, dtype=dtype, indices_dtype=columns, shards=tuple(shards))

    def _windows(self, name: str, borders: Sequence[tuple[int, int]]) -> Generator[Window, None, None]:
        """Yield the rows between borders, read on this thread; more of them are there than one."""
        first = 0
        for part in self._parts:
            end = first + len(part.ids.obs_joinids)
            mine = [(start - first, stop - first) for start, stop in borders if first <= start < end]
            if mine:
                n_rows = max(stop - start for start, stop in mine)
                n_parts = math.ceil(n_rows * self._bytes_per_row[name] / PART_BYTES)
                with self._reader(part, name, n_parts) as (reader, _):
                    for start, stop in mine:
                        yield reader.read_window(part.ids.obs_joinids[start:stop])
            first = end

    @contextmanager
    def _reader(self, part: SourceRows, name: str, n_parts: int = 1) -> Iterator[tuple[SOMAReader, Any]]:
        locator = attrs.evolve(part.locator, layer_name=name)
        with locator.open(self._budget) as (X, obs):
            yield self._reader_of(X, obs, part.ids.var_joinids, n_parts), X

    def _reader_of(
        self, array: Any, obs: soma.DataFrame, var_joinids: NDArrayJoinId, n_parts: int
    ) -> SOMAReader:
        return SOMAReader(
            array,
            obs,
            var_joinids,
            obs_column_names=["soma_joinid"],
            obs_joinids=np.empty(0, dtype=np.int64),
            n_parts=n_parts,
            use_eager_fetch=True,
        )

    def _dtype_of(self, name: str) -> str:
        """Return the type of a layer, which is the same in all queries."""
        dtypes = {self._layer_dtype(part, name).str: part.locator.uri for part in self._parts}
        if len(dtypes) > 1:
            listed = ", ".join(f"{dtype} in {uri!r}" for dtype, uri in dtypes.items())
            raise ValueError(
                f"layer {name!r} must have one type in all queries, but has {listed}; make one snapshot each."
            )
        [dtype] = dtypes
        return dtype

    def _layer_dtype(self, part: SourceRows, name: str) -> np.dtype[Any]:
        with attrs.evolve(part.locator, layer_name=name).open(self._budget) as (X, _):
            return _dtype(X)

    def _write_frames(self) -> dict[str, File]:
        """Write joinids, `obs` and `var`."""
        obs_tables, var_tables = [], []
        for number, part in enumerate(self._parts):
            with _opened(part.locator) as (measurement, obs):
                names = self._content.obs_column_names
                rows = part.ids.obs_joinids
                columns = ObsColumns.read(obs, names, rows).columns_of(rows)
                if len(self._parts) > 1:
                    columns["soma_source"] = pa.array(np.full(len(rows), number, np.uint16))
                obs_tables.append(pa.table(columns))
                var_names = [name for name in measurement.var.schema.names if name != "soma_joinid"]
                rows = part.ids.var_joinids
                var = ObsColumns.read(measurement.var, ["soma_joinid", *var_names], rows)
                var_tables.append(pa.table(var.columns_of(rows)))
        _check_same_features(self._parts, var_tables)
        joinids = [part.ids.obs_joinids for part in self._parts]
        return {
            "obs_joinids": write_array(self._folder / "obs_joinids", joinids),
            "var_joinids": write_array(self._folder / "var_joinids", [self._parts[0].ids.var_joinids]),
            "obs": _write_table(self._folder / "obs.arrow", obs_tables),
            "var": _write_table(self._folder / "var.arrow", var_tables[:1]),
        }

    def _write_obsm(self, number: int, name: str) -> Embedding:
        shapes = set()
        with HashedFile(self._folder / f"obsm{number}") as file:
            for part in self._parts:
                with _opened(part.locator) as (measurement, obs):
                    array = measurement.obsm[name]
                    width = _width(name, array)
                    shapes.add((width, _dtype(array)))
                    reader = self._reader_of(array, obs, np.arange(width), n_parts=1)
                    step = max(1, PART_BYTES // (8 * width))
                    for start in range(0, len(part.ids.obs_joinids), step):
                        for rows in reader.read_window(part.ids.obs_joinids[start : start + step]):
                            file.write(rows.slice_tonumpy(slice(None)))
        if len(shapes) > 1:
            listed = ", ".join(f"{n_cols} columns of {dtype}" for n_cols, dtype in shapes)
            raise ValueError(f"obsm={name!r} must be alike in all queries, not {listed}; leave it out.")
        [(n_cols, dtype)] = shapes
        return Embedding(name=name, dtype=dtype.str, n_cols=n_cols, values=file.written)


class _Fsyncs:
    """Files whose bytes go to the disk on a thread; all are there when the context ends."""

    def __enter__(self) -> _Fsyncs:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fsync")
        self._pending: list[Future[None]] = []
        return self

    def add(self, path: Path) -> None:
        self._pending.append(self._pool.submit(at_work()(fsync), path))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for pending in self._pending:
                pending.result()


class _ShardWriter:
    """Writes shards; values wait, in memory that is used again, until the type that holds all is known."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self._folder = folder
        self._dtype = dtype
        self._waiting = np.empty(0, dtype=np.uint8)

    def write(self, name: str, window: Window) -> dict[str, Any]:
        """Write the rows of a window; return what the manifest says about them, but for their numbers."""
        paths = {what: self._folder / f"{name}.{what}" for what in ("indptr", "indices", "data")}
        lengths, kept = [np.zeros(1, dtype=np.int64)], []
        if len(self._waiting) < window.nbytes:  # enough, but where values have many types
            self._waiting = np.empty(window.nbytes, dtype=np.uint8)

        def sorted_indices() -> Iterator[NDArray[Any]]:
            n_bytes = 0
            for part in window.give_out(narrow=True):
                part.sort_indices()
                lengths.append(np.diff(part.indptr))
                if part.nnz:
                    kept.append(self._keep(part.data, n_bytes))
                    n_bytes += -(-kept[-1].nbytes // 8) * 8
                yield part.indices

        with (
            HashedFile(paths["indices"]) as indices,
            EagerMap(indices.write, sorted_indices(), n_threads=1) as written,
        ):
            for _ in written:  # each while the next part is sorted
                pass
        data_dtype = smallest(kept, self._dtype)
        with HashedFile(paths["data"]) as data:
            for values in kept:
                data.write(values.astype(data_dtype, copy=False))
        indptr = np.cumsum(np.concatenate(lengths))
        return {
            "nnz": int(indptr[-1]),
            "data_dtype": data_dtype.str,
            "indptr": write_array(paths["indptr"], [indptr]),
            "indices": indices.written,
            "data": data.written,
        }

    def _keep(self, values: NDArray[Any], start: int) -> NDArray[Any]:
        """Return values, narrowed, in the memory that waits, from `start` on."""
        dtype = narrowed(values)
        end = start + len(values) * dtype.itemsize
        if end > len(self._waiting):  # what was kept before stays where it is, held by its views
            self._waiting = np.empty(end + end // 4, dtype=np.uint8)
        kept = self._waiting[start:end].view(dtype)
        np.copyto(kept, values, casting="unsafe")
        return kept


def narrowed(values: NDArray[Any]) -> np.dtype[Any]:
    """Return the smallest type that holds every one of some values exactly."""
    dtype = _narrowed(values)
    if dtype == values.dtype and dtype.kind == "i" and len(values):
        low, high = values.min(), values.max()
        widths = (8, 16, 32, 64)
        return next(np.dtype(f"i{w // 8}") for w in widths if -(2 ** (w - 1)) <= low and high < 2 ** (w - 1))
    if dtype == np.float64:
        with np.errstate(over="ignore", invalid="ignore"):
            short = values.astype(np.float32)
        if (short.astype(np.float64).view(np.uint64) == values.view(np.uint64)).all():
            return short.dtype
    return dtype


def smallest(parts: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the smallest type that holds every value of a layer of `dtype`, given in narrowed parts."""
    *narrower, _ = map(np.dtype, stored_dtypes(dtype.str))
    return next((t for t in narrower if all(_holds(t, values) for values in parts)), dtype)


def _holds(dtype: np.dtype[Any], values: NDArray[Any]) -> bool:
    """Whether a type holds narrowed values exactly."""
    if np.can_cast(values.dtype, dtype):
        return True
    if values.dtype.kind == "f":
        return False
    if dtype.kind == "f":
        return bool((values.astype(dtype).astype(np.float64) == values).all())
    limits = np.iinfo(dtype)
    return bool(limits.min <= values.min() and values.max() <= limits.max)


def _dtype(array: soma.SparseNDArray | soma.DenseNDArray) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(array.schema.field("soma_data").type.to_pandas_dtype())
    return dtype.newbyteorder("<")


def _width(name: str, array: soma.SparseNDArray | soma.DenseNDArray) -> int:
    """Return how many columns an array of `obsm` has: as declared, unless it is declared without a limit.

    Raises:
        ValueError: If it is, and nothing is written to it that would tell.
    """
    if array.shape[1] <= MAX_OBSM_COLUMNS:
        return int(array.shape[1])
    (_, last_row), (_, last_col) = array.non_empty_domain()
    if last_row == last_col == 0 or last_col >= MAX_OBSM_COLUMNS:  # zeros are what an empty array has
        raise ValueError(
            f"obsm={name!r} must have at most {MAX_OBSM_COLUMNS:,} columns, but is declared with "
            f"{array.shape[1]:,}, and what is written does not tell how many there are; leave it out."
        )
    return int(last_col) + 1


def _borders_from(told: Any, n_obs: int) -> list[int]:
    """Return the borders of shards that a killed creation tells of.

    Raises:
        ValueError: If they do not ascend from 0 to the number of rows.
    """
    borders = [0, *(int(border) for border in told[1:])]
    if borders != told or borders[-1] != n_obs or any(b <= a for a, b in pairwise(borders)):
        raise ValueError(f"borders={told} must ascend from 0 to {n_obs}.")
    return borders


def _shard_borders(tiles: NDArray[np.int64], n_rows: int) -> list[int]:
    """Return where shards of about `n_rows` rows end: between tiles, or within one that is larger."""
    starts = np.append(np.flatnonzero(np.diff(tiles, prepend=tiles[:1])), len(tiles))
    borders = [0]
    while borders[-1] < len(tiles):
        start = borders[-1]
        fits = starts[(starts > start) & (starts <= start + n_rows)]
        borders.append(int(fits[-1]) if len(fits) else min(start + n_rows, len(tiles)))
    return borders[1:]


# Frames ---------------------------------------------------------------------------------------------------


def _write_table(path: Path, tables: Sequence[pa.Table]) -> File:
    """Write tables, put below each other, as an Arrow IPC file of one record batch."""
    try:
        table = pa.concat_tables(tables).unify_dictionaries()
    except pa.ArrowException as err:
        raise ValueError(
            f"obs_column_names must have one type in all queries, but: {err}; leave out what differs."
        ) from err
    columns = [column.combine_chunks() for column in table.columns]
    batch = pa.RecordBatch.from_arrays(columns, table.column_names)
    with open_new(path) as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return describe_file(path)


def _check_same_features(parts: Sequence[SourceRows], tables: Sequence[pa.Table]) -> None:
    for part, table in zip(parts, tables, strict=True):
        if "feature_id" not in tables[0].column_names or "feature_id" not in table.column_names:
            continue
        ours, its = (t["feature_id"].to_pylist() for t in (tables[0], table))
        if differing := [i for i, pair in enumerate(zip(ours, its, strict=True)) if len(set(pair)) > 1]:
            k = differing[0]
            raise ValueError(
                f"query must be several ones on the same features, but that on {part.locator.uri!r} has "
                f"{its[k]!r} where the first has {ours[k]!r}; make one snapshot each."
            )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
