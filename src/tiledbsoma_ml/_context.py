"""The one way to open an experiment: with the settings of TileDB that we recommend."""

from __future__ import annotations

import datetime as dt
import logging
import os
from collections.abc import Mapping
from functools import cache
from typing import Literal, TypeAlias

import tiledbsoma as soma

from tiledbsoma_ml._common import absolute_uri

Config: TypeAlias = dict[str, str | float]

PARALLEL_MERGE = "sm.query.sparse_global_order.preprocess_tile_merge"
"""Number of tiles that libtiledb 2.28 and later merge in a thread of its own; with 0 it does not do so.

The merge frees memory that its threads still use, now and then, when `obs` or `var` is read: the process dies
or reads what is not there. No version is known in which this is mended.
"""

_TILEDB_DEFAULT = "32768"
_VARIABLE = "TILEDB_" + PARALLEL_MERGE.upper().replace(".", "_")

_logger = logging.getLogger(__name__)


def context(
    tiledb_config: Mapping[str, str | float] | None = None,
    *,
    timestamp: int | dt.datetime | None = None,
    **config: str | float,
) -> soma.SOMATileDBContext:
    """Return a context to open experiments with, which has the settings of TileDB that we recommend.

    That is one setting today. When `obs` or `var` is read, libtiledb 2.28 and later (tiledbsoma 1.17 and
    later) free memory that is still in use, now and then: the process dies. With
    `sm.query.sparse_global_order.preprocess_tile_merge=0` they do not, and read as fast.

    Args:
        tiledb_config: Settings of TileDB by name, for instance `{"vfs.s3.region": "us-west-2"}`. They win
            over ours.
        timestamp: The time, in ms since 1970, as of which data are read and written. If left out, the time
            at which something is opened.
        **config: Settings of TileDB as well: `context(**{"vfs.s3.region": "us-west-2"})`.

    Raises:
        TypeError: If a name cannot be one of TileDB's settings, or they are no dictionary.
    """
    if tiledb_config is not None and not isinstance(tiledb_config, Mapping):
        raise TypeError(
            f"tiledb_config must be a dictionary of settings, not a {type(tiledb_config).__name__}; "
            "try context({'vfs.s3.region': 'us-west-2'})."
        )
    given = {**(tiledb_config or {}), **config}
    for name in given:
        if not isinstance(name, str) or ("." not in name and not name.startswith("profile_")):
            raise TypeError(
                f"{name}={given[name]!r} must be a setting of TileDB, whose names have dots; "
                "try context({'vfs.s3.region': 'us-west-2'})."
            )
    return soma.SOMATileDBContext(tiledb_config=with_recommended(given), timestamp=timestamp)


def open_experiment(
    uri: str,
    mode: Literal["r", "w"] = "r",
    *,
    config: Mapping[str, str | float] | None = None,
    timestamp: int | None = None,
) -> soma.Experiment:
    """Open an experiment in a context of ours."""
    return soma.Experiment.open(absolute_uri(uri), mode, tiledb_timestamp=timestamp, context=context(config))


def with_recommended(config: Mapping[str, str | float]) -> Config:
    """Return a configuration with what we recommend, but for what the user decided.

    A context that was used has a value for everything, so TileDB's own default counts as not decided.
    """
    value = str(config.get(PARALLEL_MERGE, _TILEDB_DEFAULT))
    is_decided = value != _TILEDB_DEFAULT or _VARIABLE in os.environ
    return dict(config) if is_decided else {**config, PARALLEL_MERGE: "0"}


def tell_if_unprotected(config: Mapping[str, str | float]) -> None:
    """Log, once in a process, that a context in use lacks the setting; older versions do not know it."""
    if str(config.get(PARALLEL_MERGE, "0")) != "0":
        _tell_unprotected()


@cache
def _tell_unprotected() -> None:
    _logger.info(
        "the query comes from a context in which TileDB can crash, now and then, when it reads obs or var; "
        "open the experiment with context=tiledbsoma_ml.context()."
    )
