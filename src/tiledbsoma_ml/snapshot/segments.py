"""The segments of queries or sources that a user gives to `Snapshot.create`, and checks of their origin."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, TypeGuard

import tiledbsoma as soma

from tiledbsoma_ml._common import check_name
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._source import Source
from tiledbsoma_ml.snapshot.content import Content, arrays_of, warn_of_unknown
from tiledbsoma_ml.snapshot.segment import Segment
from tiledbsoma_ml.snapshot.soma_segment import SOMASegment
from tiledbsoma_ml.snapshot.source_segment import LAYER_NAME, SourceSegment
from tiledbsoma_ml.x_locator import XLocator

Query: TypeAlias = soma.ExperimentAxisQuery | Source
"""A query on an experiment, or a source."""

Located: TypeAlias = tuple[XLocator | Source, QueryIDs]
"""The address of a layer, or a source, and the joinids of rows and columns there."""

_OF_QUERIES_ALONE, _OF_SOURCES_ALONE = ("experiment", "measurement_name"), ("query_ids", "layout", "open")

_OF_SOURCES = (
    *_OF_SOURCES_ALONE,
    *("check", "content", "locator", "obs", "of_rows", "prepare", "row_tile", "var"),
)

_NO_ROWS = QueryIDs(obs_joinids=[], var_joinids=[])


def located(query: Query | Sequence[Query], layer_name: str | None) -> list[Located]:
    """Return the address, or the source, and the joinids of each query or source.

    Raises:
        TypeError: If an element is neither a query nor a source, or there are some of both.
        ValueError: If there are none, or the layer does not exist.
    """
    queries = list(query) if _are_several(query) else [query]
    if not queries:
        raise ValueError("query=[] must hold at least one query; try experiment.axis_query('RNA').")
    sources = [one for one in queries if _is_source(one)]
    if not sources:
        return [_of_query(one, layer_name) for one in queries]
    if len(sources) < len(queries):
        raise TypeError("query must hold queries or sources, not some of both; make one snapshot each.")
    for source in sources:
        check_members(source)
        own = LAYER_NAME if source.locator is None else source.locator.layer_name
        if layer_name not in (None, own):
            raise ValueError(
                f"layer_name={layer_name!r} must be left out, because a Source has the layer {own!r} alone; "
                "make a source of that layer."
            )
    return [(source, source.query_ids) for source in sources]


def segment_of(origin: XLocator | Source, ids: QueryIDs) -> Segment:
    """Return rows and columns as a segment; if a source has a locator, rows are read from that layer."""
    if isinstance(origin, XLocator):
        return SOMASegment(locator=origin, ids=ids)
    check_members(origin)
    if origin.locator is not None:
        return SOMASegment(locator=origin.locator, ids=ids)
    return SourceSegment(origin, ids)


def check_origin(path: Path, content: Content, origin: XLocator | Source) -> None:
    """Raise a ValueError that names the differences, unless a snapshot was made from this layer or source."""
    if len(content.sources) > 1:
        raise ValueError(
            f"snapshot={str(path)!r} must be made from one query to be read as part of one, but it "
            "holds several; leave the query out."
        )
    [made] = content.sources
    segment = segment_of(origin, _NO_ROWS)
    asked = segment.origin(layer_names=[segment.layer_name], obsm_names=())
    if differences := made.differences(asked):
        what = "source that is given" if asked.is_source else "experiment that is queried"
        raise ValueError(
            f"snapshot={str(path)!r} must be made from the {what}, but {'; '.join(differences)}; make a "
            "snapshot of this query at another path."
        )
    snapshot = f"a layer in the snapshot {str(path)!r}"
    check_name("layer_name", segment.layer_name, content.layer_names, of=snapshot)
    warn_of_unknown(path, made, asked, arrays_of([segment.layer_name]))


# Queries and sources, which are distinguished by their members --------------------------------------------


def _are_several(query: Query | Sequence[Query]) -> TypeGuard[Sequence[Query]]:
    return isinstance(query, Sequence) and not isinstance(query, str) and not _is_source(query)


def _is_source(item: object) -> TypeGuard[Source]:
    return not _lacking(item, _OF_SOURCES_ALONE)


def _of_query(query: soma.ExperimentAxisQuery, layer_name: str | None) -> Located:
    if _lacking(query, _OF_QUERIES_ALONE):
        raise TypeError(
            f"query must be an ExperimentAxisQuery, not of type {type(query).__name__}; try "
            "experiment.axis_query('RNA') of an open tiledbsoma.Experiment, or a Source."
        )
    locator = XLocator.create(query.experiment, query.measurement_name, layer_name)
    return locator, QueryIDs.create(query)


def check_members(source: Source) -> None:
    """Raise a TypeError if a source, which need not derive from `Source`, lacks one of its members."""
    if isinstance(source, type):
        raise TypeError(f"source={source.__name__} must be an object, not a class; make one of it.")
    if lacking := _lacking(source, _OF_SOURCES):
        name = type(source).__name__
        way_out = "try MemorySource.from_anndata(adata)" if name == "AnnData" else "derive it from Source"
        raise TypeError(
            f"source={name} must have all members of a tiledbsoma_ml.Source, but lacks {', '.join(lacking)}; "
            f"{way_out}."
        )


def _lacking(item: object, names: Sequence[str]) -> list[str]:
    missing = object()
    return [name for name in names if inspect.getattr_static(item, name, missing) is missing]
