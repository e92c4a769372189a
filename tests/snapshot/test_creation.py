from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapshots import make, partial, raising
from stores import N_OBS, Store
from tiledbsoma_ml.snapshot.creation import locked

# Locks ----------------------------------------------------------------------------------------------------


def test_who_waits_for_a_lock_is_told_once_which_process_has_it(path: Path) -> None:
    told: list[str] = []
    may_end = threading.Event()

    def hold() -> None:
        with locked(path, pytest.fail):
            is_held.set()
            may_end.wait()

    is_held = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait()
    with locked(path, lambda maker: [told.append(maker), may_end.set()]):
        holder.join()
    assert told == [str(os.getpid())]
    assert not list(path.parent.iterdir())


# The disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_told(
    store: Store, path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", raising(number))
    with pytest.raises(
        OSError, match=r"must be on a disk with locks \(flock\), but: .*; choose .* local"
    ) as raised:
        make(path, store)
    assert raised.value.errno == number


def test_a_lock_that_is_taken_away_whenever_it_is_looked_at_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(file: Any, *args: Any, **options: Any) -> int:
        descriptor = usual(file, *args, **options)
        if n_taken_away and str(file).endswith(".x.snapshot.lock"):
            n_taken_away.pop()
            Path(file).unlink()
        return descriptor

    usual, n_taken_away = os.open, [0]
    monkeypatch.setattr(os, "open", opened)
    with locked(path, pytest.fail):
        assert not n_taken_away
        assert list(path.parent.iterdir()) == [path.with_name(".x.snapshot.lock")]


def test_a_lock_of_another_user_and_a_link_are_told(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, mine = path.with_name(f".{path.name}.lock"), path.with_name("mine")
    mine.write_text("mine")
    lock.symlink_to(mine)
    with pytest.raises(
        OSError, match=r"lock '.*\.x\.snapshot\.lock' is a link, which is not followed; remove"
    ):
        make(path, store)
    lock.unlink()
    lock.touch()
    user = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", raising(errno.EACCES))
        patch.setattr(os, "geteuid", lambda: user + 1)
        with pytest.raises(
            OSError, match=r"lock '.*lock' belongs to the user .*; wait until it is there, or"
        ):
            make(path, store)
    assert mine.read_text() == "mine"
    make(path, store)


# Progress -------------------------------------------------------------------------------------------------


def test_a_callback_is_told_rows_done_and_in_all_speed_and_time_left(store: Store, path: Path) -> None:
    told: list[tuple[int, int, float, float]] = []
    make(path, store, progress=lambda *args: told.append(args))
    assert [done for done, *_ in told] == [64, 128, 192, 256, N_OBS]
    assert {total for _, total, *_ in told} == {N_OBS}
    assert all(speed > 0 and left >= 0 for *_, speed, left in told)
    assert told[-1][3] == 0


def test_a_continued_creation_starts_where_the_last_one_ended(store: Store, path: Path) -> None:
    partial(path, store)
    told: list[int] = []
    make(path, store, progress=lambda done, *_: told.append(done))
    assert told == [256, N_OBS]


def test_lines_on_stderr_tell_how_far_it_is_unless_they_are_unwanted(
    store: Store, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(path, store)
    assert capsys.readouterr().err == ""
    shutil.rmtree(path)
    make(path, store, progress=True)
    assert "x.snapshot: 311 of 311 rows, " in capsys.readouterr().err


@pytest.mark.parametrize("progress", [np.True_, np.False_])
def test_a_bool_of_numpy_says_whether_there_are_lines(
    store: Store, path: Path, capsys: pytest.CaptureFixture[str], progress: Any
) -> None:
    make(path, store, progress=progress)
    assert ("311 of 311 rows" in capsys.readouterr().err) == bool(progress)


def test_a_terminal_shows_a_bar(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    make(path, store, progress=True)
    shown = sys.stderr.getvalue()
    assert "x.snapshot" in shown
    assert "311/311" in shown
    assert "rows/s" in shown
