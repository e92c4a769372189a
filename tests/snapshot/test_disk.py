from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from snapshots import assert_is_right, building, make, raising, watched_disk
from stores import Store
from tiledbsoma_ml.snapshot.takeover import PARTIAL

Usage = namedtuple("Usage", "total used free")


def test_space_is_checked_before_anything_is_read(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**19, 2**19))
    with pytest.raises(OSError, match=r"with 1 MiB free, not 0 MiB; .* choose another disk") as raised:
        make(path, store)
    assert raised.value.errno == errno.ENOSPC
    assert not list(path.parent.iterdir())


def test_a_disk_that_becomes_full_is_told_and_what_is_finished_is_kept(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_free = [2**30]

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - n_free[0], n_free[0]))

    def write(what: str, file: Path) -> None:
        if what == "write" and file.name == "shard-00002.data":
            n_free[0] = 2**19
        if n_free[0] < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        watched_disk(path.parent, write),
        pytest.raises(OSError, match=r"MiB free, .* call again: what is finished is kept") as raised,
    ):
        make(path, store)
    assert raised.value.errno == errno.ENOSPC
    assert (building(path) / PARTIAL).is_file()
    n_free[0] = 2**30
    make(path, store)
    assert_is_right(path)


def test_a_folder_that_cannot_be_written_to_is_told(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path.parent / "file").write_text("mine")
    with pytest.raises(OSError, match="must be in a folder that can be written to"):
        make(path.parent / "file" / "x.snapshot", store)

    def read_only(*_: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"must be in a folder .* but: Read-only file system; choose"):
        make(path, store)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            "No space left on device, though the disk has .* free: a quota or the number of files",
        ),
        (errno.EDQUOT, "Disk quota exceeded, though the disk has"),
        (errno.EROFS, "must be in a folder that can be written to, but: Read-only file system"),
        (errno.EIO, "must be on a disk that works, but: Input/output error; look after the disk"),
        (errno.ECONNREFUSED, "^.Errno 111. Connection refused$"),
    ],
)
def test_an_error_of_the_disk_is_told_as_what_it_is(
    store: Store, path: Path, number: int, message: str
) -> None:
    def fail(what: str, file: Path) -> None:
        if what == "write" and file.suffix == ".indices":
            raising(number)()

    with watched_disk(path.parent, fail), pytest.raises(OSError, match=message) as raised:
        make(path, store)
    assert raised.value.errno == number
