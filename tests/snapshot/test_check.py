from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from snapshots import all_files, dense_of, files_of, with_manifest
from stores import N_OBS, N_VARS
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.check import check_content
from tiledbsoma_ml.snapshot.format import MANIFEST, Manifest


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_verify_finds_a_byte_that_was_flipped_in_any_file_and_names_both_checksums(
    either: Snapshot, copied_either: Path, place: str
) -> None:
    snapshot = Snapshot.open(copied_either)
    snapshot.verify()
    for name in files_of(copied_either):
        file = copied_either / name
        content = file.read_bytes()
        if not content:
            continue
        k = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[place]
        for flip in (0x01, 0x80, 0x07):  # the last one turns "\n" into "\r"
            file.write_bytes(content[:k] + bytes([content[k] ^ flip]) + content[k + 1 :])
            with pytest.raises(ValueError, match=re.escape(name)) as raised:
                snapshot.verify()
            if name != MANIFEST:
                assert len(re.findall(r"\b[0-9a-f]{64}\b", str(raised.value))) == 2
        file.write_bytes(content)
    snapshot.verify()


def test_a_shard_that_was_checked_before_is_not_read_again(copied: Path) -> None:
    manifest = Manifest.read(copied)
    shard = manifest.layers[0].shards[0]
    check_content(copied, manifest)
    columns = copied / shard.indices.name
    columns.write_bytes(b"\xff" * columns.stat().st_size)
    with pytest.raises(ValueError, match="must hold ascending columns"):
        check_content(copied, manifest)
    check_content(copied, manifest, {shard})


def in_array(dtype: str, place: int, value: int) -> Callable[[bytes], bytes]:
    """Return what sets a value of an array, given as bytes."""

    def change(content: bytes) -> bytes:
        values = np.frombuffer(content, dtype).copy()
        values[place] = value
        return values.tobytes()

    return change


def other_arrow(change: Callable[[pa.Table], pa.Table]) -> Callable[[bytes], bytes]:
    """Return what changes a table, given as an Arrow IPC file."""

    def changed(content: bytes) -> bytes:
        sink, table = pa.BufferOutputStream(), change(pa.ipc.open_file(content).read_all())
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    return changed


def bad_codes(table: pa.Table) -> pa.Table:
    codes = pa.array(np.full(len(table), 99, np.int8))
    column = pa.DictionaryArray.from_arrays(codes, pa.array(["a"]), safe=False)
    return table.set_column(table.column_names.index("cell_type"), "cell_type", column)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard-00001.indptr", in_array("<i8", 0, 1), "must lead from 0 to"),
        ("shard-00001.indptr", in_array("<i8", -1, 2**40), "must lead from 0 to"),
        ("shard-00001.indptr", in_array("<i8", 5, 2**40), "must not descend, but does after row 69"),
        ("shard-00001.indptr", in_array("<i8", 5, -(2**62)), "must not descend, but does after row 68"),
        ("shard-00001.indices", in_array("<u2", 0, N_VARS), "columns below 23, but .*row 64"),
        ("shard-00001.indices", in_array("<u2", -1, 65_535), "columns below 23, but .*row 127"),
        ("shard-00001.indices", in_array("<u2", 0, 22), None),  # exists, but is not ascending
        ("obs_joinids", in_array("<i8", 7, 5), "must hold ascending joinids, but has 5 after 6"),
        ("obs_joinids", in_array("<i8", 0, -1), "must hold no negative joinids"),
        ("obs_joinids", in_array("<i8", -1, N_OBS), None),
        ("var_joinids", in_array("<i8", -1, N_VARS), None),
        ("obs.arrow", lambda _: b"no Arrow", "must be an Arrow IPC file"),
        ("obs.arrow", other_arrow(lambda table: table.slice(1)), "must have 311 rows, but has 310"),
        ("obs.arrow", other_arrow(bad_codes), "must hold a column 'cell_type', but"),
        ("obs.arrow", other_arrow(lambda table: table.drop(["score"])), "must have the column 'score'"),
        ("var.arrow", other_arrow(lambda table: table[::-1]), None),
    ],
)
def test_damage_that_goes_with_its_checksum_is_told_by_verify_and_before_it_harms(
    copied: Path, name: str, damage: Callable[[bytes], bytes], message: str | None
) -> None:
    content = damage((copied / name).read_bytes())
    (copied / name).write_bytes(content)
    with_manifest(
        copied, lambda fields: [f.update(nbytes=len(content)) for f in all_files(fields) if f["name"] == name]
    )
    pattern = f"{name}.* {message}.*: it is damaged"
    with nullcontext() if message is None else pytest.raises(ValueError, match=pattern):
        snapshot = Snapshot.open(copied)
        X, _ = snapshot[:]
        np.testing.assert_array_equal(X.toarray(), dense_of(snapshot.reader(), snapshot.obs_joinids))
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*it is damaged"):
        Snapshot(copied, Manifest.read(copied)).verify()
