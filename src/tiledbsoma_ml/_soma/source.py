"""`SOMASource`: a query on an experiment, read within a budget of memory wherever it is stored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property

import attrs
import pandas as pd

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayJoinId, check_name
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import QueryIDs, check_among
from tiledbsoma_ml._soma.blocks import Extents, Pages
from tiledbsoma_ml._soma.obs import ObsColumns, ObsTypes
from tiledbsoma_ml._soma.reader import SOMAReader, check_obs_column_names, measure_row_bytes, row_tile
from tiledbsoma_ml._soma.versions import written_at
from tiledbsoma_ml._soma.window import Room, preload_kernels
from tiledbsoma_ml._source import Fields, RowsAndColumns, Source
from tiledbsoma_ml.x_locator import XLocator


class SOMASource(Source):
    """The rows of a query on an experiment.

    Args:
        locator: Address of the layer of `X`.
        ids: Rows and columns.
        make_room: What makes the room of an iterator, from its size in bytes.

    Attributes:
        locator: Address of the layer of `X`.
    """

    def __init__(
        self, locator: XLocator, ids: QueryIDs, *, make_room: Callable[[float], Room] = Room
    ) -> None:
        self.locator: XLocator = locator
        self.query_ids = ids
        self._make_room = make_room
        self._types: dict[tuple[str, ...], ObsTypes] = {}
        preload_kernels()

    @property
    def content(self) -> Mapping[str, str]:
        """The measurement, the layer, and a digest of what was written to each array, where that is known."""
        locator = self.locator
        written = written_at(locator, [locator.layer_name])
        versions = {f"content of {array}": found for array, found in written.versions.items()}
        named = {"measurement": locator.measurement_name, "layer": locator.layer_name}
        return named | (versions or {"uri": written.uri})

    def check(self, ids: QueryIDs, fields: Fields) -> None:
        """Raise a ValueError or TypeError unless there are such rows, columns and fields."""
        check_among("obs_joinids", ids.obs_joinids, self.query_ids.obs_joinids)
        check_among("var_joinids", ids.var_joinids, self.query_ids.var_joinids)
        with self.locator.open() as (_, obs):
            check_obs_column_names(fields.obs_column_names, obs)
        self.expect(fields)

    def expect(self, fields: Fields) -> None:
        """Let copies of this, and forks, share the types of these columns: those in the whole query."""
        names = fields.obs_column_names
        if names not in self._types:
            self._types[names] = ObsTypes(self.locator, names, self.query_ids.obs_joinids)

    def obs(self, obs_joinids: NDArrayJoinId, column_names: Sequence[str]) -> pd.DataFrame:
        """Return columns of `obs` of some rows, in that order, with a fresh index."""
        with self.locator.open() as (_, obs):
            check_obs_column_names(column_names, obs)
            types = ObsTypes(self.locator, column_names, self.query_ids.obs_joinids)
            return ObsColumns.read(obs, column_names, obs_joinids, types).take(obs_joinids)

    def var(self, var_joinids: NDArrayJoinId, column_names: Sequence[str] | None = None) -> pd.DataFrame:
        """Return columns of `var`, all if None, of some columns of `X`, in that order, with a fresh index."""
        with self.locator.open_experiment() as experiment:
            var = experiment.ms[self.locator.measurement_name].var
            names = var.keys() if column_names is None else column_names
            for name in names:
                check_name("column_names", name, var.keys(), of="a column of var")
            return ObsColumns.read(var, names, var_joinids).take(var_joinids)

    def of_rows(self, ids: QueryIDs) -> SOMASource:
        """Return the same with these rows alone; types of columns stay those of the whole query."""
        source = copy.copy(self)
        source.query_ids = ids
        return source

    @cached_property
    def row_tile(self) -> int:
        """Neighbouring rows that are decoded together."""
        with self.locator.open() as (X, _):
            return row_tile(X)

    def layout(self, ids: QueryIDs, budget: Budget) -> Layout:
        """Return how the rows are stored, from a sample of them, and how many a window may hold."""
        preload_kernels()
        budget = self._budget(budget)
        with self.locator.open(budget) as (X, obs):
            rows, names = ids.obs_joinids, ["soma_joinid"]
            reader = SOMAReader(X, obs, ids.var_joinids, obs_column_names=names, obs_joinids=rows)
            bytes_per_row = measure_row_bytes(reader, rows)
            tile = row_tile(X)
        return Layout(tile, bytes_per_row, int(budget.share_of_windows().planned_bytes / bytes_per_row))

    def open(self, ids: RowsAndColumns, fields: Fields, budget: Budget) -> SOMAReader:
        """Return what reads rows; it is closed after an epoch."""
        preload_kernels()
        budget = self._budget(budget)
        windows, folder = budget.share_of_windows(), budget.window_dir
        self.expect(fields)
        with ExitStack() as stack:
            X, obs = stack.enter_context(self.locator.open(budget))
            opened = ExitStack()
            reader = SOMAReader(
                X,
                obs,
                ids.var_joinids,
                obs_column_names=fields.obs_column_names,
                obs_joinids=ids.obs_joinids,
                obs_types=self._types[fields.obs_column_names],
                n_parts=windows.n_parts,
                use_eager_fetch=budget.use_eager_fetch,
                room=self._make_room(windows.n_bytes),
                store=Pages() if folder is None else Extents(folder, windows.extent_bytes),
                opened=opened,
            )
            opened.push(stack.pop_all())
            return reader

    def _budget(self, budget: Budget) -> Budget:
        return attrs.evolve(budget, is_remote=self.locator.is_remote)
