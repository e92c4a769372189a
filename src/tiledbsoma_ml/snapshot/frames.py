"""`Frames`: the joinids, `obs` and `var` of a snapshot, read from its segments and written to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
import pyarrow as pa

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml.snapshot.files import File, describe_file, open_new, write_array
from tiledbsoma_ml.snapshot.segment import Segment


@attrs.frozen(kw_only=True, eq=False)
class Frames:
    """The joinids, `obs` and `var` of a snapshot.

    Attributes:
        obs_joinids: Joinids of the rows of each segment.
        var_joinids: Joinids of the columns.
        obs: `obs` of each segment.
        var: `var`, which all segments share.
    """

    obs_joinids: Sequence[NDArrayJoinId]
    var_joinids: NDArrayJoinId
    obs: Sequence[pa.Table]
    var: pa.Table


def read_frames(segments: Sequence[Segment], obs_column_names: Sequence[str]) -> Frames:
    """Return the frames of segments; if there are several, `obs` gets the column "soma_source".

    Raises:
        ValueError: If the segments have different features.
    """
    obs_tables, var_tables = [], []
    for number, segment in enumerate(segments):
        obs = segment.obs(obs_column_names)
        if len(segments) > 1:
            obs = obs.append_column("soma_source", pa.array(np.full(obs.num_rows, number, np.uint16)))
        obs_tables.append(obs)
        var_tables.append(segment.var())
    _check_same_features(segments, var_tables)
    joinids = [segment.ids.obs_joinids for segment in segments]
    return Frames(
        obs_joinids=joinids, var_joinids=segments[0].ids.var_joinids, obs=obs_tables, var=var_tables[0]
    )


def write_frames(folder: Path, frames: Frames) -> dict[str, File]:
    """Write frames, and return the files by their names in the manifest."""
    return {
        "obs_joinids": write_array(folder / "obs_joinids", frames.obs_joinids),
        "var_joinids": write_array(folder / "var_joinids", [frames.var_joinids]),
        "obs": write_table(folder / "obs.arrow", frames.obs),
        "var": write_table(folder / "var.arrow", [frames.var]),
    }


def write_table(path: Path, tables: Sequence[pa.Table]) -> File:
    """Write tables, below each other, to an Arrow IPC file with one record batch."""
    try:
        table = pa.concat_tables(_with_wide_codes(tables), promote_options="default").unify_dictionaries()
    except pa.ArrowException as err:
        raise ValueError(
            f"obs_column_names must have one type in all queries, but: {err}; leave out what differs."
        ) from err
    columns = [column.combine_chunks() for column in table.columns]
    batch = pa.RecordBatch.from_arrays(columns, table.column_names)
    with open_new(path) as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return describe_file(path)


def _with_wide_codes(tables: Sequence[pa.Table]) -> Sequence[pa.Table]:
    """Return tables with int32 codes in each column of categories whose code types differ."""
    first = tables[0]
    for name in first.column_names:
        types = [table.schema.field(name).type for table in tables]
        if all(map(pa.types.is_dictionary, types)) and len({kind.index_type for kind in types}) > 1:
            tables = [_with_wide_codes_in(table, name) for table in tables]
    return tables


def _with_wide_codes_in(table: pa.Table, name: str) -> pa.Table:
    number, kind = table.column_names.index(name), table.schema.field(name).type
    wide = pa.dictionary(pa.int32(), kind.value_type, kind.ordered)
    return table.set_column(number, name, table[name].cast(wide))


def _check_same_features(segments: Sequence[Segment], tables: Sequence[pa.Table]) -> None:
    first = tables[0]
    for segment, table in zip(segments[1:], tables[1:], strict=True):
        pairs = [(first[name].to_pylist(), table[name].to_pylist()) for name in _naming_columns(first, table)]
        if not pairs or any(ours == its for ours, its in pairs):
            continue
        ours, its = pairs[0]
        k = next(k for k, pair in enumerate(zip(ours, its, strict=True)) if len(set(pair)) > 1)
        raise ValueError(
            f"query must be several ones on the same features, but that on {segment.name!r} has "
            f"{its[k]!r} where the first has {ours[k]!r}; make one snapshot each."
        )


def _naming_columns(first: pa.Table, other: pa.Table) -> list[str]:
    """Return the columns of two `var` that name features: "feature_id", or else columns of distinct texts."""
    both = [name for name in first.column_names if name in other.column_names]
    if "feature_id" in both:
        return ["feature_id"]
    texts = [name for name in both if _is_text(first[name]) and _is_text(other[name])]
    return [name for name in texts if len(first[name].unique()) == first.num_rows]


def _is_text(column: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))
