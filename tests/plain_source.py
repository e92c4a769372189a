"""A source that keeps its promises, to be broken, one promise at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml._common import check_names
from tiledbsoma_ml._order.sizes import Layout
from tiledbsoma_ml._query_ids import check_among
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._source import Source
from tiledbsoma_ml.testing import check_source

N_OBS, N_VARS = 100, 7
NAMES = ("kind", "n")
TIMEOUT_S = 60.0


def make_X() -> sparse.csr_matrix:
    i, j = np.arange(N_OBS)[:, None], np.arange(N_VARS)[None, :]
    return sparse.csr_matrix(np.where((i + j) % 3, N_VARS * i + j + 1, 0).astype(np.float32))


class PlainReader:
    def __init__(self, source: Any, columns: Any, names: Any) -> None:
        self.X, self.table = source.X[:, columns], source.table[list(names)]
        self.X.sort_indices()
        self.n_vars, self.dtype = self.X.shape[1], self.X.dtype

    def read(self, ids: Any) -> Iterator[Any]:
        for start in range(0, len(ids), 16):
            piece = ids[start : start + 16]
            yield Rows.from_scipy(piece, self.csr(piece), self.obs(piece))

    def csr(self, ids: Any) -> Any:
        return self.X[ids]

    def fill_dense(self, ids: Any, out: Any) -> None:
        out[...] = self.X[ids].toarray()

    def obs(self, ids: Any) -> Any:
        return self.table.iloc[ids].reset_index(drop=True)

    def close(self) -> None: ...


class Plain(Source):
    reader: Any = PlainReader
    name = "plain"
    contents: Any = None

    def __init__(self) -> None:
        self.X = make_X()
        n = np.arange(N_OBS)
        kinds = pd.Categorical.from_codes(n % 2, categories=["a", "b", "c"])
        self.table = pd.DataFrame({"kind": kinds, "n": n, "soma_joinid": n})
        self.symbols = pd.DataFrame({"soma_joinid": np.arange(N_VARS), "symbol": list("abcdefg")})
        self.query_ids = QueryIDs(obs_joinids=n, var_joinids=np.arange(N_VARS))

    @property
    def content(self) -> Any:
        return {"X": "some"} if self.contents is None else self.contents

    def obs(self, obs_joinids: Any, column_names: Any) -> Any:
        check_among("obs_joinids", obs_joinids, self.query_ids.obs_joinids)
        names = check_names("column_names", column_names, self.table.columns, of="a column of obs")
        return self.table.iloc[obs_joinids][list(names)].reset_index(drop=True)

    def var(self, var_joinids: Any, column_names: Any = None) -> Any:
        names = self.symbols.columns if column_names is None else column_names
        names = check_names("column_names", names, self.symbols.columns, of="a column of var")
        return self.symbols.iloc[var_joinids][list(names)].reset_index(drop=True)

    def layout(self, ids: Any, budget: Any) -> Any:
        return Layout(row_tile=1, bytes_per_row=50.0)

    def open(self, ids: Any, fields: Any, budget: Any) -> Any:
        return self.reader(self, ids.var_joinids, fields.obs_column_names)

    def __reduce__(self) -> Any:
        return build, (self.name,)


class Streaming(PlainReader):
    """A reader that has no random access, as `csr` is none."""

    csr = None  # type: ignore[assignment]

    def read(self, ids: Any) -> Iterator[Any]:
        yield Rows.from_scipy(ids, self.X[ids], self.obs(ids))


MUTANTS: dict[str, type[Plain]] = {"plain": Plain}


def build(name: str) -> Any:
    return MUTANTS[name]()


class Mutants:
    """Sources that break one promise each, with the sentence that tells it."""

    def __init__(self) -> None:
        self.sentences: dict[str, str] = {}

    def of_source(self, name: str, sentence: str, **members: Any) -> None:
        self.sentences[name] = sentence
        MUTANTS[name] = type(name, (Plain,), {"name": name, **members})

    def of_reader(self, name: str, sentence: str, **members: Any) -> None:
        self.of_source(name, sentence, reader=type(name, (PlainReader,), members))


MUTANTS["streaming"] = type("streaming", (Plain,), {"name": "streaming", "reader": Streaming})


def counting(self: Any) -> int:
    """Return how often this was asked for."""
    self.count = getattr(self, "count", 0) + 1
    return int(self.count)


def raising(*_: Any, **__: Any) -> Any:
    raise OSError("no luck")


def assert_is_told(name: str, sentence: str, timeout_s: float = TIMEOUT_S) -> None:
    with pytest.raises(AssertionError) as told:
        check_source(build(name), obs_column_names=NAMES, timeout_s=timeout_s)
    assert re.search(sentence, str(told.value)), str(told.value)
    assert ", but " in str(told.value)
