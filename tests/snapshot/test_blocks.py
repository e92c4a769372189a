from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshots import files_of, with_manifest
from stores import N_OBS, N_VARS, expected_X
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.blocks import BLOCKS_PER_TASK, RowValues, encode, on_threads


def dense_of(snapshot: Snapshot) -> np.ndarray:
    return snapshot[:][0].toarray()


def test_parts_of_rows_are_those_of_all_rows() -> None:
    rows = RowValues(np.array([0, 2, 2, 5, 6]), np.arange(6))
    parts = [rows.slice(0, 1), rows.slice(1, 3), rows.slice(3, 4)]
    assert [part.starts.tolist() for part in parts] == [[0, 2], [0, 0, 3], [0, 1]]
    joined = RowValues.concat(parts)
    assert joined.starts.tolist() == rows.starts.tolist()
    assert joined.values.tolist() == rows.values.tolist()


def test_a_block_without_entries_has_no_bytes() -> None:
    empty = RowValues(np.zeros(9, np.int64), np.empty(0, np.uint16))
    assert encode("zstd", empty, are_columns=True) == b""


def test_many_blocks_are_worked_on_by_several_threads_and_come_in_order() -> None:
    names = set()

    def work(number: int) -> int:
        names.add(threading.current_thread().name)
        return number

    for n in (0, 1, BLOCKS_PER_TASK, 40 * BLOCKS_PER_TASK):
        assert list(on_threads(work, range(n))) == list(range(n))


@pytest.mark.parametrize("ending", [".indptr", ".indices", ".data", ".blocks"])
def test_no_flip_of_a_bit_in_a_file_of_compressed_rows_goes_unseen_by_who_reads_them(
    compressed: Snapshot, tmp_path: Path, ending: str
) -> None:
    copied = Path(shutil.copytree(compressed.path, tmp_path / "copied.snapshot"))
    rng = np.random.default_rng(0)
    file = copied / f"shard-00001{ending}"
    content = file.read_bytes()
    for _ in range(60):
        k, bit = int(rng.integers(len(content))), int(rng.integers(8))
        file.write_bytes(content[:k] + bytes([content[k] ^ 1 << bit]) + content[k + 1 :])
        with pytest.raises(ValueError, match=r"shard-00001\.(indptr|indices|data)") as raised:
            dense_of(Snapshot.open(copied))
        assert "it is damaged" in str(raised.value)
        with pytest.raises(ValueError, match=r"shard-00001\."):
            compressed.__class__(copied, compressed._manifest).verify()
    file.write_bytes(content)
    np.testing.assert_array_equal(dense_of(Snapshot.open(copied)), expected_X(range(N_OBS), range(N_VARS)))


def other_table(table: np.ndarray, column: int, value: int) -> bytes:
    changed = table.copy()
    changed[0, column] = value
    return changed.tobytes()


@pytest.mark.parametrize(("column", "value"), [(0, -1), (0, 2**40), (1, 2**62), (1, 0), (2, 0), (3, -7)])
def test_a_table_of_blocks_that_was_made_up_is_an_error_and_not_a_large_allocation(
    compressed: Snapshot, tmp_path: Path, column: int, value: int
) -> None:
    copied = Path(shutil.copytree(compressed.path, tmp_path / "copied.snapshot"))
    file = copied / "shard-00001.blocks"
    file.write_bytes(other_table(np.fromfile(file, "<i8").reshape(-1, 4), column, value))
    with_manifest(copied, lambda fields: None)
    snapshot = Snapshot.open(copied)
    for read in (dense_of, Snapshot.verify):
        with pytest.raises(ValueError, match=r"shard-00001\.(indices|data).*it is damaged"):
            read(snapshot)


def test_bytes_that_go_with_their_checksums_but_are_not_of_their_size_are_an_error(
    make_store: Any, tmp_path: Path
) -> None:
    """A block says neither how large it is nor which rows it has: the manifest and the row starts do."""
    import zlib

    from snapshots import make

    snapshot = make(tmp_path / "x.snapshot", make_store(obs_joinids=range(20)), compression="zstd")
    starts = np.fromfile(snapshot.path / "shard-00000.indptr", "<i8")
    for replaced in (encode("zstd", RowValues(starts, np.zeros(starts[-1], "u1")), are_columns=False), b"no"):
        for file, column in (("indices", 0), ("data", 1)):
            copied = Path(shutil.copytree(snapshot.path, tmp_path / f"{file}-{len(replaced)}"))
            (copied / f"shard-00000.{file}").write_bytes(replaced)
            table = np.fromfile(copied / "shard-00000.blocks", "<i8").reshape(-1, 4)
            table[0, column] = len(replaced)
            table[0, column + 2] = zlib.crc32(replaced, zlib.crc32(starts.tobytes()))
            (copied / "shard-00000.blocks").write_bytes(table.tobytes())

            def fit(fields: dict[str, Any], file: str = file, n: int = len(replaced)) -> None:
                fields["layers"][0]["shards"][0][file]["nbytes"] = n

            with_manifest(copied, fit)
            with pytest.raises(ValueError, match=rf"shard-00000\.{file}.* when decompressed.*it is damaged"):
                dense_of(Snapshot.open(copied))


def test_verify_tells_columns_of_compressed_rows_that_do_not_ascend(compressed: Snapshot) -> None:
    compressed.verify()
    assert [name for name in files_of(compressed.path) if name.endswith(".blocks")] == [
        f"shard-{number:05}.blocks" for number in range(len(compressed._manifest.layers[0].shards))
    ]
