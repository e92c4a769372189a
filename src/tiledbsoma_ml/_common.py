"""Type aliases, checks of plain values, and the one seed rule, which every module shares.

Shapes are written with these letters: `n_obs` rows (cells) and `n_vars` columns (genes) of the query,
`batch_size` rows of a mini-batch, `nnz` stored values.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pandas as pd
import platformdirs
import torch
from numpy.typing import NDArray
from scipy import sparse

NDArrayNumber: TypeAlias = NDArray[np.number[Any]]
"""An array of numbers of any type."""

NDArrayJoinId: TypeAlias = NDArray[np.int64]
"""An array of SOMA joinids."""

XBatch: TypeAlias = NDArrayNumber | sparse.csr_matrix | torch.Tensor
"""`X` of a mini-batch."""

MiniBatch: TypeAlias = tuple[XBatch, pd.DataFrame]
"""A mini-batch: `X` of shape (batch_size, n_vars) and the `obs` of the same rows.

`X` is an `ndarray` (of shape (n_vars,) if `batch_size` is 1), a `csr_matrix` with `return_sparse_X=True`,
or a `torch.Tensor` (dense, or `torch.sparse_csr`) where a `device` is given.
"""


def seeded_rng(seed: int | None, epoch: int = 0) -> np.random.Generator:
    """Return the generator of an epoch: the one place where a seed becomes random numbers.

    `default_rng([seed, 0])` is the same stream as `default_rng(seed)`, so epoch 0 repeats runs made
    with tiledbsoma-ml 0.1.0. Without a seed the generator is drawn from the operating system.
    """
    return np.random.default_rng(None if seed is None else [seed, epoch])


def absolute_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """Return a path that means the same in every working directory and process; `~` is the home directory.

    Args:
        path: The path. An empty string is often a variable that is not set.
        name: The parameter by which the user gave it, for messages.

    Raises:
        ValueError: If it is an empty string.
    """
    if not os.fspath(path):
        raise ValueError(f"{name}={path!r} must not be empty; try '.' for the working directory.")
    return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 - a folder may have a name like "~x"


def absolute_uri(uri: str | os.PathLike[str], name: str = "uri") -> str:
    """Return a URI as it is, and a path as an absolute path (see `absolute_path`)."""
    return str(uri) if "://" in str(uri) else str(absolute_path(uri, name))


def cache_folder() -> Path:
    """Return the folder of this package in the user's cache directory; it may not exist yet.

    `XDG_CACHE_HOME` names that directory where it is set.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given.startswith("~"):  # as quotes in a script leave it; platformdirs takes absolute paths only
        return absolute_path(given) / "tiledbsoma_ml"
    return absolute_path(platformdirs.user_cache_path("tiledbsoma_ml", appauthor=False))


def warn(message: str) -> None:
    """Warn at the line of the caller of this package: the innermost line that is not of the package."""
    frame, level = sys._getframe(), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def check_bool(name: str, value: object) -> bool:
    """Return `value` as a `bool` if it is one, of Python or of NumPy; raise a TypeError if it is not."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name}={value!r} must be True or False, not a {type(value).__name__}; try {name}=True."
        )
    return bool(value)


def check_count(name: str, value: object, suggestion: int, *, minimum: int = 1) -> int:
    """Return `value` as an `int` if it is a whole number of at least `minimum`.

    Raises:
        TypeError: If it is not an integer (a bool or a float is not).
        ValueError: If it is smaller than `minimum`.
    """
    rule = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} must be {rule}, not a {type(value).__name__}; try {suggestion}.")
    if value < minimum:
        raise ValueError(f"{name}={value} must be {rule}; try {suggestion}.")
    return int(value)


_Choice = TypeVar("_Choice", bound=str)


def check_choice(name: str, value: _Choice, choices: Sequence[str]) -> _Choice:
    """Return `value` if it is one of `choices`; raise a ValueError that lists them if it is not."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, choices))}; try {choices[0]!r}.")
    return value


def check_name(parameter: str, name: str, known: Iterable[str], *, of: str) -> str:
    """Return `name` if it is among the `known` ones.

    Raises:
        ValueError: If it is not. The message says that it must be `of`, and lists the nearest names.
    """
    known = list(known)
    if name in known:
        return name
    raise ValueError(f"{parameter}={name!r} must be {of}; {nearest_names(name, known)}")


def nearest_names(name: str, known: Sequence[str], limit: int = 10) -> str:
    """Return a hint for a misspelt name: the nearest known names, or all of them if none is near."""
    if near := difflib.get_close_matches(str(name), known, n=3, cutoff=0.6):
        return f"did you mean {' or '.join(map(repr, near))}?"
    listed = ", ".join(map(repr, known[:limit])) or "none"
    return f"there are {listed}{f' and {len(known) - limit} more' if len(known) > limit else ''}."


def check_distinct(parameter: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return `names` as a tuple if there is at least one, and all differ.

    Raises:
        TypeError: If `names` is a string.
        ValueError: If it is empty, or a name repeats.
    """
    if isinstance(names, str):
        raise TypeError(f"{parameter}={names!r} must be a list of names; try [{names!r}].")
    if not len(names):
        raise ValueError(f"{parameter}=[] must hold at least one name; try ['soma_joinid'].")
    if len(set(names)) < len(names):
        raise ValueError(f"{parameter}={list(names)} must differ from each other; name each column once.")
    return tuple(names)


def check_names(parameter: str, names: Sequence[str], known: Iterable[str], *, of: str) -> tuple[str, ...]:
    """Return `names` as a tuple if they differ, and each is known; see `check_distinct` and `check_name`."""
    known = list(known)
    return tuple(check_name(parameter, name, known, of=of) for name in check_distinct(parameter, names))


def check_obs_column_names(names: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Return names of columns of `obs` as a tuple if they differ, and each is known; see `check_names`."""
    return check_names("obs_column_names", names, known, of="a column of obs")


def first_line(err: Exception) -> str:
    """Return the reason that an error gives, without the call stack and the quotes that libraries add."""
    return str(err).strip().partition("\n")[0].removeprefix("SOMAError: ").strip("'\"").rstrip(".")
