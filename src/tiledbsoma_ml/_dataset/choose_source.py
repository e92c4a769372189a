"""`choose_source`: which of its arguments a dataset reads from: a query, an address, a source, or a snapshot.

A new source changes nothing here: it comes in the argument `source`.
"""

from __future__ import annotations

import logging
import os

import numpy as np
import tiledbsoma as soma

from tiledbsoma_ml._common import check_obs_column_names
from tiledbsoma_ml._query_ids import QueryIDs, check_query, check_whole
from tiledbsoma_ml._soma.source import SOMASource
from tiledbsoma_ml._source import Fields, Source
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.segments import check_members
from tiledbsoma_ml.snapshot.source import SnapshotSource
from tiledbsoma_ml.x_locator import XLocator

logger = logging.getLogger("tiledbsoma_ml")


def choose_source(
    query: soma.ExperimentAxisQuery | None,
    layer_name: str | None,
    x_locator: XLocator | None,
    query_ids: QueryIDs | None,
    source: Source | None,
    snapshot: Snapshot | str | os.PathLike[str] | bool | None,
    *,
    fields: Fields,
    memory_bytes: int,
) -> tuple[Source, QueryIDs]:
    """Return what a dataset reads, and which rows and columns of it.

    Raises:
        ValueError: If no source is given, or more than one, or it lacks the rows, columns or fields.
        TypeError: If something has the wrong type.
    """
    of = _said(query, layer_name, x_locator, query_ids, source, fields, may_be_none=snapshot is not None)
    ids = query_ids if of is None or query_ids is not None else of.query_ids
    if snapshot is not None:
        of = SnapshotSource(
            snapshot, of=of, ids=ids, fields=fields, layer_name=layer_name, memory_bytes=memory_bytes
        )
    assert of is not None
    return of, of.query_ids if ids is None else ids


def check_snapshot(snapshot: object) -> Snapshot | str | os.PathLike[str] | bool | None:
    """Return a snapshot or its path, True for a folder of its own, or None where there is to be none."""
    if snapshot is None or isinstance(snapshot, Snapshot | str | os.PathLike):
        return snapshot
    if not isinstance(snapshot, bool | np.bool_):
        raise TypeError(
            f"snapshot={snapshot!r} must be a Snapshot, a path, True or False; try snapshot=True."
        )
    return True if snapshot else None


def _said(
    query: soma.ExperimentAxisQuery | None,
    layer_name: str | None,
    x_locator: XLocator | None,
    query_ids: QueryIDs | None,
    source: Source | None,
    fields: Fields,
    *,
    may_be_none: bool,
) -> Source | None:
    """Return the source that the arguments describe; None if they describe none, and a snapshot is given."""
    if query_ids is not None:
        check_whole(query_ids)
    said = {"query": query, "layer_name": layer_name, "x_locator": x_locator, "source": source}
    given = [name for name, value in {**said, "query_ids": query_ids}.items() if value is not None]
    if query is not None and set(given) <= {"query", "layer_name"}:
        return _of_query(query, layer_name, fields)
    found: Source | None = None
    if x_locator is not None and query_ids is not None and set(given) == {"x_locator", "query_ids"}:
        found = SOMASource(x_locator, query_ids)
    elif source is not None and set(given) <= {"source", "query_ids"}:
        found = source
    elif not may_be_none or not set(given) <= {"layer_name", "query_ids"}:
        raise ValueError(
            "either query (and layer_name), or both x_locator and query_ids, or source must be given, "
            f"not {', '.join(given) or 'none of them'}; try ExperimentDataset(query, layer_name='raw')."
        )
    if found is not None:
        check_members(found)
        found.check(query_ids or found.query_ids, fields)
    return found


def _of_query(query: soma.ExperimentAxisQuery, layer_name: str | None, fields: Fields) -> Source:
    check_query(query)
    locator = XLocator.create(query.experiment, query.measurement_name, layer_name)
    check_obs_column_names(fields.obs_column_names, query.experiment.obs.keys())
    ids = QueryIDs.create(query)
    if not len(ids.obs_joinids):
        logger.warning("the query selects no cells, so that there is no mini-batch; loosen its filters")
    source = SOMASource(locator, ids)
    source.expect(fields)
    return source
