"""Contexts of TileDB with the settings that we recommend; the one function that opens experiments."""

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
"""The setting that turns on the parallel merge of libtiledb 2.28 and later; the value 0 turns it off.

Now and then, when `obs` or `var` is read, the merge frees memory that its threads still use: the process dies
or reads wrong values. No version is known to be free of this.
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
    """Return a context for opening experiments, with the settings of TileDB that we recommend.

    Today this is one setting. Without it, libtiledb 2.28 and later (tiledbsoma 1.17 and later) can free
    memory that is still in use when they read `obs` or `var`, and the process dies. With
    `sm.query.sparse_global_order.preprocess_tile_merge=0` this does not happen, and reads are as fast.

    Args:
        tiledb_config: Settings of TileDB by name, for instance `{"vfs.s3.region": "us-west-2"}`. They win
            over ours.
        timestamp: The time, in ms since 1970, as of which data are read and written. If left out, the time
            at which an object is opened.
        **config: More settings of TileDB: `context(**{"vfs.s3.region": "us-west-2"})`.

    Raises:
        TypeError: If `tiledb_config` is not a dictionary, or a name cannot be a setting of TileDB.
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
    """Open an experiment with `context`."""
    return soma.Experiment.open(absolute_uri(uri), mode, tiledb_timestamp=timestamp, context=context(config))


def with_recommended(config: Mapping[str, str | float]) -> Config:
    """Return a configuration with the recommended settings, unless the user set them otherwise.

    A context that was used has a value for each setting, so TileDB's own default counts as not set.
    """
    value = str(config.get(PARALLEL_MERGE, _TILEDB_DEFAULT))
    is_decided = value != _TILEDB_DEFAULT or _VARIABLE in os.environ
    return dict(config) if is_decided else {**config, PARALLEL_MERGE: "0"}


def tell_if_unprotected(config: Mapping[str, str | float]) -> None:
    """Log, once per process, that a user's context lacks the recommended setting.

    Older versions of TileDB do not know the setting, and need none.
    """
    if str(config.get(PARALLEL_MERGE, "0")) != "0":
        _tell_unprotected()


@cache
def _tell_unprotected() -> None:
    _logger.info(
        "the query comes from a context in which TileDB can crash, now and then, when it reads obs or var; "
        "open the experiment with context=tiledbsoma_ml.context()."
    )
