from __future__ import annotations

from pathlib import Path

import pytest

from tiledbsoma_ml._vfs import open_vfs


def test_names_in_a_folder_are_listed_by_path_and_by_uri(tmp_path: Path) -> None:
    for name in ("b", "a b", "é"):
        (tmp_path / name).mkdir()
    (tmp_path / "c").touch()
    with open_vfs({}) as vfs:
        assert vfs.names(str(tmp_path)) == ["a b", "b", "c", "é"]
        assert vfs.names(tmp_path.as_uri() + "/") == ["a b", "b", "c", "é"]
        assert vfs.names(str(tmp_path / "none")) == []


def test_a_request_takes_a_time(tmp_path: Path) -> None:
    with open_vfs({}) as vfs:
        assert 0 < vfs.latency(str(tmp_path)) < 60
        with pytest.raises(OSError, match="TileDB cannot list: tiledb://somebody/array"):
            vfs.latency("tiledb://somebody/array")


def test_what_cannot_be_listed_is_an_os_error() -> None:
    config = {"vfs.s3.region": "eu-west-1", "soma.init_buffer_bytes": 10.0}
    with pytest.raises(OSError, match="TileDB cannot list: tiledb://somebody/array"), open_vfs(config) as vfs:
        vfs.names("tiledb://somebody/array")
    with pytest.raises(OSError, match=r"cannot list: sm\.check_coord_oob"):
        open_vfs({"sm.check_coord_oob": "maybe"}).__enter__()
