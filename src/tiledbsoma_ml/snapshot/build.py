"""`create`: makes a snapshot of segments, alone or together with other processes that are asked for the same.

The snapshot is made in a folder beside its path, which is renamed at the end.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import TypeAlias

import attrs
import numpy as np

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._soma.held_rows import preload_kernels
from tiledbsoma_ml.snapshot.check import check_content, verify
from tiledbsoma_ml.snapshot.compression import SAMPLE, SAMPLE_BYTES, measure
from tiledbsoma_ml.snapshot.content import Content, warn_of_unknown
from tiledbsoma_ml.snapshot.creation import Progress, check_own_folder, locked
from tiledbsoma_ml.snapshot.disk import check_space, naming_disk
from tiledbsoma_ml.snapshot.files import digest, fsync
from tiledbsoma_ml.snapshot.format import MANIFEST, Manifest, indices_dtype
from tiledbsoma_ml.snapshot.maker import POLL_S, Maker
from tiledbsoma_ml.snapshot.segment import Segment
from tiledbsoma_ml.snapshot.stored_layers import DEFAULT_SHARDS, ShardSizes, StoredLayers
from tiledbsoma_ml.snapshot.takeover import PARTIAL, Partial, take_over
from tiledbsoma_ml.snapshot.tasks import Tasks, makers, remove_tasks

_Begun: TypeAlias = tuple[Tasks, Partial]


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
        compression: Name of the compression of `X`; None to compress nothing, "auto" to choose.

    Raises:
        ValueError: If a name does not exist, segments differ in columns or types, or the path has other data.
        OSError: If the disk cannot be written to, or is too small.
    """
    content = describe(segments, obs_column_names=obs_column_names, layers=layers, obsm=obsm)
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
    """A builder of one snapshot, alone or together with other processes, in a folder beside its path.

    All processes that are asked for the same content at the same time make its tasks together. The first one
    divides it; the last one writes the manifest, and renames the folder. Only these two steps are made under
    the lock beside the path. If all processes were killed, the next one continues in the folder.
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
        self._layers = StoredLayers(segments, content, budget)
        self._needed = 0
        self._has_told = False

    def build(self) -> None:
        while (begun := self._begin()) is not None:
            tasks, partial = begun
            with closing(tasks):
                maker = Maker(
                    self._folder,
                    self._segments,
                    partial,
                    self._layers.dtypes,
                    tasks=tasks,
                    budget=self._budget,
                    progress=self._progress,
                )
                with naming_disk(self._path, self._needed, maker.comes_from_disk):
                    maker.make()
                if self._complete(maker, tasks):
                    return

    # The first step ---------------------------------------------------------------------------------------

    def _begin(self) -> _Begun | None:
        """Begin to make the snapshot, or join the processes that make it; return None if it is there."""
        while True:
            with locked(self._path, self._tell_lock):
                preload_kernels()
                if is_there(self._path, self._content):
                    return None
                is_begun = check_own_folder(self._folder, self._path)
                others = makers(self._path)
                if not (is_begun and others):
                    return self._begin_alone()
                if (begun := self._join(others[0])) is not None:
                    return begun
            time.sleep(POLL_S)

    def _begin_alone(self) -> _Begun | None:
        """Divide the snapshot into tasks, or take them over; return None if it was only to be renamed."""
        if self._is_only_to_be_renamed():
            self._rename()
            return None
        partial = take_over(self._folder, self._content, self._compression)
        sample: list[CSR_IO_Buffer] = []
        if partial is None:
            sizes = self._layers.bytes_per_row()
            borders = self._layers.borders(sizes[self._content.layer_names[0]], self._shards)
            compression = None if self._compression == "auto" else self._compression
            partial = Partial(
                content=self._content, borders=borders, bytes_per_row=sizes, compression=compression
            )
            if self._compression == "auto":
                sample = self._layers.sample(sizes[self._content.layer_names[0]], SAMPLE_BYTES)
        self._check_space(partial)
        with self._naming_disk():
            if not check_own_folder(self._folder, self._path):
                self._folder.mkdir(mode=0o700)
            (self._folder / MANIFEST).unlink(missing_ok=True)
            if sample:
                partial = attrs.evolve(partial, compression=self._choose(sample))
            partial.write(self._folder)
            return Tasks(self._path, self._folder, partial.creation), partial

    def _join(self, maker: str) -> _Begun | None:
        """Join the processes that make the snapshot; return None if this must wait until they have made it.

        Raises:
            ValueError: If they make another one.
        """
        try:
            partial = Partial.read(self._folder)
        except ValueError:  # it was completed, and is to be renamed
            return None
        if differences := partial.content.differences(self._content):
            raise ValueError(
                f"path={str(self._path)!r} must be free or hold this query, but process {maker} makes a "
                f"snapshot of another one there ({'; '.join(differences)}); choose another path."
            )
        if partial.content.fingerprint == self._content.fingerprint and self._content.tells_changes:
            self._check_space(partial)
            with self._naming_disk():
                return Tasks(self._path, self._folder, partial.creation), partial
        if not self._has_told:  # whether their rows are these cannot be told, so none are added to them
            self._progress.say(f"process {maker} makes it; waiting until it is there")
            self._has_told = True
        return None

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

    def _check_space(self, partial: Partial) -> None:
        """Raise an OSError unless the disk has room for what is still to be written."""
        per_row = 8 + 16 * len(self._content.obs_column_names) + sum(partial.bytes_per_row.values())
        done = 0
        for file in self._folder.glob("*"):
            with suppress(FileNotFoundError):  # another process makes it anew
                done += file.lstat().st_size
        self._needed = max(0, int(1.05 * per_row * self._content.n_obs) + 2**20 - done)
        check_space(self._path, self._needed)

    # The last step ----------------------------------------------------------------------------------------

    def _complete(self, maker: Maker, tasks: Tasks) -> bool:
        """Complete the snapshot, all of whose tasks are finished; return False if another process did."""
        with locked(self._path, self._tell_lock):
            if not tasks.goes_on:
                return False
            makers(self._path)  # which forgets those that were killed
            with self._naming_disk():
                manifest = maker.manifest()
                for file in manifest.files:  # a process that was killed did not wait for the disk
                    fsync(self._folder / file.name)
                check_content(self._folder, manifest, maker.checked())
                manifest.write(self._folder)
                self._rename()
        return True

    def _rename(self) -> None:
        """Remove what only the creation needs, open the folder to others, and rename it."""
        (self._folder / PARTIAL).unlink(missing_ok=True)
        shutil.rmtree(self._folder / SAMPLE, ignore_errors=True)  # of a creation that was killed
        remove_tasks(self._folder)
        special = stat.S_IMODE(self._folder.stat().st_mode) & 0o7000
        mode = stat.S_IMODE((self._folder / MANIFEST).stat().st_mode)  # it follows the umask
        with suppress(OSError):  # a file system without modes
            self._folder.chmod(special | mode | (mode & 0o444) >> 2)
        fsync(self._folder)
        self._folder.rename(self._path)
        fsync(self._path.parent)

    # Helpers ----------------------------------------------------------------------------------------------

    def _choose(self, sample: Sequence[CSR_IO_Buffer]) -> str | None:
        """Return the compression with which this disk reads rows like these fastest, and tell it."""
        dtype = self._layers.dtypes[self._content.layer_names[0]]
        choice = measure(self._folder / SAMPLE, sample, dtype, indices_dtype(self._content.n_vars).str)
        self._progress.say(f"compression='auto' takes {choice.compression!r}: {choice.reason}")
        return choice.compression

    def _naming_disk(self) -> AbstractContextManager[None]:
        return naming_disk(self._path, self._needed, lambda _: True)

    def _tell_lock(self, maker: str) -> None:
        self._progress.say(f"process {maker} begins or completes it; waiting for that")
