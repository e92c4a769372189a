"""How an epoch is read from a snapshot, which is made when it is first needed."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from tiledbsoma_ml._common import MiniBatch, NDArrayJoinId, NDArrayNumber, absolute_path, cache_folder
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._eager_iter import EagerMap
from tiledbsoma_ml._order.plan import EpochPart, PartPlan, Plan
from tiledbsoma_ml._order.quality import ShuffleQuality, evenly_spaced, measure_quality
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._read_ahead import read_ahead
from tiledbsoma_ml._rebatch import rebatch_joinids
from tiledbsoma_ml._rows import Padding, Rows
from tiledbsoma_ml._snapshot_build import SourceRows, describe
from tiledbsoma_ml._snapshot_reader import SnapshotReader
from tiledbsoma_ml._window import Room
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.x_locator import XLocator

AUTO_IO_BATCH_SIZE = 65_536
"""Rows shuffled among each other, under "auto", where a snapshot is larger than memory."""

AUTO_CHUNK_SIZE = 64
"""Neighbouring rows that stay together there: a disk reads them at twice the speed of single ones."""

MAX_THREADS = 4
"""Mini-batches are made by at most so many threads, each by one. In a worker, torch has one."""


class SnapshotReading:
    """Reads rows of a query from a snapshot.

    Args:
        plan: In which order.
        snapshot: The snapshot, or where it is or is to be; True for a place in the user's cache directory.
        locator: Address of the layer that is queried; None if there is no query.
        ids: What is queried; None for all that the snapshot holds.
        layer_name: Layer of `X` where there is no query.
        obs_column_names: Columns of `obs`.
        memory_bytes: Budget of memory for making it.

    Raises:
        ValueError: If it is there and does not hold the query.
    """

    def __init__(
        self,
        plan: Plan,
        snapshot: Snapshot | str | os.PathLike[str] | bool,
        *,
        locator: XLocator | None,
        ids: QueryIDs | None,
        layer_name: str | None,
        obs_column_names: Sequence[str],
        memory_bytes: int,
    ) -> None:
        self._plan = plan
        self._locator = locator
        self._layer_name = layer_name if locator is None else locator.layer_name
        self._obs_column_names = obs_column_names
        self._memory_bytes = memory_bytes
        self._ids = ids
        self._nullable: frozenset[str] | None = None
        self._to_make = None if locator is None or ids is None else (locator, ids)
        self._snapshot = snapshot if isinstance(snapshot, Snapshot) else None
        self.path = snapshot.path if isinstance(snapshot, Snapshot) else self._place(snapshot)
        if self._snapshot is not None:
            self._check(self._snapshot)
        elif self._to_make is None or self.path.exists():
            self.prepare()

    def prepare(self) -> Snapshot:
        """Return the snapshot, having made it if it is not there.

        Raises:
            ValueError: If another one is there, also if it came there just now.
        """
        if self._snapshot is None:
            if self._to_make is None or self.path.exists():
                found = Snapshot.open(self.path)
                self._check(found)
                self._snapshot = found
            else:
                self._snapshot = Snapshot.create_from(
                    self.path,
                    [self._to_make],
                    obs_column_names=self._obs_column_names,
                    memory_budget=self._memory_bytes,
                )
        return self._snapshot

    def mini_batches(
        self,
        planned: PartPlan,
        *,
        return_sparse_X: bool,
        padding: Padding,
        use_eager_fetch: bool,
    ) -> Generator[MiniBatch, None, None]:
        """Yield the mini-batches of a part of an epoch, straight from the files."""
        plan = planned.plan
        n_threads = min(torch.get_num_threads(), MAX_THREADS) if use_eager_fetch else 0
        reader = self._reader(planned.ids)
        reader.keep_memory_of((n_threads + 3) * plan.batch_size, is_sparse=return_sparse_X)

        def to_obs(ids: NDArrayJoinId) -> pd.DataFrame:
            return padding.mark(reader.obs(ids), ids)

        def with_room(ids: NDArrayJoinId) -> tuple[NDArrayJoinId, NDArrayNumber | None]:
            shape = len(ids), reader.n_cols
            return ids, None if return_sparse_X else reader.pool.empty(shape, reader.dtype)

        def make(rows: tuple[NDArrayJoinId, NDArrayNumber | None]) -> MiniBatch:
            ids, X = rows
            if X is None:
                return reader.csr(ids), to_obs(ids)
            reader.fill_dense(ids, X)
            return X[0] if plan.batch_size == 1 else X, to_obs(ids)

        rooms = map(with_room, rebatch_joinids(planned.batches(), plan.batch_size))
        with EagerMap(make, rooms, n_threads) if n_threads else nullcontext(map(make, rooms)) as made:
            yield from made

    def room(self) -> Room:
        """Return the room of an epoch: no rows wait here."""
        return Room(math.inf)

    def rows(
        self, planned: PartPlan, *, use_eager_fetch: bool, room: Room
    ) -> Generator[Rows[CSR_IO_Buffer], None, None]:
        """Yield the rows of a part of an epoch as whole IO batches, for a device."""
        reader = self._reader(planned.ids)
        assert isinstance(planned.plan.io_batch_size, int)
        reader.keep_memory_of(2 * planned.plan.io_batch_size, is_sparse=True)
        return read_ahead(planned.batches(), _Whole(reader), use_eager_fetch=use_eager_fetch, room=room)

    def quality(self, part: EpochPart, column: str, n_batches: int) -> ShuffleQuality:
        """Return how well the rows of an epoch are mixed; every row counts as a tile of its own."""
        plan = self.plan
        planned = attrs.evolve(plan, permutes=plan.shuffle_chunk_size is not None).of(part)
        joinids = planned.joinids()
        rows = np.unique(joinids)
        reader = self.prepare().reader(rows, part.ids.var_joinids, [column])
        labels = reader.obs(rows)[column]
        codes = pa.array(labels).dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
        chosen = evenly_spaced(planned.batches(), plan.batch_size, len(joinids), n_batches)
        return measure_quality(chosen, rows, codes.astype(np.int64), row_tile=1)

    @property
    def order_key(self) -> list[object]:
        """What the order of rows depends on beside what the user gave: what "auto" stands for."""
        if "auto" not in (self._plan.io_batch_size, self._plan.shuffle_chunk_size):
            return []
        return ["snapshot", self.plan.shuffle_chunk_size, self.plan.io_batch_size]

    @property
    def plan(self) -> Plan:
        """In which order rows are read; "auto" is a true shuffle where memory holds the snapshot."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        plan = self._plan
        if plan.shuffle_chunk_size == "auto":
            fits = self.prepare().nbytes < memory / 2
            plan = attrs.evolve(plan, shuffle_chunk_size=1 if fits else AUTO_CHUNK_SIZE)
        return attrs.evolve(plan, io_batch_size=AUTO_IO_BATCH_SIZE) if plan.io_batch_size == "auto" else plan

    def _place(self, snapshot: str | os.PathLike[str] | bool) -> Path:
        if not isinstance(snapshot, bool):
            return absolute_path(snapshot)
        if self._to_make is None:
            raise ValueError("snapshot=True needs a query to make it of; name the folder of a snapshot.")
        locator, ids = self._to_make
        content = describe(
            [SourceRows.of(locator, ids)], obs_column_names=self._obs_column_names, layers=(), obsm=()
        )
        return cache_folder() / f"{content.fingerprint}.snapshot"

    def _check(self, snapshot: Snapshot) -> None:
        """Raise a ValueError unless a snapshot holds the query; keep what is found out meanwhile."""
        if self._locator is not None:
            snapshot.check_holds(self._locator, self._obs_column_names)
        ids = snapshot.query_ids if self._ids is None else self._ids
        names, layer_name = self._obs_column_names, self._layer_name
        found = snapshot.reader(ids.obs_joinids, ids.var_joinids, names, layer_name=layer_name)
        self._nullable = found.nullable

    def _reader(self, ids: QueryIDs) -> SnapshotReader:
        return self.prepare().reader(
            var_joinids=ids.var_joinids,
            obs_column_names=self._obs_column_names,
            layer_name=self._layer_name,
            nullable=self._obs_nullable(),
        )

    def _obs_nullable(self) -> frozenset[str]:
        """Return which columns of `obs` are nullable: decided once for the query, as by `ObsTypes`."""
        if self._nullable is None:
            ids = self.prepare().query_ids if self._ids is None else self._ids
            self._nullable = self.prepare().reader(ids.obs_joinids, None, self._obs_column_names).nullable
        return self._nullable

    def __getstate__(self) -> dict[str, Any]:
        if self._snapshot is None:
            return self.__dict__
        return self.__dict__ | {"_to_make": None, "_ids": None, "_nullable": self._obs_nullable()}


class _Whole:
    """A Reader that gives out what it reads in one piece."""

    def __init__(self, reader: SnapshotReader) -> None:
        self._reader = reader

    def read(self, obs_joinids: NDArrayJoinId) -> Iterator[Rows[CSR_IO_Buffer]]:
        return iter([self._reader.rows(obs_joinids)])
