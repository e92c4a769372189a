"""What `Snapshot.create` takes becomes parts: a query, several ones, or sources."""

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
from tiledbsoma_ml.snapshot.part import Part
from tiledbsoma_ml.snapshot.soma_part import SOMAPart
from tiledbsoma_ml.snapshot.source_part import LAYER_NAME, SourcePart
from tiledbsoma_ml.x_locator import XLocator

Query: TypeAlias = soma.ExperimentAxisQuery | Source
"""What rows are asked for with."""

Located: TypeAlias = tuple[XLocator | Source, QueryIDs]
"""Rows and columns, and where they are."""

_OF_QUERIES_ALONE, _OF_SOURCES_ALONE = ("experiment", "measurement_name"), ("query_ids", "layout", "open")

_OF_SOURCES = (
    *_OF_SOURCES_ALONE,
    *("check", "content", "locator", "obs", "of_rows", "prepare", "row_tile", "var"),
)

_NO_ROWS = QueryIDs(obs_joinids=[], var_joinids=[])


def located(query: Query | Sequence[Query], layer_name: str | None) -> list[Located]:
    """Return the rows and columns of one query or source, or of several, and where they are.

    Raises:
        TypeError: If something is neither, or some are queries and others sources.
        ValueError: If there is none, or there is no such layer.
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


def part_of(where: XLocator | Source, ids: QueryIDs) -> Part:
    """Return rows and columns as a part of a snapshot; what a layer has as it is comes from the layer."""
    if isinstance(where, XLocator):
        return SOMAPart(locator=where, ids=ids)
    check_members(where)
    return SourcePart(where, ids) if where.locator is None else SOMAPart(locator=where.locator, ids=ids)


def check_origin(path: Path, content: Content, where: XLocator | Source) -> None:
    """Raise a ValueError that says what differs, unless a snapshot was made from one layer or source."""
    if len(content.sources) > 1:
        raise ValueError(
            f"snapshot={str(path)!r} must be made from one query to be read as part of one, but it "
            "holds several; leave the query out."
        )
    [made] = content.sources
    part = part_of(where, _NO_ROWS)
    asked = part.origin(layer_names=[part.layer_name], obsm_names=())
    if differences := made.differences(asked):
        what = "source that is given" if asked.is_source else "experiment that is queried"
        raise ValueError(
            f"snapshot={str(path)!r} must be made from the {what}, but {'; '.join(differences)}; make a "
            "snapshot of this query at another path."
        )
    snapshot = f"a layer in the snapshot {str(path)!r}"
    check_name("layer_name", part.layer_name, content.layer_names, of=snapshot)
    warn_of_unknown(path, made, asked, arrays_of([part.layer_name]))


# What is given, told apart by what it has -----------------------------------------------------------------


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
    """Raise a TypeError if a source lacks a member of `Source`, as one that does not derive from it may."""
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
