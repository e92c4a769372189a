"""`create`: makes a snapshot of segments, which it reads in the order of storage, shard by shard.

The snapshot is made in a folder beside its path. This module does not know the origin of rows: see `Segment`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from math import ceil
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._soma.held_rows import preload_kernels
from tiledbsoma_ml._threads import at_work
from tiledbsoma_ml.snapshot.check import check_content, verify
from tiledbsoma_ml.snapshot.content import Content, warn_of_unknown
from tiledbsoma_ml.snapshot.creation import Progress, check_own_folder, locked
from tiledbsoma_ml.snapshot.disk import check_space, disk_error
from tiledbsoma_ml.snapshot.files import File, Fsyncs, HashedFile, digest, fsync
from tiledbsoma_ml.snapshot.format import MANIFEST, Embedding, Layer, Manifest, indices_dtype
from tiledbsoma_ml.snapshot.frames import read_frames, write_frames
from tiledbsoma_ml.snapshot.segment import PIECE_BYTES, Segment, ShardRows, StoredLayer
from tiledbsoma_ml.snapshot.shard import DTYPES, Shard
from tiledbsoma_ml.snapshot.shards import ShardWriter
from tiledbsoma_ml.snapshot.takeover import PARTIAL, Finished, keep_partial, shard_name, take_over


@attrs.frozen(kw_only=True)
class ShardSizes:
    """The sizes of the shards of a snapshot.

    Attributes:
        min_bytes: Approximate smallest size of a shard, unless the snapshot has fewer bytes.
        max_bytes: Approximate largest size of a shard, unless a tile has more bytes.
        min_number: Number of shards up to which shards have the smallest size.
    """

    min_bytes: int = 2**25
    max_bytes: int = 2**29
    min_number: int = 8


DEFAULT_SHARDS = ShardSizes()


def create(
    path: Path,
    segments: Sequence[Segment],
    *,
    obs_column_names: Sequence[str],
    layers: Sequence[str],
    obsm: Sequence[str],
    budget: Budget,
    progress: Progress,
    shards: ShardSizes = DEFAULT_SHARDS,
    compression: str | None = None,
) -> None:
    """Make a snapshot at a path, unless it is there already.

    Args:
        path: The folder to make.
        segments: The segments of the snapshot, in order.
        obs_column_names: Columns of `obs`.
        layers: Further layers of `X`.
        obsm: Arrays of `obsm`.
        budget: The memory that this may use.
        progress: Callback for progress.
        shards: Sizes of its shards.
        compression: Name of the compression of `X`; None to compress nothing.

    Raises:
        ValueError: If a name does not exist, segments differ in columns or types, or the path has other data.
        OSError: If the disk cannot be written to, or is too small.
    """
    content = describe(segments, obs_column_names=obs_column_names, layers=layers, obsm=obsm)
    if is_there(path, content):
        return
    with locked(path, progress.say):
        if not is_there(path, content):
            _Builder(path, segments, content, budget, progress, shards, compression).build()


def is_there(path: Path, content: Content) -> bool:
    """Return whether the path has a snapshot with this content.

    Raises:
        ValueError: If the path has other data.
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


def describe(
    segments: Sequence[Segment],
    *,
    obs_column_names: Sequence[str],
    layers: Sequence[str],
    obsm: Sequence[str],
) -> Content:
    """Check that layers, columns and arrays exist in all segments, and return the content of the snapshot."""
    first = segments[0]
    layer_names = tuple(dict.fromkeys([first.layer_name, *layers]))
    for segment in segments[1:]:
        if not np.array_equal(segment.ids.var_joinids, first.ids.var_joinids):
            raise ValueError(
                f"query must be several ones on the same columns, but that on {segment.name!r} has "
                f"{len(segment.ids.var_joinids):,} other var_joinids than the "
                f"{len(first.ids.var_joinids):,} of the first; select the same columns, in the same order."
            )
    for segment in segments:
        segment.check(layer_names=layer_names, obs_column_names=obs_column_names, obsm_names=obsm)
    return Content(
        sources=tuple(segment.origin(layer_names=layer_names, obsm_names=obsm) for segment in segments),
        n_vars=len(first.ids.var_joinids),
        var_digest=digest(first.ids.var_joinids),
        layer_names=layer_names,
        obs_column_names=tuple(obs_column_names),
        obsm_names=tuple(obsm),
    )


class _Builder:
    """A builder of one snapshot, in a folder beside its path, which is renamed at the end.

    It continues in the folder of a creation that was killed: `partial.json` lists the finished shards.
    """

    def __init__(
        self,
        path: Path,
        segments: Sequence[Segment],
        content: Content,
        budget: Budget,
        progress: Progress,
        shards: ShardSizes,
        compression: str | None,
    ) -> None:
        self._path = path
        self._folder = path.with_name(f".{path.name}.building")
        self._segments = segments
        self._content = content
        self._budget = budget
        self._progress = progress
        self._shards = shards
        self._compression = compression
        self._stored: dict[str, list[StoredLayer]] = {}
        self._bytes_per_row: dict[str, float] = {}
        self._borders: list[int] = []
        self._finished: dict[str, list[Shard]] = {}
        self._frames: Future[dict[str, File]] = Future()
        self._failed_read: OSError | None = None

    def build(self) -> None:
        preload_kernels()
        check_own_folder(self._folder, self._path)
        if not self._is_only_to_be_renamed():
            self._stored = {name: self._layers_of_segments(name) for name in self._content.layer_names}
            dtypes = {name: self._dtype_of(name) for name in self._content.layer_names}
            finished = take_over(self._folder, self._content, dtypes, self._compression)
            self._borders, self._finished = finished.borders, finished.shards
            self._bytes_per_row = self._measure()
            if not self._borders:
                self._borders = self._cut()
            needed = self._needed()
            check_space(self._path, needed)
            try:
                if not check_own_folder(self._folder, self._path):
                    self._folder.mkdir(mode=0o700)
                self._write()
            except OSError as err:
                if err is self._failed_read:
                    raise
                raise disk_error(self._path, err, needed) from err
        (self._folder / PARTIAL).unlink(missing_ok=True)
        self._open_to_others()
        fsync(self._folder)
        self._folder.rename(self._path)
        fsync(self._path.parent)

    def _is_only_to_be_renamed(self) -> bool:
        """Return whether a creation that was killed had finished everything but the renaming."""
        try:
            manifest = Manifest.read(self._folder)
            if manifest.content.fingerprint != self._content.fingerprint or not self._content.tells_changes:
                return False
            verify(self._folder, manifest)
        except ValueError:
            return False
        return True

    def _keep_partial(self) -> None:
        keep_partial(self._folder, self._content, Finished(borders=self._borders, shards=self._finished))

    def _open_to_others(self) -> None:
        """Give the folder the permissions of its files, which follow the umask."""
        special = stat.S_IMODE(self._folder.stat().st_mode) & 0o7000
        mode = stat.S_IMODE((self._folder / MANIFEST).stat().st_mode)
        with suppress(OSError):  # a file system without modes
            self._folder.chmod(special | mode | (mode & 0o444) >> 2)

    # Types and sizes --------------------------------------------------------------------------------------

    def _layers_of_segments(self, name: str) -> list[StoredLayer]:
        return [segment.layer(name, self._budget) for segment in self._segments]

    def _dtype_of(self, name: str) -> str:
        """Return the type of a layer, which must be the same in all segments with rows.

        Raises:
            ValueError: If the types differ, or a snapshot cannot hold the type.
        """
        pairs = list(zip(self._segments, self._stored[name], strict=True))
        pairs = [pair for pair in pairs if len(pair[0].ids.obs_joinids)] or pairs[:1]
        dtypes = {stored.dtype.str: segment.name for segment, stored in pairs}
        if len(dtypes) > 1:
            listed = ", ".join(f"{dtype} in {uri!r}" for dtype, uri in dtypes.items())
            raise ValueError(
                f"layer {name!r} must have one type in all queries, but has {listed}; make one snapshot each."
            )
        [dtype] = dtypes
        if dtype not in DTYPES:
            raise ValueError(
                f"layer {name!r} must have a type among {', '.join(DTYPES)}, not {dtype}; convert it."
            )
        return dtype

    def _measure(self) -> dict[str, float]:
        """Return the approximate size of a row of each layer and of each array of `obsm`."""
        segment = max(self._segments, key=lambda segment: len(segment.ids.obs_joinids))
        found = {name: segment.bytes_per_row(name, self._budget) for name in self._content.layer_names}
        for name in self._content.obsm_names:
            array = segment.array(name)
            found[f"obsm {name}"] = float(array.n_cols * array.dtype.itemsize)
        return found

    def _cut(self) -> list[int]:
        """Return the borders of shards, which have whole tiles, unless a tile is too large for the budget."""
        first_layer = self._content.layer_names[0]
        bytes_per_row = self._bytes_per_row[first_layer]
        sizes = self._shards
        size = max(bytes_per_row * self._content.n_obs / sizes.min_number, sizes.min_bytes)
        borders = [0]
        for segment, stored in zip(self._segments, self._stored[first_layer], strict=True):
            tile = stored.row_tile
            n_bytes = min(max(min(size, sizes.max_bytes), tile * bytes_per_row), self._budget.windows / 4)
            found = _shard_borders(segment.ids.obs_joinids // tile, max(1, int(n_bytes / bytes_per_row)))
            first = borders[-1]
            borders += [first + border for border in found]
        return borders

    def _needed(self) -> int:
        """Return the approximate number of bytes that are still to be written."""
        per_row = 8 + 16 * len(self._content.obs_column_names) + sum(self._bytes_per_row.values())
        done = sum(file.lstat().st_size for file in self._folder.glob("*"))
        return max(0, int(1.05 * per_row * self._content.n_obs) + 2**20 - done)

    # Writing ----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        (self._folder / MANIFEST).unlink(missing_ok=True)
        n_done = sum(shards[-1].row_stop for shards in self._finished.values() if shards)
        n_rows = self._content.n_obs * len(self._content.layer_names)
        with self._progress.of(n_rows, n_done), Fsyncs() as fsyncs, ThreadPoolExecutor(1) as pool:
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

    def _write_frames(self) -> dict[str, File]:
        with self._reading():
            frames = read_frames(self._segments, self._content.obs_column_names)
        return write_frames(self._folder, frames)

    def _write_layer(self, name: str, fsyncs: Fsyncs) -> Layer:
        shards, dtype = self._finished[name], self._dtype_of(name)
        borders = list(pairwise(self._borders))[len(shards) :]
        writer = ShardWriter(self._folder, np.dtype(dtype), self._compression)
        with closing(self._read(name, borders)) as read, EagerIterator(read) as ahead:
            for (start, stop), rows in zip(borders, ahead, strict=True):
                written = writer.write(shard_name(self._content, name, len(shards)), rows)
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

    def _read(self, name: str, borders: Sequence[tuple[int, int]]) -> Generator[ShardRows, None, None]:
        """Yield the rows of each shard; a shard has rows of one segment only."""
        first = 0
        for segment in self._segments:
            end = first + len(segment.ids.obs_joinids)
            mine = [(start - first, stop - first) for start, stop in borders if first <= start < end]
            if mine:
                n_rows = max(stop - start for start, stop in mine)
                n_pieces = ceil(n_rows * self._bytes_per_row[name] / PIECE_BYTES)
                with self._reading():
                    yield from segment.shards(name, mine, n_pieces=n_pieces, budget=self._budget)
            first = end

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Remember an error of reading a segment, because it says nothing about the disk of the snapshot."""
        try:
            yield
        except OSError as err:
            self._failed_read = err
            raise

    def _write_obsm(self, number: int, name: str) -> Embedding:
        arrays = {segment.array(name) for segment in self._segments}
        if len(arrays) > 1:
            listed = ", ".join(f"{array.n_cols} columns of {array.dtype}" for array in arrays)
            raise ValueError(f"obsm={name!r} must be alike in all queries, not {listed}; leave it out.")
        with HashedFile(self._folder / f"obsm{number}") as file:
            for segment in self._segments:
                for rows in segment.array_rows(name):
                    file.write(rows)
        [array] = arrays
        return Embedding(name=name, dtype=array.dtype.str, n_cols=array.n_cols, values=file.written)


def _shard_borders(tiles: NDArray[np.int64], n_rows: int) -> list[int]:
    """Return the ends of shards of about `n_rows` rows: between tiles, or within a tile that is larger."""
    starts = np.append(np.flatnonzero(np.diff(tiles, prepend=tiles[:1])), len(tiles))
    borders = [0]
    while borders[-1] < len(tiles):
        start = borders[-1]
        fits = starts[(starts > start) & (starts <= start + n_rows)]
        borders.append(int(fits[-1]) if len(fits) else min(start + n_rows, len(tiles)))
    return borders[1:]
