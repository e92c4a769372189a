from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapshots import raising
from tiledbsoma_ml.snapshot.claim import claim, claimed_by


def test_a_file_is_claimed_by_one_at_a_time_and_tells_by_which_process(tmp_path: Path) -> None:
    claimed = claim(tmp_path / "a")
    assert claimed is not None
    assert claim(tmp_path / "a") is None
    assert claimed_by(tmp_path / "a") == str(os.getpid())
    claimed.give_back()
    again = claim(tmp_path / "a")
    assert again is not None
    again.give_back()


def test_nothing_is_claimed_and_nothing_is_made_where_the_folder_is_gone(tmp_path: Path) -> None:
    assert claim(tmp_path / "gone" / "a") is None
    assert not (tmp_path / "gone").exists()
    assert claimed_by(tmp_path / "gone" / "a") == "another one"


def test_no_link_is_followed_and_a_disk_without_locks_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic link"):
        claim(tmp_path / "a")
    assert (tmp_path / "mine").read_text() == "mine"
    monkeypatch.setattr(fcntl, "flock", raising(errno.ENOLCK))
    with pytest.raises(OSError, match="No locks"):
        claim(tmp_path / "b")


FORKS = """
import os, pathlib, signal, sys
from tiledbsoma_ml.snapshot.claim import claim

file = pathlib.Path(sys.argv[1])
reads, writes = os.pipe()
if not (maker := os.fork()):
    claimed = claim(file)
    if not os.fork():
        os.write(writes, str(os.getpid()).encode())
    signal.pause()
child = int(os.read(reads, 100))
assert claim(file) is None
os.kill(maker, signal.SIGKILL)
os.waitpid(maker, 0)
claimed = claim(file)
os.kill(child, signal.SIGKILL)
assert claimed is not None
if not (child := os.fork()):
    claimed.give_back()
    os._exit(0)
os.waitpid(child, 0)
assert claim(file) is None
claimed.give_back()
assert claim(file) is not None
"""


def test_a_claim_is_its_process_s_alone_and_ends_with_it_though_forks_go_on(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKS, str(tmp_path / "a")], check=True)
