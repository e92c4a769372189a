from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tiledbsoma_ml.snapshot import files as _snapshot_files
from tiledbsoma_ml.snapshot.format import MANIFEST


def test_what_a_disk_takes_only_the_beginning_of_is_not_there_at_all(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # a write beyond is cut there, as at the end
    try:
        with pytest.raises(OSError, match="File too large"):
            _snapshot_files.write_atomically(tmp_path / MANIFEST, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / MANIFEST).exists()
