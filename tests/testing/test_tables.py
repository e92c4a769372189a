"""Broken promises about obs, var and joinids are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from plain_source import (
    N_OBS,
    N_VARS,
    Mutants,
    Plain,
    assert_is_told,
    counting,
)

mutants = Mutants()
of_source, of_reader = mutants.of_source, mutants.of_reader


def _obs(change: Callable[[Any, Any, pd.DataFrame], Any]) -> Any:
    """Return a method `obs` of a source, whose table is changed."""

    def obs(self: Any, obs_joinids: Any, column_names: Any) -> Any:
        return change(self, obs_joinids, Plain.obs(self, obs_joinids, column_names))

    return obs


def _sorted_columns(self: Any, obs_joinids: Any, column_names: Any) -> Any:
    found = Plain.obs(self, obs_joinids, column_names)
    return found[sorted(found.columns)]


def _used_categories(self: Any, ids: Any, table: pd.DataFrame) -> pd.DataFrame:
    if "kind" not in table:
        return table
    return table.assign(kind=table["kind"].cat.remove_unused_categories())


def _obs_that_is_kept(self: Any, obs_joinids: Any, column_names: Any) -> Any:
    kept = self.__dict__.setdefault("kept", {})
    key = np.asarray(obs_joinids).tobytes(), *column_names
    return kept.setdefault(key, Plain.obs(self, obs_joinids, column_names))


def _obs_with_key_error(self: Any, obs_joinids: Any, column_names: Any) -> Any:
    return self.table.iloc[np.minimum(obs_joinids, N_OBS)][list(column_names)].reset_index(drop=True)


def _obs_of_any_row(self: Any, obs_joinids: Any, column_names: Any) -> Any:
    return Plain.obs(self, np.minimum(obs_joinids, N_OBS - 1), column_names)


def _reordered(self: Any, ids: Any, table: pd.DataFrame) -> pd.DataFrame:
    return table.iloc[np.argsort(ids, kind="stable")].reset_index(drop=True)


of_source("columns sorted", "`obs` must have the columns asked for, in that order", obs=_sorted_columns)
of_source("rows sorted", "`obs` must have the rows asked for, in that order", obs=_obs(_reordered))
of_source(
    "joinids as index",
    "`obs` must have a fresh index",
    obs=_obs(lambda self, ids, table: table.set_index(pd.Index(ids))),
)
of_source(
    "another value each time",
    "`obs` of a row must always be the same",
    obs=_obs(lambda self, ids, table: table.assign(n=counting(self)) if "n" in table else table),
)
of_source("types by the rows", "must have the same types, whatever rows", obs=_obs(_used_categories))
of_source("a table given away", "What `obs` returns must belong to the caller", obs=_obs_that_is_kept)
of_source(
    "a KeyError",
    "`obs` must reject a column that does not exist with a ValueError, but it raised KeyError",
    obs=_obs_with_key_error,
    check=lambda self, ids, fields: Plain().check(ids, fields),
)
of_source("any row", "`obs` must reject a row that does not exist", obs=_obs_of_any_row)


def _var(self: Any, var_joinids: Any, column_names: Any = None) -> Any:
    found = Plain.var(self, var_joinids, column_names)
    return found.iloc[np.argsort(var_joinids)].reset_index(drop=True)


def _var_with_key_error(self: Any, var_joinids: Any, column_names: Any = None) -> Any:
    names = list(self.symbols.columns) if column_names is None else list(column_names)
    return self.symbols.iloc[var_joinids][names].reset_index(drop=True)


def _var_that_is_kept(self: Any, var_joinids: Any, column_names: Any = None) -> Any:
    whole = column_names is None and np.array_equal(var_joinids, np.arange(N_VARS))
    return self.symbols if whole else Plain.var(self, var_joinids, column_names)


def _var_with_index(self: Any, var_joinids: Any, column_names: Any = None) -> Any:
    return Plain.var(self, var_joinids, column_names).set_index(pd.Index(var_joinids))


of_source("var sorted", "`var` must have the columns of X asked for, in that order", var=_var)
of_source("var with a KeyError", "`var` must reject a name that does not exist", var=_var_with_key_error)
of_source("var given away", "What `var` returns must belong to the caller", var=_var_that_is_kept)
of_source("var with joinids as index", "`var` must have a fresh index", var=_var_with_index)
of_source(
    "var without joinids",
    "`var` must have a column soma_joinid",
    var=lambda self, ids, names=None: self.symbols.iloc[ids][["symbol"]].reset_index(drop=True),
)


@pytest.mark.parametrize("name", mutants.sentences)
def test_a_source_that_breaks_a_promise_about_tables_is_told_which(name: str) -> None:
    assert_is_told(name, mutants.sentences[name])
