"""Labels of rows: columns of `obs` as categories and codes, computed once for a query."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import attrs
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, nearest_names, warn
from tiledbsoma_ml._soma.obs import ObsColumns

MISSING = "nan"
"""The category of rows that have no value: the text that pandas makes of a missing value."""

SEPARATOR = "//"
"""Separator of the values of several columns that together are one label."""

MANY_VALUES = 1000
"""Number of different values above which a numeric column is hardly a label."""

Unseen: TypeAlias = Literal["error", "extend"] | Mapping[str, str]
"""The treatment of labels that are not known.

"error" refuses them, "extend" appends them to the known ones, and a mapping replaces each by a known one.
"""

logger = logging.getLogger(__name__)


def check_unseen(unseen: object) -> Unseen:
    """Return the treatment of labels that are not known, as the user gave it.

    Raises:
        ValueError: If it is neither a mapping nor one of the words.
    """
    if not isinstance(unseen, Mapping) and unseen not in ("error", "extend"):
        raise ValueError(
            f"unseen={unseen!r} must be 'error', 'extend' or a mapping of new batches to known ones; "
            "try 'error'."
        )
    return cast(Unseen, unseen)


@attrs.frozen(eq=False)
class Labels:
    """A label for each row.

    Attributes:
        categories: The labels, as text; the index of each is its code.
        codes: The code of each row, as narrow as they are.
        column_names: The columns that the labels are made of; none if all rows have the same label.
    """

    categories: NDArray[np.object_]
    codes: NDArray[np.integer[Any]]
    column_names: tuple[str, ...] = ()

    @classmethod
    def constant(cls, n_rows: int) -> Labels:
        """Return the same label for all rows."""
        return cls(np.array(["all"], dtype=object), np.zeros(n_rows, dtype=np.uint8))

    @classmethod
    def read(
        cls, columns: ObsColumns, obs_joinids: NDArrayJoinId, names: Sequence[str], *, parameter: str
    ) -> Labels:
        """Return the values of columns for each row, joined by "//"; categories are sorted as text.

        Args:
            columns: Columns of `obs`, read.
            obs_joinids: All their rows, sorted.
            names: Names of the columns; at least one.
            parameter: The parameter by which the user gave the names, for messages.
        """
        joined, codes = np.array([""], dtype=object), np.zeros(len(obs_joinids), dtype=np.int64)
        for number, name in enumerate(names):
            own, own_codes = _column_labels(columns, obs_joinids, name, parameter)
            places, found = pd.factorize(codes * len(own) + own_codes)
            before, after = np.divmod(found, len(own))
            joined = own[after] if number == 0 else joined[before] + SEPARATOR + own[after]
            codes = places
        categories, merged = np.unique(joined.astype(str), return_inverse=True)
        return cls(categories.astype(object), _narrow(merged[codes], len(categories)), tuple(names))

    @property
    def name(self) -> str:
        """The names of the columns, joined like their values."""
        return SEPARATOR.join(self.column_names)

    def counts(self) -> NDArray[np.int64]:
        """Return how many rows have each category."""
        return np.bincount(self.codes, minlength=len(self.categories))

    def among(self, known: Sequence[str] | NDArray[np.object_], unseen: Unseen, *, what: str) -> Labels:
        """Return the same labels, with the codes that they have in `known`.

        Args:
            known: The categories; their order is kept.
            unseen: The treatment of other labels; with "extend" they follow the known ones.
            what: A word for such a label in messages, for instance "batch".

        Raises:
            ValueError: If labels that occur are not known, and `unseen` neither extends nor replaces them.
        """
        present = self.counts() > 0
        names = self.categories
        if isinstance(unseen, Mapping):
            known_names = set(known)
            names = np.array([n if n in known_names else unseen.get(n, n) for n in names], dtype=object)
        categories = pd.Index(known, dtype=object)
        absent = present & (categories.get_indexer(pd.Index(names)) < 0)
        if absent.any():
            if unseen != "extend":
                raise ValueError(self._says_unseen(absent, list(known), what))
            categories = categories.append(pd.Index(names[absent], dtype=object))
        codes = categories.get_indexer(pd.Index(names)).clip(min=0)[self.codes]
        return Labels(categories.to_numpy(), _narrow(codes, len(categories)), self.column_names)

    def _says_unseen(self, absent: NDArray[np.bool_], known: list[str], what: str) -> str:
        names, n_rows = self.categories[absent], int(self.counts()[absent].sum())
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        instead = {names[0]: known[0] if known else ""}
        return (
            f"the {what} of each cell (column {self.name!r}) must be one of the {len(known):,} known ones, "
            f"but {n_rows:,} of {len(self.codes):,} cells have {', '.join(map(repr, names[:3]))}{more}; "
            f"{nearest_names(names[0], known, 3)} For new batches try unseen='extend' or unseen={instead!r}."
        )


def read_numbers(
    columns: ObsColumns, obs_joinids: NDArrayJoinId, names: Sequence[str], *, parameter: str
) -> NDArray[np.float32]:
    """Return numeric columns of all rows, of shape (n_rows, len(names)).

    Raises:
        ValueError: If a column is not numeric, or a value is missing or infinite.
    """
    obs = columns.take(obs_joinids)
    numbers = np.empty((len(obs_joinids), len(names)), dtype=np.float32)
    for place, name in enumerate(names):
        if not pd.api.types.is_numeric_dtype(obs[name].dtype):
            raise ValueError(
                f"{parameter}={list(names)} must hold numeric columns, but {name!r} is {obs[name].dtype}; "
                "name it among the categorical ones."
            )
        numbers[:, place] = obs[name].to_numpy(dtype=np.float64, na_value=np.nan)
        if n_bad := int((~np.isfinite(numbers[:, place])).sum()):
            raise ValueError(
                f"{parameter}={list(names)} must have a finite value in every cell, but {name!r} has none in "
                f"{n_bad:,} of {len(obs):,} cells; leave these cells out of the query."
            )
    return numbers


def _column_labels(
    columns: ObsColumns, obs_joinids: NDArrayJoinId, name: str, parameter: str
) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
    """Return the values of a column that occur, as text, and for each row which one it has."""
    codes = columns.codes(name)
    codes -= codes.min(initial=0)
    first = np.full(codes.max(initial=-1) + 1, -1)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    occurring = np.flatnonzero(first >= 0)
    values = columns.take(obs_joinids[first[occurring]])[name]
    is_missing = values.isna().to_numpy()
    if is_missing.any():
        n_missing = int(np.isin(codes, occurring[is_missing]).sum())
        logger.warning(
            "%s: %s of %s cells have no value in %r; they are the category %r.",
            parameter,
            f"{n_missing:,}",
            f"{len(codes):,}",
            name,
            MISSING,
        )
    if len(values) > MANY_VALUES and pd.api.types.is_numeric_dtype(values.dtype):
        warn(
            f"{parameter} has the numeric column {name!r} with {len(values):,} different values in "
            f"{len(codes):,} cells; each becomes a category of its own.",
        )
    names = np.where(is_missing, MISSING, values.astype(str).to_numpy(dtype=object))
    place = np.zeros(len(first), dtype=np.int64)
    place[occurring] = np.arange(len(occurring))
    return names.astype(object), place[codes]


def _narrow(codes: NDArray[np.integer[Any]], n_categories: int) -> NDArray[np.integer[Any]]:
    narrowed: NDArray[np.integer[Any]] = codes.astype(np.min_scalar_type(max(0, n_categories - 1)))
    return narrowed
