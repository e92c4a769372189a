"""`check_source` lets pass what keeps its promises, and tells which of a source is broken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from plain_source import (
    N_OBS,
    N_VARS,
    NAMES,
    TIMEOUT_S,
    Mutants,
    Plain,
    PlainReader,
    assert_is_told,
    build,
    counting,
    make_X,
    raising,
)
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import Partition
from tiledbsoma_ml.testing import check_source

mutants = Mutants()
of_source, of_reader = mutants.of_source, mutants.of_reader


def test_a_source_that_keeps_its_promises_passes() -> None:
    check_source(Plain(), make=Plain, obs_column_names=NAMES)
    check_source(build("streaming"), obs_column_names=NAMES)
    check_source(Plain())


def _part(self: Any) -> QueryIDs:
    part = Partition(rank=0, world_size=1, worker_id=0, n_workers=1)
    return QueryIDs(obs_joinids=range(N_OBS), var_joinids=range(N_VARS), partition=part)


def _shuffled_ids(self: Any) -> QueryIDs:
    shuffled = np.random.default_rng(counting(self)).permutation(N_OBS)
    return QueryIDs(obs_joinids=shuffled, var_joinids=range(N_VARS))


def _settable(get: Callable[[Any], Any]) -> property:
    return property(get, lambda self, value: None)


of_source("no ids", "must be QueryIDs, but it is a list", query_ids=_settable(lambda self: [1]))
of_source("a part", "must be all rows, but it is the part", query_ids=_settable(_part))
of_source("ids that change", "`query_ids` must stay as it is", query_ids=_settable(_shuffled_ids))
of_source("numbers as content", "`content` must be text by name", contents={"X": 3})
of_source("no content", "`content` must be text by name", contents="some")
of_source(
    "content that changes",
    "`content` must stay as it is",
    content=property(lambda self: {"X": str(counting(self))}),
)


def _prepare_once(self: Any) -> None:
    if counting(self) > 2:
        raise OSError("is there already")


def _prepare_anew(self: Any) -> None:
    self.contents = {"X": str(counting(self))}


of_source("prepare once", "It must be possible to call `prepare` twice", prepare=_prepare_once)
of_source("prepare another", "`prepare` must not change the content of the source", prepare=_prepare_anew)


def _layout(**values: Any) -> Any:
    return lambda self, ids, budget: Layout(**{"row_tile": 1, "bytes_per_row": 1.0, **values})


of_source("no layout", "`layout` must be a Layout", layout=lambda self, ids, budget: (1, 2.0))
of_source(
    "a layout that changes",
    "`layout` must stay as it is",
    layout=lambda self, ids, budget: Layout(1, counting(self)),
)
of_source("another tile", "`row_tile` must be that of the layout", layout=_layout(row_tile=4))
of_source("no tile", "`row_tile` must be at least 1", row_tile=0)
of_source("rows without size", "must be a size, but it is 0", layout=_layout(bytes_per_row=0))
of_source("no window", "`window_rows` of the layout must be at least 1", layout=_layout(window_rows=0))

of_source("takes any column", "`check` must reject a column", check=lambda self, ids, fields: None)
of_source("takes nothing", "`check` must accept rows and columns that exist", check=raising)


def _check_columns(self: Any, ids: Any, fields: Any) -> None:
    self.obs(ids.obs_joinids[:0], fields.obs_column_names)


def _read_clipped(self: Any, ids: Any) -> Iterator[Any]:
    return PlainReader.read(self, np.minimum(ids, N_OBS - 1))


of_source(
    "takes any row",
    "`check` or `read` must reject a row that does not exist",
    check=_check_columns,
    reader=type("reader", (PlainReader,), {"read": _read_clipped}),
)


def _no_longer_the_same(self: Any, state: Any) -> None:
    self.__init__()
    self.__dict__.update(state)


def _copied(**state: Any) -> Any:
    return lambda self: (build, (self.name,), state)


def _with_state(name: str, sentence: str, **state: Any) -> None:
    of_source(name, sentence, __reduce__=_copied(**state), __setstate__=_no_longer_the_same)


def _kept_layout(self: Any, ids: Any, budget: Any) -> Any:
    return Layout(1, self.__dict__.get("size", 1.0))


_with_state(
    "another content when pickled", "pickled copy of the source must have the same `content`", contents={}
)
_with_state(
    "other rows when pickled",
    "pickled copy of the source must have the same `query_ids`",
    query_ids=QueryIDs(obs_joinids=[0, 1], var_joinids=[0, 1]),
)
_with_state("another X when pickled", "`X` of a row must be the same however it is read", X=2 * make_X())
of_source(
    "another layout when pickled",
    "pickled copy of the source must have the same `layout`",
    layout=_kept_layout,
    __reduce__=_copied(size=2.0),
    __setstate__=_no_longer_the_same,
)
of_source("not picklable", "A pickled copy must be of the same content", __reduce__=raising)


def test_another_source_of_the_same_rows_must_be_the_same() -> None:
    for name in ("another content", "another layout"):
        other = build(f"{name} when pickled")
        other.__dict__.update({"contents": {}} if name == "another content" else {"size": 2.0})
        with pytest.raises(AssertionError, match=f"Another source .* must have the same `{name[8:]}`"):
            check_source(Plain(), make=lambda other=other: other, obs_column_names=NAMES)


def _close_once(self: Any) -> None:
    if counting(self) > 1:
        raise OSError("is closed")


def _read_for_ever(self: Any, ids: Any) -> Iterator[Any]:
    yield from PlainReader.read(self, ids)
    if threading.current_thread() is not threading.main_thread() and len(ids) > N_OBS:
        threading.Event().wait()


of_reader("close once", "It must be possible to call `close` twice", close=_close_once)
of_reader("waits for ever", "`close` must end a `read` that waits", read=_read_for_ever)


@pytest.mark.parametrize("name", mutants.sentences)
def test_a_source_that_breaks_a_promise_of_its_own_is_told_which(name: str) -> None:
    assert_is_told(name, mutants.sentences[name], timeout_s=3 if name == "waits for ever" else TIMEOUT_S)
