"""Checks of the files of a snapshot: joinids, row starts, columns, `obs` and `var`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayJoinId, first_line
from tiledbsoma_ml._soma.obs import in_one_piece
from tiledbsoma_ml.snapshot.blocks import BlockFiles
from tiledbsoma_ml.snapshot.files import File, damaged, digest, map_file
from tiledbsoma_ml.snapshot.format import Manifest
from tiledbsoma_ml.snapshot.shard import Shard


def verify(folder: Path, manifest: Manifest) -> None:
    """Raise a ValueError that names the first file that was altered or breaks a rule."""
    for file in manifest.files:
        file.check_content(folder)
    check_content(folder, manifest)


def check_content(folder: Path, manifest: Manifest, checked: Collection[Shard] = ()) -> None:
    """Read all files except values, and raise a ValueError that names the first one that breaks a rule.

    Args:
        folder: The folder of the files.
        manifest: The manifest.
        checked: Shards that `check_shard` has checked before.
    """
    manifest.check(folder)
    manifest.check_files(folder)
    _check_joinids(folder, manifest)
    _check_frames(folder, manifest)
    for layer in manifest.layers:
        for shard in layer.shards:
            if shard not in checked:
                check_shard(folder, layer.indices_dtype, shard, manifest.content.n_vars)


# X --------------------------------------------------------------------------------------------------------


def check_shard(folder: Path, indices_dtype: str, shard: Shard, n_vars: int) -> None:
    """Raise a ValueError unless the columns of each row exist, ascend, and differ; decode all blocks."""
    from tiledbsoma_ml._kernels import snapshot as kernels

    starts = map_file(folder, shard.indptr, "<i8")
    check_starts(folder, shard, starts)
    if shard.blocks is None:
        wrong = kernels.first_bad_row(starts, map_file(folder, shard.indices, indices_dtype), n_vars)
    else:
        wrong = BlockFiles(folder, shard, indices_dtype, starts).first_bad_row(n_vars)
    if wrong >= 0:
        row = f"row {shard.row_start + wrong:,}"
        raise damaged(
            folder,
            shard.indices,
            f"must hold ascending columns below {n_vars:,}, but not in {row}",
        )


def check_starts(folder: Path, shard: Shard, starts: NDArray[np.int64]) -> None:
    """Raise a ValueError unless row starts ascend from 0 to the number of values."""
    from tiledbsoma_ml._kernels import snapshot as kernels

    wrong = kernels.first_descent(starts, False)
    if wrong >= 0:
        row = shard.row_start + wrong - 1
        raise damaged(folder, shard.indptr, f"must not descend, but does after row {row:,}")
    if (starts[0], starts[-1]) != (0, shard.nnz):
        raise damaged(
            folder,
            shard.indptr,
            f"must lead from 0 to {shard.nnz:,}, not from {starts[0]:,} to {starts[-1]:,}",
        )


# Joinids --------------------------------------------------------------------------------------------------


def read_obs_joinids(folder: Path, manifest: Manifest) -> NDArrayJoinId:
    """Return the mapped joinids of the rows.

    Raises:
        ValueError: If one is negative, or those of an origin do not ascend.
    """
    from tiledbsoma_ml._kernels import snapshot as kernels

    file = manifest.obs_joinids
    joinids = map_file(folder, file, "<i8")
    for start, stop in _rows_of_origins(manifest):
        own = joinids[start:stop]
        if len(own) and own[0] < 0:
            raise damaged(folder, file, f"must hold no negative joinids, but has {own[0]}")
        wrong = kernels.first_descent(own, True)
        if wrong >= 0:
            pair = f"{own[wrong]} after {own[wrong - 1]}"
            raise damaged(folder, file, f"must hold ascending joinids, but has {pair}")
    return joinids


def read_var_joinids(folder: Path, manifest: Manifest) -> NDArrayJoinId:
    """Return the mapped joinids of the columns.

    Raises:
        ValueError: If one is negative or repeats.
    """
    file = manifest.var_joinids
    joinids = map_file(folder, file, "<i8")
    if len(joinids) and joinids.min() < 0:
        raise damaged(folder, file, f"must hold no negative joinids, but has {joinids.min()}")
    if len(np.unique(joinids)) < len(joinids):
        raise damaged(folder, file, "must hold no joinid twice, but does")
    return joinids


def _rows_of_origins(manifest: Manifest) -> Iterator[tuple[int, int]]:
    """Yield the start and stop of the rows of each origin."""
    return pairwise(accumulate((source.n_obs for source in manifest.content.sources), initial=0))


def _check_joinids(folder: Path, manifest: Manifest) -> None:
    content, joinids = manifest.content, read_obs_joinids(folder, manifest)
    for source, (start, stop) in zip(content.sources, _rows_of_origins(manifest), strict=True):
        if digest(joinids[start:stop]) != source.obs_digest:
            raise damaged(folder, manifest.obs_joinids, f"must hold those of {source.uri!r}, not others")
    if digest(read_var_joinids(folder, manifest)) != content.var_digest:
        raise damaged(folder, manifest.var_joinids, "must hold the joinids of the columns, not others")


# Frames ---------------------------------------------------------------------------------------------------


def read_frame(folder: Path, file: File, n_rows: int) -> pa.Table:
    """Return a mapped table of `n_rows` rows, whose values are not checked yet; see `checked_column`.

    Raises:
        ValueError: If the file has no such table.
    """
    buffer = pa.py_buffer(map_file(folder, file, "|u1"))
    try:
        table = pa.ipc.open_file(buffer).read_all()
        table.validate()
        names = table.column_names  # this decodes them, and can raise
    except (pa.ArrowException, OSError, ValueError) as err:
        raise damaged(folder, file, f"must be an Arrow IPC file, but: {first_line(err)}") from err
    if len(set(names)) < len(names):
        raise damaged(folder, file, f"must have columns of different names, but has {names}")
    if table.num_rows != n_rows:
        raise damaged(folder, file, f"must have {n_rows:,} rows, but has {table.num_rows:,}")
    return table


def checked_column(folder: Path, file: File, table: pa.Table, name: str) -> pa.Array:
    """Return a column of a table as one array, after checking its type and every value.

    Raises:
        ValueError: If the column does not exist, or Arrow or pandas cannot read it.
    """
    if name not in table.column_names:
        raise damaged(folder, file, f"must have the column {name!r}, but has {table.column_names}")
    try:
        column = in_one_piece(table[name])
        column.validate(full=True)
        column.slice(0, 0).to_pandas()
    except Exception as err:  # Arrow and pandas raise many kinds of errors for damaged data
        raise damaged(folder, file, f"must hold a column {name!r}, but: {first_line(err)}") from err
    return column


def _check_frames(folder: Path, manifest: Manifest) -> None:
    content = manifest.content
    numbers = np.arange(len(content.sources)).repeat([source.n_obs for source in content.sources])
    obs_joinids = map_file(folder, manifest.obs_joinids, "<i8")
    var_joinids = map_file(folder, manifest.var_joinids, "<i8")
    known = {"soma_joinid": obs_joinids, "soma_source": numbers}
    _check_frame(folder, manifest.obs, list(content.stored_obs_names), known)
    _check_frame(folder, manifest.var, None, {"soma_joinid": var_joinids})


def _check_frame(folder: Path, file: File, names: list[str] | None, known: dict[str, NDArray[Any]]) -> None:
    table = read_frame(folder, file, len(known["soma_joinid"]))
    if names is not None and table.column_names != names:
        raise damaged(folder, file, f"must have the columns {names}, but has {table.column_names}")
    for name in table.column_names:
        column = checked_column(folder, file, table, name)
        if name in known and not np.array_equal(column.to_numpy(zero_copy_only=False), known[name]):
            raise damaged(folder, file, f"must have the {name!r} of its rows, but has another")
