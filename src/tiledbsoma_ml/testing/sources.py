"""`check_source`: checks the promises of a `Source`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from copy import deepcopy

import attrs
import numpy as np

from tiledbsoma_ml._source import Fields, Source
from tiledbsoma_ml.testing import reading, tables
from tiledbsoma_ml.testing.case import BUDGET, Case, keeping, read, require

N_ROWS = 60
"""Largest number of rows that are checked."""


def check_source(
    source: Source,
    *,
    make: Callable[[], Source] | None = None,
    obs_column_names: Sequence[str] = ("soma_joinid",),
    timeout_s: float = 60.0,
) -> None:
    """Raise an AssertionError that names the broken promise, unless a source keeps all promises.

    Up to 60 rows are read in many orders and ways, and compared with each other. This does not show whether
    they have the right values: compare some of them with your data yourself.

    Args:
        source: The source, with at least two different rows and two columns.
        make: Returns another source of the same rows, which is compared with this one; none if None.
        obs_column_names: Columns of `obs` to check.
        timeout_s: Longest time to wait for another thread.

    Raises:
        AssertionError: If the source breaks a promise.
        ValueError: If it has too few rows or columns for the checks.
    """
    with keeping("`query_ids` must be the QueryIDs of a whole query"):
        tables.check_query_ids(source)
    case = _case(source, make, obs_column_names, timeout_s)
    for promise in (*tables.PROMISES, *reading.PROMISES, *tables.PROMISES_OF_COPIES):
        with keeping(_sentence(promise)):
            promise(case)


def _case(
    source: Source, make: Callable[[], Source] | None, obs_column_names: Sequence[str], timeout_s: float
) -> Case:
    """Return a case with some rows of a source, as it returns them at first."""
    ids = source.query_ids
    unique = np.unique(ids.obs_joinids)
    if len(unique) < 2 or len(ids.var_joinids) < 2:
        raise ValueError(f"source must have two rows and two columns at least, and is {ids}; give it some.")
    if len(unique) > N_ROWS:  # some from everywhere, and some neighbours
        everywhere = np.linspace(0, len(unique) - 1, N_ROWS // 2).astype(int)
        unique = unique[np.union1d(everywhere, np.arange(N_ROWS // 2))]
    is_chosen = np.isin(ids.obs_joinids, unique)
    _, first = np.unique(ids.obs_joinids[is_chosen], return_index=True)
    some = attrs.evolve(ids, obs_joinids=ids.obs_joinids[is_chosen][np.sort(first)])
    fields = Fields(obs_column_names=tuple(dict.fromkeys([*obs_column_names, "soma_joinid"])))
    with keeping("`obs` must have the columns asked for, soma_joinid among them"):
        obs = source.obs(some.obs_joinids, fields.obs_column_names).copy(deep=True)
        names = obs.columns.tolist()
        promise = "`obs` must have the columns asked for, in that order"
        require(names == list(fields.obs_column_names), promise, f"it has {names}")
    with keeping("`open` and `read` must give rows"):
        source.prepare()
        with closing(source.open(some, fields, BUDGET)) as reader:
            pieces = [deepcopy(piece) for piece in reader.read(some.obs_joinids)]
            found = read(pieces, len(ids.var_joinids))
        joinids = found.obs_joinids
        promise = "`read` must give exactly the rows asked for, in that order"
        require(np.array_equal(joinids, some.obs_joinids), promise, f"it gave {len(joinids)} others")
    return Case(source=source, make=make, ids=some, fields=fields, X=found.X, obs=obs, timeout_s=timeout_s)


def _sentence(promise: Callable[[Case], None]) -> str:
    return (promise.__doc__ or promise.__name__).strip().rstrip(".")
