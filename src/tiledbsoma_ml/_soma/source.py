"""`SOMASource`: the rows of a query on an experiment, local or remote, read within a budget of memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property

import attrs
import pandas as pd

from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayJoinId, check_names, check_obs_column_names
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import QueryIDs, check_among
from tiledbsoma_ml._soma.held_rows import ByteLimit, preload_kernels
from tiledbsoma_ml._soma.obs import ObsColumns, ObsTypes
from tiledbsoma_ml._soma.reader import SOMAReader, measure_row_bytes, row_tile
from tiledbsoma_ml._soma.stores import Extents, Pages
from tiledbsoma_ml._soma.versions import written_at
from tiledbsoma_ml._source import Fields, RowsAndColumns, Source
from tiledbsoma_ml.x_locator import XLocator


class SOMASource(Source):
    """The rows of a query on an experiment.

    Args:
        locator: Address of the layer of `X`.
        ids: Joinids of the rows and columns.
        make_limit: Makes the limit of an iterator from its number of bytes.

    Attributes:
        locator: Address of the layer of `X`.
    """

    def __init__(
        self, locator: XLocator, ids: QueryIDs, *, make_limit: Callable[[float], ByteLimit] = ByteLimit
    ) -> None:
        self.locator: XLocator = locator
        self.query_ids = ids
        self._make_limit = make_limit
        self._types: dict[tuple[str, ...], ObsTypes] = {}
        self._pages: dict[int, Pages] = {}  # kept from epoch to epoch, by the size of a page
        self._pools: dict[int, Pool] = {}  # kept likewise, by their size
        preload_kernels()

    @property
    def content(self) -> Mapping[str, str]:
        """The measurement, the layer, and a digest of the writes to each array that TileDB can list."""
        locator = self.locator
        written = written_at(locator, [locator.layer_name])
        versions = {f"content of {array}": found for array, found in written.versions.items()}
        named = {"measurement": locator.measurement_name, "layer": locator.layer_name}
        return named | (versions or {"uri": written.uri})

    def check(self, ids: QueryIDs, fields: Fields) -> None:
        """Raise a ValueError or TypeError unless these rows, columns and fields exist."""
        check_among("obs_joinids", ids.obs_joinids, self.query_ids.obs_joinids)
        check_among("var_joinids", ids.var_joinids, self.query_ids.var_joinids)
        with self.locator.open() as (_, obs):
            check_obs_column_names(fields.obs_column_names, obs.keys())
        self.expect(fields)

    def expect(self, fields: Fields) -> None:
        """Prepare the types of these columns of `obs`, so that copies of this and forks share them."""
        names = fields.obs_column_names
        if names not in self._types:
            self._types[names] = ObsTypes(self.locator, names, self.query_ids.obs_joinids)

    def obs(self, obs_joinids: NDArrayJoinId, column_names: Sequence[str]) -> pd.DataFrame:
        """Return columns of `obs` for these rows, in this order, with a fresh index."""
        with self.locator.open() as (_, obs):
            check_obs_column_names(column_names, obs.keys())
            types = ObsTypes(self.locator, column_names, self.query_ids.obs_joinids)
            return ObsColumns.read(obs, column_names, obs_joinids, types).take(obs_joinids)

    def var(self, var_joinids: NDArrayJoinId, column_names: Sequence[str] | None = None) -> pd.DataFrame:
        """Return columns of `var` (all if None) for these columns of `X`, in order, with a fresh index."""
        with self.locator.open_experiment() as experiment:
            var = experiment.ms[self.locator.measurement_name].var
            given = list(var.keys()) if column_names is None else column_names
            names = check_names("column_names", given, var.keys(), of="a column of var")
            return ObsColumns.read(var, names, var_joinids).take(var_joinids)

    def of_rows(self, ids: QueryIDs) -> SOMASource:
        """Return a source of these rows only; columns of `obs` keep the types that they have in the query."""
        source = copy.copy(self)
        source.query_ids = ids
        return source

    @cached_property
    def row_tile(self) -> int:
        """Number of neighbouring rows that are decoded together."""
        with self.locator.open() as (X, _):
            return row_tile(X)

    def layout(self, ids: QueryIDs, budget: Budget) -> Layout:
        """Return how the rows are stored; the size of a row is measured on a sample."""
        preload_kernels()
        budget = self._budget(budget)
        with self.locator.open(budget) as (X, obs):
            rows, names = ids.obs_joinids, ["soma_joinid"]
            reader = SOMAReader(X, obs, ids.var_joinids, obs_column_names=names, obs_joinids=rows)
            bytes_per_row = measure_row_bytes(reader, rows)
            tile = row_tile(X)
        return Layout(tile, bytes_per_row, int(budget.share_of_windows().planned_bytes / bytes_per_row))

    def open(self, ids: RowsAndColumns, fields: Fields, budget: Budget) -> SOMAReader:
        """Return a reader, which the caller closes after an epoch."""
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
                n_pieces=windows.n_pieces,
                use_eager_fetch=budget.use_eager_fetch,
                n_streams=n_streams(self.locator.latency(), budget) if budget.streams > 1 else 1,
                byte_limit=self._make_limit(windows.n_bytes),
                read_bytes=windows.planned_bytes,
                store=Extents(folder, windows.extent_bytes) if folder else self._store(windows.page_bytes),
                pool=self._pools.setdefault(windows.given_out_bytes, Pool(windows.given_out_bytes)),
                opened=opened,
            )
            opened.push(stack.pop_all())
            return reader

    def _store(self, page_bytes: int) -> Pages:
        """Return the store that all sources of this process share; it lasts as long as one of them."""
        return self._pages.setdefault(page_bytes, Pages.shared(page_bytes))

    def _budget(self, budget: Budget) -> Budget:
        return attrs.evolve(budget, is_remote=self.locator.is_remote)


SECONDS_PER_VALUE = 20e-9
"""Time in which a value is decoded, about."""


def n_streams(latency: float, budget: Budget) -> int:
    """Return in how many streams rows are fetched, so that as many values come as can be decoded.

    A stream waits for about two requests, one after the other, for each buffer of values.

    Args:
        latency: Seconds that a request takes.
        budget: The memory that reading may take.
    """
    seconds_per_buffer = budget.buffer / 8 * SECONDS_PER_VALUE
    return min(budget.streams, 1 + round(2 * latency / seconds_per_buffer))
