from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matrix_source import matrix_source
from snapshots import building, files_of, make, partial
from stores import N_OBS, N_VARS, Store, expected_X
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.compression import Cost, choose


def cost(read_ns: float, decode_ns: float = 0.0) -> Cost:
    return Cost(read_ns=read_ns, decode_ns=decode_ns, n_bytes=1.0)


@pytest.mark.parametrize(
    ("plain", "compressed", "chosen"),
    [
        (cost(7.0), cost(2.0, 3.0), "zstd"),
        (cost(7.0), cost(2.0, 6.9), None),
        (cost(1.0), cost(0.3, 3.0), None),
        (cost(7.0), cost(6.9, 1.0), None),
        (None, cost(2.0, 3.0), None),
        (cost(7.0), None, None),
    ],
)
def test_compressed_rows_are_chosen_if_reading_and_decoding_at_once_is_clearly_faster(
    plain: Cost | None, compressed: Cost | None, chosen: str | None
) -> None:
    choice = choose(plain, compressed, "zstd")
    assert choice.compression == chosen
    if plain is None or compressed is None:
        assert "stay in memory" in choice.reason
    else:
        assert f"{plain.ns:.1f} ns not compressed" in choice.reason
        assert f"{compressed.ns:.1f} ns by zstd" in choice.reason


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A disk that forgets files when it is told to, or keeps them in memory."""

    def behave(forgets: bool) -> None:
        def preadv(descriptor: int, buffers: Any, offset: int, flags: int) -> int:
            assert flags == os.RWF_NOWAIT
            if forgets:
                raise BlockingIOError
            return len(buffers[0])

        monkeypatch.setattr(os, "preadv", preadv)

    return behave


@pytest.mark.parametrize("forgets", [False, True])
def test_auto_says_in_one_line_what_it_takes_and_why(
    store: Store, path: Path, disk: Callable[[bool], None], caplog: pytest.LogCaptureFixture, forgets: bool
) -> None:
    disk(forgets)
    with caplog.at_level(logging.INFO, "tiledbsoma_ml"):
        snapshot = make(path, store, compression="auto")
    [line] = [record.getMessage() for record in caplog.records if "compression=" in record.getMessage()]
    taken = "None" if snapshot.compression is None else "'zstd'"
    assert f"compression='auto' takes {taken}: " in line
    assert ("ns not compressed" in line) == forgets
    if not forgets:
        assert snapshot.compression is None
    assert not [name for name in files_of(path) if "sample" in name]
    snapshot.verify()
    np.testing.assert_array_equal(snapshot[:][0].toarray(), expected_X(range(N_OBS), range(N_VARS)))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_auto_goes_on_with_the_compression_of_a_creation_that_was_killed(
    path: Path, compression: str | None
) -> None:
    partial(path, matrix_source(), compression=compression)
    (building(path) / "sample").mkdir()
    (building(path) / "sample" / "left.data").write_bytes(b"of a kill while it measured")
    snapshot = make(path, matrix_source(), compression="auto")
    assert snapshot.compression == compression
    assert not [name for name in files_of(path) if "sample" in name]


def test_auto_of_no_rows_compresses_nothing(store: Store, path: Path) -> None:
    assert make(path, store, [], compression="auto").compression is None


@pytest.mark.parametrize("compression", ["gzip", "", True, 1, "ZSTD"])
def test_a_compression_that_does_not_exist_is_refused_before_anything_is_read(
    store: Store, path: Path, compression: Any
) -> None:
    message = rf"^compression={compression!r} must be None, 'zstd' or 'auto'; try 'zstd'\.$"
    with pytest.raises(ValueError, match=message):
        make(path, store, compression=compression)
    assert list(path.parent.iterdir()) == []


def test_a_snapshot_that_is_there_is_taken_as_it_is_and_a_warning_says_so(store: Store, path: Path) -> None:
    make(path, store)
    with pytest.warns(UserWarning, match="compression='zstd' changes nothing here: .* not compressed"):
        assert make(path, store, compression="zstd").compression is None
    assert make(path, store, compression="auto").compression is None
    assert Snapshot.open(path).compression is None


def test_a_compressed_snapshot_that_is_there_is_taken_whatever_is_asked_for(
    store: Store, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for compression in ("zstd", None, "auto", "zstd"):
        assert make(path, store, compression=compression).compression == "zstd"
    text = repr(Snapshot.open(path))
    assert "compressed by zstd" in text
    assert "bytes" in text
