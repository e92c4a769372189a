"""`Maker`: makes the tasks of a creation that no other process makes, until all of them are finished.

A task is a shard of a layer, the frames, or an array of `obsm`.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain, pairwise
from math import ceil
from pathlib import Path
from typing import TypeAlias

import attrs
import numpy as np

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._eager_iter import EagerIterator
from tiledbsoma_ml._threads import at_work
from tiledbsoma_ml.snapshot.check import check_shard
from tiledbsoma_ml.snapshot.creation import Progress
from tiledbsoma_ml.snapshot.files import Background, File, HashedFile, fsync
from tiledbsoma_ml.snapshot.format import (
    Embedding,
    Layer,
    Manifest,
    embedding_from,
    fields_of,
    indices_dtype,
    shard_from,
)
from tiledbsoma_ml.snapshot.frames import read_frames, write_frames
from tiledbsoma_ml.snapshot.segment import PIECE_BYTES, Segment, ShardRows
from tiledbsoma_ml.snapshot.shard import Shard
from tiledbsoma_ml.snapshot.shards import ShardWriter
from tiledbsoma_ml.snapshot.takeover import Partial, is_right_shard
from tiledbsoma_ml.snapshot.tasks import Record, Tasks

FRAMES = "frames"
"""Name of the task that makes joinids, `obs` and `var`."""

POLL_S = 0.1
"""Time between two looks at what other processes have finished."""


@attrs.frozen(kw_only=True)
class ShardTask:
    """The task to make a shard.

    Attributes:
        name: Name of the task, and of the files of the shard without their endings.
        start: The first row.
        stop: The row after the last one.
    """

    name: str
    start: int
    stop: int


_Read: TypeAlias = tuple[ShardTask, ShardRows]


class Maker:
    """A maker of the tasks of a creation.

    Args:
        folder: The folder in which the snapshot is made.
        segments: The segments of the snapshot.
        partial: The description of the snapshot in the making.
        dtypes: The type of each layer.
        tasks: The tasks, in which other processes may take part.
        budget: The memory that this may use.
        progress: The progress of all processes, which is shown.
    """

    def __init__(
        self,
        folder: Path,
        segments: Sequence[Segment],
        partial: Partial,
        dtypes: dict[str, str],
        *,
        tasks: Tasks,
        budget: Budget,
        progress: Progress,
    ) -> None:
        self._folder = folder
        self._segments = segments
        self._content = partial.content
        self._bytes_per_row = partial.bytes_per_row
        self._compression = partial.compression
        self._dtypes = dtypes
        self._tasks = tasks
        self._budget = budget
        self._progress = progress
        self._shards = {name: shard_tasks(partial, name) for name in partial.content.layer_names}
        self._others = [FRAMES, *map(obsm_name, range(len(partial.content.obsm_names)))]
        self._failed_claim: OSError | None = None
        self._failed_read: OSError | None = None

    def make(self) -> None:
        """Make what no other process makes; return when all is finished, or was even completed.

        If another process ends without finishing a task, this makes it.
        """
        n_rows = self._content.n_obs * len(self._content.layer_names)
        has_told = False
        with (
            self._progress.of(n_rows, self._n_done()),
            Background() as later,
            ThreadPoolExecutor(1) as pool,
        ):
            while True:
                self._make_free_tasks(later, pool)
                self._progress.reach(self._n_done())
                left = self._left()
                if not left:
                    return
                if not has_told:
                    self._progress.say(_others_make_it(self._tasks.makers_of(left)))
                    has_told = True
                time.sleep(POLL_S)

    def comes_from_disk(self, err: OSError) -> bool:
        """Return whether an error of `make` comes from the disk of the snapshot, not from a segment."""
        return err is not self._failed_read

    def manifest(self) -> Manifest:
        """Return the manifest of the snapshot, whose tasks are all finished."""
        frames = self._record(FRAMES)
        columns = indices_dtype(self._content.n_vars).str
        return Manifest(
            created_by=f"tiledbsoma-ml {version('tiledbsoma-ml')}",
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            content=self._content,
            layers=tuple(
                Layer(
                    name=name,
                    dtype=self._dtypes[name],
                    indices_dtype=columns,
                    shards=tuple(shard_from(self._record(task.name)) for task in tasks),
                )
                for name, tasks in self._shards.items()
            ),
            obsm=tuple(
                embedding_from(self._record(obsm_name(number)))
                for number in range(len(self._content.obsm_names))
            ),
            **{name: File(**file) for name, file in frames.items()},
        )

    def checked(self) -> set[Shard]:
        """Return the shards that some process has checked after they were on the disk."""
        names = [task.name for task in chain(*self._shards.values()) if self._tasks.is_checked(task.name)]
        return {shard_from(self._record(name)) for name in names}

    def _record(self, name: str) -> Record:
        record = self._tasks.record(name)
        assert record is not None
        return record

    def _left(self) -> list[str]:
        """Return the names of the tasks that are not finished; none if the snapshot was completed."""
        names = [task.name for task in chain(*self._shards.values())] + self._others
        left = [name for name in names if self._tasks.record(name) is None]
        return left if left and self._tasks.goes_on else []

    def _n_done(self) -> int:
        """Return the number of rows that are done, by all processes and by earlier creations."""
        names = self._tasks.recorded()
        tasks = chain(*self._shards.values())
        return sum(task.stop - task.start for task in tasks if names is None or task.name in names)

    def _make_free_tasks(self, later: Background, pool: ThreadPoolExecutor) -> None:
        """Make all tasks that this process can claim now."""
        frames = pool.submit(at_work()(self._make_frames), later)
        for name in self._content.layer_names:
            self._make_shards(name, frames, later)
        for number, name in enumerate(self._content.obsm_names):
            if self._tasks.claim(obsm_name(number), _of_no_use):
                self._make_obsm(number, name, later)
        frames.result()

    # X ----------------------------------------------------------------------------------------------------

    def _make_shards(self, layer_name: str, frames: Future[None], later: Background) -> None:
        writer = ShardWriter(self._folder, np.dtype(self._dtypes[layer_name]), self._compression)
        with closing(self._read(layer_name)) as read, EagerIterator(read) as ahead:
            for task, rows in ahead:
                written = writer.write(task.name, rows)
                shard = Shard(row_start=task.start, row_stop=task.stop, **written)
                self._finish(task.name, fields_of(shard), later, shard.files, shard)
                self._progress.reach(self._n_done())
                if frames.done():
                    frames.result()  # rather now than at the end, if it failed

    def _read(self, layer_name: str) -> Generator[_Read, None, None]:
        """Yield the shards that this process claims, and their rows; each has rows of one segment only."""
        first, tasks = 0, self._shards[layer_name]
        largest = max((task.stop - task.start for task in tasks), default=0)
        n_pieces = ceil(largest * self._bytes_per_row[layer_name] / PIECE_BYTES)
        for segment in self._segments:
            end = first + len(segment.ids.obs_joinids)
            claimed = self._claimed(layer_name, [task for task in tasks if first <= task.start < end])
            for task in claimed:  # the segment is not opened before a task is claimed
                with self._reading():
                    yield from self._read_segment(
                        segment, layer_name, chain([task], claimed), first, n_pieces
                    )
            first = end

    def _read_segment(
        self, segment: Segment, layer_name: str, claimed: Iterator[ShardTask], first: int, n_pieces: int
    ) -> Generator[_Read, None, None]:
        """Yield the claimed shards of a segment, whose first row is the row `first` of the snapshot."""
        begun: deque[ShardTask] = deque()

        def borders() -> Iterator[tuple[int, int]]:
            for task in claimed:
                begun.append(task)
                yield task.start - first, task.stop - first

        shards = segment.shards(layer_name, borders(), n_pieces=n_pieces, budget=self._budget)
        with closing(shards):
            for rows in shards:
                yield begun.popleft(), rows

    def _claimed(self, layer_name: str, tasks: Sequence[ShardTask]) -> Iterator[ShardTask]:
        """Yield those tasks that this process can claim; each is claimed when it is asked for."""
        n_vars, dtype = self._content.n_vars, self._dtypes[layer_name]
        for task in tasks:

            def is_right(record: Record, task: ShardTask = task) -> bool:
                rows = (task.start, task.stop)
                return is_right_shard(
                    self._folder,
                    record,
                    name=task.name,
                    rows=rows,
                    dtype=dtype,
                    n_vars=n_vars,
                    compression=self._compression,
                )

            try:
                is_claimed = self._tasks.claim(task.name, is_right)
            except OSError as err:
                self._failed_claim = err
                raise
            if is_claimed:
                yield task

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Remember an error of reading a segment."""
        try:
            yield
        except OSError as err:
            if err is not self._failed_claim:
                self._failed_read = err
            raise

    # All else ---------------------------------------------------------------------------------------------

    def _make_frames(self, later: Background) -> None:
        if not self._tasks.claim(FRAMES, _of_no_use):
            return
        with self._reading():
            frames = read_frames(self._segments, self._content.obs_column_names)
        files = write_frames(self._folder, frames)
        record = {name: attrs.asdict(file) for name, file in files.items()}
        self._finish(FRAMES, record, later, files.values())

    def _make_obsm(self, number: int, name: str, later: Background) -> None:
        arrays = {segment.array(name) for segment in self._segments}
        if len(arrays) > 1:
            listed = ", ".join(f"{array.n_cols} columns of {array.dtype}" for array in arrays)
            raise ValueError(f"obsm={name!r} must be alike in all queries, not {listed}; leave it out.")
        with HashedFile(self._folder / obsm_name(number)) as file:
            for segment in self._segments:
                for rows in segment.array_rows(name):
                    file.write(rows)
        [array] = arrays
        made = Embedding(name=name, dtype=array.dtype.str, n_cols=array.n_cols, values=file.written)
        self._finish(obsm_name(number), attrs.asdict(made), later, [made.values])

    def _finish(
        self, name: str, record: Record, later: Background, files: Iterable[File], shard: Shard | None = None
    ) -> None:
        """Record a finished task; later, write its files to the disk, and check them if it is a shard."""
        self._tasks.finish(name, record)
        later.call(functools.partial(self._settle, name, files, shard))

    def _settle(self, name: str, files: Iterable[File], shard: Shard | None) -> None:
        try:
            for file in files:
                fsync(self._folder / file.name)
            if shard is not None:
                n_vars = self._content.n_vars
                check_shard(self._folder, indices_dtype(n_vars).str, shard, n_vars)
                self._tasks.note_checked(name)
        except (OSError, ValueError):
            if self._tasks.goes_on:
                raise
            # Another process did the same, and completed the snapshot: the folder has another name by now.


def shard_tasks(partial: Partial, layer_name: str) -> list[ShardTask]:
    """Return the tasks that make the shards of a layer."""
    layer = partial.content.layer_names.index(layer_name)
    prefix = f"layer{layer}-shard" if layer else "shard"
    return [
        ShardTask(name=f"{prefix}-{number:05}", start=start, stop=stop)
        for number, (start, stop) in enumerate(pairwise(partial.borders))
    ]


def obsm_name(number: int) -> str:
    """Return the name of an array of `obsm`: of its task, and of its file."""
    return f"obsm{number}"


def _of_no_use(_: Record) -> bool:
    """Return that what an earlier creation left of a task is made anew, because that is soon done."""
    return False


def _others_make_it(pids: Sequence[str]) -> str:
    who = f"process {pids[0]} makes" if len(pids) == 1 else f"processes {', '.join(pids)} make"
    return f"{who} what is left; waiting until it is there"
