"""`SnapshotSource`: a query that is read from a snapshot, which is made when it is first needed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pandas as pd

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayJoinId, absolute_path, cache_folder, check_name
from tiledbsoma_ml._order.sizes import ENOUGH_ROWS, Layout
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._source import Fields, RowsAndColumns, Source
from tiledbsoma_ml.snapshot.build import describe
from tiledbsoma_ml.snapshot.parts import part_of
from tiledbsoma_ml.snapshot.reader import SnapshotReader
from tiledbsoma_ml.snapshot.snapshot import Snapshot

CHUNK_ROWS = 64
"""Neighbouring rows that stay together where memory does not hold a snapshot, and a size is "auto".

A disk reads them at twice the speed of single ones.
"""

POOL_SHARE = 16
"""A reader keeps memory of rows that nobody holds any longer: this part of the budget."""


class SnapshotSource(Source):
    """The rows of a query, read from a snapshot.

    Args:
        snapshot: The snapshot, or where it is or is to be; True for a place in the user's cache directory.
        of: What the snapshot is made of; None if it is there and nothing was said of where it comes from.
        ids: What is queried; all that the snapshot holds if None.
        fields: What of each row is wanted beside `X`.
        layer_name: Layer of `X`, where what it is made of does not say it; the first of the snapshot if None.
        memory_bytes: Budget of memory for making it.

    Attributes:
        path: The folder of the snapshot.

    Raises:
        ValueError: If it is there and does not hold the query.
    """

    def __init__(
        self,
        snapshot: Snapshot | str | os.PathLike[str] | bool,
        *,
        of: Source | None,
        ids: QueryIDs | None,
        fields: Fields,
        layer_name: str | None,
        memory_bytes: int,
    ) -> None:
        self._of = of
        self._content: Mapping[str, str] | None = None
        self.locator = None if of is None else of.locator
        self._fields = fields
        self._layer_name = layer_name if self.locator is None else self.locator.layer_name
        self._memory_bytes = memory_bytes
        self._nullable: frozenset[str] | None = None
        self._asked = ids
        self._snapshot = snapshot if isinstance(snapshot, Snapshot) else None
        self.path = snapshot.path if isinstance(snapshot, Snapshot) else self._place(snapshot)
        if self._snapshot is not None:
            self._check(self._snapshot)
        elif of is None or self.path.exists():
            self.prepare()
        self.query_ids = self._asked or self.snapshot.query_ids

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot, which is made if it is not there.

        Raises:
            ValueError: If another one is there, also if it came there just now.
        """
        if self._snapshot is None:
            if self._of is None or self.path.exists():
                found = Snapshot.open(self.path)
                self._check(found)
                self._snapshot = found
            else:
                assert self._asked is not None
                self._snapshot = Snapshot.create_from(
                    self.path,
                    [(self._of, self._asked)],
                    obs_column_names=self._fields.obs_column_names,
                    memory_budget=self._memory_bytes,
                )
        return self._snapshot

    def prepare(self) -> None:
        """Make the snapshot if it is not there."""
        _ = self.snapshot

    @property
    def content(self) -> Mapping[str, str]:
        """That of what it is made of; the fingerprint of the snapshot if that is not known."""
        if self._content is None:
            self._content = {"snapshot": self.snapshot.fingerprint} if self._of is None else self._of.content
        return self._content

    def obs(self, obs_joinids: NDArrayJoinId, column_names: Sequence[str]) -> pd.DataFrame:
        """Return columns of `obs` of some rows, in that order, with a fresh index."""
        known = () if self._snapshot is None else ("soma_joinid", *self._snapshot.obs_column_names)
        if self._of is not None and not set(column_names) <= set(known):
            return self._of.obs(obs_joinids, column_names)
        nullable = self.snapshot.reader(self.query_ids.obs_joinids, None, column_names).nullable
        return self.snapshot.reader(None, None, column_names, nullable=nullable).obs(obs_joinids)

    def var(self, var_joinids: NDArrayJoinId, column_names: Sequence[str] | None = None) -> pd.DataFrame:
        """Return columns of `var`, all if None, of some columns of `X`, in that order, with a fresh index."""
        if self._of is not None:
            return self._of.var(var_joinids, column_names)
        frame = self.snapshot.var
        names = [str(name) for name in frame] if column_names is None else list(column_names)
        for name in names:
            check_name(
                "column_names", name, [str(key) for key in frame], of="a column of var in the snapshot"
            )
        return frame.set_index("soma_joinid", drop=False).loc[var_joinids, names].reset_index(drop=True)

    def check(self, ids: QueryIDs, fields: Fields) -> None:
        """Raise a ValueError or TypeError unless there are such rows, columns and fields."""
        for name in fields.obs_column_names:
            known = ["soma_joinid", *self._fields.obs_column_names]
            check_name("obs_column_names", name, known, of="a column of obs that the snapshot was asked for")
        if self._of is not None:
            self._of.check(ids, fields)

    def of_rows(self, ids: QueryIDs) -> Source:
        """Return the same with these rows alone; this one where the snapshot is still to be made of all."""
        if self._snapshot is None:
            return self
        source = copy.copy(self)
        source.query_ids = ids
        return source

    def layout(self, ids: QueryIDs, budget: Budget) -> Layout:
        """Return how the rows are stored: each can be read by itself, unless memory does not hold all."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        n_bytes = self.snapshot.nbytes
        row_tile = 1 if n_bytes < memory / 2 else CHUNK_ROWS
        return Layout(row_tile, n_bytes / max(1, len(self.snapshot)), ENOUGH_ROWS)

    def open(self, ids: RowsAndColumns, fields: Fields, budget: Budget) -> SnapshotReader:
        """Return what reads rows; it is closed after an epoch."""
        return self.snapshot.reader(
            var_joinids=ids.var_joinids,
            obs_column_names=fields.obs_column_names,
            layer_name=self._layer_name,
            nullable=self._obs_nullable(),
            kept_bytes=budget.total // POOL_SHARE,
        )

    def _place(self, snapshot: str | os.PathLike[str] | bool) -> Path:
        if not isinstance(snapshot, bool):
            return absolute_path(snapshot)
        if self._of is None or self._asked is None:
            raise ValueError("snapshot=True needs a query to make it of; name the folder of a snapshot.")
        content = describe(
            [part_of(self._of, self._asked)],
            obs_column_names=self._fields.obs_column_names,
            layers=(),
            obsm=(),
        )
        return cache_folder() / f"{content.fingerprint}.snapshot"

    def _check(self, snapshot: Snapshot) -> None:
        """Raise a ValueError unless a snapshot holds the query; keep what is found out meanwhile."""
        names = self._fields.obs_column_names
        if self._of is not None:
            snapshot.check_holds(self._of, names)
        ids = self._asked or snapshot.query_ids
        found = snapshot.reader(ids.obs_joinids, ids.var_joinids, names, layer_name=self._layer_name)
        self._nullable = found.nullable

    def _obs_nullable(self) -> frozenset[str]:
        """Return which columns of `obs` are nullable: decided once for the query, as by `ObsTypes`."""
        if self._nullable is None:
            rows = self.query_ids.obs_joinids
            self._nullable = self.snapshot.reader(rows, None, self._fields.obs_column_names).nullable
        return self._nullable

    def __getstate__(self) -> dict[str, Any]:
        if self._snapshot is None:
            return self.__dict__
        kept: dict[str, Any] = {"_nullable": self._obs_nullable(), "_asked": None}
        if self.locator is None:  # what is large, perhaps, goes nowhere
            return self.__dict__ | kept | {"_of": None, "_content": self.content}
        assert self._of is not None
        no_rows = attrs.evolve(self.query_ids, obs_joinids=self.query_ids.obs_joinids[:0])
        return self.__dict__ | kept | {"_of": self._of.of_rows(no_rows)}
