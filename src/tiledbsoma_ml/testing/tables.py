"""The promises of a source about everything but `X`: `query_ids`, `content`, `obs`, `var`, layout, copies."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping

import attrs
import numpy as np

from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._source import Source
from tiledbsoma_ml.testing.case import (
    BUDGET,
    UNKNOWN_NAME,
    UNKNOWN_ROW,
    Case,
    check_fresh,
    overwrite,
    raising,
    read,
    require,
    same_frame,
)


def check_query_ids(source: Source) -> None:
    """Raise an error unless `query_ids` is that of a whole query, the same whenever it is asked for."""
    ids = source.query_ids
    require(isinstance(ids, QueryIDs), "`query_ids` must be QueryIDs", f"it is a {type(ids).__name__}")
    require(ids.partition is None, "`query_ids` must be all rows", f"it is the part of {ids.partition}")
    require(ids == source.query_ids, "`query_ids` must stay as it is", "it changed")


def content_is_texts(case: Case) -> None:
    """`content` must be text by name, the same whenever it is asked for."""
    content = case.source.content
    are_texts = isinstance(content, Mapping) and all(isinstance(x, str) for xs in content.items() for x in xs)
    require(are_texts, "`content` must be text by name", f"it is {content!r}")
    again = case.source.content
    require(dict(content) == dict(again), "`content` must stay as it is", f"{content} became {again}")


def layout_is_one(case: Case) -> None:
    """`layout` must be a Layout of positive sizes, the same whenever it is asked for."""
    source = case.source
    layout, again = (source.layout(case.ids, BUDGET) for _ in range(2))
    require(isinstance(layout, Layout), "`layout` must be a Layout", f"it is a {type(layout).__name__}")
    require(layout == again, "`layout` must stay as it is", f"{layout} became {again}")
    tile = source.row_tile
    require(isinstance(tile, int) and tile >= 1, "`row_tile` must be at least 1", f"it is {tile!r}")
    same = f"the layout's is {layout.row_tile}, the source's {tile}"
    require(layout.row_tile == tile, "`row_tile` must be that of the layout", same)
    size = layout.bytes_per_row
    require(0 < size < math.inf, "`bytes_per_row` of the layout must be a size", f"it is {size!r}")
    rows = layout.window_rows
    require(rows is None or rows >= 1, "`window_rows` of the layout must be at least 1", f"it is {rows!r}")


def prepare_twice(case: Case) -> None:
    """It must be possible to call `prepare` twice, and this must not change the content of the source."""
    before = case.source.query_ids, dict(case.source.content)
    case.source.prepare()
    case.source.prepare()
    after = case.source.query_ids, dict(case.source.content)
    require(
        before == after, "`prepare` must not change the content of the source", f"{before} became {after}"
    )


def check_tells(case: Case) -> None:
    """`check` must accept rows and columns that exist, and reject a column that does not."""
    case.source.check(case.ids, case.fields)
    unknown = attrs.evolve(case.fields, obs_column_names=("soma_joinid", UNKNOWN_NAME))
    with raising("`check` must reject a column of `obs` that does not exist", ValueError, TypeError):
        case.source.check(case.ids, unknown)


def unknown_rows_are_told(case: Case) -> None:
    """`check`, or a read, must reject a row that does not exist, with a ValueError or TypeError."""
    ids = attrs.evolve(case.ids, obs_joinids=np.append(case.ids.obs_joinids, UNKNOWN_ROW))
    with raising("`check` or `read` must reject a row that does not exist", ValueError, TypeError):
        case.source.check(ids, case.fields)
        reader = case.source.open(ids, case.fields, BUDGET)
        try:
            for _ in reader.read(np.array([UNKNOWN_ROW])):
                pass
        finally:
            reader.close()


# Tables ---------------------------------------------------------------------------------------------------


def obs_is_in_order(case: Case) -> None:
    """`obs` must have the rows and columns asked for, in that order, repeats included, with a fresh index."""
    names = case.fields.obs_column_names
    for what, rows in case.orders().items():
        found = case.source.obs(case.asked(rows), names)
        promise = f"`obs` must have the rows asked for, in that order, also {what}"
        require(found["soma_joinid"].tolist() == case.asked(rows).tolist(), promise, "it has not")
        same_frame(found, case.obs.take(rows), f"`obs` of a row must always be the same, also {what}")
        check_fresh(found, "`obs` must have a fresh index, which counts from 0")
    reverse = list(names[::-1])
    found = case.source.obs(case.asked([1, 0]), reverse)
    columns = found.columns.tolist()
    require(columns == reverse, "`obs` must have the columns asked for, in that order", f"it has {columns}")


def obs_keeps_types(case: Case) -> None:
    """The types of columns of `obs` must not depend on the rows that are asked for."""
    for rows in ([], [0], [1], range(len(case.obs))):
        found = case.source.obs(case.asked(list(rows)), case.fields.obs_column_names)
        different = found.dtypes.index[(found.dtypes != case.obs.dtypes).to_numpy()].tolist()
        names = {name: f"{found[name].dtype} for {case.obs[name].dtype}" for name in different}
        promise = "Columns of `obs` must have the same types, whatever rows are asked for"
        require(not different, promise, f"of {len(found)} rows, the types are {names}")


def obs_tells(case: Case) -> None:
    """`obs` must raise a ValueError for a column or row that does not exist."""
    with raising("`obs` must reject a column that does not exist with a ValueError", ValueError):
        case.source.obs(case.asked([0]), [UNKNOWN_NAME])
    with raising("`obs` must reject a row that does not exist with a ValueError", ValueError):
        case.source.obs(np.array([UNKNOWN_ROW]), ["soma_joinid"])


def obs_is_given_away(case: Case) -> None:
    """The results of `obs` and `var` must belong to the caller, who may write into them."""
    everything = case.asked(np.arange(len(case.obs)))
    overwrite(case.source.obs(everything, case.fields.obs_column_names))
    found = case.source.obs(everything, case.fields.obs_column_names)
    same_frame(found, case.obs, "What `obs` returns must belong to the caller, who may write into it")
    columns = case.ids.var_joinids
    expected = case.source.var(columns).copy(deep=True)
    overwrite(case.source.var(columns))
    promise = "What `var` returns must belong to the caller, who may write into it"
    same_frame(case.source.var(columns), expected, promise)


def var_is_in_order(case: Case) -> None:
    """`var` must have the columns of X asked for, in that order, with a fresh index."""
    source, columns = case.source, case.ids.var_joinids
    everything = source.var(columns)
    names = everything.columns.tolist()
    require("soma_joinid" in names, "`var` must have a column soma_joinid", f"it has {names}")
    for order in (np.arange(len(columns)), np.arange(len(columns))[::-1], np.array([1, 0]), np.array([1])):
        promise = "`var` must have the columns of X asked for, in that order"
        found = source.var(columns[order])
        require(found["soma_joinid"].tolist() == columns[order].tolist(), promise, "it has not")
        same_frame(found, everything.take(order), promise)
        check_fresh(found, "`var` must have a fresh index, which counts from 0")
    some = source.var(columns, names[::-1]).columns.tolist()
    require(some == names[::-1], "`var` must have the names asked for, in that order", f"it has {some}")
    with raising("`var` must reject a name that does not exist with a ValueError", ValueError):
        source.var(columns, [UNKNOWN_NAME])


# Copies ---------------------------------------------------------------------------------------------------


def pickled_is_the_same(case: Case) -> None:
    """A pickled copy must be of the same content, layout and rows: workers have one."""
    _is_the_same(case, pickle.loads(pickle.dumps(case.source)), "A pickled copy of the source")


def made_is_the_same(case: Case) -> None:
    """Another source of the same rows, which `make` returns, must be the same: other ranks have one."""
    if case.make is not None:
        _is_the_same(case, case.make(), "Another source of the same rows")


def _is_the_same(case: Case, other: Source, what: str) -> None:
    ids = other.query_ids
    require(ids == case.source.query_ids, f"{what} must have the same `query_ids`", f"it has {ids}")
    content = dict(other.content), dict(case.source.content)
    promise, found = f"{what} must have the same `content`", f"{content[0]} is not {content[1]}"
    require(content[0] == content[1], promise, found)
    layouts = [source.layout(case.ids, BUDGET) for source in (other, case.source)]
    promise, found = f"{what} must have the same `layout`", f"{layouts[0]} is not {layouts[1]}"
    require(layouts[0] == layouts[1], promise, found)
    rows = case.orders()["in random order"]
    reader = case.open(source=other)
    try:
        case.compare(
            read(reader.read(case.asked(rows)), case.X.shape[1]), rows, f"of {what[0].lower()}{what[1:]}"
        )
    finally:
        reader.close()


PROMISES: tuple[Callable[[Case], None], ...] = (
    content_is_texts,
    prepare_twice,
    layout_is_one,
    check_tells,
    unknown_rows_are_told,
    obs_keeps_types,
    obs_is_in_order,
    obs_tells,
    obs_is_given_away,
    var_is_in_order,
)
PROMISES_OF_COPIES: tuple[Callable[[Case], None], ...] = (pickled_is_the_same, made_is_the_same)
